"""Upscaling on the pretend device: every way through it gives the picture of the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icmsr_core.cli.main import main
from icmsr_core.conditions import extract
from icmsr_core.pictures.files import Picture, read_picture, write_picture
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.tiled_vae import modes
from icmsr_core.train.networks.adapters import load_adapter
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.upscale.tiling import Box
from icmsr_core.weights.embedded import embedded_adapter
from tests.support.apart import apart
from tests.support.device_models import NANO, condition_well, load
from tests.support.platform_rules import PLATFORMS, Platform
from tests.support.pretend_device import pretend_device
from tests.support.tiny_vae_files import write_tiny_folder

pytestmark = pytest.mark.long

TILES = UpscaleSettings(tile=64, overlap=16)
"""A result of 128 x 96 px is then six tiles of the UNet and three stripes of the VAE."""
WAYS = {
    "exact": replace(TILES, vae="exact"),
    "bounded": replace(TILES, vae="bounded"),
    "the whole picture at once": replace(TILES, tile=0),
    "batches of tiles": replace(TILES, batch=4),
    "adain": replace(TILES, color_fix="adain"),
    "no colour correction": replace(TILES, color_fix="none"),
    "a size that must be padded": replace(TILES, size=(83, 117)),
}
LARGER = UpscaleSettings(scale=8, tile=128, overlap=32)
"""The same with 256 x 192 px for Stable Diffusion, whose tiles must be multiples of 64 px."""
LARGER_WAYS = {
    "larger, exact": replace(LARGER, vae="exact"),
    "larger, bounded": replace(LARGER, vae="bounded"),
    "larger, the whole picture at once": replace(LARGER, tile=0),
}
ALL_WAYS = {**WAYS, **LARGER_WAYS}


def pictures(number: int = 1) -> Tensor:
    """[N, 3, 32, 24]: ramps, edges and noise."""
    random = torch.Generator().manual_seed(5)
    rows = torch.linspace(0, 1, 32)[:, None].expand(32, 24)
    columns = (torch.arange(24) // 6 % 2).float()[None].expand(32, 24)
    base = torch.stack([rows, columns, 0.5 * rows + 0.5 * columns])
    return (0.8 * base + 0.2 * torch.rand(number, 3, 32, 24, generator=random)).clamp(0, 1)


def error_of(result: Tensor, expected: Tensor) -> float:
    """The largest difference over the scale of `expected`."""
    return float((result.cpu() - expected).abs().max() / expected.abs().max())


def errors_of_ways(recipe: Recipe, ways: Sequence[str]) -> dict[str, float | str]:
    """How far the results of `ways` under the rules of each platform are from the CPU's."""
    picture, backbone, found = pictures(), load(recipe, "cpu"), {}
    expected = {name: upscale(backbone, picture, ALL_WAYS[name]) for name in ways}
    for platform in PLATFORMS:
        with pretend_device(platform):
            backbone = load(recipe, "pretend")
            for name in ways:
                try:
                    error: float | str = error_of(upscale(backbone, picture, ALL_WAYS[name]), expected[name])
                except Exception as failure:
                    error = f"{type(failure).__name__}: {failure}"
                found[f"{platform}, {name}"] = error
    return found


def check_errors(errors: dict[str, float | str], ways: Sequence[str], bound: float = 1e-5) -> None:
    assert len(errors) == len(PLATFORMS) * len(ways)
    assert all(isinstance(error, float) and error < bound for error in errors.values()), errors


def test_nano_gives_the_picture_of_the_cpu_in_every_way() -> None:
    check_errors(apart(errors_of_ways, NANO, list(WAYS)), list(WAYS))


@pytest.mark.slow
def test_stable_diffusion_gives_the_picture_of_the_cpu(stable_diffusion: Recipe) -> None:
    # 1.04e-5 on a CPU with AVX-512, whose kernels add the many channels up in another order.
    check_errors(apart(errors_of_ways, stable_diffusion, list(LARGER_WAYS)), list(LARGER_WAYS), 2e-5)


def test_a_tiny_vae_gives_the_picture_of_the_cpu(stable_diffusion: Recipe, tmp_path: Path) -> None:
    tiny = write_tiny_folder(tmp_path)
    condition_well(tiny)
    recipe, ways = replace(stable_diffusion, tiny_vae=tiny), ["larger, exact"]
    check_errors(apart(errors_of_ways, recipe, ways), ways)


def with_features(device: str) -> Tensor:
    """The result of nano with the residuals of its adapter, the hint being that of the picture itself."""
    backbone, picture = load(NANO, device), pictures()
    factor = backbone.descriptor.latent_factor
    adapter = load_adapter(embedded_adapter(), factor).to(device)
    shown = extract(resize(picture, 128, 96), ("colormap", "edges")).to(device)

    @torch.no_grad()
    def features(boxes: Sequence[Box]) -> Sequence[Tensor]:
        crops = [shown[(slice(None), slice(None), *box.slices(factor))] for box in boxes]
        return list(adapter(torch.cat(crops)))

    return upscale(backbone, picture, replace(TILES, batch=2), features=features)


