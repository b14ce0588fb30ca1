"""`--compile`: the same pictures from compiled code, one compilation for each size of tile, and no surprise without."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.runtime import compilation
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.model_files import write_base, write_generator

SMALL = NetworkConfig(latent_channels=4, vae_channels=(32, 32, 32, 32), unet_channels=(32, 32), vae_groups=4)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(tmp_path: Path) -> None:
    """Two pictures of one size and one of another, compiled and not."""
    base = write_base(tmp_path / "base", SMALL)
    generator = write_generator(tmp_path / "generator.safetensors", base)
    settings = UpscaleSettings(tile=128, overlap=32)
    sizes = ((40, 60), (40, 60), (70, 40))
    pictures = [torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) for size in sizes]
    plain, compiled = load_backbone(Recipe(base, generator)), load_backbone(Recipe(base, generator, compile_unet=True))
    counters = torch._dynamo.utils.counters
    counters.clear()
    results, graphs = [], []
    for picture in pictures:
        results.append(upscale(compiled, picture, settings))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2]
    for picture, result in zip(pictures, results):
        assert (result - upscale(plain, picture, settings)).abs().max() < 1e-4


@pytest.mark.long
def test_a_size_of_tile_is_traced_once(tmp_path: Path, fresh_compiler, monkeypatch) -> None:
    """With a backend that takes seconds, not minutes: what is traced, and that the trace gives the same picture."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "COMPILERS", (sys.executable,))  # it needs none
    compare(tmp_path)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, compilation.COMPILERS)), reason="no C++ compiler")
def test_compiled_tiles_give_the_same_picture(tmp_path: Path, fresh_compiler) -> None:
    compare(tmp_path)


@pytest.mark.long
def test_every_size_is_compiled_once_and_many_sizes_are_allowed(fresh_compiler, monkeypatch) -> None:
    compiled: list[tuple[int, ...]] = []

    def backend(graph, inputs):
        compiled.append(next(tuple(entry.shape) for entry in inputs if entry.ndim == 4 and entry.shape[1] == 3))
        return graph.forward

    def network(picture: torch.Tensor) -> torch.Tensor:
        return 2 * picture

    monkeypatch.setattr(compilation, "BACKEND", backend)
    network = compilation.compiled(network)
    sizes = [(1, 3, 8, 8 + step) for step in range(20)]
    for size in [*sizes, *sizes]:
        network(torch.zeros(size))
    assert compiled == sizes


def test_without_a_compiler_the_error_comes_before_the_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr("icmsr_core.runtime.ingredients.open_base", lambda *_: pytest.fail("a base was opened"))
    (tmp_path / "in.png").write_bytes(b"")
    arguments = ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--compile", "--device", "cpu"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "--compile needs a C++ compiler on a CPU and found none of g++" in error
    assert error.count("\n") == 1


def test_devices_that_cannot_compile_are_refused(monkeypatch) -> None:
    with pytest.raises(IcmsrError, match="the device is mps: run without"):
        compilation.check_compiler(torch.device("mps"))
    monkeypatch.setattr("icmsr_core.runtime.compilation.find_spec", lambda _: None)
    with pytest.raises(IcmsrError, match="on CUDA needs the package triton"):
        compilation.check_compiler(torch.device("cuda"))
