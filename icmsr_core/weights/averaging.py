"""The weighted average of several generators: a generator between them (model soups, arXiv 2203.05482).

Between generators of which one was trained on from the other, the average is often better than both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import IcmsrError
from .base import BaseFolder
from .generator_file import PARTS, Generator, PartWeights
from .merging import check_fit, merged_parameter

_SAME = ("family", "timestep", "prediction", "coeff_t", "base_hash")


def averaged(generators: Sequence[Generator], weights: Sequence[float], base: BaseFolder) -> Generator:
    """The generator whose parameters are the average of those of `generators` with `weights`, which add up to 1.

    Each generator is merged into `base` at its fidelity first, so LoRA and whole weights can be mixed. The result has
    one set of whole tensors, float32. Its description is the first one's, with what was averaged as its training.

    Raises `IcmsrError` for weights that are not above 0 or do not add up to 1, and for generators that do not go
    together: of another base, timestep, prediction or prompt, or that do not fit `base`.
    """
    if len(generators) != len(weights) or not generators:
        raise IcmsrError(f"an average needs one weight per generator, got {len(weights)} for {len(generators)}")
    if not all(weight > 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise IcmsrError(f"the weights of an average must be above 0 and add up to 1, got {list(weights)}")
    first = generators[0]
    for other in generators[1:]:
        _check_same(first, other)
    if first.info.base_hash not in ("", base.hash()):
        raise IcmsrError(
            f"{first.name} belongs to other weights than {base.path}: name the base {first.info.base!r} that it was "
            "trained on"
        )
    parts = {part: _average_part(generators, weights, base, part) for part in PARTS}
    training = [
        {
            "file": Path(generator.name).name,
            "weight": weight,
            **({"fidelity": generator.fidelity} if generator.has_two_sets else {}),
            "training": generator.info.training,
            **({"realistic_training": generator.info.realistic_training} if generator.has_two_sets else {}),
        }
        for generator, weight in zip(generators, weights)
    ]
    info = replace(
        first.info,
        rank=0,
        alpha=0.0,
        realistic_rank=0,
        realistic_alpha=0.0,
        realistic_training={},
        realistic_default=1.0,
        training={"average": training},
    )
    return Generator(info, parts["unet"], parts["vae"], first.prompt_embedding, name="average")


def with_realistic(faithful: Generator, other: Generator, strength: float = 1.0) -> Generator:
    """`faithful`, which has one set of weights, with the realistic set of `other` on top, `strength` times as strong.

    Between generators of which one was trained on from the other, the difference that a realistic set makes can be
    carried over (task arithmetic, arXiv 2212.04089).

    Raises `IcmsrError` unless `faithful` has one set and `other` a realistic set of LoRA, both for the same base,
    timestep and prediction, and for a strength that is not above 0.
    """
    if faithful.has_two_sets:
        raise IcmsrError(f"{faithful.name} has a realistic set already: take its faithful set")
    if not other.has_two_sets or any(entry.tensors for entry in other.realistic.values()):
        raise IcmsrError(f"{other.name} has no realistic set of LoRA: name a file that `icmsr inspect` says has one")
    if not 0 < strength < math.inf:
        raise IcmsrError(f"the strength of the realistic set must be above 0, got {strength}")
    _check_same(faithful, other)
    info = replace(
        faithful.info,
        realistic_rank=other.info.realistic_rank,
        realistic_alpha=strength * other.info.realistic_alpha,
        realistic_training=other.info.realistic_training,
        realistic_default=1.0,
    )
    return replace(faithful, info=info, realistic=other.realistic)


def _check_same(first: Generator, other: Generator) -> None:
    for name in _SAME:
        here, there = getattr(first.info, name), getattr(other.info, name)
        if here != there:
            raise IcmsrError(
                f"{first.name} and {other.name} cannot be averaged: their {name} is {here!r} and {there!r}: choose "
                "generators of which one was trained on from the other"
            )
    here, there = first.prompt_embedding, other.prompt_embedding
    if (here is None) != (there is None) or (here is not None and there is not None and not _close(here, there)):
        raise IcmsrError(f"{first.name} and {other.name} cannot be averaged: their prompt embeddings differ")


def _close(here: Tensor, there: Tensor) -> bool:
    return here.shape == there.shape and torch.allclose(here.float(), there.float(), atol=1e-3)


def _average_part(
    generators: Sequence[Generator], weights: Sequence[float], base: BaseFolder, part: str
) -> PartWeights:
    shapes = {name: torch.empty(shape, device="meta") for name, shape in base.shapes(part).items()}
    for generator in generators:
        check_fit(generator, part, shapes)
    changed = {name for generator in generators for entry in generator.sets(part) for name in entry.parameters()}
    if not changed:
        return PartWeights()
    tensors = {
        name: torch.stack(
            [weight * merged_parameter(generator, part, name, tensor) for generator, weight in zip(generators, weights)]
        ).sum(0)
        for name, tensor in base.tensors(part, torch.float32)
        if name in changed
    }
    return PartWeights({}, tensors)
