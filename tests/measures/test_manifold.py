"""The teacher's clean estimates: exact in closed form, the same noise in every arm; the script that measures them."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.errors import IcmsrError
from icmsr_core.measures.manifold import clean_estimates, latent_error, manifold_grid, seeded_noise
from icmsr_core.pictures.files import read_picture
from icmsr_core.pictures.panels import MIN_CELL, labelled_grid
from icmsr_core.train.experiments.teacher_view import (
    MEASURES,
    View,
    ViewConfig,
    check_view,
    load_arms,
    measure_view,
    open_teacher,
    read_crops,
)
from icmsr_core.train.experiments.teacher_view_report import error_figure, markdown, summary
from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from icmsr_core.train.networks.conditioning import ConditionConfig, StructureConfig
from icmsr_core.train.run.launch import run_script
from icmsr_core.train.tasks.building import latent_factor, level_widths, training_base
from tests.support.script_process import ROOT, ScriptProcess

TIMESTEPS = (0, 50, 500, 950, 999)


class KnowingBackbone:
    """Knows the clean latent, and therefore the noise; notes what it is given, and empties the list of features."""

    def __init__(self, latent, prediction, family="nano"):
        self.descriptor = BackboneDescriptor(family, latent.shape[1], 8, 16, 0, prediction)
        self.latent = latent
        self.seen = []

    def predict_noise(self, latent, timestep, features=None):
        self.seen.append((latent.clone(), timestep, None if features is None else [one.clone() for one in features]))
        while features:  # as diffusers does with pop(0)
            features.pop(0)
        schedule = self.descriptor.schedule
        if self.descriptor.prediction == "v":
            return schedule.v_from_x0(latent, self.latent, timestep)
        return schedule.eps_from_x0(latent, self.latent, timestep)


def latent(count=3):
    return torch.randn(count, 4, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_who_knows_the_noise_estimates_the_truth_at_every_timestep(prediction):
    truth = latent()
    backbone = KnowingBackbone(truth, prediction)
    estimates = clean_estimates(backbone, truth, TIMESTEPS, seeded_noise(truth, 0))
    assert len(estimates) == len(TIMESTEPS)
    for estimate in estimates:
        assert estimate.dtype == torch.float64
        torch.testing.assert_close(estimate, truth, rtol=0, atol=1e-12)
        assert float(latent_error(estimate, truth).max()) < 1e-24
    assert [t for _, t, _ in backbone.seen] == list(TIMESTEPS)


def test_an_estimate_of_the_wrong_prediction_is_not_the_truth():
    """Or the test above would pass whatever the closed form."""
    truth = latent()
    backbone = KnowingBackbone(truth, "v")
    backbone.descriptor = BackboneDescriptor("nano", 4, 8, 16, 0, "eps")
    backbone.predict_noise = lambda z, t, features=None: backbone.descriptor.schedule.v_from_x0(z, truth, t)
    assert float(latent_error(clean_estimates(backbone, truth, [500], seeded_noise(truth, 0))[0], truth).min()) > 0.1


def test_noise_is_the_same_with_and_without_features_and_at_all_timesteps():
    truth = latent()
    backbone = KnowingBackbone(truth, "eps")
    noise = seeded_noise(truth, 3)
    features = [torch.randn(3, 8, 4, 6), torch.randn(3, 16, 2, 3)]
    before = [one.clone() for one in features]
    clean_estimates(backbone, truth, TIMESTEPS, noise)
    clean_estimates(backbone, truth, TIMESTEPS, noise, features)
    plain, conditioned = backbone.seen[: len(TIMESTEPS)], backbone.seen[len(TIMESTEPS) :]
    for (a, _, nothing), (b, t, given) in zip(plain, conditioned):
        assert torch.equal(a, b)
        assert nothing is None
        assert len(given) == 2, "the list was emptied by the timestep before"
        assert all(map(torch.equal, given, before))
        scale, sigma = backbone.descriptor.schedule.a_s(t, truth)
        torch.testing.assert_close((b - scale * truth) / sigma, noise, rtol=0, atol=1e-10)
    assert len(features) == 2
    assert all(map(torch.equal, features, before))


def test_seeded_noise_is_a_sample_s_own():
    some = seeded_noise(latent(5), 7)
    assert torch.equal(some, seeded_noise(latent(5), 7))
    assert torch.equal(some[:2], seeded_noise(latent(2), 7)), "it does not depend on the size of the batch"
    assert not torch.equal(some, seeded_noise(latent(5), 8))
    assert not torch.equal(some[0], some[1])
    assert some.dtype == torch.float64
    many = seeded_noise(torch.zeros(2, 4, 64, 64), 0)
    assert abs(float(many.mean())) < 0.02
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_estimates_raise_for_what_they_cannot_do():
    truth = latent()
    noise, backbone = seeded_noise(truth, 0), KnowingBackbone(truth, "eps")
    for t in (-1, 1000):
        with pytest.raises(IcmsrError, match=f"between 0 and 999, got {t}"):
            clean_estimates(backbone, truth, [500, t], noise)
    assert not backbone.seen, "a bad timestep is found before the first pass"
    with pytest.raises(IcmsrError, match="timesteps is empty"):
        clean_estimates(backbone, truth, [], noise)
    with pytest.raises(IcmsrError, match=r"\[N, 4, h, w\], got \[3, 2, 4, 6\]"):
        clean_estimates(backbone, truth[:, :2], [500], noise[:, :2])
    with pytest.raises(IcmsrError, match=r"\[3, 4, 4, 6\] and \[2, 4, 4, 6\]"):
        clean_estimates(backbone, truth, [500], noise[:2])
    with pytest.raises(IcmsrError, match="without its generator"):
        clean_estimates(KnowingBackbone(truth, "residual"), truth, [200], noise)


def picture(value, side=64):
    return np.full((side, side, 3), value, np.float32)


def test_the_grid_shows_every_picture_under_its_label():
    rows = {"none": [picture(0.25), picture(0.5)], "icm": [picture(0.75), picture(0.125)]}
    maps = {"icm": {"colormap": picture(0.375), "edges": picture(0.0)}}
    grid = manifold_grid(picture(1 / 16), (200, 800), rows, maps)
    assert grid.dtype == np.float32
    assert grid.min() >= 0
    assert grid.max() <= 1
    side = 64 * math.ceil(MIN_CELL / 64)
    for value in (1 / 16, 0.25, 0.5, 0.75, 0.125, 0.375, 0.0):
        assert (grid == np.float32(value)).all(-1).sum() == side * side, f"picture {value} is not whole"
    blank = manifold_grid(picture(1 / 16), (200, 800), rows)
    assert blank.shape[1] < grid.shape[1]
    two_labels = [manifold_grid(picture(1 / 16), steps, rows) for steps in ((200, 800), (200, 801))]
    assert not np.array_equal(*two_labels), "the timestep is written over its picture"
    with pytest.raises(IcmsrError, match="row 'icm' must have a picture for each of 2 timesteps, got 1"):
        manifold_grid(picture(0.5), (200, 800), {**rows, "icm": [picture(0)]})
    with pytest.raises(IcmsrError, match="one size"):
        labelled_grid({"a": [("x", picture(0)), ("y", picture(0, 32))]})
    with pytest.raises(IcmsrError, match="the same number of cells in every row"):
        labelled_grid({"a": [("x", picture(0))], "b": []})
    with pytest.raises(IcmsrError, match="a grid needs pictures of one size"):
        labelled_grid({})


def view(values):
    names = tuple(f"{number}.png" for number in range(len(next(iter(values.values()))[0])))
    full = {arm: dict.fromkeys(MEASURES, levels) for arm, levels in values.items()}
    return View((200, 800), names, full, dict.fromkeys(MEASURES, 3.0), picture(0))


def test_differences_between_arms_are_paired_by_picture():
    """Pictures differ by far more than the arms do: an unpaired error would drown the difference."""
    some = view({"none": [[1.0, 5.0, 9.0], [2.0, 4.0, 6.0]], "icm": [[0.5, 4.6, 8.4], [2.0, 4.0, 6.0]]})
    row = summary(some)["icm"]["latent_mse"][0]
    paired = [-0.5, -0.4, -0.6]
    assert row["t"] == 200
    assert row["difference"] == pytest.approx(-0.5)
    assert row["difference_error"] == pytest.approx(np.std(paired, ddof=1) / math.sqrt(3))
    assert row["error"] == pytest.approx(np.std([0.5, 4.6, 8.4], ddof=1) / math.sqrt(3))
    assert "difference" not in summary(some)["none"]["latent_mse"][0]
    text = markdown(some)
    assert "| t | none | icm | icm − none |" in text
    assert "| 200 | 5.0000 | 4.5000 | -0.5000 ± 0.0577 |" in text
    assert "| 800 | 4.00 | 4.00 | +0.00 ± 0.00 |" in text
    assert "an estimate of zeros: 3.0000." in text
    figure = error_figure(some)
    assert len(figure.axes) == 2 * len(MEASURES)
    assert figure.axes[0].get_yscale() == "log"
    legend = {label.get_text() for label in figure.legends[0].get_texts()}
    assert legend == {"none", "icm", "an estimate of zeros", "the truth's own latent, decoded"}
    relative = figure.axes[len(MEASURES)].containers[0].lines[0].get_ydata()
    assert relative == pytest.approx([-10, 0]), "per cent of the arm without a condition"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three photographs with some structure, and a random adapter of the embedded base."""
    folder = tmp_path_factory.mktemp("view")
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(3):
        coarse = Image.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        coarse.resize((90, 80), Image.Resampling.BICUBIC).save(folder / "photos" / f"{number}.png")
    base = training_base("")
    torch.manual_seed(0)
    for name, channels in (("adapter", 4), ("grey", 1)):
        adapter = make_adapter(channels, latent_factor(base), level_widths(base))
        description = {"structure": StructureConfig(cells=2).describe()} if name == "adapter" else {}
        save_adapter(folder / name, adapter, description, torch.float32)
    return folder


