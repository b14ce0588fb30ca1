"""LPIPS and its converted file against the published package."""

import runpy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.train.losses import lpips
from icmsr_core.train.losses.lpips import Lpips, convert_lpips, load_lpips
from icmsr_core.weights.tensor_files import write_tensors
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.loss_pictures import HEADS, noisy, picture
from tests.support.places import ROOT


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_lpips_equals_the_published_one(reference, converted, dtype, precision):
    truth = picture(72, 2).to(dtype)
    result = noisy(truth)[..., :65]  # a width that the poolings do not divide
    truth = truth[..., :65]
    ours = load_lpips(converted).to(dtype)
    theirs = reference.to(dtype)
    values, gradients = [], []
    for measure in (ours, lambda a, b: theirs(a, b).mean()):
        given = result.clone().requires_grad_()
        value = measure(given, truth)
        value.backward()
        values.append(value.item())
        gradients.append(given.grad)
    reference.float()
    assert values[1] > 0.01
    assert values[0] == pytest.approx(values[1], rel=precision)
    assert (gradients[0] - gradients[1]).norm() < precision * gradients[1].norm()


def test_lpips_is_frozen_and_draws_no_random_number(converted):
    before = torch.random.get_rng_state()
    measure = load_lpips(converted)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in measure.parameters())
    image = picture(32)
    assert measure(image, image) == 0
    truth = noisy(image).requires_grad_()
    measure(image.requires_grad_(), truth).backward()
    assert image.grad is not None
    assert truth.grad is None


def test_lpips_runs_in_float32_under_autocast(converted):
    measure, image = load_lpips(converted), picture(32)
    plain = measure(noisy(image), image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(noisy(image), image), plain)


def test_lpips_of_dead_features_has_a_gradient(converted):
    tensors = load_file(converted)
    tensors["features.2.bias"] = torch.full_like(tensors["features.2.bias"], -1e4)
    image = picture(32)
    given = noisy(image).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        Lpips(tensors)(given, image).backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize(
    ("result", "truth", "message"),
    [
        ((1, 3, 32, 32), (1, 3, 32, 48), "one shape"),
        ((1, 1, 32, 32), (1, 1, 32, 32), "3, H, W"),
        ((1, 3, 32, 15), (1, 3, 32, 15), "16 px"),
    ],
)
def test_lpips_refuses_pictures_it_cannot_take(converted, result, truth, message):
    with pytest.raises(IcmsrError, match=message):
        load_lpips(converted)(torch.zeros(result), torch.zeros(truth))


def test_lpips_takes_the_smallest_picture(converted):
    assert load_lpips(converted)(noisy(picture(16)), picture(16)) > 0


def test_the_file_says_what_it_is(converted, vgg):
    with safe_open(str(converted), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "icmsr-lpips"
    assert lpips.HEADS_SHA256 in metadata["icmsr"]
    assert lpips._sha256(vgg) in metadata["icmsr"]


def test_the_heads_of_the_package_are_the_published_ones():
    assert lpips._sha256(HEADS) == lpips.HEADS_SHA256
    assert lpips.VGG_SHA256.startswith("397923af")


def test_conversion_checks_the_hash(vgg, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    with pytest.raises(IcmsrError, match=r"vgg16\.pth: SHA-256 .*397923af.*--trust=true"):
        convert_lpips(vgg, HEADS, out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(lpips, "VGG_SHA256", lpips._sha256(vgg))
    convert_lpips(vgg, HEADS, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    with pytest.raises(IcmsrError, match="a78928a0"):
        convert_lpips(vgg, vgg, out)


def test_a_pickle_with_code_is_not_run(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"features.0.weight": HostileValue(mark)}, path)
    with pytest.raises(IcmsrError, match="no code in it was run"):
        convert_lpips(path, HEADS, tmp_path / "out.safetensors", trust=True)
    assert_runs_code(path, mark)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("features.28.bias"), "tensors are missing, such as features.28.bias"),
        (
            lambda state: state.update({"features.30.weight": torch.zeros(1)}),
            "tensors are unexpected.*features.30.weight",
        ),
        (lambda state: state.update({"features.0.bias": torch.zeros(32)}), r"features.0.bias is \[32\], expected \[64"),
        (lambda state: state["features.0.bias"].fill_(float("nan")), "features.0.bias holds"),
        (lambda state: state.update({"features.0.bias": "text"}), "must hold tensors only, .* not: features.0.bias"),
    ],
)
def test_conversion_checks_the_tensors(vgg, tmp_path, change, message):
    state = torch.load(vgg, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(IcmsrError, match=message):
        convert_lpips(tmp_path / "changed.pth", HEADS, tmp_path / "out.safetensors", trust=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_conversion_refuses_other_files(vgg, tmp_path):
    out = tmp_path / "out.safetensors"
    for network, message in (("alex", r"lin0.*expected \[1, 64, 1, 1\]|lin1.*expected"), ("squeeze", "lin")):
        with pytest.raises(IcmsrError, match=message):
            convert_lpips(vgg, HEADS.with_name(f"{network}.pth"), out, trust=True)
    (tmp_path / "damaged.pth").write_bytes(vgg.read_bytes()[:1000])
    with pytest.raises(IcmsrError, match="truncated, damaged"):
        convert_lpips(tmp_path / "damaged.pth", HEADS, out, trust=True)
    with pytest.raises(IcmsrError, match="no such file"):
        convert_lpips(tmp_path / "nothing.pth", HEADS, out)
    with pytest.raises(IcmsrError, match=r"must end in \.safetensors"):
        convert_lpips(vgg, HEADS, vgg)


def test_loading_refuses_other_files(converted, tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(IcmsrError, match="no such file"):
        load_lpips(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(IcmsrError, match=r"not a converted LPIPS file.*lpips_weights\.py"):
        load_lpips(path)
    tensors = load_file(converted)
    write_tensors(path, tensors, {"format": "icmsr-lpips", "icmsr": '{"format_version": 2}'})
    with pytest.raises(IcmsrError, match="format version 2"):
        load_lpips(path)
    write_tensors(path, tensors, {"format": "icmsr-lpips"})
    with pytest.raises(IcmsrError, match="convert it again"):
        load_lpips(path)
    del tensors["heads.4"]
    write_tensors(path, tensors, {"format": "icmsr-lpips", "icmsr": '{"format_version": 1}'})
    with pytest.raises(IcmsrError, match=r"tensors are missing, such as heads\.4"):
        load_lpips(path)


def run_script(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lpips_weights.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train" / "lpips_weights.py"), run_name="__main__")
    return ended.value.code


def test_the_script_converts_what_is_published_when_it_is_trusted(vgg, converted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out.safetensors"
    files = ["--vgg", vgg, "--heads", HEADS, "--out", out]
    assert run_script(monkeypatch, *files) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert run_script(monkeypatch, *files, "--trust=true") == 0
    made, expected = load_file(out), load_file(converted)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in made)
