"""Small bases and generators."""

from pathlib import Path

import pytest
import torch

from icmsr_core.weights.generator_file import Generator
from tests.support.generators import TINY
from tests.support.model_files import random_generator, write_base
from tests.support.sd_files import write_sd_checkpoint


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base", TINY)


@pytest.fixture
def generator(small_base) -> Generator:
    return random_generator(small_base)


@pytest.fixture
def two_sets(small_base) -> Generator:
    return random_generator(small_base, two_sets=True)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    return write_sd_checkpoint(tmp_path_factory.mktemp("narrow") / "narrow.safetensors", "sd21", 10, torch.float16)
