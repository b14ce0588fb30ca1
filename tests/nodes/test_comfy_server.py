"""The nodes through a running ComfyUI: node list, the committed workflow, interrupt, errors as a user meets them."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from icmsr_core import conditions
from icmsr_core.measures import manifold
from icmsr_core.pictures.files import from_tensor, to_tensor
from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.adapters import load_adapter, save_adapter
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import pad_to_multiple, resize
from icmsr_core.weights.base import open_base
from icmsr_core.weights.embedded import embedded_adapter, embedded_base, embedded_generator
from icmsr_core.weights.generator_file import load_generator, save_generator
from tests.support.comfy_harness import PACK_NAME, ROOT, to_prompt
from tests.support.hostile_pickle import HostileValue
from tests.support.locales import LOCALES
from tests.support.model_files import random_generator, write_generator

pytestmark = pytest.mark.comfy

NODES = {
    "ICMSR_LoadEmbedded": ["MODEL", "VAE"],
    "ICMSR_ApplyGenerator": ["MODEL", "VAE"],
    "ICMSR_LoadAdapter": ["CONTROL_NET"],
    "ICMSR_ExtractCondition": ["IMAGE", "IMAGE", "IMAGE"],
    "ICMSR_Upscale": ["IMAGE"],
    "ICMSR_InspectManifold": ["IMAGE"],
}
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def object_info(comfy_server) -> dict:
    return comfy_server.get("/object_info")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some texture and an edge."""
    random = torch.Generator().manual_seed(seed)
    smooth = resize(torch.rand(1, 3, 5, 5, generator=random), height, width)
    smooth += 0.05 * torch.rand(1, 3, height, width, generator=random)
    smooth[..., width // 2 :] *= 0.6
    return Image.fromarray((smooth[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0)[None].float() / 255


def assert_same_picture(got: Image.Image, expected: torch.Tensor) -> None:
    """At most 2 levels of 255 apart, everywhere."""
    levels = (expected[0].movedim(0, -1) * 255).round().numpy()
    got_levels = np.asarray(got).astype(float)
    assert got_levels.shape == levels.shape
    print(f"largest difference {np.abs(got_levels - levels).max():.0f}/255")
    assert np.abs(got_levels - levels).max() <= 2


def graph(image: str, *, before: dict | None = None, **settings) -> dict:
    """A prompt in API form: Load Image, the nodes in `before` (or Load Embedded as "model"), Upscale, Save."""
    nodes = before or {"model": {"class_type": "ICMSR_LoadEmbedded", "inputs": {"generator": "embedded"}}}
    inputs = {"model": ["model", 0], "vae": ["model", 1], "image": ["image", 0]}
    defaults = {"scale": 4.0, "tile": 512, "overlap": 128, "color_fix": "wavelet", "tile_batch": 1}
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": image}},
        **nodes,
        "upscale": {"class_type": "ICMSR_Upscale", "inputs": {**inputs, **defaults, **settings}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["upscale", 0], "filename_prefix": "test"}},
    }


def base_with(generator: str) -> dict:
    return {
        "base": {"class_type": "ICMSR_LoadEmbedded", "inputs": {"generator": "none"}},
        "model": {
            "class_type": "ICMSR_ApplyGenerator",
            "inputs": {"model": ["base", 0], "vae": ["base", 1], "generator": generator, "strength": 1.0},
        },
    }


def test_comfyui_s_python_has_none_of_the_command_line_s_packages(comfy_python):
    """What runs below runs with ComfyUI's requirements and requirements.txt alone."""
    names = ("diffusers", "peft", "accelerate", "cv2", "einops")
    found = f"import importlib.util; print([name for name in {names} if importlib.util.find_spec(name)])"
    answer = subprocess.run([str(comfy_python), "-c", found], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "['cv2', 'einops']"


def test_every_node_is_there_and_explains_itself(object_info):
    assert {name for name in object_info if name.startswith("ICMSR_")} == set(NODES)
    for name, outputs in NODES.items():
        node = object_info[name]
        assert node["output"] == outputs
        assert node["display_name"].startswith("ICM-SR ")
        assert node["category"] == "image/upscaling/ICM-SR"
        assert len(node["description"]) > 40
        assert all(node["output_tooltips"]), f"{name}: an output without a tooltip"
        for inputs in node["input"].values():
            for socket, (_, options) in inputs.items():
                assert options.get("tooltip"), f"{name}.{socket} has no tooltip"


def test_fidelity_begins_at_what_the_embedded_file_says(object_info):
    (_, options) = object_info["ICMSR_LoadEmbedded"]["input"]["optional"]["fidelity"]
    assert options["default"] == load_generator(embedded_generator()).info.realistic_default


def test_input_names_and_their_order_are_kept(object_info):
    """Saved workflows hold widget values by position: new inputs are appended, old ones keep their names."""
    required = ["model", "vae", "image", "scale", "tile", "overlap", "color_fix", "tile_batch"]
    assert object_info["ICMSR_Upscale"]["input_order"] == {
        "required": required,
        "optional": [
            *("control_net", "hint", "strength", "conditioning", "vae_mode"),
            *("longest", "shortest", "megapixels", "width", "height", "fit"),
            "authors_settings",
            "mask",
        ],
    }
    assert object_info["ICMSR_LoadEmbedded"]["input_order"] == {"required": ["generator"], "optional": ["fidelity"]}
    assert object_info["ICMSR_ApplyGenerator"]["input_order"] == {
        "required": ["model", "vae", "generator", "strength"],
        "optional": [
            "fidelity",
            "clip",
            "prompt",
            "family",
            "timestep",
            "prediction",
            "coeff_t",
            "save_converted",
        ],
    }
    assert object_info["ICMSR_LoadAdapter"]["input_order"] == {"required": ["adapter"], "optional": ["second_adapter"]}
    assert object_info["ICMSR_InspectManifold"]["input_order"] == {
        "required": ["model", "vae", "image", "timesteps", "seed"],
        "optional": ["control_net", "hint", "strength", "conditioning"],
    }
    assert object_info["ICMSR_ExtractCondition"]["input_order"] == {
        "required": ["image", "low_threshold", "high_threshold"]
    }


def test_the_pack_imports_cleanly_and_fast(comfy_server):
    log = comfy_server.log().split("got prompt")[0]  # what comes later are the runs of other tests, errors among them
    match = re.search(rf"([\d.]+) seconds(.*): \S*{PACK_NAME}\s", log)
    assert match, "the pack is not in the list of import times"
    print(f"import: {match[1]} s")
    assert "FAILED" not in match[2]
    assert float(match[1]) < 1.0
    assert "Traceback" not in log
    assert "Cannot import" not in log


def test_help_pages_translations_and_templates_are_served(comfy_server, object_info):
    from urllib.request import urlopen

    for name in NODES:
        with urlopen(f"{comfy_server.url}/extensions/{PACK_NAME}/docs/{name}.md") as page:
            assert object_info[name]["display_name"] in page.read().decode()
    names = comfy_server.get("/i18n")["en"]["nodeDefs"]
    assert set(NODES) <= set(names)
    templates = comfy_server.get("/workflow_templates")[PACK_NAME]
    assert sorted(templates) == sorted(path.stem for path in WORKFLOWS)
    for stem in templates:
        with urlopen(f"{comfy_server.url}/api/workflow_templates/{PACK_NAME}/{stem}.jpg") as picture:
            assert picture.headers["Content-Type"] == "image/jpeg"


def test_english_names_are_those_of_the_nodes(object_info):
    texts = json.loads((ROOT / "locales/en/nodeDefs.json").read_text())
    expected = {}
    for name in NODES:
        node = object_info[name]
        sockets = {key: options for group in node["input"].values() for key, (_, options) in group.items()}
        expected[name] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {key: {"name": key, "tooltip": options["tooltip"]} for key, options in sockets.items()},
            "outputs": {
                str(index): {"name": title, "tooltip": tooltip}
                for index, (title, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"]))
            },
        }
    assert texts == expected


def test_locales_are_those_of_the_frontend(comfy_python):
    """Of the installed frontend: a newer one may know more languages, whose texts are then to be written."""
    where = "import comfyui_frontend_package; print(comfyui_frontend_package.__path__[0])"
    package = subprocess.run([str(comfy_python), "-c", where], capture_output=True, text=True, check=True).stdout
    bundles = (Path(package.strip()) / "static" / "assets").glob("i18n-*.js")
    code = "".join(path.read_text(encoding="utf-8") for path in bundles)
    assert set(re.findall(r'"\./([\w-]+)/nodeDefs\.json"', code)) == {"en", *LOCALES}


def test_comfyui_serves_the_texts_and_help_pages_of_every_language(comfy_server):
    """Where the frontend looks for them: /i18n and /extensions/PACK/docs/NODE/LOCALE.md."""
    served = comfy_server.get("/i18n")
    for locale in ("en", *LOCALES):
        assert served[locale]["nodeDefs"] == json.loads(
            (ROOT / "locales" / locale / "nodeDefs.json").read_text("utf-8")
        )
    for page in sorted((ROOT / "web" / "docs").rglob("*.md")):
        address = f"{comfy_server.url}/extensions/{PACK_NAME}/{page.relative_to(ROOT / 'web').as_posix()}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read() == page.read_bytes()
            assert "html" not in answer.headers["Content-Type"], "the frontend takes HTML for a missing page"


def needs_files(path: Path) -> bool:
    """Whether a workflow names a base and a generator that are not in the pack."""
    types = {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    return {"CheckpointLoaderSimple", "ICMSR_ApplyGenerator"} <= types


@pytest.mark.parametrize("path", list(filter(needs_files, WORKFLOWS)), ids=lambda path: path.stem)
def test_a_workflow_for_foreign_weights_validates_once_its_files_are_in_place(comfy_server, object_info, path: Path):
    """Without them ComfyUI names each; with files of their names it runs, and the base is the first that it reads."""
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)
    prompt["2"]["inputs"]["image"] = comfy_server.upload(photograph(16, 16), "workflow.png")
    named = {"checkpoints": prompt["3"]["inputs"]["ckpt_name"], "icmsr": prompt["4"]["inputs"]["generator"]}
    files = [comfy_server.base / "models" / folder / name for folder, name in named.items()]
    refused = comfy_server.post("/prompt", {"prompt": prompt, "client_id": "x"})
    wrong = {key for key, entry in refused["node_errors"].items() if entry["errors"]}
    # What Compare Images shows is a value that only the frontend sends.
    assert {key for key in wrong if prompt[key]["class_type"] != "ImageCompare"} == {"3", "4"}
    try:
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"")
        kind, data, _ = comfy_server.run(prompt)
        assert (kind, data["node_type"]) == ("execution_error", "CheckpointLoaderSimple")
    finally:
        for file in files:
            file.unlink()


@pytest.mark.parametrize("name", ["upscale", "inspect_manifold"])
def test_committed_workflow_gives_the_library_s_picture(comfy_server, object_info, name: str):
    path = ROOT / "example_workflows" / f"{name}.json"
    picture = photograph(100, 75)
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)
    loader = next(node for node in prompt.values() if node["class_type"] == "LoadImage")
    loader["inputs"]["image"] = comfy_server.upload(picture, "workflow.png")
    kind, data, entry = comfy_server.run(prompt)
    assert kind == "execution_success", data
    if name == "inspect_manifold":
        hint = conditions.extract(tensor(picture), ("colormap", "edges"))
        features = load_adapter(embedded_adapter(), 4)(pad_to_multiple(hint, 8))
        expected = library_grid(picture, features, (200, 500, 800), 0, hint)
    else:
        expected = upscale(load_backbone(Recipe(generator=embedded_generator())), tensor(picture))
    assert_same_picture(comfy_server.picture(entry), expected)


