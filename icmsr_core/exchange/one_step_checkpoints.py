"""Reads the checkpoints of related methods that are pickles of PEFT adapters: OSEDiff and PiSA-SR.

OSEDiff (arXiv 2406.08177) and PiSA-SR (arXiv 2412.03017) split the UNet's LoRA into three adapters and use PEFT's
default alpha at any rank. S3Diff (arXiv 2409.17058) cannot be imported: between the two matrices of each LoRA it has a
third one that depends on the picture, so there is no constant update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import IcmsrError
from ..weights.generator_file import Generator, GeneratorInfo, LoraPair, PartWeights
from ..weights.pickles import read_pickle
from ..weights.tensor_files import first_names

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
class PickledKind:
    """The layout of one method's pickle, and what the pickle does not state."""

    info: GeneratorInfo
    """The description to write, except rank and alpha."""
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


PICKLED_KINDS: Mapping[str, PickledKind] = {
    "osediff": PickledKind(
        GeneratorInfo(
            "sd21",
            999,
            "eps",
            "stable-diffusion-2-1-base",
            licence="Apache-2.0",
            notes="OSEDiff takes its prompt from an image tagger, which is no part of this file: with one prompt for "
            "all pictures the results differ from the published ones.",
        ),
        _unet_adapters("rank_unet"),
        Adapters("state_dict_vae", "rank_vae", {"default_encoder": "vae_lora_encoder_modules"}),
        whole="conv_in",
    ),
    "pisasr": PickledKind(
        GeneratorInfo(
            "sd21",
            1,
            "residual",
            "stable-diffusion-2-1-base",
            licence="Apache-2.0",
            notes="PiSA-SR was trained with prompts from an image tagger, which is no part of this file; its authors' "
            "own test uses the empty prompt.",
        ),
        _unet_adapters("lora_rank_unet_pix", "_pix"),
        realistic=_unet_adapters("lora_rank_unet_sem", "_sem"),
    ),
}


def read_pickled(name: str, path: Path) -> Generator:
    """The checkpoint at `path` of the kind `name` (a key of `PICKLED_KINDS`) as a generator without prompt embedding.

    Its tensors have the precision of the file. Raises `IcmsrError` for a file that cannot be read as plain tensors, a
    missing entry, a matrix without its partner, another rank than stated, a tensor that no list names, and values that
    are not finite.
    """
    kind = PICKLED_KINDS[name]
    checkpoint = read_pickle(path)
    # S3Diff's pickle looks similar, but its matrices are useless without what it computes between them.
    if "state_dict_unet_de_mlp" in checkpoint:
        raise IcmsrError(
            f"{path}: an S3Diff checkpoint, which cannot be imported: its LoRA changes with each picture, that of a "
            "generator file does not"
        )
    reader = _Reader(f"{path} as {name}", checkpoint)
    unet = PartWeights(reader.pairs(kind.unet), reader.whole(kind.unet.state, kind.whole) if kind.whole else {})
    vae = PartWeights(reader.pairs(kind.vae)) if kind.vae else PartWeights()
    above = {"unet": PartWeights(reader.pairs(kind.realistic))} if kind.realistic else {}
    reader.finish()
    info = replace(kind.info, rank=reader.number(kind.unet.rank), alpha=PEFT_ALPHA)
    if kind.realistic:
        info = replace(info, realistic_rank=reader.number(kind.realistic.rank), realistic_alpha=PEFT_ALPHA)
    return Generator(info, unet, vae, realistic=above)


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
