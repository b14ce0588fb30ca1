"""The plan of an upscale: what it holds, and that it is made once for pictures of one size."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from icmsr_core.cli import picture_jobs
from icmsr_core.cli.job_list import plan_jobs
from icmsr_core.cli.picture_jobs import UntilItFits, planner, upscale_jobs
from icmsr_core.pictures.files import Picture, write_picture
from icmsr_core.tiled_vae.tiled import plan_stripes
from icmsr_core.upscale import plan as plan_module
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.tile_choice import Automatic
from icmsr_core.upscale.tiling import plan_tiles
from tests.support.toy_backbone import Toy

DESCRIPTOR = Toy().descriptor
SETTINGS = UpscaleSettings(scale=2, tile=64, overlap=16, color_fix="none")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often the tiles and the stripes of a picture are planned, by the name of the function."""
    counts: Counter = Counter()
    for function in (plan_tiles, plan_stripes):

        def counted(*arguments, function=function):
            counts[function.__name__] += 1
            return function(*arguments)

        monkeypatch.setattr(plan_module, function.__name__, counted)
    return counts


def test_a_plan_holds_sizes_tiles_stripes_mode_and_steps() -> None:
    plan = plan_upscale(DESCRIPTOR, 41, 100, SETTINGS)
    assert plan.settings is SETTINGS
    assert (plan.source, plan.target, plan.padded) == ((41, 100), (82, 200), (96, 208))
    assert plan.tiles == plan_tiles(12, 26, 8, 2, 2)
    assert plan.stripes == plan_stripes(12, 26, 8)
    assert plan.exact
    assert plan.steps == len(plan.tiles) + 2 * plan.stripes.number
    assert plan.with_batch(3) == plan_upscale(DESCRIPTOR, 41, 100, UpscaleSettings(2, None, 64, 16, 3, "none"))


def test_the_whole_picture_is_one_tile_and_one_stripe() -> None:
    plan = plan_upscale(DESCRIPTOR, 300, 500, UpscaleSettings(tile=0, overlap=0))
    assert (len(plan.tiles), plan.stripes.number, plan.steps) == (1, 1, 3)


def test_the_vae_is_exact_by_the_size_of_the_padded_result() -> None:
    assert plan_upscale(DESCRIPTOR, 512, 512, UpscaleSettings(scale=4)).exact
    assert not plan_upscale(DESCRIPTOR, 512, 513, UpscaleSettings(scale=4)).exact
    assert plan_upscale(DESCRIPTOR, 512, 513, UpscaleSettings(scale=4, vae="exact")).exact
    assert not plan_upscale(DESCRIPTOR, 8, 8, UpscaleSettings(vae="bounded")).exact


def test_a_batch_is_planned_once(planned: Counter) -> None:
    upscale(Toy(), torch.rand(3, 3, 40, 60), SETTINGS)
    assert planned == {"plan_tiles": 1, "plan_stripes": 1}


@pytest.mark.parametrize(
    ("automatic", "vae", "plans"),
    [
        (Automatic(tile=False, batch=False), "exact", 2),
        (Automatic(tile=False, batch=False), "auto", 4),
        (Automatic(), "bounded", 4),
        (Automatic(tile=False), "exact", 4),
    ],
)
def test_a_folder_is_planned_once_a_size_or_once_a_picture_where_memory_decides(
    planned: Counter, tmp_path, automatic: Automatic, vae: str, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory may be another when the next picture comes."""
    (tmp_path / "in").mkdir()
    for index, width in enumerate((20, 30, 20, 30)):
        write_picture(tmp_path / "in" / f"{index}.png", Picture(torch.rand(12, width, 3).numpy()))
    monkeypatch.setattr(picture_jobs, "free_memory", lambda _: 1e9)
    settings = replace(SETTINGS, vae=vae)
    plan_for = planner(DESCRIPTOR, settings, automatic, torch.device("cpu"), torch.float32)
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out").jobs
    failures: list[str] = []
    assert upscale_jobs(UntilItFits(Toy(), plan_for), jobs, report=failures.append) == 0
    assert failures == []
    assert planned == {"plan_tiles": plans, "plan_stripes": plans}
