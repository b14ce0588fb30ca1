"""A generator merged into the weights of its base.

    W1 = W + alpha / rank * B A                          the faithful set: LoRA ...
    W1 = new                                             ... or a tensor replaced whole
    W2 = W1 + f * realistic_alpha / rank * B A           the realistic set at the fidelity f: LoRA ...
    W2 = W1 + f * (new - W1)                             ... or a tensor replaced whole

f = 0 is the faithful generator alone, f = 1 the one that training with ICM ended at, and beyond 1 the same way further.
The two LoRAs of PiSA-SR (arXiv 2412.03017), pixels and semantics, are such a pair; between them it mixes the outputs of
two passes, where the weights are scaled here, for one pass (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import IcmsrError
from .generator_file import REALISTIC, Generator, PartWeights
from .tensor_files import first_names


def merged_tensor(weights: PartWeights, parameter: str, tensor: Tensor, alpha: float, strength: float = 1.0) -> Tensor:
    """The base's `tensor`, called `parameter`, after one set of weights: in float32, `tensor` itself where none is its.

    LoRA: ``W + strength * alpha / rank * B A``; whole tensor: ``W + strength * (new - W)``; of both, the tensor is
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
    """`merged_tensor` of both sets of `generator` for a parameter of ``unet`` or ``vae``, at the generator's fidelity.

    The result is float32 and to be cast afterwards: a small update would be lost in 16 bits.
    """
    info = generator.info
    faithful, realistic = generator.sets(part)
    merged = merged_tensor(faithful, parameter, tensor, info.alpha)
    if generator.fidelity == 0:
        return merged
    return merged_tensor(realistic, parameter, merged, info.realistic_alpha, generator.fidelity)


def check_fit(generator: Generator, part: str, state: Mapping[str, Tensor]) -> None:
    """Raises `IcmsrError`, which names every key of both sets that has no place or another shape in the base.

    `state` maps the diffusers names of the parameters of `part` to tensors, of which only the shapes are looked at.
    """
    wrong: list[str] = []
    for prefix, weights in zip((f"{part}.", f"{REALISTIC}{part}."), generator.sets(part)):
        shapes = {parameter: tuple(tensor.shape) for parameter, tensor in weights.tensors.items()}
        of_lora = {f"{name}.weight": (pair.up.shape[0], *pair.down.shape[1:]) for name, pair in weights.lora.items()}
        for parameter, shape in (*shapes.items(), *of_lora.items()):
            base = state.get(parameter)
            if base is None or tuple(base.shape) != shape:
                wrong.append(misfit(prefix + parameter, shape, base))
    if wrong:
        raise not_for_this_base(generator.name, wrong)


@torch.no_grad()
def merge_into(network: nn.Module, generator: Generator, part: str) -> None:
    """Merges `part` of `generator` into the parameters of `network`, one by one; errors as in `check_fit`.

    Nothing is changed when one of them does not fit.
    """
    state = network.state_dict()
    check_fit(generator, part, state)
    for parameter in {name for weights in generator.sets(part) for name in weights.parameters()}:
        state[parameter].copy_(merged_parameter(generator, part, parameter, state[parameter]))


def misfit(key: str, shape: Iterable[int], base: Tensor | None) -> str:
    """Text for `not_for_this_base`: `key` of a generator has no place in a base, or another shape than there."""
    there = "no such parameter" if base is None else f"the base has {list(base.shape)}"
    return f"{key} {list(shape)} ({there})"


def not_for_this_base(name: str, wrong: list[str]) -> IcmsrError:
    """The error for a generator, called `name`, whose keys do not fit a base; `wrong` holds the `misfit` of each."""
    return IcmsrError(f"{name}: the generator does not fit this base model: {first_names(wrong)}")