def arm(files, **options):
    return ConditionConfig(**{"cells": 2, "adapters": (str(files / "adapter"),), **options})


def config(files, **options):
    return ViewConfig(
        **{
            "pictures": str(files / "photos"),
            "arms": {"icm": arm(files)},
            "crop": 64,
            "draws": 2,
            "timesteps": (200, 800),
            **options,
        }
    )


def test_measuring_is_determined_by_the_seed_and_hears_the_adapter(files):
    base, cpu = training_base(""), torch.device("cpu")
    teacher = open_teacher(base, cpu)

    def run(**options):
        chosen = config(files, count=2, **options)
        return measure_view(teacher, load_arms(chosen, base, cpu), *read_crops(chosen), chosen, cpu)

    first, again, other = run(), run(), run(seed=1)
    assert first.values == again.values
    assert np.array_equal(first.grid, again.grid)
    assert first.values != other.values
    assert first.pictures == ("0.png", "1.png")
    for name in MEASURES:
        assert first.values["icm"][name] != first.values["none"][name], "the features reach the network"
    alone = run(arms={"icm": arm(files, adapter_weights=(0.0,))})
    for name in MEASURES:
        assert alone.values["icm"][name] == alone.values["none"][name] == first.values["none"][name], "the same noise"
    for t, error in zip(first.timesteps, first.values["none"]["latent_mse"]):
        assert all(0 < value < 50 for value in error), t
    assert max(first.values["none"]["latent_mse"][0]) < min(first.values["none"]["latent_mse"][1])
    assert first.reference["psnr_y"] > np.mean(first.values["none"]["psnr_y"][1])
    with torch.no_grad():
        truth = teacher.encode(read_crops(config(files, count=2))[1] * 2 - 1)
    assert first.reference["latent_mse"] == pytest.approx(float(truth.square().mean()), rel=1e-4)


