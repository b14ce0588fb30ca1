"""A generator merged into the weights of its base, and the fidelity: how much of the realistic set is laid over it.

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

from torch import Tensor

from ..errors import IcmsrError
from .fidelity import check_fidelity
from .generator_file import REALISTIC, Generator, PartWeights, first_names


def fidelity_to_use(name: str, two_sets: bool, fidelity: float | None, default: float = 1.0) -> float:
    """The fidelity to merge the generator `name` with: None asks for `default` (`GeneratorInfo.realistic_default`).

    Raises `IcmsrError` for a value beyond 0..2, or for any value where there is one set.
    """
    if fidelity is None:
        return default
    check_fidelity(fidelity)
    if not two_sets:
        raise IcmsrError(
            f"{name}: fidelity needs a generator with a faithful and a realistic set of weights, this one holds a "
            f"single set: leave fidelity out (in ComfyUI: at 1), got {fidelity:g}"
        )
    return fidelity


def fidelity_of(name: str, generator: Generator, fidelity: float | None) -> float:
    """`fidelity_to_use` for `generator`, called `name`."""
    return fidelity_to_use(name, generator.has_two_sets, fidelity, generator.info.realistic_default)


def merged_tensors(
    name: str, weights: PartWeights, state: Mapping[str, Tensor], alpha: float, strength: float = 1.0
) -> dict[str, Tensor]:
    """The parameters of a network that one set of weights changes, in float32 (cast afterwards, never before).

    `state` maps diffusers parameter names to the base's tensors. LoRA: ``W + strength * alpha / rank * B A``; whole
    tensor: ``W + strength * (new - W)``. Raises `IcmsrError` naming every key that has no place or another shape.
    """
    merged, wrong = _merge("", weights, state, alpha, strength)
    _check_fit(name, wrong)
    return merged


def merged_part(
    name: str, generator: Generator, part: str, state: Mapping[str, Tensor], fidelity: float | None = None
) -> dict[str, Tensor]:
    """The parameters of ``unet`` or ``vae`` that `generator` changes, both sets in one go and in float32.

    `state` as in `merged_tensors`; `fidelity` as in `fidelity_to_use`. Raises `IcmsrError` for the fidelity, and naming
    every key of either set that has no place or another shape.
    """
    fidelity = fidelity_of(name, generator, fidelity)
    faithful, realistic = generator.sets(part)
    first, wrong = _merge(f"{part}.", faithful, state, generator.info.alpha, 1.0)
    second, wrong_above = _merge(
        f"{REALISTIC}{part}.", realistic, {**state, **first}, generator.info.realistic_alpha, fidelity
    )
    _check_fit(name, wrong + wrong_above)
    return {**first, **second} if fidelity else first


def misfit(key: str, shape: Iterable[int], base: Tensor | None) -> str:
    """`key` of a generator, which has no place in a base or another shape there, for `not_for_this_base`."""
    there = "no such parameter" if base is None else f"the base has {list(base.shape)}"
    return f"{key} {list(shape)} ({there})"


def not_for_this_base(name: str, wrong: list[str]) -> IcmsrError:
    """The error for a generator whose keys do not fit a base; `wrong` holds the `misfit` of each."""
    return IcmsrError(f"{name}: the generator does not fit this base model: {first_names(wrong)}")


def _merge(
    prefix: str, weights: PartWeights, state: Mapping[str, Tensor], alpha: float, strength: float
) -> tuple[dict[str, Tensor], list[str]]:
    merged: dict[str, Tensor] = {}
    wrong: list[str] = []
    for parameter, tensor in weights.tensors.items():
        base = state.get(parameter)
        if base is None or base.shape != tensor.shape:
            wrong.append(misfit(prefix + parameter, tensor.shape, base))
            continue
        base = base.float()
        merged[parameter] = base + strength * (tensor.to(base) - base) if strength != 1.0 else tensor.to(base)
    for module, pair in weights.lora.items():
        parameter = f"{module}.weight"
        base = state.get(parameter)
        rank = pair.down.shape[0]
        shape = (pair.up.shape[0], *pair.down.shape[1:])
        if base is None or tuple(base.shape) != shape:
            wrong.append(misfit(prefix + parameter, shape, base))
            continue
        start = merged.get(parameter, base.float())
        delta = pair.up.to(start).flatten(1) @ pair.down.to(start).flatten(1)
        merged[parameter] = start + strength * alpha / rank * delta.reshape(base.shape)
    return merged, wrong


def _check_fit(name: str, wrong: list[str]) -> None:
    if wrong:
        raise not_for_this_base(name, wrong)
