"""The committed workflows in ComfyUI's real frontend, in a headless browser."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.comfy_harness import ROOT, to_prompt

pytestmark = pytest.mark.comfy

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = "window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"
# Serialised in the page: the objects there are proxies that the driver cannot copy.
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    const nodes = app.graph.nodes.map((node) => [node.type, node.has_errors ?? false]);
    return JSON.stringify({nodes, prompt: (await app.graphToPrompt()).output, saved: app.graph.serialize()});
}"""


def without_vae_mode(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow as it was saved before ICMSR_Upscale had this input, which a widget's place in a list stands for."""
    older = copy.deepcopy(workflow)
    (node,) = (node for node in older["nodes"] if node["type"] == "ICMSR_Upscale")
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    later = names[names.index("vae_mode") :]
    node["inputs"] = [entry for entry in node["inputs"] if entry["name"] not in later]
    del node["widgets_values"][-len(later) :]
    for name in later:
        del node["widgets_values_named"][name]
    return older


@pytest.mark.parametrize(
    ("path", "saved"),
    [(path, "now") for path in WORKFLOWS] + [(path, "before vae_mode") for path in WORKFLOWS if path.stem == "upscale"],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_workflow_opens_in_the_frontend(comfy_server, path: Path, saved: str):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no chromium on the PATH")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    given = workflow if saved == "now" else without_vae_mode(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":  # as on a user's machine: the picture that the workflow names is there
            comfy_server.upload(Image.new("RGB", (8, 8)), node["widgets_values"][0])
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(comfy_server.url)
            page.wait_for_function(READY, timeout=60_000)
            page.wait_for_timeout(1000)
            loaded = json.loads(page.evaluate(LOAD, given))
        finally:
            browser.close()
    assert errors == []
    assert loaded["nodes"] == [[node["type"], False] for node in workflow["nodes"]]
    assert loaded["saved"]["links"] == workflow["links"]
    assert [node["widgets_values"] for node in loaded["saved"]["nodes"]] == [
        node["widgets_values"] for node in workflow["nodes"]
    ]
    prompt = {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in loaded["prompt"].items()
    }
    assert prompt == to_prompt(workflow, comfy_server.get("/object_info"))


MISSING = """() => {
    const stores = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia.state.value;
    const found = Object.values(stores).map((store) => store.missingModelCandidates).find((some) => some?.length);
    return found ? JSON.stringify(found.map(({name, url, directory}) => ({name, url, directory}))) : "";
}"""
"""What the frontend offers to download, for the graph that is open."""


def test_the_frontend_lists_base_and_weights_that_are_missing(comfy_server):
    """Both come from localhost here: the frontend offers downloads from a few hosts only."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("no chromium on the PATH")
    (path,) = (path for path in WORKFLOWS if path.stem == "upscale_hypir")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    wanted = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert [model["name"] for model in wanted] == ["v2-1_512-ema-pruned.safetensors", "HYPIR_sd2.pth"]
    for model in wanted:
        model["url"] = f"http://localhost:1/{model['name']}"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(comfy_server.url)
            page.wait_for_function(READY, timeout=60_000)
            page.wait_for_timeout(1000)
            page.evaluate(LOAD, workflow)
            page.wait_for_function(f"({MISSING})()", timeout=30_000)
            listed = json.loads(page.evaluate(MISSING))
        finally:
            browser.close()
    assert sorted(listed, key=lambda model: model["name"]) == sorted(wanted, key=lambda model: model["name"])
