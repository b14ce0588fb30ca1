"""The collapse experiment at the smallest size, and its report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.train.experiments.collapse import NOISE_LEVELS, Bench
from icmsr_core.train.experiments.collapse_config import COLLAPSE_ARMS, CollapseArm, CollapseConfig
from icmsr_core.train.experiments.collapse_crops import Crops, condition_maps
from icmsr_core.train.experiments.collapse_report import conditions_figure, levels_figure, markdown, summary
from icmsr_core.train.experiments.spread import spread
from icmsr_core.train.networks.conditioning import StructureConfig
from tests.support.script_process import ROOT, ScriptProcess


def crops(count: int) -> Crops:
    random = torch.Generator().manual_seed(count)
    return Crops(
        torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=random),
        torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random),
        torch.randn(count, 12, 8, 8, generator=random),
        torch.randn(count, 12, 8, 8, generator=random),
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(CollapseConfig(batch=4), crops(8), crops(5), 0)


def test_an_auxiliary_that_is_the_teacher_shows_no_difference(bench):
    none = CollapseArm("none", StructureConfig("none"))
    rows = bench.measure(bench.teacher, None, none, bench.generator)
    assert [row["t"] for row in rows] == list(NOISE_LEVELS)
    assert all(row["rho"] == 0 and row["mse_auxiliary"] == row["mse_teacher"] for row in rows)


def test_an_auxiliary_that_knows_the_noise_is_full_collapse(bench, monkeypatch):
    """The noise is recovered from the latent that the generator made, as an omniscient auxiliary would."""
    latent = bench._generate(bench.generator, bench.held_out.given).detach()
    predict = bench._predict

    def omniscient(network, noisy, t, seen):
        if network != "auxiliary":
            return predict(network, noisy, t, seen)
        return bench.schedule.eps_from_x0(noisy, latent, t)

    monkeypatch.setattr(bench, "_predict", omniscient)
    rows = bench.measure("auxiliary", None, CollapseArm("none", StructureConfig("none")), bench.generator)
    for row in rows:
        assert row["rho"] == pytest.approx(1, abs=1e-3)
        assert row["cos"] == pytest.approx(1, abs=1e-3)
        assert row["mse_auxiliary"] == pytest.approx(0, abs=1e-5)


def test_conditions_go_from_nothing_to_everything():
    some = crops(2)
    channels = [arm.structure.channels for arm in COLLAPSE_ARMS]
    assert channels[0] == 0
    assert len({arm.name for arm in COLLAPSE_ARMS}) == len(COLLAPSE_ARMS) == 11
    by_name = {arm.name: arm for arm in COLLAPSE_ARMS}
    assert torch.equal(condition_maps(by_name["image"], some), some.sharp.float() / 255)
    assert not torch.equal(condition_maps(by_name["image of input"], some), some.sharp.float() / 255)
    one = condition_maps(by_name["colormap 1"], some)
    assert float(one.std(dim=(2, 3)).max()) < 1e-6


def fake(rho: float) -> dict:
    rows = [{"t": t, "rho": rho + t, "cos": rho, "mse_auxiliary": 0.1, "mse_teacher": 0.2} for t in NOISE_LEVELS]
    health = [{"mse": 0.5, "variety": 1.0, "detail": 0.7}, {"mse": 0.4, "variety": 0.9, "detail": 0.8}]
    return {"frozen": rows, "joint": rows, "curve": [], "health": health}


def test_the_report_means_over_levels_and_spreads_over_seeds():
    results = {"none": {0: fake(0.1), 1: fake(0.3)}, "icm": {0: fake(0.5), 1: fake(0.5)}}
    table = summary(results)
    assert table["none"]["frozen"]["cos"] == pytest.approx((0.2, np.std([0.1, 0.3], ddof=1)))
    assert table["icm"]["joint"]["rho"] == pytest.approx((0.5 + np.mean(NOISE_LEVELS), 0), abs=1e-9)
    assert table["icm"]["health"]["mse"] == pytest.approx((0.8, 0))
    assert "| none | 0.700 ± 0.141 | 0.200 ± 0.141 |" in markdown(results)
    assert spread([3.0]) == (3.0, 0.0)
    labels = [label.get_text() for label in conditions_figure(results).axes[2].get_xticklabels()]
    assert labels == ["none", "icm"]
    assert len(levels_figure(results, ["none", "icm"]).axes) == 4


@pytest.mark.long
@pytest.mark.slow
def test_the_script_measures_resumes_and_reports(tmp_path):
    photographs = tmp_path / "photos"
    photographs.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        picture = random.integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(photographs / f"{number}.png")
    sizes = {
        "crops": 8,
        "held_out_crops": 4,
        "batch": 2,
        "prior_steps": 2,
        "generator_steps": 2,
        "adapter_steps": 2,
        "auxiliary_steps": 2,
        "joint_steps": 1,
        "seeds": "[0,1]",
        "conditions": "['none','icm']",
    }
    flags = [
        "--config",
        ROOT / "train" / "configs" / "collapse.yaml",
        "--run",
        "run",
        "--jobs=1",
        "--data.hold_out=0.3",
        f"--data.folders=['{photographs}']",
        *(f"--collapse.{key}={value}" for key, value in sizes.items()),
    ]
    process = ScriptProcess("collapse.py", *flags, folder=tmp_path)
    assert process.wait() == 0, process.output()
    report = tmp_path / "run" / "report"
    names = {path.name for path in report.iterdir()}
    assert names == {"collapse.md", "collapse.json", "collapse_conditions.png", "collapse_levels.png"}
    before = json.loads((report / "collapse.json").read_text())
    assert before["icm"].keys() == {"0", "1"}
    assert before["icm"]["0"]["frozen"] != before["icm"]["1"]["frozen"]
    lost = tmp_path / "run" / "results" / "1" / "icm.json"
    lost.unlink()
    process = ScriptProcess("collapse.py", *flags, folder=tmp_path)
    assert process.wait() == 0, process.output()
    assert json.loads((report / "collapse.json").read_text()) == before, "the same arm gives the same numbers"
    wrong = ScriptProcess("collapse.py", *flags, "--collapse.joint_steps=3", folder=tmp_path)
    assert wrong.wait() == 1
    assert "another configuration" in wrong.output()


def test_errors_name_the_value():
    with pytest.raises(IcmsrError, match=r"'depth'"):
        CollapseConfig(conditions=("none", "depth"))
    with pytest.raises(IcmsrError, match="joint_steps must be at least 1, got 0"):
        CollapseConfig(joint_steps=0)
    with pytest.raises(IcmsrError, match="seeds is empty"):
        CollapseConfig(seeds=())


def test_the_committed_report_is_of_the_committed_conditions():
    """docs/collapse.md's table is what the script wrote."""
    results = json.loads((Path(ROOT) / "docs" / "collapse.json").read_text())
    assert list(results) == [arm.name for arm in COLLAPSE_ARMS]
    by_seed = {name: {int(seed): run for seed, run in seeds.items()} for name, seeds in results.items()}
    assert markdown(by_seed) in (Path(ROOT) / "docs" / "collapse.md").read_text()
