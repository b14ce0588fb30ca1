"""The VAEs that the tests of this room share."""

import pytest

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone
from tests.support.vaes import backbone_of, random_vae

VAES = [(3, True, True), (4, False, True), (4, True, False), (3, False, False)]
"""Levels, attention in the middle, convolutions at the latent."""


@pytest.fixture(scope="module", params=VAES, ids=lambda p: f"levels{p[0]}-{'attn' if p[1] else 'plain'}-{p[2]}")
def backbone(request) -> DiffusersBackbone:
    return backbone_of(random_vae(*request.param))
