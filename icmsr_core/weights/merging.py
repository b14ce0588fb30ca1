"""A generator merged into the weights W of its base.

    W1 = W + alpha / rank * B A                          faithful set, LoRA
    W1 = new                                             faithful set, a tensor that is replaced
    W2 = W1 + f * realistic_alpha / rank * B A           realistic set at the fidelity f, LoRA
    W2 = W1 + f * (new - W1)                             realistic set at the fidelity f, a tensor that is replaced

f = 0 is the faithful generator alone, f = 1 the result of training with ICM, and f > 1 goes further in that direction.
The two LoRAs of PiSA-SR (arXiv 2412.03017), for pixels and semantics, are such a pair; PiSA-SR mixes the outputs of two
passes, while here the weights are scaled and one pass is enough (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import IcmsrError
from .generator_file import REALISTIC, Generator, PartWeights
from .tensor_files import first_names


def merged_tensor(weights: PartWeights, parameter: str, tensor: Tensor, alpha: float, strength: float = 1.0) -> Tensor:
    """One parameter of the base, `tensor`, with one set of weights merged in: float32, unchanged when none is for it.

    LoRA: ``W + strength * alpha / rank * B A``; replaced tensor: ``W + strength * (new - W)``; with both, the tensor is
    replaced first. Their shapes must fit (`check_fit`).
    """
    merged = tensor.float()
    new = weights.tensors.get(parameter)
    if new is not None:
        new = new.to(merged)
        merged = new if strength == 1.0 else merged + strength * (new - merged)
    pair = weights.lora.get(parameter.removesuffix(".weight")) if parameter.endswith(".weight") else None
    if pair is not None:
        delta = pair.up.to(merged).flatten(1) @ pair.down.to(merged).flatten(1)
        merged = merged + strength * alpha / pair.down.shape[0] * delta.reshape(merged.shape)
    return merged


def merged_parameter(generator: Generator, part: str, parameter: str, tensor: Tensor) -> Tensor:
    """One parameter of the base's ``unet`` or ``vae``, `tensor`, with both sets merged in at the generator's fidelity.

    The result is float32. Cast it afterwards: a small update would be lost in 16 bits.
    """
    info = generator.info
    faithful, realistic = generator.sets(part)
    merged = merged_tensor(faithful, parameter, tensor, info.alpha)
    if generator.fidelity == 0:
        return merged
    return merged_tensor(realistic, parameter, merged, info.realistic_alpha, generator.fidelity)


def check_fit(generator: Generator, part: str, state: Mapping[str, Tensor]) -> None:
    """Raises `IcmsrError` unless every key of both sets has a parameter of its shape in the base; it lists the others.

    `state` has the base's parameters of `part` by their diffusers names; only the shapes are used.
    """
    wrong: list[str] = []
    for prefix, weights in zip((f"{part}.", f"{REALISTIC}{part}."), generator.sets(part)):
        shapes = {parameter: tuple(tensor.shape) for parameter, tensor in weights.tensors.items()}
        of_lora = {f"{name}.weight": (pair.up.shape[0], *pair.down.shape[1:]) for name, pair in weights.lora.items()}
        for parameter, shape in (*shapes.items(), *of_lora.items()):
            base = state.get(parameter)
            if base is None or tuple(base.shape) != shape:
                wrong.append(misfit(prefix + parameter, shape, None if base is None else base.shape))
    if wrong:
        raise not_for_this_base(generator.name, wrong)


@torch.no_grad()
def merge_into(network: nn.Module, generator: Generator, part: str) -> None:
    """Merges `part` of `generator` into the parameters of `network`.

    Raises `IcmsrError` as `check_fit`, before anything is changed.
    """
    state = network.state_dict()
    check_fit(generator, part, state)
    for parameter in {name for weights in generator.sets(part) for name in weights.parameters()}:
        state[parameter].copy_(merged_parameter(generator, part, parameter, state[parameter]))


def misfit(key: str, shape: Iterable[int], base_shape: Iterable[int] | None) -> str:
    """Text for `not_for_this_base`: `key` has another shape in the base, or does not exist there (None)."""
    there = "no such parameter" if base_shape is None else f"the base has {list(base_shape)}"
    return f"{key} {list(shape)} ({there})"


def not_for_this_base(name: str, wrong: list[str]) -> IcmsrError:
    """The error for a generator called `name` with keys that do not fit a base; `wrong` has the `misfit` of each."""
    return IcmsrError(f"{name}: the generator does not fit this base model: {first_names(wrong)}")
