"""Reads the checkpoints of related methods that are pickles of PEFT adapters: OSEDiff and PiSA-SR.

OSEDiff (arXiv 2406.08177) and PiSA-SR (arXiv 2412.03017) split the UNet's LoRA into three adapters and use PEFT's
default alpha at any rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import IcmsrError
from ..weights.generator_file import LoraPair, PartWeights
from ..weights.tensor_files import first_names
from .containers import Container

PEFT_ALPHA = 8.0
"""Default LoRA alpha of PEFT's LoraConfig."""


class Adapters(NamedTuple):
    """The entries of a pickle with one set of LoRA matrices: PEFT adapters of one network, all of one rank."""

    state: str
    """Key of the tensors."""
    rank: str
    """Key of the rank."""
    modules: Mapping[str, str]
    """Key of the list of modules, by the adapter's name."""


@dataclass(frozen=True)
class PickledLayout:
    """Where one method's pickle has what."""

    unet: Adapters
    """The UNet's LoRA."""
    vae: Adapters | None = None
    """The VAE encoder's LoRA."""
    realistic: Adapters | None = None
    """The UNet's second LoRA, added to the first."""
    whole: str = ""
    """A module of the UNet whose tensors are in the pickle as well as its LoRA."""


def _unet_adapters(rank: str, suffix: str = "") -> Adapters:
    groups = ("encoder", "decoder", "others")
    modules = {f"default_{group}{suffix}": f"unet_lora_{group}_modules{suffix}" for group in groups}
    return Adapters("state_dict_unet", rank, modules)


PICKLED_LAYOUTS: Mapping[str, PickledLayout] = {
    "osediff": PickledLayout(
        _unet_adapters("rank_unet"),
        Adapters("state_dict_vae", "rank_vae", {"default_encoder": "vae_lora_encoder_modules"}),
        whole="conv_in",
    ),
    "pisasr": PickledLayout(
        _unet_adapters("lora_rank_unet_pix", "_pix"),
        realistic=_unet_adapters("lora_rank_unet_sem", "_sem"),
    ),
}


class PickledWeights(NamedTuple):
    """What a pickle of adapters holds. All its LoRAs have the alpha `PEFT_ALPHA`."""

    unet: PartWeights
    vae: PartWeights
    realistic: PartWeights
    """The second set of the UNet; empty if there is none."""
    rank: int
    """LoRA rank of the UNet's first set."""
    realistic_rank: int
    """Of its second set; 0 if there is none."""


def read_pickled(kind: str, file: Container) -> PickledWeights:
    """The weights in `file`, a checkpoint of `kind` (a key of `PICKLED_LAYOUTS`), in its precision.

    Raises `IcmsrError` for a missing entry, a matrix without its partner, another rank than stated, a tensor that no
    list names, and values that are not finite.
    """
    layout = PICKLED_LAYOUTS[kind]
    reader = _Reader(f"{file.path} as {kind}", file.values)
    unet = PartWeights(reader.pairs(layout.unet), reader.whole(layout.unet.state, layout.whole) if layout.whole else {})
    vae = PartWeights(reader.pairs(layout.vae)) if layout.vae else PartWeights()
    above = PartWeights(reader.pairs(layout.realistic)) if layout.realistic else PartWeights()
    reader.finish()
    rank = reader.number(layout.unet.rank)
    return PickledWeights(unet, vae, above, rank, reader.number(layout.realistic.rank) if layout.realistic else 0)


class _Reader:
    """Takes tensors out of a checkpoint and keeps track of which were taken."""

    def __init__(self, name: str, checkpoint: Mapping[str, Any]) -> None:
        self.name, self.checkpoint = name, checkpoint
        self.left: dict[str, dict[str, Tensor]] = {}

    def entry(self, key: str) -> Any:
        if key not in self.checkpoint:
            raise IcmsrError(f"{self.name}: missing entry {key}, found {first_names(map(str, self.checkpoint))}")
        return self.checkpoint[key]

    def number(self, key: str) -> int:
        value = self.entry(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise IcmsrError(f"{self.name}: {key} must be a whole number from 1, got {value!r}")
        return value

    def pairs(self, adapters: Adapters) -> dict[str, LoraPair]:
        rank = self.number(adapters.rank)
        pairs: dict[str, LoraPair] = {}
        for adapter, key in adapters.modules.items():
            modules = self.entry(key)
            if not isinstance(modules, (list, tuple, set)) or not all(isinstance(entry, str) for entry in modules):
                raise IcmsrError(f"{self.name}: {key} must be a list of module names, got {type(modules).__name__}")
            for module in dict.fromkeys(modules):  # OSEDiff lists some of the VAE's several times
                halves = [self.take(adapters.state, (f"{module}.lora_{half}.{adapter}.weight",)) for half in "AB"]
                down, up = halves
                if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != rank or up.shape[1] != rank:
                    raise IcmsrError(
                        f"{self.name}: {module}.lora_A.{adapter} {list(down.shape)} and lora_B {list(up.shape)} do not "
                        f"have the rank {rank} that {adapters.rank} states"
                    )
                pairs[module] = LoraPair(down, up)
        return pairs

    def whole(self, state: str, module: str) -> dict[str, Tensor]:
        # PEFT moves a module that it wraps one name down.
        return {
            f"{module}.{end}": self.take(state, (f"{module}.base_layer.{end}", f"{module}.{end}"))
            for end in ("weight", "bias")
        }

    def take(self, state: str, names: Iterable[str]) -> Tensor:
        names = list(names)
        left = self.tensors(state)
        found = next((name for name in names if name in left), None)
        if found is None:
            raise IcmsrError(f"{self.name}: missing tensor {names[0]} in {state}")
        tensor = left.pop(found)
        if not bool(tensor.isfinite().all()):
            raise IcmsrError(f"{self.name}: NaN or infinite values in {found} of {state}")
        return tensor.detach()

    def tensors(self, state: str) -> dict[str, Tensor]:
        if state not in self.left:
            values = self.entry(state)
            if not isinstance(values, dict):
                raise IcmsrError(f"{self.name}: {state} must hold tensors by name, got {type(values).__name__}")
            wrong = [
                str(key)
                for key, value in values.items()
                if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided
            ]
            if wrong:
                raise IcmsrError(
                    f"{self.name}: {state} must hold float tensors only, these are not: {first_names(wrong)}"
                )
            self.left[state] = dict(values)
        return self.left[state]

    def finish(self) -> None:
        surplus = [f"{key} ({state})" for state, left in self.left.items() for key in left]
        if surplus:
            raise IcmsrError(
                f"{self.name}: unexpected tensors {first_names(surplus)}: its lists of modules do not name them"
            )