def library_grid(picture, features, timesteps, seed, hint) -> torch.Tensor:
    """What ICMSR_InspectManifold should show of the embedded prior, computed with diffusers and the library."""
    base = open_base(embedded_base())
    backbone = DiffusersBackbone(
        *build_networks(base), base.descriptor(), base.prompt_embedding(), torch.device("cpu"), torch.float32
    )
    descriptor, source = backbone.descriptor, tensor(picture)
    height, width = source.shape[-2:]
    latent = backbone.encode(pad_to_multiple(source, descriptor.multiple_of) * 2 - 1)
    noise = manifold.seeded_noise(latent, seed)
    latents = {
        "noised": [descriptor.schedule.add_noise(latent, noise, t) for t in timesteps],
        "no condition": manifold.clean_estimates(backbone, latent, timesteps, noise),
        "with condition": manifold.clean_estimates(backbone, latent, timesteps, noise, features),
    }

    def decoded(one: torch.Tensor):
        return manifold.decoded_pictures(backbone, one)[0][:height, :width]

    rows = {name: [decoded(one) for one in some] for name, some in latents.items()}
    assert max(abs(a - b).max() for a, b in zip(rows["no condition"], rows["with condition"])) > 4 / 255
    shown = {"colormap": hint[:, :3], "edges": hint[:, 3:].expand(-1, 3, -1, -1)}
    maps = {
        "noised": {"its latent, decoded": decoded(latent)},
        "with condition": {name: from_tensor(one) for name, one in shown.items()},
    }
    return to_tensor(manifold.manifold_grid(from_tensor(source), timesteps, rows, maps))


