"""Stable Diffusion 1.5 and 2.1 checkpoints in ComfyUI: core's loaders, and the same pictures as diffusers gives.

Every file has the layout of a published one and random weights; core knows a family by the first width of its UNet and
the width of its text, so that a sixth of the size is enough for all but the slow test.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator, save_generator
from tests.support.checkpoint_job import (
    Outcome,
    adapter_features,
    assert_parity,
    library,
    run_job,
    scaled_difference,
    upscale_noting,
    write_complete_generator,
)
from tests.support.comfy_harness import Server
from tests.support.sd_files import clip_l_config, clip_l_state, complete_generator

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sd21")


@pytest.fixture(scope="module")
def outcome(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    return run_job(tmp_path_factory.mktemp("checkpoints"), comfy_python, comfyui, FAMILIES)


def check_everything(outcome: Outcome, family: str) -> None:
    """Checkpoint and folder in ComfyUI against folder and checkpoint in diffusers, with a complete generator."""
    backbone = library(outcome, family, "folder")
    expected = upscale_noting(outcome, backbone)
    assert_parity(outcome, family, expected)
    assert_parity(outcome, f"{family} folder", expected)
    conditioned = upscale_noting(outcome, backbone, adapter_features(outcome, family))
    assert_parity(outcome, f"{family} adapter", conditioned)
    assert scaled_difference(conditioned.output, expected.output) > 0.01  # the condition does act
    del backbone, expected, conditioned  # one fp32 base at a time
    assert_parity(outcome, family, upscale_noting(outcome, library(outcome, family, "checkpoint")))
    # As many as training makes: none dropped, none for a weight that is not there, none without effect.
    assert outcome.report[f"{family} lora"] == [
        {"patches": 258, "known": 258, "changed": 258},
        {"patches": 32, "known": 32, "changed": 32},
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_and_diffusers_agree_on_latent_unet_output_and_picture(outcome, family):
    check_everything(outcome, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_and_diffusers_agree_at_the_published_size(comfyui, comfy_python, tmp_path, family):
    """10 GB of memory, 8 GB of disk, some minutes. Core takes a diffusers folder at this size only."""
    check_everything(run_job(tmp_path, comfy_python, comfyui, [family], full=True), family)
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def server(comfy_server, outcome) -> Iterator[Server]:
    """The running ComfyUI with both families' files, and a second generator for one of them."""
    models = comfy_server.base / "models"
    (models / "checkpoints").mkdir(exist_ok=True)
    for name in (f"{kind}/{family}.safetensors" for kind in ("checkpoints", "icmsr") for family in FAMILIES):
        (models / name).hardlink_to(outcome.job / "models" / name)
    write_complete_generator(models, outcome.job / "folders" / "sd15", "other sd15", seed=5, timestep=300)
    yield comfy_server
    comfy_server.free()


def base_graph(server: Server, picture: torch.Tensor, family: str) -> dict:
    """Load Image and Load Checkpoint."""
    levels = (picture[0] * 255).round().byte().numpy()
    return {
        "image": {
            "class_type": "LoadImage",
            "inputs": {"image": server.upload(Image.fromarray(levels), f"{family}.png")},
        },
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{family}.safetensors"}},
    }


def generator_graph(generator: str, name: str = "", **settings) -> dict:
    """Apply Generator, Upscale and Save Image behind `base_graph`; `name` tells several of these apart."""
    return {
        f"generator{name}": {
            "class_type": "ICMSR_ApplyGenerator",
            "inputs": {
                "model": ["base", 0],
                "vae": ["base", 2],
                "generator": f"{generator}.safetensors",
                "strength": settings.pop("strength", 1.0),
            },
        },
        f"upscale{name}": {
            "class_type": "ICMSR_Upscale",
            "inputs": {
                "model": [f"generator{name}", 0],
                "vae": [f"generator{name}", 1],
                "image": ["image", 0],
                "scale": 4.0,
                "tile": 512,
                "overlap": 128,
                "color_fix": "wavelet",
                "tile_batch": 1,
                **settings,
            },
        },
        f"save{name}": {
            "class_type": "SaveImage",
            "inputs": {"images": [f"upscale{name}", 0], "filename_prefix": "checkpoint"},
        },
    }


class Finished(NamedTuple):
    executed: set[str]
    """Nodes that ran, the others' results being kept from before."""
    pictures: dict[str, np.ndarray]
    """Saved pictures by node, 8 bit."""


def run(server: Server, prompt: dict) -> Finished:
    kind, data, entry = server.run(prompt, timeout=300)
    assert kind == "execution_success", data
    kept = {
        node for message, data in entry["status"]["messages"] if message == "execution_cached" for node in data["nodes"]
    }
    pictures = {
        node: np.asarray(server.picture({"outputs": {node: output}})).astype(int)
        for node, output in entry["outputs"].items()
        if node.startswith("save")
    }
    return Finished(set(prompt) - kept, pictures)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_from_core_s_loader_gives_the_library_s_picture(server, outcome, family):
    prompt = {**base_graph(server, outcome.results["picture"], family), **generator_graph(family)}
    got = run(server, prompt)
    assert got.executed == set(prompt)
    picture = (outcome.results["picture"].movedim(-1, 1) * 255).round() / 255
    expected = upscale(library(outcome, family, "checkpoint"), picture)
    levels = (expected[0].movedim(0, -1) * 255).round().int().numpy()
    assert np.abs(got.pictures["save"] - levels).max() <= 1


