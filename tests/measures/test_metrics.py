"""The measures against direct formulas and golden numbers, and the evaluation of folders on real files."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icmsr_core.errors import IcmsrError
from icmsr_core.measures import metrics as metrics_module
from icmsr_core.measures.dists import load_dists
from icmsr_core.measures.evaluation import Evaluation, evaluate_folders
from icmsr_core.measures.feature_networks import ALEXNET
from icmsr_core.measures.lpips import load_lpips
from icmsr_core.measures.metrics import (
    METRICS,
    high_frequency_ratio,
    mean_color_difference,
    metric,
    psnr_y,
    ssim_y,
)
from icmsr_core.measures.niqe import load_niqe, niqe
from icmsr_core.pictures.files import to_tensor
from icmsr_core.steps import Steps
from tests.support.places import REALSR

needs_realsr = pytest.mark.skipif(not REALSR.is_dir(), reason=f"no RealSR pairs in {REALSR}: set ICMSR_REALSR")


def noise(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grating(cycles: int, amplitude: float, *, size: int = 64, axis: int = 0) -> np.ndarray:
    wave = 0.5 + amplitude * np.cos(2 * np.pi * cycles * np.arange(size) / size)
    plane = np.broadcast_to(wave[:, None] if axis == 0 else wave, (size, size))
    return np.repeat(plane[..., None], 3, axis=2)


# --- the measures ----------------------------------------------------------------------------------------------------


def test_psnr_of_known_differences() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    white = np.full((4, 4, 3), 255, np.uint8)
    assert psnr_y(white, black) == pytest.approx(20 * math.log10(255 / 219), abs=1e-6)  # Y 16 and 235
    green = black.copy()
    green[..., 1] = 255
    assert psnr_y(green, black) == pytest.approx(20 * math.log10(255 / 128.553), abs=1e-6)
    assert psnr_y(black, black) == pytest.approx(80)
    one = black.copy()
    one[0, 0] = 1  # Y is off by .86, which rounding would make 1
    assert psnr_y(one, black) == pytest.approx(10 * math.log10(16 * (255 * 255 / 219) ** 2), abs=0.1)  # not 60.2


def test_bytes_and_floats_give_the_same() -> None:
    a, b = noise(1), noise(2)
    for function in (psnr_y, ssim_y, high_frequency_ratio, mean_color_difference):
        assert function(a / 255, b / 255) == pytest.approx(function(a, b), abs=1e-9)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The formula, window by window."""
    x, y = ((picture / 255 @ [65.481, 128.553, 24.966] + 16).round() for picture in (a, b))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = 2.55**2, 7.65**2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            variance = (weights * (p - mean_p) ** 2).sum() + (weights * (q - mean_q) ** 2).sum()
            covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
            structure = max((2 * covariance + c2) / (variance + c2), 0)
            values.append((2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1) * structure)
    return float(np.mean(values))


def test_ssim_is_the_formula() -> None:
    a = noise(1)
    blended = (0.7 * a + 0.3 * noise(2)).astype(np.uint8)
    for b in (blended, noise(3), 255 - a):  # the last has negative structure everywhere
        assert ssim_y(b, a) == pytest.approx(slow_ssim(b, a), abs=1e-9)
    assert ssim_y(a, a) == pytest.approx(1)
    assert ssim_y(255 - a, a) == 0
    assert ssim_y(a[:11, :11], a[:11, :11]) == pytest.approx(1)
    with pytest.raises(IcmsrError, match="at least 11 pixels, got 20 x 10"):
        ssim_y(a[:10], a[:10])


