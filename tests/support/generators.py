"""Small generators for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.train.networks.bases import NetworkConfig

TINY = NetworkConfig(latent_channels=4, vae_channels=(32, 32), unet_channels=(32, 32))


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    metadata: dict[str, str] | None = None,
    description: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Changes a generator file by hand."""
    with safe_open(str(path), framework="pt") as file:
        old = dict(file.metadata())
    content = load_file(path)
    if tensors is not None:
        tensors(content)
    if description is not None:
        old["icmsr"] = json.dumps(description(json.loads(old["icmsr"])))
    save_file(content, path, metadata={**old, **(metadata or {})})
