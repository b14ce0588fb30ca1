"""T2I-Adapters on disk: ours and others', read back, held against the base, and never executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.train.networks.adapters import (
    check_adapter,
    load_adapter,
    make_adapter,
    read_adapter_config,
    save_adapter,
)
from icmsr_core.weights.generator_file import ADAPTER_FORMAT
from tests.support.hostile_pickle import HostileValue, assert_runs_code

WIDTHS = [32, 64]
STRUCTURE = {"names": ["colormap", "edges"], "cells": 8, "canny": [100.0, 200.0]}
PICKLE, WEIGHTS, CONFIG = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "config.json"


def some_adapter(channels: int = 4, factor: int = 8, widths: list[int] = WIDTHS) -> T2IAdapter:
    torch.manual_seed(channels)
    return make_adapter(channels, factor, widths)


def maps(channels: int = 4) -> Tensor:
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Path, T2IAdapter]:
    """The single file, the folder, and the adapter that they hold."""
    adapter = some_adapter()
    single, folder = save_adapter(tmp_path / "adapter", adapter, {"structure": STRUCTURE}, torch.float32)
    return single, folder, adapter


def same(one: T2IAdapter, other: T2IAdapter, channels: int = 4) -> None:
    with torch.no_grad():
        first, second = one(maps(channels)), other(maps(channels))
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_features_have_the_units_sizes():
    features = some_adapter()(maps())
    assert [tuple(level.shape) for level in features] == [(2, 32, 8, 8), (2, 64, 4, 4)]


def test_both_forms_read_back(saved):
    single, folder, adapter = saved
    for path in (single, folder):
        loaded = load_adapter(path)
        same(adapter, loaded)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        config = read_adapter_config(path)
        assert config["in_channels"] == 4
        assert config["channels"] == WIDTHS
        assert config["downscale_factor"] == 8
        assert config["structure"] == STRUCTURE
        check_adapter(path, 4, 8, WIDTHS, STRUCTURE)


def test_the_single_file_describes_itself(saved):
    with safe_open(str(saved[0]), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == ADAPTER_FORMAT
    assert json.loads(metadata["icmsr"])["structure"] == STRUCTURE
    assert load_file(saved[0]).keys() == saved[2].state_dict().keys() == load_file(saved[1] / WEIGHTS).keys()


def test_diffusers_reads_the_folder(saved):
    _, folder, adapter = saved
    same(adapter, T2IAdapter.from_pretrained(folder, low_cpu_mem_usage=False))


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    adapter = some_adapter()
    single, _ = save_adapter(tmp_path / "adapter", adapter, {}, torch.float16)
    assert {value.dtype for value in load_file(single).values()} == {torch.float16}
    loaded = load_adapter(single)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    same(loaded, adapter.half().float())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_saving_again_replaces_the_old_one(saved, tmp_path):
    torch.manual_seed(99)
    newer = make_adapter(4, 8, WIDTHS)
    save_adapter(tmp_path / "adapter", newer, {}, torch.float32)
    same(newer, load_adapter(saved[0]))
    same(newer, load_adapter(saved[1]))
    assert not list(tmp_path.rglob("*.partial"))


# Other people's files.


@pytest.mark.parametrize("factor", [8, 4])
def test_a_file_without_description_is_read_from_its_shapes(tmp_path, factor):
    adapter = some_adapter(3, factor)
    path = tmp_path / "foreign.safetensors"
    save_file(adapter.state_dict(), path)
    config = read_adapter_config(path)
    assert config["channels"] == WIDTHS
    assert config["num_res_blocks"] == 2
    assert config["in_channels"] == 3 * factor**2
    check_adapter(path, 3, factor, WIDTHS, STRUCTURE)  # it does not say what it was trained for
    with pytest.raises(IcmsrError, match="takes 3 channels, the condition has 4"):
        check_adapter(path, 4, factor, WIDTHS)
    same(adapter, load_adapter(path, factor), 3)


def public_folder(folder: Path, state: object) -> Path:
    """A public adapter as it is downloaded: config.json and a pickle."""
    some_adapter().save_config(folder)
    torch.save(state, folder / PICKLE)
    return folder


def test_a_public_pickle_is_read(tmp_path):
    adapter = some_adapter()
    folder = public_folder(tmp_path / "public", adapter.state_dict())
    check_adapter(folder, 4, 8, WIDTHS, STRUCTURE)
    same(adapter, load_adapter(folder))
    same(adapter, T2IAdapter.from_pretrained(folder, low_cpu_mem_usage=False))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_does_not_run(tmp_path, how):
    target = tmp_path / "it ran"
    state = {**some_adapter().state_dict(), "payload": HostileValue(target)}
    folder = public_folder(tmp_path / "public", state)
    if how == "pickle":
        (folder / PICKLE).write_bytes(pickle.dumps({"payload": HostileValue(target)}, protocol=2))
    with pytest.raises(IcmsrError, match=PICKLE):
        load_adapter(folder)
    assert_runs_code(folder / PICKLE, target)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 half a zip"])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    folder = public_folder(tmp_path / "public", {})
    (folder / PICKLE).write_bytes(content)
    with pytest.raises(IcmsrError, match=PICKLE):
        load_adapter(folder)


# What does not fit.


@pytest.mark.parametrize("form", [0, 1], ids=["file", "folder"])
def test_an_adapter_that_does_not_fit_is_refused(saved, form):
    path = saved[form]
    with pytest.raises(IcmsrError, match="takes 4 channels, the condition has 3"):
        check_adapter(path, 3, 8, WIDTHS)
    with pytest.raises(IcmsrError, match=r"widths \[32, 64\], the base has \[32, 64, 64\]"):
        check_adapter(path, 4, 8, [32, 64, 64])
    with pytest.raises(IcmsrError, match="downscales by 8, the base's VAE by 4"):
        check_adapter(path, 4, 4, WIDTHS)
    for other in (
        {**STRUCTURE, "cells": 16},
        {**STRUCTURE, "names": ["colormap", "sketch"]},
        {**STRUCTURE, "canny": [50.0, 200.0]},
    ):
        with pytest.raises(IcmsrError, match=r"was trained for .*, the condition is "):
            check_adapter(path, 4, 8, WIDTHS, other)


def test_files_that_are_not_adapters_are_refused(saved, tmp_path):
    single, folder, _ = saved
    with pytest.raises(IcmsrError, match="no such adapter file or folder"):
        check_adapter(tmp_path / "none", 4, 8, WIDTHS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(IcmsrError, match=r"not a T2I-Adapter, config.json is missing"):
        check_adapter(tmp_path / "empty", 4, 8, WIDTHS)
    save_file({"unet.conv_in.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(IcmsrError, match="not a T2I-Adapter"):
        check_adapter(tmp_path / "other.safetensors", 4, 8, WIDTHS)
    single.write_bytes(single.read_bytes()[:1000])
    with pytest.raises(IcmsrError, match=r"not a readable \.safetensors"):
        check_adapter(single, 4, 8, WIDTHS)
    (folder / WEIGHTS).unlink()
    with pytest.raises(IcmsrError, match=f"{WEIGHTS} is missing"):
        check_adapter(folder, 4, 8, WIDTHS)
    (folder / CONFIG).write_text("{")
    with pytest.raises(IcmsrError, match="cannot be read as JSON"):
        check_adapter(folder, 4, 8, WIDTHS)


@pytest.mark.parametrize("content", ['{"in_channels": 4, "sample_size": 64}', "[]"])
def test_a_folder_of_another_kind_is_refused(saved, content):
    (saved[1] / CONFIG).write_text(content)  # a UNet's configuration, say, has in_channels too
    with pytest.raises(IcmsrError, match=r"config\.json.*(T2I-Adapter|JSON object)"):
        check_adapter(saved[1], 4, 8, WIDTHS)


@pytest.mark.parametrize("form", [0, 1], ids=["file", "folder"])
@pytest.mark.parametrize(
    ("damage", "words"), [("nan", "NaN"), ("missing", "damaged"), ("shape", "damaged"), ("surplus", "damaged")]
)
def test_damaged_weights_are_refused_by_name(saved, form, damage, words):
    path = saved[form]
    file = path / WEIGHTS if path.is_dir() else path
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    state, name = load_file(file), "adapter.body.1.resnets.0.block2.weight"
    if damage == "nan":
        state[name].view(-1)[5] = float("nan")
    elif damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][:3].contiguous()
    else:
        state["adapter.extra.weight"] = torch.zeros(2)
    save_file(state, file, metadata=metadata)
    with pytest.raises(IcmsrError, match=words) as caught:
        load_adapter(path)
    assert ("extra" if damage == "surplus" else name) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_res_blocks": "2"},
        {"downscale_factor": None},
        {"channels": []},
        {"channels": 32},
        {"channels": [2**70]},
        {"in_channels": 0},
        {"in_channels": 2**70},
        {"adapter_type": "../../etc/passwd"},
    ],
)
@pytest.mark.parametrize("form", [0, 1])
def test_a_configuration_that_makes_no_adapter_is_refused(saved, form, changes):
    path = saved[form]
    if path.is_dir():
        values = json.loads((path / CONFIG).read_text("utf-8"))
        (path / CONFIG).write_text(json.dumps({**values, **changes}), "utf-8")
    else:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        values = json.loads(metadata["icmsr"])
        values["config"] |= changes
        save_file(load_file(path), path, {**metadata, "icmsr": json.dumps(values)})
    (name,) = changes
    with pytest.raises(IcmsrError, match=rf"no T2I-Adapter can be built .*got {name} "):
        load_adapter(path)