def test_all_nodes_together_give_the_library_s_picture(comfy_server, request):
    """Bare base, a LoRA generator from models/icmsr, a condition through an adapter from models/controlnet."""
    from diffusers import T2IAdapter

    models = comfy_server.base / "models"
    generator = write_generator(models / "icmsr" / "lora.safetensors", embedded_base())
    torch.manual_seed(1)
    adapter = T2IAdapter(4, [64, 128], 2, downscale_factor=4, adapter_type="full_adapter").requires_grad_(False)
    save_adapter(models / "controlnet" / "adapter", adapter, {}, torch.float32)
    picture = photograph(70, 90, seed=1)
    nodes = {
        **base_with("lora.safetensors"),
        "adapter": {"class_type": "ICMSR_LoadAdapter", "inputs": {"adapter": "adapter.safetensors"}},
        "condition": {
            "class_type": "ICMSR_ExtractCondition",
            "inputs": {"image": ["image", 0], "low_threshold": 20.0, "high_threshold": 60.0},
        },
    }
    prompt = graph(
        comfy_server.upload(picture, "all.png"),
        before=nodes,
        scale=3.0,
        tile=192,
        overlap=64,
        color_fix="adain",
        tile_batch=2,
        control_net=["adapter", 0],
        hint=["condition", 0],
        strength=0.8,
    )
    kind, data, entry = comfy_server.run(prompt)
    assert kind == "execution_success", data
    source = tensor(picture)
    hint = conditions.extract(source, ("colormap", "edges"), {"edges": {"low": 20, "high": 60}})
    assert 0 < float(hint[:, 3].mean()) < 1
    hint = pad_to_multiple(torch.nn.functional.interpolate(hint, (270, 210), mode="nearest-exact"), 8)

    def features(boxes):
        crops = [hint[:, :, box.slices(4)[0], box.slices(4)[1]] for box in boxes]
        return [0.8 * level for level in adapter(torch.cat(crops))]

    settings = UpscaleSettings(scale=3, tile=192, overlap=64, batch=2, color_fix="adain")
    expected = upscale(load_backbone(Recipe(generator=generator)), source, settings, features=features)
    assert_same_picture(comfy_server.picture(entry), expected)
    without = upscale(load_backbone(Recipe(generator=generator)), source, settings)
    assert float((without - expected).abs().max()) > 4 / 255  # the condition does act