def errors_with_features() -> list[float]:
    expected, found = with_features("cpu"), []
    for platform in PLATFORMS:
        with pretend_device(platform):
            found.append(error_of(with_features("pretend"), expected))
    return found


def test_an_adapters_features_reach_the_unet_of_the_device() -> None:
    errors = apart(errors_with_features)
    assert len(errors) == len(PLATFORMS)
    assert max(errors) < 1e-5


def errors_of_a_batch() -> list[tuple[float, float, str]]:
    """On each platform, of two pictures in main memory, of the same on the device, and where the latter's result is."""
    batch, settings, found = pictures(2), replace(TILES, vae="exact"), []
    expected = upscale(load(NANO, "cpu"), batch, settings)
    for platform in PLATFORMS:
        with pretend_device(platform):
            backbone = load(NANO, "pretend")
            here, there = upscale(backbone, batch, settings), upscale(backbone, batch.to("pretend"), settings)
            assert here.device.type == "cpu"
            found.append((error_of(here, expected), error_of(there, expected), there.device.type))
    return found


def test_pictures_may_lie_in_main_memory_or_on_the_device() -> None:
    found = apart(errors_of_a_batch)
    assert len(found) == len(PLATFORMS)
    for here, there, device in found:
        assert max(here, there) < 1e-5
        assert device == "pretend"


def without_room() -> tuple[float, int, int]:
    """A result while no whole map may stay on the device: its error, and the bytes copied there and back."""
    picture, settings = pictures(), replace(TILES, vae="exact")
    expected = upscale(load(NANO, "cpu"), picture, settings)
    with pretend_device("cuda") as device:
        backbone = load(NANO, "pretend")
        backbone._room = lambda: 0.0
        device.trace.clear()
        result = upscale(backbone, picture, settings)
        return error_of(result, expected), device.trace.copied("to device"), device.trace.copied("to host")


def test_maps_that_wait_in_main_memory_come_back_to_be_used_and_not_to_be_measured() -> None:
    error, there, back = apart(without_room)
    assert error < 1e-5
    assert back > 2**22
    assert there < 2 * back, "once to be normalised, and once to be added to what the layers between made of it"


def run_command(platform: Platform, folder: Path) -> dict[str, int]:
    """Exit codes of ``icmsr upscale`` on the CPU, on the device, and there with everything chosen automatically."""
    codes = {}
    with pretend_device(platform):
        for name, options in (
            ("cpu", ["--device", "cpu", "--dtype", "fp32"]),
            ("device", ["--device", "pretend", "--dtype", "fp32"]),
            ("auto", ["--device", "pretend", "--tile", "auto", "--batch", "auto"]),
        ):
            codes[name] = main(["upscale", str(folder / "in"), str(folder / name), *options])
    return codes


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_command_writes_the_files_of_the_cpu(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, picture in enumerate(pictures(2)):
        write_picture(tmp_path / f"in/{index}.png", Picture(rgb=picture.movedim(0, -1).contiguous().numpy()))
    assert apart(run_command, platform, tmp_path) == {"cpu": 0, "device": 0, "auto": 0}
    for index in range(2):
        cpu, device, auto = (read_picture(tmp_path / f"{name}/{index}.png").rgb for name in ("cpu", "device", "auto"))
        assert np.abs(cpu - device).max() <= 1.01 / 255
        assert np.abs(cpu - auto).mean() < 2 / 255, "in bfloat16"


def plant_a_constant_on_the_cpu() -> None:
    real = modes.normaliser

    def normaliser(step: modes.Norm, known: modes.Statistics) -> modes.TensorMap:
        run, gain = real(step, known), torch.ones(1, step.affine()[0].shape[0], 1, 1)
        return lambda chunk: run(chunk) * gain

    modes.normaliser = normaliser


def plant_float64() -> None:
    real = modes.normaliser

    def normaliser(step: modes.Norm, known: modes.Statistics) -> modes.TensorMap:
        run = real(step, known)
        return lambda chunk: run(chunk).double().float()

    modes.normaliser = normaliser


PLANTED = {"a constant on the CPU": plant_a_constant_on_the_cpu, "float64": plant_float64}


def errors_when_planted(fault: str) -> dict[str, float | str]:
    PLANTED[fault]()
    return errors_of_ways(NANO, ["exact"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "a constant on the CPU",
            {"cuda": "Expected all tensors to be on the same", "mps": "Expected all tensors to be on the same"},
        ),
        ("float64", {"mps": "Cannot convert a MPS Tensor to float64"}),
    ],
)
def test_a_planted_fault_that_a_cpu_does_not_mind_is_found(fault: str, words: dict[Platform, str]) -> None:
    found = apart(errors_when_planted, fault)
    for platform, part in words.items():
        assert part in str(found[f"{platform}, exact"])
