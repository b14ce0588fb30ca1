"""The small default model ("nano") that ships with the pack: where its files are."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_FIDELITY = 1.0
"""Default fidelity of the embedded generator, as its file states: the realistic set, which has more detail."""
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def embedded_base() -> Path:
    """Folder of nano's base: VAE and diffusion prior."""
    return ASSETS / "nano"


def embedded_generator() -> Path:
    """nano's one-step generator file."""
    return ASSETS / "nano" / "generator.safetensors"


def embedded_adapter() -> Path:
    """nano's T2I-Adapter: colormap and edges, for its bare prior."""
    return ASSETS / "nano" / "adapter.safetensors"


def demo_picture() -> Path:
    """The bundled photograph of `icmsr demo` (source and licence in `assets/README.md`)."""
    return ASSETS / "demo.png"
