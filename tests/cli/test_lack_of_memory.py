"""`icmsr upscale` where memory runs out: what is tried then, and what is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from icmsr_core.cli import picture_jobs
from icmsr_core.cli.main import main
from icmsr_core.pictures.files import read_picture
from tests.support.model_files import TINY, write_base, write_generator
from tests.support.pictures import write_random_picture

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a small model whose VAE has norms."""
    folder: Path = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base", replace(TINY, unet_channels=(64, 64)))
    return ["--base", str(base), "--model", str(write_generator(folder / "generator.safetensors", base))]


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        ([], [(512, "auto"), (256, "auto"), (128, "auto"), (512, "bounded")]),
        pytest.param(["--tile", "256", "--overlap", "32"], [(256, "auto"), (256, "bounded")], marks=pytest.mark.slow),
        (["--vae-mode", "exact"], [(512, "exact"), (256, "exact"), (128, "exact")]),
    ],
)
def test_a_lack_of_memory_is_tried_with_less(tmp_path, model, monkeypatch, capsys, flags, tried):
    """An error of macOS with all but the bounded VAE. The result is the bounded one, or one line says what to do."""
    source, target = write_random_picture(tmp_path / "in.png", 150, 140), tmp_path / "out.png"
    run = ["upscale", str(source), str(target), *model, *flags]
    seen, said, real = [], [], picture_jobs.run_plan

    def planted(backbone, image, plan, **others):
        seen.append((plan.settings.tile, plan.settings.vae))
        if plan.settings.vae != "bounded":
            raise RuntimeError("MPS backend out of memory (MPS allocated: 5 GiB). Tried to allocate 2.00 GiB")
        return real(backbone, image, plan, **others)

    monkeypatch.setattr(picture_jobs, "run_plan", planted)
    monkeypatch.setattr(picture_jobs.log, "warning", lambda text, *values: said.append(text % values))
    if "exact" in flags:
        assert main(run) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "in.png: out of memory with tile 128, 1 at a time, vae exact, for 150 x 140 to 600 x 560 pixels" in line
        assert "choose bounded" in line
    else:
        assert main(run) == 0
        found = read_picture(target).rgb
        monkeypatch.setattr(picture_jobs, "run_plan", real)
        assert main([*run, "--vae-mode", "bounded"]) == 0
        assert np.array_equal(found, read_picture(target).rgb)
    assert seen == tried
    lines = [f"in.png: out of memory with tile {tile}, 1 at a time, vae {mode}: " for tile, mode in tried[:-1]]
    assert [text.partition("trying")[0] for text in said] == lines


def test_pictures_of_a_size_that_did_not_fit_start_with_less(tmp_path, model, monkeypatch, capsys):
    """And an error that is none of memory fails the one picture, and is not tried again."""
    (tmp_path / "in").mkdir()
    for index, width in enumerate((150, 150, 140, 150)):
        write_random_picture(tmp_path / "in" / f"{index}.png", width, 140)
    seen, real = [], picture_jobs.run_plan

    def planted(backbone, image, plan, **others):
        seen.append((image.shape[3], plan.settings.tile))
        if len(seen) == 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if plan.settings.tile > 256 and image.shape[3] == 150:
            raise MemoryError
        return real(backbone, image, plan, **others)

    monkeypatch.setattr(picture_jobs, "run_plan", planted)
    assert main(["upscale", str(tmp_path / "in"), str(tmp_path / "out"), *model]) == 1
    assert seen == [(150, 512), (150, 256), (150, 256), (140, 512), (150, 256)]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icmsr: error")]
    assert len(errors) == 1
    assert "2.png: CUDA error: an illegal memory access" in errors[0]
