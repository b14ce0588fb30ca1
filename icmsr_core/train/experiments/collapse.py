"""Does a dense condition collapse the regulariser, and does a sparse one not? The paper's Lemma 1, measured.

Everything happens in the latent of a base's VAE, at a size that a CPU finishes. First a text-free diffusion prior (the
teacher), a one-step generator trained to the truth's latent, and, for each condition, an adapter on the frozen teacher.
Then, for each condition and seed:

1. the generator is frozen, and the auxiliary, a copy of the teacher, is trained on its latents until it has converged;
2. generator and auxiliary are trained together, as in distillation (L2 + ICM).

The auxiliary trains every tensor here, where distillation gives it LoRA: the question is what it can learn from the
condition, not what a rank leaves of it. After 1 and 2 the diagnostics of `icm` are taken on crops of photographs that
no stage has seen, at fixed timesteps: with the crops of training, a sparse condition too would name its crop, and the
auxiliary could remember it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...backbone.context import repeated_context
from ...backbone.noise_schedule import NoiseSchedule
from ...pictures.ranges import bytes_to_unit
from ...weights.base import open_base
from ...weights.embedded import embedded_base
from ...weights.tensor_files import read_tensors, write_tensors
from ..data.draws import TimestepConfig, all_timesteps, timesteps
from ..losses.diagnostics import diagnostics
from ..losses.icm import auxiliary_loss, icm_gradient, icm_loss
from ..networks.adapters import make_adapter
from ..networks.bases import NetworkConfig, make_unet
from ..networks.conditioning import StructureConfig, StructureFeatures
from ..networks.roles import predict
from .collapse_config import CollapseArm, CollapseConfig
from .collapse_crops import Crops, condition_maps

GENERATOR_TIMESTEP = 200
NOISE_LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Noise levels, as shares of T, of the diagnostics."""
Values = dict[str, float]


