"""The methods whose published weights are known: what their files do not state, and which modules they change.

Source: their papers and code. OSEDiff arXiv 2406.08177, PiSA-SR arXiv 2412.03017, HYPIR arXiv 2507.20590, OMGSR arXiv
2508.08227. All are LoRAs over Stable Diffusion 2.1-base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import IcmsrError
from ..weights.generator_file import GeneratorInfo, LoraPair
from ..weights.tensor_files import first_names
from .layouts import Layout

BASE = "stable-diffusion-2-1-base"
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_shortcut", "conv_out")
INPUT = ("conv_in",)
PROJECTIONS = ("proj_in", "proj_out", "ff.net.2", "ff.net.0.proj")
STANDARD = (*ATTENTION, *CONVOLUTIONS, *INPUT, *PROJECTIONS)
"""Last parts of the names of the UNet's modules that OSEDiff and its successors train."""
VAE_PARTS = ("encoder.", "quant_conv")
"""Beginnings of the names of the VAE's modules from picture to latent."""
WITHOUT_TAGGER = "with one prompt for all pictures the results differ from the published ones."


@dataclass(frozen=True)
class Relative:
    """One method."""

    title: str
    """Its name, for people."""
    info: GeneratorInfo
    """The description of its weights, without ranks and alphas."""
    unet: tuple[str, ...]
    """Last parts of the names of the UNet's modules with a LoRA."""
    vae: tuple[str, ...] = ()
    """The same of the VAE's encoder; empty: no LoRA there."""
    ranks: Mapping[str, int] | None = None
    """Rank by part, of a file that does not state it."""

    def modules(self, part: str, layout: Layout) -> frozenset[str]:
        """Names of the modules of ``unet`` or ``vae`` that its weights have a LoRA for, in a base of `layout`."""
        ends = self.unet if part == "unet" else self.vae
        names = module_names(part, layout)
        return frozenset(name for name in names if any(f".{name}".endswith(f".{end}") for end in ends))


def module_names(part: str, layout: Layout) -> list[str]:
    """Names of all modules with a matrix in ``unet``, or in ``vae`` from picture to latent, of a base of `layout`."""
    end = ".weight"
    names = [key[: -len(end)] for key, shape in layout[part].items() if key.endswith(end) and len(shape) > 1]
    return names if part == "unet" else [name for name in names if name.startswith(VAE_PARTS)]


RELATIVE: Mapping[str, Relative] = {
    "osediff": Relative(
        "OSEDiff",
        GeneratorInfo(
            "sd21",
            999,
            "eps",
            BASE,
            licence="Apache-2.0",
            notes=f"OSEDiff takes its prompt from an image tagger, which is no part of this file: {WITHOUT_TAGGER}",
            recommended={"color_fix": "adain", "tile": 768, "overlap": 256, "smallest": 512},
        ),
        STANDARD,
        (*ATTENTION, *CONVOLUTIONS, *INPUT, "quant_conv"),
    ),
    "pisasr": Relative(
        "PiSA-SR",
        GeneratorInfo(
            "sd21",
            1,
            "residual",
            BASE,
            notes="PiSA-SR was trained with prompts from an image tagger, which is no part of this file; its authors' "
            "own test uses the empty prompt. Its code has no licence file.",
            recommended={"color_fix": "adain", "tile": 768, "overlap": 256, "smallest": 512},
        ),
        STANDARD,
    ),
    "hypir": Relative(
        "HYPIR",
        GeneratorInfo(
            "sd21",
            200,
            "eps",
            BASE,
            licence="non-commercial",
            notes="HYPIR's weights are for non-commercial use and must not be passed on, converted or not: keep this "
            "file to yourself. Its authors' default prompt is the empty one. A lower coeff_t weakens it, as there.",
            recommended={"color_fix": "wavelet", "tile": 512, "overlap": 256, "smallest": 512, "resize": "bicubic"},
        ),
        (*ATTENTION, *CONVOLUTIONS, *PROJECTIONS),
        ranks={"unet": 256},
    ),
    "omgsr": Relative(
        "OMGSR-S",
        GeneratorInfo(
            "sd21",
            273,
            "eps",
            BASE,
            notes="OMGSR states no licence: do not pass this file on. Its authors use the empty prompt.",
            recommended={"color_fix": "adain", "tile": 512, "overlap": 256, "smallest": 512},
        ),
        (*ATTENTION, *CONVOLUTIONS, *INPUT),
        (*ATTENTION, *CONVOLUTIONS, *INPUT),
        ranks={"unet": 32, "vae": 16},
    ),
}


def check_complete(name: str, kind: str, part: str, lora: Mapping[str, LoraPair], layout: Layout) -> None:
    """Raises `IcmsrError` unless `lora` has the modules and, where it is known, the rank of the relative `kind`.

    `layout` is that of the base, and `name` begins the message.
    """
    relative = RELATIVE[kind]
    expected = relative.modules(part, layout)
    start = f"{name}: recognised as {relative.title}, whose LoRA"
    for what, odd in (("lacks", expected - lora.keys()), ("has besides", lora.keys() - expected)):
        if odd:
            raise IcmsrError(
                f"{start} is on {len(expected)} modules of the {part}; this file {what} {first_names(sorted(odd))}: "
                "download it again"
            )
    rank = (relative.ranks or {}).get(part)
    others = _ranks(lora) - {rank}
    if rank is not None and others:
        raise IcmsrError(
            f"{start} has the rank {rank} in the {part}; this file has {', '.join(map(str, sorted(others)))}: "
            "use the published file"
        )


def _ranks(lora: Mapping[str, LoraPair]) -> set[int]:
    return {pair.down.shape[0] for pair in lora.values()}
