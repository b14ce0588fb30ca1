"""The state of a run in one .safetensors: weights, their running average, the optimiser's moments, the position."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import IcmsrError
from ..generator_file import read_tensors, write_atomically

FORMAT = "icmsr-training-state"


def save_state(
    path: Path, parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer, images: int, fingerprint: str,
) -> None:
    """Writes a run's state atomically: the file at `path` is always a whole one."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"average/{name}"] = average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    meta = {"format": FORMAT, "images": str(images), "fingerprint": fingerprint}
    write_atomically(path, {key: value.cpu() for key, value in tensors.items()}, meta)


def load_state(
    path: Path, parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer, fingerprint: str,
) -> int:
    """Restores what `save_state` wrote into the live objects and returns the number of images seen.

    Raises `IcmsrError` when the file is of another configuration: resuming would mix two runs.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise IcmsrError(f"{path}: not a training state")
    if metadata["fingerprint"] != fingerprint:
        raise IcmsrError(
            f"{path}: this run was started with another configuration: choose another run folder, or put back "
            f"the configuration in {path.parent / 'config.json'}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"weight/{name}"))
            average[name].copy_(tensors.pop(f"average/{name}"))
            own = {key: key.split("/", 1)[0] for key in tensors if key.split("/", 1)[1] == name}
            if own:
                optimizer.state[parameter] = {
                    short: tensors.pop(key).to("cpu" if short == "step" else parameter.device)
                    for key, short in own.items()
                }
    if tensors:
        raise IcmsrError(f"{path}: tensors of no parameter: {sorted(tensors)[:4]}")
    return int(metadata["images"])


def fingerprint(values: Mapping[str, object]) -> str:
    """A configuration as text, for telling two runs apart; order of keys does not matter."""
    return json.dumps(values, sort_keys=True, default=str)
