"""Three roles on one UNet: the base weights are the teacher, LoRA adapters are the generator and the auxiliary.

One copy of the frozen weights serves all three (1.73 GB in bf16 for SD2.1's UNet, where three networks would hold
5.2 GB and more). The price is a number of ways to train the wrong thing without an error; each is closed here, and
`tests/train/networks/test_roles.py` springs every one of them:

- peft's own ``set_adapter`` flips ``requires_grad``: backward after a switch then leaves the generator without a
  gradient. `Roles.use` switches what is active and touches nothing else.
- gradient checkpointing recomputes with the adapter that is active at the time of backward. `Roles.checkpoint`
  restores the role that the forward pass ran in.
- an adapter that is not active trains nothing. `Roles.use` asserts, layer by layer, that the role's adapter is.
- peft creates LoRA in the base's dtype. Every LoRA tensor is made float32 at once, before any optimiser sees it.
- with several processes, only parameters that are trainable while the model is wrapped are synchronised: both adapters
  are, always.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import IcmsrError
from ...weights.generator_file import LoraPair

Role = Literal["teacher", "generator", "auxiliary"]

UNET_TARGETS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv_out",
    "proj_out",
    "proj_in",
    "ff.net.2",
    "ff.net.0.proj",
)
"""Modules of a UNet that carry LoRA (OSEDiff's list): 258 in SD2.1, 4,055,712 parameters at rank 4."""

VAE_ENCODER_TARGETS = (
    r"encoder\.(.*\.)?(conv_in|conv1|conv2|conv_shortcut|conv|conv_out|to_q|to_k|to_v|to_out\.0)|quant_conv"
)
"""Modules of a VAE's encoder that carry LoRA, and quant_conv: 32 in SD's. The decoder has none."""


class Roles:
    """A network whose LoRA adapters take turns, at no cost and without touching ``requires_grad``.

    `ranks` names the roles that LoRA plays; "teacher" is always the bare network.
    """

    def __init__(self, network: nn.Module, ranks: Mapping[Role, int], targets: Sequence[str] | str) -> None:
        """Adds LoRA on `targets` for every role of `ranks` (alpha = rank; Gaussian A, zero B), and freezes the rest.

        `network` may be in any dtype; LoRA is float32. `targets` as in peft: names that modules end with, or one
        regular expression. Raises `IcmsrError` for a rank below 1 and for targets that match nothing.
        """
        if "teacher" in ranks:
            raise IcmsrError("the teacher is the base itself and has no LoRA")
        self.network, self.ranks = network, dict(ranks)
        network.requires_grad_(False)
        for role, rank in ranks.items():
            if rank < 1:
                raise IcmsrError(f"LoRA rank must be at least 1, got {rank} for {role}")
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=targets if isinstance(targets, str) else list(targets),
            )
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that is the point
                    inject_adapter_in_model(config, network, adapter_name=role)
            except ValueError as error:
                raise IcmsrError(f"LoRA cannot be added for {role}: {' '.join(str(error).split())}") from error
        self._layers = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
        for parameter in self._lora_parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._role: Role = "teacher"
        self._activate("teacher")

    @property
    def role(self) -> Role:
        """The role that a forward pass now plays."""
        return self._role

    @contextmanager
    def use(self, role: Role) -> Iterator[None]:
        """Plays `role` inside the block; the previous role returns afterwards, also after an error."""
        before = self._role
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The LoRA parameters of `role` by their names in the network."""
        marks = (f".lora_A.{role}.", f".lora_B.{role}.")
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if any(mark in name for mark in marks)
        }

    def lora(self, role: Role) -> dict[str, LoraPair]:
        """The LoRA matrices of `role` by module, under the names that the module has in the bare network."""
        parameters = self.parameters(role)
        pairs = {}
        for name in self._layers:
            down, up = (parameters.get(f"{name}.lora_{which}.{role}.weight") for which in "AB")
            if down is not None and up is not None:
                pairs[name] = LoraPair(down.detach(), up.detach())
        return pairs

    @torch.no_grad()
    def load_lora(self, role: Role, pairs: Mapping[str, LoraPair], scale: float = 1.0) -> None:
        """Gives the LoRA of `role` the values of `pairs`, by module as `lora` returns them; the update is `scale` times
        B @ A. Raises `IcmsrError` unless modules and shapes are exactly those of the role."""
        own = self.lora(role)
        wrong = sorted(own.keys() ^ pairs.keys())
        wrong += sorted(
            name
            for name in own.keys() & pairs.keys()
            if any(a.shape != b.shape for a, b in zip(own[name], pairs[name]))
        )
        if wrong:
            raise IcmsrError(
                f"the LoRA does not fit that of {role}: {len(wrong)} modules differ, the first is {wrong[0]}: "
                "use the rank and the settings that it was trained with"
            )
        for name, (down, up) in own.items():
            down.copy_(pairs[name].down)
            up.copy_(pairs[name].up * scale)

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward pass, in the role that the forward pass ran in.

        For diffusers' networks; saves most of the activations' memory for about a third more time.
        """
        self.network.enable_gradient_checkpointing(  # type: ignore[operator]
            gradient_checkpointing_func=self.checkpoint
        )

    def checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`torch.utils.checkpoint`, whose recomputation plays the role of the first pass."""
        role = self._role

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.use(role)

        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)

    def _lora_parameters(self) -> Iterator[nn.Parameter]:
        for role in self.ranks:
            yield from self.parameters(role).values()

    def _activate(self, role: Role) -> None:
        if role != "teacher" and role not in self.ranks:
            raise IcmsrError(f"role must be one of teacher, {', '.join(self.ranks)}, got {role!r}")
        self._role = role
        for name, layer in self._layers.items():
            # peft's public switches set requires_grad as well; these two are what its layers look at in forward.
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]
            active = [] if layer.disable_adapters else list(layer.active_adapters)
            if active != ([] if role == "teacher" else [role]):
                raise IcmsrError(
                    f"{name}: in the role {role} peft runs the adapters {active}: use another version of peft"
                )


def predict(network: nn.Module, noisy: Tensor, t: Tensor, context: Tensor, features: Sequence[Tensor] | None) -> Tensor:
    """The network's raw output [N, C, h, w], float32, for `noisy` latents at timesteps `t` [N].

    `context` [N, tokens, width]; `features` are an adapter's residuals, one per level, or None. They go in as a list
    made anew for each call: diffusers consumes it with pop(0), and a second call with the emptied list would run
    unconditioned without a word.
    """
    residuals = features
    if features is not None:
        # In the network's own precision, which its first parameter has (LoRA is float32): float32 added to a bf16
        # base's activations would make them float32. diffusers' `dtype` goes through all parameters.
        dtype = next(network.parameters(), noisy).dtype
        residuals = [level.to(dtype) for level in features]
    output: Tensor = network(
        noisy, t, encoder_hidden_states=context, down_intrablock_additional_residuals=residuals
    ).sample
    return torch.as_tensor(output).float()
