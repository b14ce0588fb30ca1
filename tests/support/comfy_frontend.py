"""ComfyUI's real frontend in a headless browser: builds, opens, saves, runs and shows graphs.

`release/templates.py` reads this file by its path, so it imports nothing of the tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
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
START_SECONDS = 600
VUE_NODES = "Comfy.VueNodes.Enabled"
# Serialised in the page: the objects there are proxies that the driver cannot copy.
LOAD = """async (workflow) => {
    await app.loadGraphData(workflow);
    const nodes = app.graph.nodes.map((node) => [node.type, node.has_errors ?? false]);
    return JSON.stringify({nodes, prompt: (await app.graphToPrompt()).output, saved: app.graph.serialize()});
}"""
# Nodes stand in columns from left to right; a column is as wide as its widest node. `box` of a node asks for at least
# so much space.
BUILD = """async ({nodes, links, left, gap}) => {
    // A graph of its own id: the frontend keeps widgets' values by graph and node, and would give old ones back.
    const empty = {revision: 0, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], version: 0.4};
    await app.loadGraphData({...empty, id: crypto.randomUUID()});
    const made = {};
    for (const given of nodes) {
        const node = LiteGraph.createNode(given.type);
        if (!node) throw Error(`no node ${given.type}`);
        app.graph.add(node);
        if (given.title) node.title = given.title;
        for (const [name, value] of Object.entries(given.values)) {
            const widget = node.widgets?.find((one) => one.name === name);
            if (!widget) throw Error(`${given.type} has no widget ${name}`);
            widget.value = value;
            widget.callback?.(value);
        }
        if (given.type === "MarkdownNote") { node.color = "#432"; node.bgcolor = "#653"; }
        made[given.name] = node;
    }
    for (const [source, output, target, input] of links) {
        const from = made[source].outputs.findIndex((one) => one.name === output);
        const to = made[target].inputs.findIndex((one) => one.name === input);
        if (from < 0 || to < 0) throw Error(`no link ${source}.${output} -> ${target}.${input}`);
        if (!made[source].connect(from, made[target], to)) throw Error(`refused ${source}.${output} -> ${input}`);
    }
    await new Promise((done) => setTimeout(done, 300));
    let x = left[0];
    for (let column = 0; ; column++) {
        const here = nodes.filter((given) => given.column === column);
        if (!here.length) break;
        let y = left[1];
        const wide = Math.max(...here.map((given) => Math.max(given.box[0], made[given.name].computeSize()[0])));
        for (const given of here) {
            const node = made[given.name];
            const high = Math.max(given.box[1], node.computeSize()[1]);
            node.setSize([Math.round(wide), Math.round(high)]);
            node.pos = [x, y];
            y += Math.round(high) + gap[1];
        }
        x += Math.round(wide) + gap[0];
    }
    app.graph.computeExecutionOrder?.(false);
    return JSON.stringify(Object.fromEntries(Object.entries(made).map(([name, node]) => [name, String(node.id)])));
}"""
# What the frontend does for "Convert to Subgraph", "Publish Subgraph", and for widgets that are drawn to its border.
SUBGRAPH = """async ({inside, name, widgets, category, description}) => {
    const ids = new Set(inside.map(String));
    const nodes = app.graph.nodes.filter((node) => ids.has(String(node.id)));
    const {subgraph, node} = app.graph.convertToSubgraph(new Set(nodes));
    subgraph.name = name;
    node.title = name;
    for (const [type, widget] of widgets) {
        const inner = subgraph.nodes.find((one) => one.type === type);
        const index = inner.inputs.findIndex((one) => one.name === widget);
        const input = subgraph.addInput(widget, inner.inputs[index].type);
        if (!input.connect(inner.inputs[index], inner)) throw Error(`refused ${widget}`);
    }
    await new Promise((done) => setTimeout(done, 300));
    node.setSize(node.computeSize());
    const {nodes: saved, subgraphs} = app.canvas._serializeItems([node]);
    for (const one of subgraphs) Object.assign(one, {category, description});
    for (const one of saved) for (const output of one.outputs) output.links = [];
    for (const one of saved) for (const input of one.inputs) input.link = null;
    return JSON.stringify({
        revision: 0, last_node_id: Number(node.id), last_link_id: 0, nodes: saved, links: [], version: 0.4,
        definitions: {subgraphs}, extra: {},
    });
}"""
RUN = """async () => {
    const ends = ["execution_success", "execution_error", "execution_interrupted"];
    const end = new Promise((done) => {
        for (const event of ends) {
            const seen = ({detail}) => {
                for (const one of ends) app.api.removeEventListener(one, seen);
                done({event, detail});
            };
            app.api.addEventListener(event, seen, {once: true});
        }
    });
    if (!(await app.queuePrompt(0, 1))) {
        const errors = app.lastNodeErrors ?? app.extensionManager?.lastNodeErrors ?? null;
        return JSON.stringify({event: "refused", detail: errors});
    }
    return JSON.stringify(await end);
}"""
FIT = """(edge) => {
    const box = [Infinity, Infinity, -Infinity, -Infinity];
    for (const {pos, size} of app.graph.nodes) {
        box[0] = Math.min(box[0], pos[0]);
        box[1] = Math.min(box[1], pos[1] - 30);
        box[2] = Math.max(box[2], pos[0] + size[0]);
        box[3] = Math.max(box[3], pos[1] + size[1]);
    }
    const [width, height] = [box[2] - box[0] + 2 * edge, box[3] - box[1] + 2 * edge];
    const ds = app.canvas.ds;
    const [side, bar] = [60, 110];
    ds.scale = Math.min((innerWidth - side) / width, (innerHeight - bar) / height, 1);
    ds.offset[0] = side / ds.scale + edge - box[0];
    ds.offset[1] = bar / ds.scale + edge - box[1];
    app.canvas.setDirty(true, true);
    const place = (at, axis) => (at - edge + ds.offset[axis]) * ds.scale;
    return {x: place(box[0], 0), y: place(box[1], 1), width: width * ds.scale, height: height * ds.scale};
}"""


def find_browser() -> str | None:
    """The path of a Chromium; None without any."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Frontend:
    """An open page of ComfyUI."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self.errors: list[str] = []
        """What the page has thrown so far."""
        page.set_default_timeout(START_SECONDS * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str) -> None:
        """Opens ComfyUI and returns when its nodes are registered."""
        self._page.goto(url, timeout=START_SECONDS * 1000)
        self._page.wait_for_function(READY, timeout=START_SECONDS * 1000)
        self._page.wait_for_timeout(1000)

    def load(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Opens a workflow: its `nodes` as [type, has errors], the `prompt` it makes, and what is `saved` of it."""
        return json.loads(self._page.evaluate(LOAD, workflow))

    def build(self, graph: dict[str, Any]) -> dict[str, str]:
        """Draws a graph from nodes and links, in place of what is open; returns the nodes' ids by name."""
        return json.loads(self._page.evaluate(BUILD, graph))

    def subgraph(self, order: dict[str, Any]) -> dict[str, Any]:
        """Folds nodes of the open graph into a subgraph and returns it as a blueprint."""
        return json.loads(self._page.evaluate(SUBGRAPH, order))

    def saved(self) -> dict[str, Any]:
        """What is saved of the open graph."""
        return json.loads(self._page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def run(self) -> dict[str, Any]:
        """Presses Run and waits for the end: {"event": ..., "detail": ...}, the last message of the run."""
        return json.loads(self._page.evaluate(RUN))

    def use_vue_nodes(self, wanted: bool) -> None:
        """Switches Nodes 2.0 on or off."""
        self._page.evaluate(f"(on) => app.extensionManager.setting.set('{VUE_NODES}', on)", wanted)
        self._page.wait_for_timeout(1500)

    def screenshot(self, path: Any, edge: int = 20) -> None:
        """A PNG of the open graph, all of it."""
        clip = self._page.evaluate(FIT, edge)
        self._page.wait_for_timeout(1500)
        self._page.screenshot(path=path, clip=clip)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Runs a function in the page."""
        return self._page.evaluate(script, argument)

    def wait_for(self, script: str) -> Any:
        """What a function in the page returns, once that is not empty."""
        self._page.wait_for_function(f"({script})()")
        return self._page.evaluate(script)

    def whole_page(self, path: Any) -> None:
        """A PNG of what the window shows."""
        self._page.screenshot(path=path)


@contextmanager
def open_frontend(url: str, browser_path: str, width: int = 1600, height: int = 900) -> Iterator[Frontend]:
    """A page of the ComfyUI at `url`, in a browser of its own. Needs playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        try:
            frontend = Frontend(browser.new_page(viewport={"width": width, "height": height}))
            frontend.open(url)
            yield frontend
        finally:
            browser.close()
