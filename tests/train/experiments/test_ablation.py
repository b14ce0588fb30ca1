"""The ablation at the smallest size, through its own script, and its report."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.metrics import psnr_y
from icmsr_core.train.experiments import ablation_report
from icmsr_core.train.experiments.ablation import read_training
from icmsr_core.train.experiments.ablation_pictures import pairs_of
from icmsr_core.train.experiments.ablation_report import (
    detailed_crop,
    diagnostics_table,
    differences,
    markdown,
    summary,
)
from icmsr_core.train.networks.adapters import load_adapter
from icmsr_core.train.networks.bases import NetworkConfig
from icmsr_core.train.run.launch import run_script
from icmsr_core.weights.generator_file import load_generator
from tests.support.model_files import write_base
from tests.support.script_process import ROOT, ScriptProcess

SIZES = NetworkConfig(vae_channels=(32, 32, 32, 32), unet_channels=(32, 64))
ARM_NAMES = ["reconstruction", "none", "image"]


def write_pictures(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, real pairs and a base."""
    folder = tmp_path_factory.mktemp("ablation")
    write_pictures(folder / "photos", 8, 96)
    write_pictures(folder / "pairs" / "hr", 3, 96, seed=1)
    (folder / "pairs" / "lr").mkdir()
    for path in (folder / "pairs" / "hr").iterdir():
        Image.open(path).resize((24, 24), Image.Resampling.BICUBIC).save(folder / "pairs" / "lr" / path.name)
    write_base(folder / "base", SIZES)
    return folder


def flags(place: Path, run: str = "run", **more: object) -> list[str]:
    values = {
        "run": run,
        "base": place / "base",
        "pairs": place / "pairs",
        "every": 2,
        "photographs": 1,
        "side": 96,
        "metrics": "['psnr','hf']",
        "arms": ARM_NAMES,
        "seeds": "[0,1]",
        "device": "cpu",
        "data.folders": f"['{place / 'photos'}']",
        "data.hold_out": 0.4,
        "start.images": 4,
        "start.batch": 2,
        "start.workers": 0,
        "adapter.images": 4,
        "adapter.batch": 2,
        "adapter.workers": 0,
        "generator.networks.start": "",
        "loop.images": 8,
        "loop.batch": 2,
        "loop.workers": 0,
        "loop.log_every": 2,
        "loop.warmup_images": 0,
        "generator.losses.icm": 0.5,
        **more,
    }
    return [
        "--config",
        str(ROOT / "train" / "configs" / "ablation.yaml"),
        *(f"--{name}={value}" for name, value in values.items()),
    ]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """A finished run."""
    process = ScriptProcess("ablation.py", *flags(place, jobs=1), folder=place)
    assert process.wait() == 0, process.output()
    return place / "run"


def results_of(run: Path) -> dict:
    return json.loads((run / "report" / "ablation.json").read_text())


@pytest.mark.long
def test_a_report_without_a_measure_of_detail_has_no_plot_of_it(made, tmp_path, monkeypatch):
    def psnr_alone(values):
        if not isinstance(values, dict):
            return values
        kept = {"psnr": values["psnr"]} if "psnr" in values else values
        return {name: psnr_alone(value) for name, value in kept.items()}

    results = results_of(made)
    for kind in ("arms", "references"):
        results[kind] = psnr_alone(results[kind])
    monkeypatch.setattr(ablation_report, "crops_figure", lambda config: ablation_report.Figure())
    files = ablation_report.write_report(results, SimpleNamespace(folder=lambda name: tmp_path / name))
    assert sorted(file.name for file in files) == [
        "ablation.json",
        "ablation.md",
        "ablation_crops.png",
        "ablation_curves.png",
    ]
    assert "PSNR" in files[0].read_text("utf-8")