class Bench:
    """Networks, data and random numbers."""

    def __init__(self, config: CollapseConfig, train: Crops, held_out: Crops, seed: int) -> None:
        self.config, self.train, self.held_out = config, train, held_out
        self.schedule = NoiseSchedule()
        context = open_base(embedded_base()).prompt_embedding()
        assert context is not None
        self.context = context
        torch.manual_seed(seed)
        self.random = torch.Generator().manual_seed(seed)
        networks = NetworkConfig(latent_channels=train.truth.shape[1], unet_channels=config.unet_channels)
        self.teacher, self.generator = make_unet(networks), make_unet(networks)

    def prepare(self, file: Path) -> None:
        """Trains teacher and generator, or reads them from `file`."""
        if not file.exists():
            self._train_teacher()
            self.generator.load_state_dict(self.teacher.state_dict())
            self._train_generator()
            state = {f"teacher/{key}": value for key, value in self.teacher.state_dict().items()}
            state |= {f"generator/{key}": value for key, value in self.generator.state_dict().items()}
            write_tensors(file, state, {"format": "icmsr-collapse"})
        tensors = read_tensors(file)[0]
        for name, network in (("teacher", self.teacher), ("generator", self.generator)):
            network.load_state_dict(
                {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            )
            network.requires_grad_(False)

    def features(self, structure: StructureConfig, file: Path) -> StructureFeatures | None:
        """The features of `structure` for the teacher; trains the adapter, or reads it from `file`."""
        if not structure.names:
            return None
        factor = self.train.sharp.shape[-1] // self.train.truth.shape[-1]
        adapter = make_adapter(structure.channels, factor, self.config.unet_channels)
        if not file.exists():
            steps = self.config.adapter_steps
            with Descent(adapter.parameters(), steps, 2 * self.config.learning_rate) as step:
                for crops in self._batches(steps):
                    noisy, eps, t = self._noised(crops.truth, all_timesteps("cubic"))
                    seen = adapter(structure.maps(bytes_to_unit(crops.sharp)))
                    step(F.mse_loss(self._predict(self.teacher, noisy, t, seen), eps))
            write_tensors(file, adapter.state_dict(), {"format": "icmsr-collapse"})
        adapter.load_state_dict(read_tensors(file)[0])
        return StructureFeatures([adapter], [structure.channels], [1.0])

    def run(self, arm: CollapseArm, features: StructureFeatures | None) -> dict[str, list[Values]]:
        """One arm: diagnostics ``frozen`` and ``joint`` by noise level, the auxiliary's ``curve``, and ``health``."""
        auxiliary = copy.deepcopy(self.teacher).requires_grad_(True)
        curve, steps = [], self.config.auxiliary_steps
        with Descent(auxiliary.parameters(), steps, self.config.learning_rate) as step:
            for number, crops in enumerate(self._batches(steps), 1):
                with torch.no_grad():
                    latent = self._generate(self.generator, crops.given)
                step(self._auxiliary_loss(auxiliary, features, arm, crops, latent))
                if number % max(1, steps // 4) == 0:
                    rows = self.measure(auxiliary, features, arm, self.generator)
                    curve.append({"step": float(number), **_mean(rows)})
        frozen = self.measure(auxiliary, features, arm, self.generator)
        generator = self._train_together(auxiliary, features, arm)
        joint = self.measure(auxiliary, features, arm, generator)
        return {"curve": curve, "frozen": frozen, "joint": joint, "health": self._health(generator)}

    @torch.no_grad()
    def measure(
        self,
        auxiliary: nn.Module,
        features: StructureFeatures | None,
        arm: CollapseArm,
        generator: UNet2DConditionModel,
    ) -> list[Values]:
        """Means of the diagnostics on the held-out crops, one row per noise level; the noise is the same every time."""
        random = torch.Generator().manual_seed(1)
        crops = self.held_out
        latent = torch.cat([self._generate(generator, some) for some in crops.given.split(64)])
        parts = [crops.take(some) for some in torch.arange(len(crops)).split(64)]
        seen = [self._see(features, arm, some) for some in parts]
        rows = []
        for level in NOISE_LEVELS:
            sums: dict[str, list[Tensor]] = {}
            for z, given in zip(latent.split(64), seen):
                t = torch.full((z.shape[0],), int(level * self.schedule.steps))
                eps = torch.randn(z.shape, generator=random)
                noisy = self.schedule.add_noise(z, eps, t)
                teacher, predicted = (self._predict(net, noisy, t, given) for net in (self.teacher, auxiliary))
                for name, value in diagnostics(teacher, predicted, eps).items():
                    sums.setdefault(name, []).append(value)
            rows.append({"t": level, **{name: float(torch.cat(values).mean()) for name, values in sums.items()}})
        return rows

    def _batches(self, steps: int) -> Iterator[Crops]:
        for _ in range(steps):
            yield self.train.take(torch.randint(len(self.train), (self.config.batch,), generator=self.random))

    def _noised(self, latent: Tensor, law: TimestepConfig) -> tuple[Tensor, Tensor, Tensor]:
        t = timesteps(torch.rand(latent.shape[0], generator=self.random), self.schedule.steps, law)
        eps = torch.randn(latent.shape, generator=self.random)
        return self.schedule.add_noise(latent, eps, t), eps, t

    def _predict(self, network: nn.Module, noisy: Tensor, t: Tensor, seen: Sequence[Tensor] | None) -> Tensor:
        return predict(network, noisy, t, repeated_context(self.context, noisy), seen)

    def _generate(self, generator: UNet2DConditionModel, given: Tensor) -> Tensor:
        t = torch.full((given.shape[0],), GENERATOR_TIMESTEP)
        return given - self._predict(generator, given, t, None)

    def _see(self, features: StructureFeatures | None, arm: CollapseArm, crops: Crops) -> list[Tensor] | None:
        return None if features is None else features(condition_maps(arm, crops))

    def _train_teacher(self) -> None:
        with Descent(self.teacher.parameters(), self.config.prior_steps, self.config.learning_rate) as step:
            for crops in self._batches(self.config.prior_steps):
                noisy, eps, t = self._noised(crops.truth, all_timesteps())
                step(F.mse_loss(self._predict(self.teacher, noisy, t, None), eps))

    def _train_generator(self) -> None:
        nn.init.zeros_(self.generator.conv_out.weight)
        nn.init.zeros_(self.generator.conv_out.bias)
        steps = self.config.generator_steps
        with Descent(self.generator.parameters(), steps, self.config.learning_rate) as step:
            for crops in self._batches(steps):
                step(F.mse_loss(self._generate(self.generator, crops.given), crops.truth))

    def _auxiliary_loss(
        self,
        auxiliary: nn.Module,
        features: StructureFeatures | None,
        arm: CollapseArm,
        crops: Crops,
        latent: Tensor,
    ) -> Tensor:
        noisy, eps, t = self._noised(latent, all_timesteps())
        return auxiliary_loss(self._predict(auxiliary, noisy, t, self._see(features, arm, crops)), eps)

    def _train_together(
        self, auxiliary: nn.Module, features: StructureFeatures | None, arm: CollapseArm
    ) -> UNet2DConditionModel:
        generator: UNet2DConditionModel = copy.deepcopy(self.generator).requires_grad_(True)
        rate, steps = self.config.learning_rate / 10, self.config.joint_steps
        move = Descent(generator.parameters(), steps, rate)
        with move, Descent(auxiliary.parameters(), steps, rate) as follow:
            for crops in self._batches(steps):
                latent = self._generate(generator, crops.given)
                with torch.no_grad():
                    noisy, eps, t = self._noised(latent, TimestepConfig())
                    seen = self._see(features, arm, crops)
                    judged = [self._predict(network, noisy, t, seen) for network in (self.teacher, auxiliary)]
                    g = icm_gradient(judged[0], judged[1], eps)
                move(F.mse_loss(latent, crops.truth) + self.config.icm_weight * icm_loss(latent, g))
                follow(self._auxiliary_loss(auxiliary, features, arm, crops, latent.detach()))
        return generator.requires_grad_(False)

    @torch.no_grad()
    def _health(self, generator: UNet2DConditionModel) -> list[Values]:
        """Distance to the truth, spread and energy of the latents, before joint training and after."""
        truth, rows = self.held_out.truth, []
        for network in (self.generator, generator):
            latent = torch.cat([self._generate(network, some) for some in self.held_out.given.split(64)])
            rows.append(
                {
                    "mse": float(F.mse_loss(latent, truth)),
                    "variety": float(latent.std(0).mean() / truth.std(0).mean()),
                    "detail": float(_detail(latent) / _detail(truth)),
                }
            )
        return rows


def _detail(latent: Tensor) -> Tensor:
    """Energy of the differences of neighbouring cells."""
    return latent.diff(dim=-1).square().mean() + latent.diff(dim=-2).square().mean()


def _mean(rows: Sequence[Values]) -> Values:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "t"}


class Descent:
    """AdamW with a cosine to zero; called with a loss, it does one step."""

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int, rate: float) -> None:
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
