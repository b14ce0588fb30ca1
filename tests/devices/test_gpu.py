"""One step on a real accelerator (CUDA, ROCm, XPU or MPS): agreement with the CPU, precisions, peak memory.

Run with ``pytest -m gpu``, or by `benchmarks/gpu.py`. ICMSR_GPU_TESTS_ON names another device than the first that torch
finds: cuda:1, xpu, mps; cpu rehearses them where there is no card, on smaller pictures and without the memory.
"""

import os

import pytest
import torch

from icmsr_core.backbone.protocol import Backbone
from icmsr_core.measures.metrics import psnr_y
from icmsr_core.pictures.files import from_tensor, read_picture, to_tensor
from icmsr_core.runtime.device import pick_device
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.precision import use_full_float32
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.embedded import demo_picture, embedded_generator

pytestmark = pytest.mark.gpu

MODELS = ("nano", "reduced SD")
WIDTH = 0.25
"""Of Stable Diffusion's widths, in the reduced one; its weights are random."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_DIFFERENCE = 1e-4
"""Of a colour in [0, 1], in float32."""
SMALLEST_PSNR = {"nano": 35.0, "reduced SD": 30.0}
"""In dB, of 16 bits against float32."""
MOST_MEMORY = 6e9
"""What a card of 8 GB has left, once the system and the desktop have their share."""


@pytest.fixture(scope="module")
def device() -> torch.device:
    found = pick_device(os.environ.get("ICMSR_GPU_TESTS_ON", "auto"))
    if found.type == "cpu" and "ICMSR_GPU_TESTS_ON" not in os.environ:
        pytest.skip(f"no accelerator: torch {torch.__version__} finds no CUDA, ROCm, XPU or MPS device")
    use_full_float32()
    return found


def network(load_benchmark, model: str, device: torch.device, dtype: str) -> Backbone:
    if model == "nano":
        return load_backbone(Recipe(generator=embedded_generator(), device=str(device), dtype=dtype))
    return load_benchmark("_sd_networks").our_backbone(WIDTH, device, DTYPES[dtype])


def picture(side: int) -> torch.Tensor:
    """[1, 3, side, side] of the bundled photograph, repeated where it is smaller."""
    image = to_tensor(read_picture(demo_picture()).rgb)
    repeats = [-(-side // length) for length in image.shape[-2:]]
    return image.repeat(1, 1, *repeats)[..., :side, :side]


def result(backbone: Backbone, device: torch.device, side: int, **settings: object) -> torch.Tensor:
    return upscale(backbone, picture(side // 4).to(device), UpscaleSettings(**settings)).cpu()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("vae", ["exact", "bounded"])
def test_float32_agrees_with_the_cpu(device, load_benchmark, model, vae):
    """In several tiles. Bounded mode draws the same parts of the picture on both."""
    side = 128 if device.type == "cpu" else 512 if model == "nano" else 256
    settings = {"vae": vae, "tile": max(128, side // 2), "overlap": 32}
    cpu = torch.device("cpu")
    expected = result(network(load_benchmark, model, cpu, "fp32"), cpu, side, **settings)
    found = result(network(load_benchmark, model, device, "fp32"), device, side, **settings)
    assert float((found - expected).abs().max()) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_stay_near_float32(device, load_benchmark, model, dtype):
    """Where they overflow, the part runs in float32 instead, which a warning says."""
    side = 128 if device.type == "cpu" else 512
    expected = result(network(load_benchmark, model, device, "fp32"), device, side)
    found = result(network(load_benchmark, model, device, dtype), device, side)
    assert bool(found.isfinite().all())
    assert psnr_y(from_tensor(found), from_tensor(expected)) >= SMALLEST_PSNR[model]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("side", [512, 2048, 4096])
def test_memory_fits_a_card_of_eight_gigabytes(device, load_benchmark, model, side):
    if device.type == "cpu":
        pytest.skip("a CPU has no memory of its own")
    backbone = network(load_benchmark, model, device, "fp32" if device.type == "mps" else "bf16")
    peak = load_benchmark("_measurement").Peak(device)
    peak.reset()
    assert bool(result(backbone, device, side).isfinite().all())
    print(f"\n{model}, {side} px: peak {peak.bytes() / 1e9:.2f} GB")
    assert peak.bytes() <= MOST_MEMORY