@pytest.mark.long
def test_the_script_trains_measures_and_reports(made):
    assert {path.name for path in (made / "report").iterdir()} == {
        "ablation.md",
        "ablation.json",
        "ablation_tradeoff.png",
        "ablation_curves.png",
        "ablation_crops.png",
    }
    results = results_of(made)
    assert list(results["arms"]) == ARM_NAMES
    assert list(results["references"]) == ["bicubic", "start"]
    for arm, seeds in results["arms"].items():
        assert list(seeds) == ["0", "1"]
        for values in seeds.values():
            assert len(values["pairs"]) == 2, "every second of three"
            assert len(values["photographs"]) == 1
            assert values["diagnostics"].keys() == (
                set() if arm == "reconstruction" else {"rho", "cos", "mse_auxiliary", "mse_teacher"}
            )
    assert results["budget"]["images"] == 8
    assert results["budget"]["losses"]["icm"] == 0.5


@pytest.mark.long
def test_arms_begin_from_one_start_and_differ_by_their_condition_alone(made):
    start = load_generator(made / "start" / "generator.safetensors")
    configs = {arm: json.loads((made / "runs" / arm / "0" / "config.json").read_text()) for arm in ARM_NAMES}
    for arm, config in configs.items():
        assert config["generator"]["networks"]["start"] == str(Path("run", "start", "generator.safetensors"))
        assert config["loop"]["seed"] == 0
        assert config["generator"]["losses"]["icm"] == (0 if arm == "reconstruction" else 0.5)
        assert config["condition"]["kind"] == {"reconstruction": "none"}.get(arm, arm)
        config["generator"]["losses"]["icm"] = 0.5
        for part in ("data", "loop", "generator"):
            assert config[part] == configs["none"][part]
    weights = {
        (arm, seed): load_generator(made / "runs" / arm / seed / "generator.safetensors").unet.tensors
        for arm in ARM_NAMES
        for seed in ("0", "1")
    }
    name = "conv_out.weight"
    values = [start.unet.tensors[name], *(tensors[name] for tensors in weights.values())]
    for index, one in enumerate(values):
        assert not any(torch.equal(one, other) for other in values[index + 1 :])


@pytest.mark.long
def test_the_numbers_are_those_of_the_pictures(made):
    """The written result of an arm, against the truth that lies beside it, gives the value in the report."""
    results = results_of(made)
    name, truth = next((path.stem, path) for path in (made / "photographs" / "hr").iterdir())
    for arm in (*ARM_NAMES, "start"):
        picture = np.asarray(Image.open(made / "pictures" / arm / f"{name}.png"))
        seeds = results["references"]["start"] if arm == "start" else results["arms"][arm]["0"]
        expected = psnr_y(picture, np.asarray(Image.open(truth)))
        assert seeds["photographs"][name]["psnr"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.long
def test_the_report_means_over_pictures_and_spreads_over_seeds(made):
    results = results_of(made)

    def value(arm: str, seed: str, measure: str) -> float:
        rows = results["arms"][arm][seed]["pairs"].values()
        return float(np.mean([row[measure] for row in rows]))

    for measure in ("psnr", "hf", "color"):
        image = [value("image", seed, measure) for seed in ("0", "1")]
        base = [value("reconstruction", seed, measure) for seed in ("0", "1")]
        assert summary(results)["pairs"]["image"][measure] == pytest.approx((np.mean(image), np.std(image, ddof=1)))
        apart = np.subtract(image, base)
        assert differences(results)["pairs"]["image"][measure] == pytest.approx((apart.mean(), apart.std(ddof=1)))
        none = [value("none", seed, measure) for seed in ("0", "1")]
        apart, found = np.subtract(image, none), differences(results, "none")["pairs"]
        assert found["image"][measure] == pytest.approx((apart.mean(), apart.std(ddof=1)))
        assert not {"none", "reconstruction"} & set(found)
    rho = [results["arms"]["image"][seed]["diagnostics"]["rho"] for seed in ("0", "1")]
    assert diagnostics_table(results)["image"]["rho"] == pytest.approx((np.mean(rho), np.std(rho, ddof=1)))
    text = (made / "report" / "ablation.md").read_text()
    assert text == markdown(results) + "\n"
    assert text.count("Difference to reconstruction") == text.count("Difference to none") == 2
    mean, deviation = summary(results)["pairs"]["image"]["psnr"]
    assert f"| image | {mean:.3f} ± {deviation:.3f} |" in text


def test_diagnostics_are_of_the_middle_levels_at_the_end(tmp_path):
    lines = []
    for images in (10, 20, 30, 40):
        bins = {"0.0-0.2": 9.0, "0.2-0.4": images / 10, "0.4-0.6": images / 10 + 1, "0.8-1.0": 9.0}
        lines.append(
            {"images": images, "loss/generator/psnr": 20.0}
            | {f"icm/{name}/{level}": value for name in ("rho", "cos") for level, value in bins.items()}
        )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = read_training(tmp_path)
    assert values["diagnostics"] == {"rho": 4.5, "cos": 4.5}
    assert [point["rho"] for point in values["curve"]] == [1.5, 2.5, 3.5, 4.5]
    assert values["curve"][0]["psnr"] == 20.0


@pytest.mark.long
def test_it_goes_on_with_what_is_missing(place, made):
    before = results_of(made)
    start = (made / "start" / "generator.safetensors").stat().st_mtime_ns
    kept = (made / "results" / "none" / "0.json").stat().st_mtime_ns
    shutil.rmtree(made / "runs" / "image" / "1")
    (made / "results" / "image" / "1.json").unlink()
    process = ScriptProcess("ablation.py", *flags(place), folder=place)
    assert process.wait() == 0, process.output()
    assert "runs: 1 of 1 done (image, seed 1)" in process.output()
    assert results_of(made) == before, "the same run gives the same numbers"
    assert (made / "start" / "generator.safetensors").stat().st_mtime_ns == start
    assert (made / "results" / "none" / "0.json").stat().st_mtime_ns == kept


@pytest.mark.long
def test_each_condition_has_an_adapter_of_its_own_from_the_same_data(made):
    assert {path.name for path in (made / "adapters").iterdir()} == {"image"}, "of the arms, one has an adapter"
    config = json.loads((made / "adapters" / "image" / "config.json").read_text())
    assert config["adapter"]["kind"] == "image"
    assert config["data"]["hold_out"] == 0.4, "what is measured on, it has not seen"
    adapter = load_adapter(made / "adapters" / "image" / "adapter.safetensors")
    assert adapter.config["in_channels"] == 3
    used = json.loads((made / "runs" / "image" / "0" / "config.json").read_text())["condition"]["adapters"]
    assert used == [str(Path("run", "adapters", "image", "adapter.safetensors"))]


def test_pairs_without_a_partner_are_refused(tmp_path):
    for part, names in (("lr", "ab"), ("hr", "a")):
        (tmp_path / part).mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / part / f"{name}.png")
    with pytest.raises(IcmsrError, match="b without a partner"):
        pairs_of(tmp_path)