def test_high_frequency_ratio_counts_the_band_and_nothing_else() -> None:
    truth = grating(16, 0.2)  # 16 cycles in 64 pixels: radius .5
    assert high_frequency_ratio(grating(16, 0.1), truth) == pytest.approx(0.25)
    assert high_frequency_ratio(grating(16, 0.4, axis=1), truth) == pytest.approx(4)
    # Radius .25 is outside, the next frequency inside, and so is 1; the mean does not matter.
    assert high_frequency_ratio(grating(8, 0.2), truth) == pytest.approx(0, abs=1e-12)
    assert high_frequency_ratio(grating(9, 0.2), truth) == pytest.approx(1)
    assert high_frequency_ratio(grating(32, 0.2), truth) == pytest.approx(2)  # at half the rate a cosine has all power
    assert high_frequency_ratio(truth + 0.1, truth) == pytest.approx(1)
    # Both axes at .75: radius 1.06 is outside.
    corner = (grating(24, 1) - 0.5) * (grating(24, 1, axis=1) - 0.5) * 0.2 + 0.5
    assert high_frequency_ratio(corner, truth) == pytest.approx(0, abs=1e-12)
    assert math.isnan(high_frequency_ratio(truth, np.full_like(truth, 0.3)))
    one_level = np.full((64, 48, 3), 77, np.uint8)
    one_level[5, 5] += 1
    assert high_frequency_ratio(one_level, one_level) == pytest.approx(1)


def test_mean_color_difference_is_the_worst_channel_in_levels() -> None:
    a = np.full((8, 8, 3), 100, np.uint8)
    b = np.full((4, 6, 3), 100, np.uint8)
    b[..., 1] = 93
    b[..., 2] = 105
    assert mean_color_difference(a, b) == pytest.approx(7)
    assert mean_color_difference(b / 255, a) == pytest.approx(7)
    b[::2, :, 1], b[1::2, :, 1] = 90, 110  # the means count, not the pixels
    assert mean_color_difference(a, b) == pytest.approx(5)


@pytest.mark.parametrize("function", [psnr_y, ssim_y, high_frequency_ratio])
def test_unlike_pictures_are_refused(function: object) -> None:
    with pytest.raises(IcmsrError, match="must have the same size"):
        function(noise(1), noise(1)[1:])
    for bad in (noise(1)[..., 0], noise(1).astype(np.int64), np.zeros((12, 12, 4), np.uint8)):
        with pytest.raises(IcmsrError, match=r"\[height, width, 3\]"):
            function(bad, bad)


@pytest.mark.parametrize("name", ["fsim", "dss", "srsim"])
def test_piq_measures_are_piqs_on_rgb_in_the_unit_range(name: str) -> None:
    piq = pytest.importorskip("piq")
    truth = np.asarray(Image.fromarray(noise(1, 20, 24)).resize((96, 80), Image.Resampling.BICUBIC))
    result = np.asarray(Image.fromarray(truth).resize((40, 30)).resize((96, 80)))
    expected = getattr(piq, name)(*(to_tensor((a / 255).astype(np.float32)) for a in (result, truth)), data_range=1.0)
    assert metric(name)(result, truth) == pytest.approx(float(expected), abs=1e-6)
    assert metric(name)(truth, truth) == pytest.approx(1, abs=1e-5)
    with pytest.raises(IcmsrError, match="must have the same size"):
        metric(name)(result, truth[1:])
    if name != "fsim":  # which takes any size
        with pytest.raises(IcmsrError, match=f"{name} of 2 x 2 pixels"):
            metric(name)(truth[:2, :2], truth[:2, :2])


# --- the registry ----------------------------------------------------------------------------------------------------


def test_each_measure_says_whether_it_needs_a_truth_and_which_way_is_better() -> None:
    assert [name for name, entry in METRICS.items() if not entry.needs_truth] == [
        "niqe",
        "musiq",
        "maniqa",
        "clipiqa",
        "topiq_nr",
        "liqe",
    ]
    assert [name for name, entry in METRICS.items() if entry.lower_better] == [
        "lpips",
        "lpips_vgg",
        "dists",
        "niqe",
    ]
    assert [name for name, entry in METRICS.items() if entry.lower_better is None] == ["hf"]
    assert all(name == entry.name for name, entry in METRICS.items())
    assert metric("psnr")(noise(1), noise(2)) == psnr_y(noise(1), noise(2))
    with pytest.raises(IcmsrError, match=r"unknown metric 'psnrr'.*psnr, ssim"):
        metric("psnrr")
    with pytest.raises(IcmsrError, match="ssim compares the result with a truth"):
        metric("ssim")(noise(1))