EMPTY_PROMPT = [49406, *[49407] * 76]
"""Tokens of the empty prompt in Stable Diffusion 1.5: start, end, padding."""


@pytest.fixture(scope="module")
def whole(server, outcome) -> Path:
    """SD1.5's checkpoint with its text encoder at the published size, as users have it; beside it a generator that
    holds no prompt."""
    models = server.base / "models"
    path = models / "checkpoints" / "whole.safetensors"
    with safe_open(outcome.job / "models/checkpoints/sd15.safetensors", "pt") as file:
        metadata = file.metadata()
        networks = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({**networks, **clip_l_state()}, path, metadata)
    generator = complete_generator(open_base(outcome.job / "folders" / "sd15"))
    save_generator(models / "icmsr" / "whole.safetensors", replace(generator, prompt_embedding=None), torch.float32)
    return path


def test_a_checkpoint_with_its_text_encoder_brings_the_prompt(server, outcome, whole):
    """Core's MODEL, CLIP and VAE of one file; the library reads the same file and leaves the text encoder alone."""
    from transformers import CLIPTextConfig, CLIPTextModel

    base = base_graph(server, outcome.results["picture"], "whole")
    base["text"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["base", 1]}}
    got = run(server, {**base, **generator_graph("whole", conditioning=["text", 0])})
    other = {**base, "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["base", 1]}}}
    again = run(server, {**other, **generator_graph("whole", conditioning=["text", 0])})
    assert again.executed == {"text", "upscale", "save"}
    assert (again.pictures["save"] != got.pictures["save"]).any()

    encoder = CLIPTextModel(CLIPTextConfig(**clip_l_config())).eval()
    own = "" if next(iter(encoder.state_dict())).startswith("embeddings") else "text_model."
    state = {key.partition("text_model.")[2]: value for key, value in load_file(whole).items() if "text_model." in key}
    encoder.load_state_dict({f"{own}{key}": value for key, value in state.items() if "position_ids" not in key})
    with torch.no_grad():
        context = encoder(torch.tensor([EMPTY_PROMPT])).last_hidden_state[0]
    generator = load_generator(server.base / "models" / "icmsr" / "whole.safetensors")
    picture = (outcome.results["picture"].movedim(-1, 1) * 255).round() / 255
    expected = upscale(load_backbone(Recipe(whole, replace(generator, prompt_embedding=context))), picture)
    levels = (expected[0].movedim(0, -1) * 255).round().int().numpy()
    difference = np.abs(got.pictures["save"] - levels).max()
    moved = np.abs(got.pictures["save"] - again.pictures["save"]).max()
    print(f"largest difference {difference}/255, another prompt {moved}/255")
    assert difference <= 1 < moved


def test_a_generator_without_a_prompt_asks_for_one(server, outcome, whole):
    prompt = {**base_graph(server, outcome.results["picture"], "whole"), **generator_graph("whole")}
    kind, data, _ = server.run(prompt, timeout=300)
    assert kind == "execution_error"
    assert data["node_type"] == "ICMSR_Upscale"
    assert "has no prompt of its own: connect CLIP of Load Checkpoint to" in data["exception_message"]


def test_a_widget_runs_only_what_depends_on_it(server, outcome):
    base = base_graph(server, outcome.results["picture"], "sd15")
    first = run(server, {**base, **generator_graph("sd15")})
    assert run(server, {**base, **generator_graph("sd15")}).executed == set()
    color = run(server, {**base, **generator_graph("sd15", color_fix="none")})
    assert color.executed == {"upscale", "save"}
    weaker = run(server, {**base, **generator_graph("sd15", strength=0.5)})
    assert weaker.executed == {"generator", "upscale", "save"}
    assert (weaker.pictures["save"] != first.pictures["save"]).any()
    file = server.base / "models" / "icmsr" / "sd15.safetensors"
    file.unlink()  # the name is a link to what other tests read
    shutil.copy(server.base / "models" / "icmsr" / "other sd15.safetensors", file)
    replaced = run(server, {**base, **generator_graph("sd15")})
    assert replaced.executed == {"generator", "upscale", "save"}
    assert (replaced.pictures["save"] != first.pictures["save"]).any()


def test_two_generators_in_one_graph_do_not_mix(server, outcome):
    base = base_graph(server, outcome.results["picture"], "sd15")
    write_complete_generator(server.base / "models", outcome.job / "folders" / "sd15", "third sd15", seed=6)
    parts = {name: generator_graph(f"{name} sd15", f" {name}") for name in ("other", "third")}
    alone = {name: run(server, {**base, **part}).pictures[f"save {name}"] for name, part in parts.items()}
    assert np.abs(alone["other"] - alone["third"]).max() > 10
    both = {**base, **parts["other"], **parts["third"]}
    for order in (both, dict(reversed(both.items()))):
        server.free()
        together = run(server, order)
        assert together.executed == set(both)
        for name, picture in alone.items():
            np.testing.assert_array_equal(together.pictures[f"save {name}"], picture)
