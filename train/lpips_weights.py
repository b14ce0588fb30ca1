"""Converts the public LPIPS-VGG weights into the one file that perceptual.weights takes. It downloads nothing.

python train/lpips_weights.py --vgg vgg16-397923af.pth --heads vgg.pth --out lpips_vgg.safetensors
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from icmsr_core.train.losses.lpips import convert_lpips
from icmsr_core.train.run.launch import parse_config, run_script


@dataclass(frozen=True)
class Config:
    """The public LPIPS-VGG weights as one .safetensors."""

    vgg: str
    """torchvision's VGG16, https://download.pytorch.org/models/vgg16-397923af.pth"""
    heads: str
    """The linear heads: lpips/weights/v0.1/vgg.pth of the PyPI package lpips."""
    out: str = "lpips_vgg.safetensors"
    """The file to write."""
    trust: bool = False
    """Take files whose SHA-256 is not the published one. Code in them is never run."""


def main() -> None:
    """Both files are checked before the first is read."""
    config = parse_config(Config)
    convert_lpips(Path(config.vgg), Path(config.heads), Path(config.out), config.trust)
    logging.info("wrote %s", config.out)


if __name__ == "__main__":
    sys.exit(run_script(main))