def test_crops_are_the_middles(files):
    names, crops = read_crops(config(files, count=2))
    assert names == ("0.png", "1.png")
    whole = read_picture(files / "photos" / "1.png").rgb[8:72, 13:77]
    assert np.array_equal(crops[1].permute(1, 2, 0).numpy(), whole)


def test_maps_have_the_cells_of_the_configuration(files):
    """The adapter's file says 2 cells and is taken at its word; the maps have those of the configuration."""
    chosen, base = config(files, cells=4), training_base("")
    check_view(chosen, base)
    condition, _ = load_arms(chosen, base, torch.device("cpu"))["icm"]
    assert condition.cells == 4
    assert load_arms(config(files), base, torch.device("cpu"))["icm"][0].cells == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": {}}, "arms must name one or more"),
        ({"arms": {"none": ConditionConfig()}}, "other than 'none'"),
        ({"arms": {"words": ConditionConfig("text")}}, "arms.words: the condition text has no adapter"),
        ({"arms": {"icm": ConditionConfig(source="input")}}, "source must be truth and guidance 1 here, got input"),
        ({"arms": {"icm": ConditionConfig(guidance=2.0)}}, "got truth and 2"),
        ({"timesteps": ()}, "one or more and ascend"),
        ({"timesteps": (800, 200)}, r"ascend, got \[800, 200\]"),
        ({"count": 1}, "count must be at least 2, got 1"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"cells": 65}, "cells must be between 1 and 64"),
    ],
)
def test_wrong_values_are_refused(files, options, words):
    with pytest.raises(IcmsrError, match=words):
        config(files, **options)