def test_the_vae_mode_of_a_graph_is_the_library_s(comfy_server):
    """A prompt from before the input was there takes the default."""
    picture = photograph(60, 48, seed=3)
    image = comfy_server.upload(picture, "vae mode.png")
    backbone, results = load_backbone(Recipe(generator=embedded_generator())), {}
    for mode in (None, "bounded"):
        prompt = graph(image, tile=128, overlap=32, **({} if mode is None else {"vae_mode": mode}))
        assert ("vae_mode" in prompt["upscale"]["inputs"]) == (mode is not None)
        kind, data, entry = comfy_server.run(prompt)
        assert kind == "execution_success", data
        results[mode] = upscale(backbone, tensor(picture), UpscaleSettings(tile=128, overlap=32, vae=mode or "auto"))
        assert_same_picture(comfy_server.picture(entry), results[mode])
    assert not torch.equal(results["bounded"], results[None])  # the modes differ, by less than a level of 255


def test_what_the_toy_configurations_train_runs_in_a_graph(comfy_server, toy_run):
    """Adapter and generator straight from train/adapter.py and train/distill.py."""
    models = comfy_server.base / "models" / "icmsr"
    models.mkdir(parents=True, exist_ok=True)
    generator = models / "toy generator.safetensors"
    shutil.copy(toy_run / "toy_distill" / "generator.safetensors", generator)
    shutil.copy(toy_run / "toy_adapter" / "adapter.safetensors", models / "toy adapter.safetensors")
    picture = photograph(48, 40, seed=2)
    nodes = {
        **base_with(generator.name),
        "adapter": {"class_type": "ICMSR_LoadAdapter", "inputs": {"adapter": "toy adapter.safetensors"}},
        "condition": {
            "class_type": "ICMSR_ExtractCondition",
            "inputs": {"image": ["image", 0], "low_threshold": 20.0, "high_threshold": 60.0},
        },
    }
    image = comfy_server.upload(picture, "toy.png")
    kind, data, entry = comfy_server.run(graph(image, before=base_with(generator.name)))
    assert kind == "execution_success", data
    expected = upscale(load_backbone(Recipe(generator=generator)), tensor(picture))
    assert_same_picture(comfy_server.picture(entry), expected)
    kind, data, entry = comfy_server.run(graph(image, before=nodes, control_net=["adapter", 0], hint=["condition", 0]))
    assert kind == "execution_success", data
    conditioned = tensor(comfy_server.picture(entry))
    assert float((conditioned - expected).abs().max()) > 1 / 255  # the trained adapter is in the graph