@pytest.mark.parametrize(
    ("name", "package", "advice"),
    [
        ("fsim", "piq", r"pip install \"icm-sr\[eval\]\""),
        ("dss", "piq", "pip install"),
        ("srsim", "piq", "pip install"),
        ("lpips", "pyiqa", r"pip install pyiqa .*metric_weights\.py --alex .* and pass --weights-dir DIR"),
        ("niqe", "pyiqa", r"pip install pyiqa .*metric_weights\.py --niqe .* and pass --weights-dir DIR"),
        ("musiq", "pyiqa", "pip install pyiqa"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(IcmsrError, match=advice):
        metric(name)(noise(1), noise(2))
    with pytest.raises(IcmsrError, match=advice):
        evaluate_folders(tmp_path / "missing", tmp_path / "missing", metrics=["psnr", name])


@pytest.mark.long
def test_lpips_dists_and_niqe_are_computed_with_converted_weights(
    metric_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    truth = noise(1, 96, 192)
    result = (0.6 * truth + 0.4 * noise(2, 96, 192)).astype(np.uint8)
    signed = [to_tensor((a / 255).astype(np.float32)) * 2 - 1 for a in (result, truth)]
    expected = {
        "lpips": load_lpips(metric_weights / "lpips_alex.safetensors", ALEXNET)(*signed),
        "lpips_vgg": load_lpips(metric_weights / "lpips_vgg.safetensors")(*signed),
        "dists": load_dists(metric_weights / "dists.safetensors")(*signed),
        "niqe": niqe((result / 255).astype(np.float32), load_niqe(metric_weights / "niqe.safetensors")),
    }
    for name, value in expected.items():
        entry = metric(name, metric_weights)
        assert entry(result, truth) == pytest.approx(float(value), rel=1e-6)
        assert entry(result / 255, truth / 255) == pytest.approx(float(value), rel=1e-5)
        assert (entry.needs_truth, entry.lower_better) == (name != "niqe", True)
    assert metric("niqe", metric_weights)(result) == pytest.approx(expected["niqe"])
    with pytest.raises(IcmsrError, match="must have the same size"):
        metric("dists", metric_weights)(result, truth[1:])
    assert metric("psnr", metric_weights) is metric("psnr")
    with pytest.raises(IcmsrError, match="pip install pyiqa"):
        metric("musiq", metric_weights).prepare()


def test_a_missing_file_of_weights_is_named_with_its_command(tmp_path: Path) -> None:
    for name, file in (("lpips", "lpips_alex"), ("lpips_vgg", "lpips_vgg"), ("dists", "dists"), ("niqe", "niqe")):
        message = refused(tmp_path / "missing", tmp_path / "missing", metrics=["psnr", name], weights=tmp_path / "none")
        assert str(tmp_path / "none" / f"{file}.safetensors") in message
        assert "python train/metric_weights.py --" in message


def test_psnr_and_ssim_are_those_of_pyiqa_and_its_networks_run() -> None:
    pyiqa = pytest.importorskip("pyiqa")
    truth = noise(1, 64, 48)
    result = (0.6 * truth + 0.4 * noise(2, 64, 48)).astype(np.uint8)
    tensors = [to_tensor((a / 255).astype(np.float32)) for a in (result, truth)]
    for name, function in (("psnr", psnr_y), ("ssim", ssim_y)):
        reference = pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr", device="cpu")
        assert function(result, truth) == pytest.approx(float(reference(*tensors)), abs=1e-5)
    # The road of the network metrics, with two that need no weights.
    with_truth = metrics_module._network("mad", needs_truth=True, lower_better=True)
    alone = metrics_module._network("entropy", needs_truth=False, lower_better=False)
    mad, entropy = (pyiqa.create_metric(name, device="cpu") for name in ("mad", "entropy"))
    assert with_truth(result, truth) == pytest.approx(float(mad(*tensors)), rel=1e-4)
    assert alone(result) == pytest.approx(float(entropy(tensors[0])), rel=1e-4)
    with pytest.raises(IcmsrError, match="no-such-metric"):
        metrics_module._network("no-such-metric", needs_truth=False, lower_better=False).prepare()


# --- folders ---------------------------------------------------------------------------------------------------------


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path)


def test_folders_are_paired_by_stem_and_averaged(tmp_path: Path) -> None:
    pairs = {"a": (noise(1), noise(2)), "b": (noise(3), noise(4)), "c": (noise(5), np.full((24, 20, 3), 9, np.uint8))}
    for stem, (result, truth) in pairs.items():
        save(tmp_path / "sr" / f"{stem}.png", result)
        save(tmp_path / "hr" / f"{stem}.{'bmp' if stem == 'b' else 'PNG'}", truth)
        save(tmp_path / "lq" / f"{stem}.png", np.full((6, 5, 3), 50, np.uint8))
    steps = []
    found = evaluate_folders(
        tmp_path / "sr",
        str(tmp_path / "hr"),
        tmp_path / "lq",
        ["hf", "psnr", "hf"],
        Steps(lambda done, total: steps.append((done, total))),
    )
    assert list(found.rows) == ["a", "b", "c"]
    for stem, (result, truth) in pairs.items():
        row = found.rows[stem]
        assert list(row) == ["hf", "psnr", "color"]
        assert row["psnr"] == pytest.approx(psnr_y(result, truth), abs=1e-6)
        assert row["color"] == pytest.approx(np.abs(result.mean(axis=(0, 1)) - 50).max(), abs=1e-4)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert math.isnan(found.rows["c"]["hf"])  # a flat truth
    assert found.means["hf"] == pytest.approx((found.rows["a"]["hf"] + found.rows["b"]["hf"]) / 2)
    assert found.means["psnr"] == pytest.approx(np.mean([row["psnr"] for row in found.rows.values()]))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["pictures"] == 3
    assert data["means"]["psnr"] == found.means["psnr"]
    assert data["rows"]["c"]["hf"] is None
    assert data["rows"]["a"] == found.rows["a"]


def test_defaults_need_no_optional_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("piq", "pyiqa"):
        monkeypatch.setitem(sys.modules, package, None)
    for folder in ("sr", "hr"):
        save(tmp_path / folder / "a.png", noise(1))
    assert evaluate_folders(tmp_path / "sr", tmp_path / "hr").means == pytest.approx({"psnr": 80, "ssim": 1, "hf": 1})


def test_the_table_of_results_is_aligned() -> None:
    rows = {"short": {"psnr": 7.5, "hf": 0.25}, "a longer name": {"psnr": 123.45678, "hf": math.nan}}
    table = Evaluation(rows=rows, means={"psnr": 65.5, "hf": 0.25}).table()
    assert table.splitlines() == [
        "picture            psnr      hf",
        "short            7.5000  0.2500",
        "a longer name  123.4568       -",
        "mean of 2       65.5000  0.2500",
    ]


def refused(*folders: Path, **options: object) -> str:
    with pytest.raises(IcmsrError) as caught:
        evaluate_folders(*folders, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_do_not_match_are_refused(tmp_path: Path) -> None:
    sr, hr, lq = tmp_path / "sr", tmp_path / "hr", tmp_path / "lq"
    for folder, names in ((sr, "abc"), (hr, "bcd"), (lq, "ab")):
        for name in names:
            save(folder / f"{name}.png", noise(1))
    message = refused(sr, hr)
    assert "hr has no a" in message
    assert "sr has no d" in message
    save(hr / "a.png", noise(1))
    (hr / "d.png").unlink()
    assert "lq has no c" in refused(sr, hr, lq)
    assert "no such folder" in refused(sr, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(tmp_path / "empty", hr)
    save(sr / "a.bmp", noise(1))
    assert "a.bmp and a.png differ in the extension only" in refused(sr, hr)
    for index in range(15):
        save(lq / f"x{index:02}.png", noise(1))
    assert "x09 and 5 more" in refused(hr, lq)


def test_sizes_that_differ_are_all_named_before_anything_is_measured(tmp_path: Path) -> None:
    for name, cut in (("a", 0), ("b", 1), ("c", 2)):
        save(tmp_path / "sr" / f"{name}.png", noise(1)[cut:])
        save(tmp_path / "hr" / f"{name}.png", noise(1))
    steps: list[int] = []
    message = refused(tmp_path / "sr", tmp_path / "hr", steps=Steps(lambda done, total: steps.append(done)))
    assert "b.png is 20 x 23 and its truth 20 x 24, c.png is 20 x 22" in message
    assert "a.png" not in message
    assert not steps


def test_a_turned_picture_counts_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "hr" / "a.png", np.rot90(noise(1), -1))
    (tmp_path / "sr").mkdir()
    Image.fromarray(noise(1)).save(tmp_path / "sr" / "a.png", exif=exif)
    assert evaluate_folders(tmp_path / "sr", tmp_path / "hr").means["psnr"] == pytest.approx(80)
    save(tmp_path / "hr" / "a.png", noise(1))
    assert "a.png is 24 x 20 and its truth 20 x 24" in refused(tmp_path / "sr", tmp_path / "hr")


def test_errors_on_the_way_name_the_file(tmp_path: Path) -> None:
    for folder in ("sr", "hr"):
        save(tmp_path / folder / "small.png", noise(1)[:9])
    assert "small.png: SSIM needs" in refused(tmp_path / "sr", tmp_path / "hr")
    (tmp_path / "hr" / "small.png").write_text("not a picture")
    assert str(tmp_path / "hr" / "small.png") in refused(tmp_path / "sr", tmp_path / "hr")


# --- golden numbers: RealSR, 100 pairs, and the pictures that OSEDiff's authors published -----------------------------


@pytest.fixture(scope="module")
def bicubic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bicubic")
    for path in (REALSR / "lr").glob("*.png"):
        with Image.open(path) as image:
            large = image.convert("RGB").resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
        large.save(folder / path.name, compress_level=1)
    return folder


@pytest.mark.long
@needs_realsr
@pytest.mark.parametrize(
    ("method", "psnr", "ssim", "hf", "color"),
    [("osediff", 25.1511, 0.7341, 1.4736, 0.52), ("bicubic", 27.1128, 0.7555, 0.1198, 0.0)],
)
def test_golden_values_of_all_pairs(
    bicubic: Path, method: str, psnr: float, ssim: float, hf: float, color: float
) -> None:
    folder = bicubic if method == "bicubic" else REALSR / method
    means = evaluate_folders(folder, REALSR / "hr", REALSR / "lr").means
    assert round(means["psnr"], 4) == psnr  # 25.1511 and .7341 are the published values
    assert round(means["ssim"], 4) == ssim
    assert round(means["hf"], 4) == hf
    assert means["color"] == pytest.approx(color, abs=0.005)


@needs_realsr
@pytest.mark.parametrize(
    ("method", "fsim", "dss", "srsim"), [("osediff", 0.83449, 0.56586, 0.90636), ("bicubic", 0.81958, 0.51145, 0.89743)]
)
def test_golden_values_of_every_tenth_pair(bicubic: Path, method: str, fsim: float, dss: float, srsim: float) -> None:
    # All 100 pairs: FSIM .8358 / .8310, DSS .5838 / .5331, SR-SIM .9095 / .9070.
    pytest.importorskip("piq")
    folder = bicubic if method == "bicubic" else REALSR / method
    found = {"fsim": [], "dss": [], "srsim": []}
    for truth_path in sorted((REALSR / "hr").glob("*.png"))[::10]:
        result, truth = (np.asarray(Image.open(path).convert("RGB")) for path in (folder / truth_path.name, truth_path))
        for name, values in found.items():
            values.append(metric(name)(result, truth))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means == pytest.approx({"fsim": fsim, "dss": dss, "srsim": srsim}, abs=5e-5)