def load_script(monkeypatch):
    spec = importlib.util.spec_from_file_location("teacher_view_script", ROOT / "train" / "teacher_view.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--timesteps=[200,1000]"], ["between 0 and 999, got 1000"]),
        (["--crop=76"], ["multiple of 8", "76"]),
        (["--crop=96"], ["0.png", "90 x 80 is smaller than the crop of 96"]),
        (["--pictures={empty}"], ["0 pictures", "choose another folder"]),
        (["--pictures=/none/at/all"], ["/none/at/all", "no such folder"]),
        (["--arms.icm.adapters=['{grey}']"], ["arms.icm", "takes 1 channels, the condition has 4"]),
        (["--arms.icm.adapters=['/none']"], ["arms.icm", "/none", "no such adapter"]),
        (["--arms.icm.cells=3"], ["was trained for", "'cells': 2"]),
        (["--arms.edges.kind=edges"], ["arms.edges", "needs 1 adapter"]),
    ],
)
def test_the_script_refuses_in_one_line_before_it_reads_weights(files, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    script = load_script(monkeypatch)
    monkeypatch.setattr(script, "open_teacher", lambda *_: pytest.fail("weights were read"))
    given = [flag.format(empty=tmp_path / "empty", grey=files / "grey.safetensors") for flag in flags]
    monkeypatch.setattr(sys, "argv", ["teacher_view.py", *flags_of(files, tmp_path / "out"), *given])
    assert run_script(script.main) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    for word in words:
        assert word in errors
    assert not (tmp_path / "out").exists()


def flags_of(files, out):
    return [
        "--config",
        str(ROOT / "train" / "configs" / "teacher_view.yaml"),
        "--base=",
        "--cells=0",
        "--crop=64",
        f"--pictures={files / 'photos'}",
        f"--arms.icm.adapters=['{files / 'adapter.safetensors'}']",
        f"--out={out}",
        "--device=cpu",
    ]


@pytest.mark.long
def test_the_script_writes_its_four_files(files, tmp_path):
    flags = [
        *flags_of(files, "out"),
        "--timesteps=[200,950]",
        "--draws=1",
        "--shown=1",
        f"--arms.again={{cells: 2, adapters: ['{files / 'adapter'}'], adapter_weights: [2.0]}}",
    ]
    process = ScriptProcess("teacher_view.py", *flags, folder=tmp_path)
    assert process.wait() == 0, process.output()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "teacher_view.json",
        "teacher_view.md",
        "error_by_noise.png",
        "grid.png",
    }
    text = (out / "teacher_view.json").read_text()
    assert str(tmp_path) not in text
    assert str(files) not in text, "no path of the machine in a file to share"
    content = json.loads(text)
    assert content["pictures"] == ["0.png", "1.png", "2.png"]
    assert content["settings"]["arms"]["icm"]["adapters"] == ["adapter.safetensors"]
    assert list(content["values"]) == ["none", "icm", "again"]
    for measures in content["values"].values():
        assert {name: np.array(levels).shape for name, levels in measures.items()} == dict.fromkeys(MEASURES, (2, 3))
        assert all(math.isfinite(value) for levels in measures.values() for level in levels for value in level)
    table = (out / "teacher_view.md").read_text()
    assert table.count("| t | none | icm | icm − none | again | again − none |") == len(MEASURES)
    assert table.strip() in process.output()
    for name, least in (("error_by_noise.png", 20), ("grid.png", 100)):
        with Image.open(out / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > least, f"{name} shows next to nothing"
    assert read_picture(out / "grid.png").rgb.shape[1] > 4 * MIN_CELL