def test_the_crop_shown_is_richer_than_four_in_five():
    noise = np.random.default_rng(0).random((112, 512, 3), dtype=np.float32)
    picture = noise * np.linspace(0, 1, 512, dtype=np.float32)[None, :, None]
    assert detailed_crop(picture) == (0, 320, 112)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"arms": "['icm','depth']"}, ["arms", "depth", "colormap"]),
        ({"seeds": "[]"}, ["seeds is empty"]),
        ({"side": 98}, ["multiple of 4", "98"]),
        ({"photographs": 7}, ["held-out photographs", "7 are wanted"]),
        ({"data.hold_out": 0}, ["data.hold_out is 0"]),
        ({"data.crop": 100}, ["data.crop must be a positive multiple of 32", "100"]),
        ({"generator.losses.icm": 0}, ["losses.icm above 0"]),
        ({"generator.networks.start": "/none"}, ["/none"]),
        ({"pairs": "/none"}, ["/none/lr", "no such folder"]),
        ({"base": "/none"}, ["/none", "no such file or folder"]),
        ({"metrics": "['sharpness']"}, ["sharpness", "psnr"]),
    ],
)
def test_wrong_configurations_end_with_1_and_name_the_value(place, tmp_path, more, words, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("ablation_script", ROOT / "train" / "ablation.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["ablation.py", *flags(place, str(tmp_path / "run"), **more)])
    assert run_script(script.main) == 1
    errors = capsys.readouterr().err
    for word in words:
        assert word in errors
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.long
def test_another_configuration_in_the_same_folder_is_refused(place, made):
    process = ScriptProcess("ablation.py", *flags(place, **{"loop.images": 10}), folder=place)
    assert process.wait() == 1
    assert "another configuration" in process.output()