def test_what_the_prior_sees_is_what_the_library_says(comfy_server):
    """A labelled grid over the bare base, with an adapter that takes the edges alone."""
    from diffusers import T2IAdapter

    torch.manual_seed(2)
    adapter = T2IAdapter(1, [64, 128], 2, downscale_factor=4).requires_grad_(False)
    save_adapter(comfy_server.base / "models" / "controlnet" / "edges", adapter, {}, torch.float32)
    picture = photograph(50, 37, seed=4)
    prompt = {
        "image": {"class_type": "LoadImage", "inputs": {"image": comfy_server.upload(picture, "manifold.png")}},
        "base": {"class_type": "ICMSR_LoadEmbedded", "inputs": {"generator": "none"}},
        "adapter": {
            "class_type": "ICMSR_LoadAdapter",
            "inputs": {"adapter": "edges.safetensors", "second_adapter": "none"},
        },
        "condition": {
            "class_type": "ICMSR_ExtractCondition",
            "inputs": {"image": ["image", 0], "low_threshold": 20.0, "high_threshold": 60.0},
        },
        "inspect": {
            "class_type": "ICMSR_InspectManifold",
            "inputs": {
                "model": ["base", 0],
                "vae": ["base", 1],
                "image": ["image", 0],
                "timesteps": "100, 800",
                "seed": 3,
                "control_net": ["adapter", 0],
                "hint": ["condition", 0],
                "strength": 2.0,
            },
        },
        "save": {"class_type": "SaveImage", "inputs": {"images": ["inspect", 0], "filename_prefix": "manifold"}},
    }
    kind, data, entry = comfy_server.run(prompt)
    assert kind == "execution_success", data
    hint = conditions.extract(tensor(picture), ("colormap", "edges"), {"edges": {"low": 20, "high": 60}})
    features = [2 * level for level in adapter(pad_to_multiple(hint[:, 3:], 8))]
    assert_same_picture(comfy_server.picture(entry), library_grid(picture, features, (100, 800), 3, hint))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generator": "embedded"}, "which upscales in one step and cannot remove noise: connect the model without it"),
        ({"timesteps": "some"}, "timesteps must be 1 to 16 whole numbers separated by commas, got 'some'"),
        ({"timesteps": "200, 1000"}, "1000"),
    ],
)
def test_a_prior_that_cannot_be_looked_at_is_the_node_s_error(comfy_server, settings, words):
    settings = {"generator": "none", "timesteps": "500", **settings}
    nodes = graph(
        comfy_server.upload(photograph(20, 20), "small.png"),
        before={"model": {"class_type": "ICMSR_LoadEmbedded", "inputs": {"generator": settings.pop("generator")}}},
    )
    inputs = {key: nodes["upscale"]["inputs"][key] for key in ("model", "vae", "image")}
    nodes["upscale"] = {"class_type": "ICMSR_InspectManifold", "inputs": {**inputs, "seed": 0, **settings}}
    outcome, data, _ = comfy_server.run(nodes)
    assert outcome == "execution_error"
    assert data["node_type"] == "ICMSR_InspectManifold"
    assert words in data["exception_message"]
    assert "\n" not in data["exception_message"].strip()


