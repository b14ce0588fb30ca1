"""Every template in ComfyUI's real frontend: opened, saved and, where nano is enough, run. One page for all."""

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from release.template_graphs import TEMPLATES
from tests.support.comfy_frontend import find_browser, open_frontend
from tests.support.comfy_harness import ROOT, to_prompt

pytestmark = pytest.mark.comfy

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINT = ROOT / "subgraphs" / "Upscale (ICM-SR).json"
SIDES = (20, 16)
"""Width and height of the pictures that the templates get."""
FRAMES = 3
MISSING = """() => {
    const stores = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia.state.value;
    const found = Object.values(stores).map((store) => store.missingModelCandidates).find((some) => some?.length);
    return found ? JSON.stringify(found.map(({name, url, directory}) => ({name, url, directory}))) : "";
}"""
"""What the frontend offers to download, for the graph that is open."""


def ends_of(workflow: dict[str, Any]) -> dict[str, int]:
    """What a run of a template saves: the number of results by node type."""
    counts: dict[str, int] = {}
    for node in workflow["nodes"]:
        if node["type"] in ("SaveImage", "SaveVideo", "PreviewImage", "ImageCompare"):
            counts[node["type"]] = counts.get(node["type"], 0) + 1
    return counts


def sent(node: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node in a prompt, without widgets that only show something, such as ImageCompare's."""
    return {name: value for name, value in node["inputs"].items() if not isinstance(value, dict)}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def needs_weights(workflow: dict[str, Any]) -> bool:
    """Whether a template names weights which the pack does not have."""
    return "CheckpointLoaderSimple" in {node["type"] for node in workflow["nodes"]}


def named(name: str) -> dict[str, Any]:
    return read(ROOT / "example_workflows" / f"{name}.json")


@pytest.fixture(scope="module")
def frontend(comfy_server):
    """A page of the frontend, with what the templates name in the input folder."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = find_browser()
    if browser is None:
        pytest.skip("no chromium on the PATH")
    folder = comfy_server.base / "input"
    (folder / "pictures").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (SIDES[1], SIDES[0], 3), dtype=np.uint8) for _ in range(FRAMES)]
    for name, picture in zip(("example.png", "pictures/one.png", "pictures/two.png"), pictures):
        Image.fromarray(picture).save(folder / name)
    writer = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 8, SIDES)
    assert writer.isOpened()
    for picture in pictures:
        writer.write(picture)
    writer.release()
    with open_frontend(comfy_server.url, browser) as page:
        yield page


def saved_outputs(comfy_server, detail: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a finished run, by node id."""
    return comfy_server.get(f"/history/{detail['prompt_id']}")[detail["prompt_id"]]["outputs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_template_opens_saves_and_runs(comfy_server, frontend, path: Path):
    workflow = read(path)
    loaded = frontend.load(workflow)
    assert frontend.errors == []
    assert [kind for kind, _ in loaded["nodes"]] == [node["type"] for node in workflow["nodes"]]
    wrong = {kind for kind, has_errors in loaded["nodes"] if has_errors}
    if needs_weights(workflow):
        assert {"CheckpointLoaderSimple"} <= wrong <= {"CheckpointLoaderSimple", "ICMSR_ApplyGenerator"}
    else:
        assert wrong == set()
    assert loaded["saved"]["links"] == workflow["links"]
    assert [node["widgets_values"] for node in loaded["saved"]["nodes"] if "widgets_values" in node] == [
        node["widgets_values"] for node in workflow["nodes"] if "widgets_values" in node
    ]
    assert [[entry["name"] for entry in node["inputs"]] for node in loaded["saved"]["nodes"]] == [
        [entry["name"] for entry in node["inputs"]] for node in workflow["nodes"]
    ], "a node has other inputs than the template: run release/templates.py"
    prompt = {key: {"class_type": node["class_type"], "inputs": sent(node)} for key, node in loaded["prompt"].items()}
    assert prompt == to_prompt(workflow, comfy_server.get("/object_info"))
    if needs_weights(workflow):
        return
    ended = frontend.run()
    assert ended["event"] == "execution_success", ended
    outputs = saved_outputs(comfy_server, ended["detail"])
    counted: dict[str, int] = {}
    for key in outputs:
        kind = prompt[key]["class_type"]
        counted[kind] = counted.get(kind, 0) + 1
    assert {kind: counted.get(kind) for kind in ends_of(workflow)} == ends_of(workflow)


def test_stable_diffusion_s_template_is_valid_where_a_checkpoint_is(comfy_server, frontend):
    """With a file of the checkpoint's name core accepts the graph; the run then stops at reading that file."""
    workflow = named("after_text_to_image")
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple")
    prompt = to_prompt(workflow, comfy_server.get("/object_info"))
    refused = comfy_server.post("/prompt", {"prompt": prompt})
    assert refused["status"] == 400
    # What Compare Images shows is a value that only the frontend sends.
    wrong = [key for key in refused["node_errors"] if prompt[key]["class_type"] != "ImageCompare"]
    assert wrong == [str(loader["id"])], "only the checkpoint is missing"
    checkpoint = comfy_server.base / "models" / "checkpoints" / loader["widgets_values"][0]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(b"no weights")
    frontend.load(workflow)
    try:
        ended = frontend.run()
    finally:
        checkpoint.unlink()
    assert ended["event"] == "execution_error", ended
    assert ended["detail"]["node_type"] == "CheckpointLoaderSimple"


def test_the_frontend_lists_base_and_weights_that_are_missing(frontend):
    """Both come from localhost here: the frontend offers downloads from a few hosts only."""
    workflow = named("upscale_hypir")
    wanted = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert [model["name"] for model in wanted] == ["v2-1_512-ema-pruned.safetensors", "HYPIR_sd2.pth"]
    for model in wanted:
        model["url"] = f"http://localhost:1/{model['name']}"
    frontend.load(workflow)
    # Until then it may still hold what an earlier graph missed.
    found = f"() => {{ const found = ({MISSING})(); return found.includes('HYPIR_sd2') ? found : ''; }}"
    listed = json.loads(frontend.wait_for(found))
    assert sorted(listed, key=lambda model: model["name"]) == sorted(wanted, key=lambda model: model["name"])


def test_a_workflow_from_before_vae_mode_still_opens(comfy_server, frontend):
    """Inputs that came later are missing in it: their widgets take the defaults, the others keep their values."""
    older = named("upscale")
    (node,) = (node for node in older["nodes"] if node["type"] == "ICMSR_Upscale")
    now = copy.deepcopy(node)
    names = [entry["name"] for entry in node["inputs"]]
    at = names.index("vae_mode")
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry].index("vae_mode")
    node["inputs"] = node["inputs"][:at]
    node["widgets_values"] = node["widgets_values"][:widgets]
    node["widgets_values"][0] = 3
    del node["widgets_values_named"]
    loaded = frontend.load(older)
    assert loaded["nodes"] == [[node["type"], False] for node in older["nodes"]]
    (saved,) = (node for node in loaded["saved"]["nodes"] if node["type"] == "ICMSR_Upscale")
    assert saved["widgets_values"] == [3, *now["widgets_values"][1:]]
    assert [entry["name"] for entry in saved["inputs"]] == names


def test_templates_hold_what_is_described_and_defaults_otherwise(comfy_server):
    """Nothing that happened to stand in the editor when they were written."""
    info = comfy_server.get("/object_info")
    assert {template.name for template in TEMPLATES} <= {path.stem for path in WORKFLOWS}
    for template in TEMPLATES:
        name = template.name
        (note,) = (node for node in named(name)["nodes"] if node["type"] == "MarkdownNote")
        assert note["widgets_values"] == [template.graph()["nodes"][0]["values"]["text"]], "run release/templates.py"
        nodes = [node for node in named(name)["nodes"] if node["type"] != "MarkdownNote"]
        assert [node["type"] for node in nodes] == [node.type for node in template.nodes]
        for saved, node in zip(nodes, template.nodes):
            known = {**info[node.type]["input"].get("required", {}), **info[node.type]["input"].get("optional", {})}
            for widget, value in saved.get("widgets_values_named", {}).items():
                default = known[widget][1].get("default") if widget in known and len(known[widget]) > 1 else None
                if widget in node.values:
                    assert value == node.values[widget], f"{name}: {node.name}.{widget}"
                elif default is not None:
                    assert value == default, f"{name}: {node.name}.{widget}"


def test_the_app_shows_settings_and_results_that_exist(frontend):
    """App mode: the inputs are widgets of the graph, the outputs are nodes that save something."""
    workflow = named("upscale.app")
    app = workflow["extra"]["linearData"]
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    assert workflow["extra"]["linearMode"] is True
    for node, widget in app["inputs"]:
        assert widget in nodes[node]["widgets_values_named"]
    assert [nodes[node]["type"] for node in app["outputs"]] == ["SaveImage"]
    assert frontend.load(workflow)["saved"]["extra"]["linearData"] == app
    assert frontend.wait_for("() => document.querySelectorAll('[data-testid^=linear]').length") > 0


def test_the_blueprint_is_served_and_runs(comfy_server, frontend):
    listed = [
        one for one in comfy_server.get("/global_subgraphs").values() if one["info"]["node_pack"].endswith("icm-sr")
    ]
    assert [one["name"] for one in listed] == [BLUEPRINT.stem]
    blueprint = read(BLUEPRINT)
    (node,) = blueprint["nodes"]
    assert node["inputs"][0]["name"] == "image"
    around = {
        **blueprint,
        "id": "00000000-0000-4000-8000-000000000001",
        "nodes": [
            {
                "id": 101,
                "type": "LoadImage",
                "pos": [0, 0],
                "size": [300, 300],
                "widgets_values": ["example.png", "image"],
            },
            node,
            {"id": 102, "type": "SaveImage", "pos": [900, 0], "size": [300, 300], "widgets_values": ["blueprint"]},
        ],
        "last_node_id": 102,
    }
    frontend.load(around)
    frontend.evaluate(
        """(id) => {
            const [image, fold, save] = [101, id, 102].map((one) => app.graph.getNodeById(one));
            image.connect(0, fold, 0);
            fold.connect(0, save, 0);
            fold.widgets.find((one) => one.name === "scale").value = 2;
        }""",
        node["id"],
    )
    ended = frontend.run()
    assert ended["event"] == "execution_success", ended
    (shown,) = (one["images"] for one in saved_outputs(comfy_server, ended["detail"]).values() if one.get("images"))
    with Image.open(comfy_server.base / "output" / shown[0]["filename"]) as picture:
        assert picture.size == (2 * SIDES[0], 2 * SIDES[1])
