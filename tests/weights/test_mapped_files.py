"""No file of weights stays mapped into memory once its loader has returned: under Windows nobody could replace it."""

import ast
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.lora_files import read_lora
from icmsr_core.measures.dists import dists_shapes, load_dists
from icmsr_core.measures.feature_networks import VGG16
from icmsr_core.measures.lpips import load_lpips, lpips_shapes
from icmsr_core.measures.niqe import NIQE_SHAPES, load_niqe
from icmsr_core.measures.weight_files import DISTS, LPIPS_VGG, NIQE, write_weight_file
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.prompts import embed_prompts
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.adapters import load_adapter, make_adapter, save_adapter
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.state import RunState
from icmsr_core.train.tasks.task import Player
from icmsr_core.weights.adapter_layouts import read_adapter
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from icmsr_core.weights.pickles import read_pickle
from icmsr_core.weights.tensor_files import open_tensors, read_tensors
from icmsr_core.weights.tiny_vae_file import read_tiny_vae
from tests.support.comfy_scripts.mapped_files import MAPS, mapped_files
from tests.support.model_files import TINY, write_base, write_generator
from tests.support.places import ROOT
from tests.support.sd_files import write_sd_folder, write_text_encoder
from tests.support.tiny_vae_files import write_tiny_folder, write_tiny_pair

linux = pytest.mark.skipif(not MAPS.is_file(), reason="the list of mapped files is Linux's")
DIRECT_READERS = {
    "safe_open": {
        "icmsr_core/weights/tensor_files.py",
        "icmsr_core/train/data/cached_file.py",
    },
    "from_pretrained": {"icmsr_core/runtime/prompts.py"},
    "load_file": set(),
}
"""Functions of libraries that map a file or may do so, and the files that call them. Cached latents are read piece by
piece all through a run, so their file stays open; transformers' encoder is dropped once the prompts are embedded."""


def state_of_a_run() -> RunState:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    state = RunState([Player("generator", {"w": parameter})], LoopConfig(), 8, "{}")
    parameter.grad = torch.ones(64, 64)
    state.descend(state.players[0])
    return state


def resumed(path: Path) -> RunState:
    state = state_of_a_run()
    state.load(path)
    return state


LOADERS: dict[str, Callable[[Path], Any]] = {
    "tensors": lambda place: read_tensors(place / "generator.safetensors"),
    "one tensor": lambda place: one_tensor(place / "generator.safetensors"),
    "base": lambda place: [
        (base := open_base(place / "base")).unet_state(),
        base.vae_state(),
        base.prompt_embedding(),
        dict(base.tensors("unet", torch.float32)),
    ],
    "networks": lambda place: build_networks(open_base(place / "base")),
    "generator": lambda place: load_generator(place / "generator.safetensors"),
    "backbone": lambda place: load_backbone(Recipe(place / "base", place / "generator.safetensors")),
    "tiny VAE": lambda place: read_tiny_vae(place / "tiny"),
    "tiny VAE, two files": lambda place: read_tiny_vae(place / "pair"),
    "backbone with a tiny VAE": lambda place: load_backbone(
        Recipe(place / "base", place / "generator.safetensors", tiny_vae=place / "tiny")
    ),
    "adapter": lambda place: load_adapter(place / "adapter.safetensors"),
    "adapter for the nodes": lambda place: read_adapter(place / "adapter.safetensors"),
    "pickle": lambda place: read_pickle(place / "adapter.pth"),
    "pickled adapter for the nodes": lambda place: read_adapter(place / "adapter.pth"),
    "text encoder": lambda place: embed_prompts(open_base(place / "text base"), ["a cat"], None, "cpu"),
    "prompt cache": lambda place: embed_prompts(
        open_base(place / "text base"), ["a cat"], place / "prompts.safetensors", "cpu"
    ),
    "LPIPS": lambda place: load_lpips(place / LPIPS_VGG.name),
    "DISTS": lambda place: load_dists(place / DISTS.name),
    "NIQE": lambda place: load_niqe(place / NIQE.name),
    "training state": lambda place: resumed(place / "state.safetensors"),
    "LoRA": lambda place: read_lora(place / "lora.safetensors", ["conv_in"]),
    "import": lambda place: import_checkpoint(
        "lora", place / "lora.safetensors", place / "new.safetensors", ImportSettings(base=place / "text base")
    ),
}


def one_tensor(path: Path) -> torch.Tensor:
    with open_tensors(path) as file:
        return file.tensor(file.keys()[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind."""
    folder = tmp_path_factory.mktemp("mapped")
    write_generator(folder / "generator.safetensors", write_base(folder / "base", TINY))
    write_text_encoder(write_sd_folder(folder / "text base", "sd21", 10, torch.float16), 96)
    embed_prompts(open_base(folder / "text base"), ["a cat"], folder / "prompts.safetensors", "cpu")
    write_tiny_pair(folder / "pair", write_tiny_folder(folder / "tiny"))
    save_adapter(folder / "adapter", make_adapter(4, 8, TINY.unet_channels), {}, torch.float32)
    torch.save(load_file(folder / "adapter.safetensors"), folder / "adapter.pth")
    state_of_a_run().save(folder / "state.safetensors")
    lora = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(32, 2, 1, 1)}
    save_file(lora, folder / "lora.safetensors")
    for kind, shapes in ((LPIPS_VGG, lpips_shapes(VGG16)), (DISTS, dists_shapes()), (NIQE, NIQE_SHAPES)):
        write_weight_file(folder / kind.name, kind, {name: torch.ones(shape) for name, shape in shapes.items()}, {})
    return folder


@linux
def test_an_open_file_shows_among_the_mapped_ones(place, tmp_path):
    shutil.copy(place / "lora.safetensors", tmp_path)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        kept = file.get_tensor("unet.conv_in.lora_A.weight")
    assert mapped_files(tmp_path) == [str((tmp_path / "lora.safetensors").resolve())]
    del kept, file
    gc.collect()
    assert mapped_files(tmp_path) == []


@linux
@pytest.mark.parametrize("name", LOADERS)
def test_nothing_stays_mapped_when_a_loader_has_returned(place, name):
    loaded = LOADERS[name](place)
    assert mapped_files(place) == []
    del loaded


@pytest.mark.parametrize("function", DIRECT_READERS)
def test_every_other_reader_goes_through_them(function):
    found = set()
    for folder in ("icmsr_core", "nodes", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
            if any(ast.unparse(call).split(".")[-1] == function for call in calls):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == DIRECT_READERS[function]