def test_what_a_generator_file_notes_is_shown(comfy_server):
    notes = "Takes its prompt from an image tagger, which is no part of this file."
    generator = random_generator(embedded_base())
    path = comfy_server.base / "models" / "icmsr" / "with notes.safetensors"
    save_generator(path, replace(generator, info=replace(generator.info, notes=notes)))
    write_generator(path.with_name("without notes.safetensors"), embedded_base())
    image = comfy_server.upload(photograph(20, 20), "small.png")
    for name, expected in (("with notes", [notes]), ("without notes", None)):
        kind, data, entry = comfy_server.run(graph(image, before=base_with(f"{name}.safetensors"), scale=1.0))
        assert kind == "execution_success", data
        assert entry["outputs"].get("model", {}).get("text") == expected
    assert f"with notes.safetensors: {notes}" in comfy_server.log()


def test_weights_are_found_in_every_folder(comfy_server):
    models = comfy_server.base / "models"
    folders = {"here": models / "icmsr", "there": comfy_server.elsewhere, "loras": models / "loras"}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_generator(folder / f"found {name}.safetensors", embedded_base())
    (models / "icmsr" / "notes.txt").write_text("not a weights file")
    adapters = ["canny.pth", "color/diffusion_pytorch_model.bin", "color/diffusion_pytorch_model.safetensors"]
    (models / "controlnet" / "color").mkdir(parents=True, exist_ok=True)
    for name in (*adapters, "color/config.json"):
        (models / "controlnet" / name).touch()
    inputs = comfy_server.get("/object_info/ICMSR_LoadAdapter")["ICMSR_LoadAdapter"]["input"]
    for group, socket in (("required", "adapter"), ("optional", "second_adapter")):
        listed = inputs[group][socket][1]["options"]
        assert set(adapters) <= set(listed)
        assert not [name for name in listed if name.endswith((".txt", ".json"))]
    assert inputs["required"]["adapter"][1]["options"][0] == "nano (embedded)"
    assert inputs["optional"]["second_adapter"][1]["options"][0] == "none"
    assert "nano (embedded)" not in inputs["optional"]["second_adapter"][1]["options"], "it has both structures"
    options = comfy_server.get("/object_info/ICMSR_ApplyGenerator")["ICMSR_ApplyGenerator"]["input"]["required"]
    listed = options["generator"][1]["options"]
    assert listed[0] == "nano (embedded)"
    assert {f"found {name}.safetensors" for name in folders} <= set(listed)
    assert not [name for name in listed if name.endswith(".txt")]
    image = comfy_server.upload(photograph(20, 20), "small.png")
    for name in folders:
        kind, data, _ = comfy_server.run(graph(image, before=base_with(f"found {name}.safetensors")))
        assert kind == "execution_success", data


