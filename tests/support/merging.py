"""Whole networks merged at once, as a reference for what is merged tensor by tensor."""

from collections.abc import Mapping

from torch import Tensor

from icmsr_core.weights.generator_file import Generator, PartWeights
from icmsr_core.weights.merging import check_fit, merged_parameter, merged_tensor


def merged_set(
    weights: PartWeights, state: Mapping[str, Tensor], alpha: float, strength: float = 1.0
) -> dict[str, Tensor]:
    """The parameters of `state` that one set of weights changes, in float32."""
    return {name: merged_tensor(weights, name, state[name], alpha, strength) for name in sorted(weights.parameters())}


def merged_part(generator: Generator, part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of ``unet`` or ``vae`` that `generator` changes at its fidelity, in float32."""
    check_fit(generator, part, state)
    sets = generator.sets(part) if generator.fidelity else generator.sets(part)[:1]
    names = {name for weights in sets for name in weights.parameters()}
    return {name: merged_parameter(generator, part, name, state[name]) for name in sorted(names)}
