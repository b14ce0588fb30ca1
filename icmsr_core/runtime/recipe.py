"""What to load and how to run it, as the user asks for it. Needs no torch, so that the command line can check it first.

`ingredients.resolve` turns it into what the networks are built from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import IcmsrError
from ..foreign.told import Told
from ..weights.embedded import embedded_base
from ..weights.fidelity import check_fidelity

if TYPE_CHECKING:
    from ..weights.generator_file import Generator

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""Precisions by name; ``auto`` is the fastest that is safe for the family on the device (`precision.choose_dtype`)."""


@dataclass(frozen=True)
class Recipe:
    """A base, a generator over it, and how the two run. Raises `IcmsrError` for an unknown dtype and for a fidelity
    beyond 0..2, when it is made."""

    base: Path | str = field(default_factory=embedded_base)
    """A diffusers folder, a checkpoint file, or as a text also a hub id (`hub.find_base`)."""
    generator: Path | Generator | None = None
    """A generator file, foreign weights as they are published, or a generator in memory; None: the bare prior."""
    told: Told = field(default_factory=Told)
    """What a foreign generator file does not say; of any generator the `coeff_t`."""
    fidelity: float | None = None
    """For a generator with a faithful and a realistic set of weights: 0 faithful, 1 realistic, up to 2; None: what the
    file says."""
    prompt: str | None = None
    """A text in place of the constant prompt embedding; the base's own text encoder embeds it once. Imported generators
    without an embedding need it."""
    tiny_vae: Path | None = None
    """A tiny VAE in place of the base's (`read_tiny_vae`), for a preview: what the generator changes in the VAE is
    lost."""
    device: str = "cpu"
    """auto (the accelerator where there is one), cpu, cuda, cuda:1, mps, ..."""
    dtype: str = "fp32"
    """One of `DTYPES`."""
    compile_unet: bool = False
    """Whether torch.compile makes code for every size of tile that comes (`compilation`)."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise IcmsrError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.fidelity is not None:
            check_fidelity(self.fidelity)