def test_interrupt_stops_between_tiles_and_leaves_a_working_server(comfy_server):
    picture = photograph(160, 160, seed=2)
    name = comfy_server.upload(picture, "interrupt.png")
    seen, moment = [], []

    def interrupt(progress: dict) -> None:
        seen.append(progress)
        if not moment:
            moment.append(time.monotonic())
            comfy_server.post("/interrupt", {})

    kind, data, _ = comfy_server.run(graph(name, tile=64, overlap=32), interrupt)
    assert kind == "execution_interrupted", data
    print(f"stopped {time.monotonic() - moment[0]:.1f} s after the request, at {seen[-1]['value']}/{seen[-1]['max']}")
    assert seen[-1]["max"] > 100
    assert seen[-1]["value"] < seen[-1]["max"] / 2
    kind, data, entry = comfy_server.run(graph(name, scale=1.0))
    assert kind == "execution_success", data
    expected = upscale(load_backbone(Recipe(generator=embedded_generator())), tensor(picture), UpscaleSettings(scale=1))
    assert_same_picture(comfy_server.picture(entry), expected)


def _damaged(folder: Path, kind: str) -> str:
    generator = random_generator(embedded_base(), prediction="v" if kind == "prior" else "residual")
    path = folder / f"{kind}.safetensors"
    if kind == "family":
        generator = replace(generator, info=replace(generator.info, family="sd21"))
    save_generator(path, generator)
    if kind == "nan":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["unet.conv_in.bias"][3] = float("nan")
        save_file(tensors, path, metadata)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if kind == "foreign":
        save_file({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(2, 2)}, path)
    if kind == "vae":
        save_file(open_base(embedded_base()).vae_state(), path)
    if kind == "code":
        torch.save({"unet.conv_in.weight": HostileValue(folder / "ran")}, path)
        torch.load(path, weights_only=False)
        (folder / "ran").unlink()  # it works where code is run
    return path.name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("family", "the generator is for the family 'sd21'"),
        ("nan", "NaN or infinite values in unet.conv_in.bias"),
        ("truncated", "not a readable .safetensors file"),
        ("foreign", "a LoRA of which nothing else is known. If it is that of a one-step upscaling model, say"),
        ("vae", "not an ICM-SR generator file (a VAE alone; "),
        (
            "code",
            "not a readable .safetensors file (a pickle, which can run code when it is read; no code in it was run)",
        ),
        ("prior", "the generator is for a base that predicts v, this one predicts eps (the MODEL, nano"),
    ],
)
def test_a_bad_generator_file_is_the_node_s_error(comfy_server, kind, words):
    name = _damaged(comfy_server.base / "models" / "icmsr", kind)
    image = comfy_server.upload(photograph(20, 20), "small.png")
    outcome, data, _ = comfy_server.run(graph(image, before=base_with(name)))
    assert outcome == "execution_error"
    assert data["node_type"] == "ICMSR_ApplyGenerator"
    assert words in data["exception_message"]
    assert "\n" not in data["exception_message"].strip()
    assert not (comfy_server.base / "models" / "icmsr" / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generator": "none"}, "put ICM-SR Apply Generator before this node"),
        ({"tile": 500}, "tile must be a multiple of 64, got 500: try 512"),
        ({"overlap": 300}, "overlap must be between 0 and half of the tile (256), got 300"),
    ],
)
def test_a_wrong_setting_is_the_node_s_error(comfy_server, settings, words):
    settings = dict(settings)
    loader = {"class_type": "ICMSR_LoadEmbedded", "inputs": {"generator": settings.pop("generator", "embedded")}}
    image = comfy_server.upload(photograph(20, 20), "small.png")
    outcome, data, _ = comfy_server.run(graph(image, before={"model": loader}, **settings))
    assert outcome == "execution_error"
    assert data["node_type"] == "ICMSR_Upscale"
    assert words in data["exception_message"]
    assert "\n" not in data["exception_message"].strip()


def test_a_setting_out_of_range_is_refused_before_anything_runs(comfy_server):
    image = comfy_server.upload(photograph(20, 20), "small.png")
    answer = comfy_server.post("/prompt", {"prompt": graph(image, scale=20.0, color_fix="sepia")})
    assert answer["status"] == 400
    problems = {problem["extra_info"]["input_name"] for problem in answer["node_errors"]["upscale"]["errors"]}
    assert problems == {"scale", "color_fix"}
