"""Writes the templates: `example_workflows/` (graphs and pictures), `subgraphs/`, and docs/images/workflow.png.

    uv run --extra test python release/templates.py
    uv run --extra test python release/templates.py --parts graphs

The graphs stand in template_graphs.py. A real ComfyUI's frontend draws and saves them in headless Chromium, so they
always have its shape of today and the nodes' inputs of today: run this again when a node gets an input. ComfyUI is
found as the tests find it. Parts: graphs; pictures (crops before and after); screenshot (the template upscale after a
run). Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Error as BrowserError
from template_graphs import BLUEPRINT, EXAMPLE, TEMPLATES, Blueprint, Template

from icmsr_core.console import escape_unprintable
from icmsr_core.errors import IcmsrError
from icmsr_core.weights.embedded import demo_picture
from icmsr_core.whole_file import replace_file

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
"""What starts a ComfyUI and its frontend; read by path, because only tests import tests."""
PARTS = ("graphs", "pictures", "screenshot")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAMESPACE = uuid.UUID("5f0c3c1e-3f0e-4d5c-9b0a-6a1d5b7e2c41")
VIEW = {"scale": 0.7, "offset": [60, 90]}
"""Where the editor looks when a template is opened."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what is asked for and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to write (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT, help="the checkout to write into (default: this one)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the graphs, only these files, without .json")
    parser.add_argument("--url", help="a running ComfyUI that has this checkout (default: one is started)")
    options = parser.parse_args(arguments)
    try:
        if "graphs" in options.parts or "screenshot" in options.parts:
            with _frontend(options.url) as frontend:
                if "graphs" in options.parts:
                    write_graphs(frontend, options.out, options.only)
                if "screenshot" in options.parts:
                    write_screenshot(frontend, options.out / "docs" / "images" / "workflow.png")
        if "pictures" in options.parts:
            write_pictures(options.out / "example_workflows")
    except (BrowserError, IcmsrError, OSError, RuntimeError) as error:
        print(f"templates: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _frontend(url: str | None) -> Iterator[Any]:
    """An open frontend, of the ComfyUI at `url` or of one that is started for it."""
    page = runpy.run_path(str(SUPPORT / "comfy_frontend.py"))
    harness = runpy.run_path(str(SUPPORT / "comfy_harness.py"))
    browser = page["find_browser"]()
    if browser is None:
        raise FileNotFoundError("no Chromium on the PATH: install chromium")
    if url:
        with page["open_frontend"](url, browser) as frontend:
            yield frontend
        return
    comfyui = harness["find_comfyui"]()
    if comfyui is None:
        raise FileNotFoundError("no ComfyUI: set COMFYUI_PATH, or clone it to ~/.cache/icm-sr/ComfyUI")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "input").mkdir()
        shutil.copy(demo_picture(), base / "input" / EXAMPLE)
        server = harness["Server"](harness["prepare_python"](comfyui), comfyui, base)
        try:
            server.wait_until_ready()
            with page["open_frontend"](server.url, browser) as frontend:
                yield frontend
        finally:
            server.stop()


def write_graphs(frontend: Any, out: Path, only: Sequence[str] | None) -> None:
    """Writes the JSON of every template and of the blueprint below `out`, or `only` some.

    Templates that were drawn by hand are opened and saved again. Raises `IcmsrError` for a name that there is not.
    """
    folder = out / "example_workflows"
    described = {template.name for template in TEMPLATES}
    by_hand = {path.stem: path for path in sorted(folder.glob("*.json")) if path.stem not in described}
    known = {*described, *by_hand, BLUEPRINT.name}
    wanted = set(only or known)
    if wanted - known:
        raise IcmsrError(f"no template {', '.join(sorted(wanted - known))}: there are {', '.join(sorted(known))}")
    for name, path in by_hand.items():
        if name in wanted:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            _write_json(path, frontend.load(workflow)["saved"] | {"extra": workflow["extra"]})
    for template in TEMPLATES:
        if template.name in wanted:
            _write_json(folder / f"{template.name}.json", workflow_of(frontend, template))
    if BLUEPRINT.name in wanted:
        _write_json(out / "subgraphs" / f"{BLUEPRINT.name}.json", blueprint_of(frontend, BLUEPRINT))


def workflow_of(frontend: Any, template: Template) -> dict[str, Any]:
    """The template as the frontend saves it."""
    ids = frontend.build(template.graph())
    saved: dict[str, Any] = frontend.load(fixed_ids(frontend.saved(), template.name))["saved"]
    saved["extra"] = {"ds": VIEW}
    if template.app is not None:
        inputs, outputs = template.app
        saved["extra"]["linearData"] = {
            "inputs": [[ids[node], widget] for node, widget in inputs],
            "outputs": [ids[node] for node in outputs],
        }
        saved["extra"]["linearMode"] = True
    return saved


def blueprint_of(frontend: Any, blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint as the frontend publishes it."""
    ids = frontend.build(blueprint.graph.graph())
    order = {
        "inside": [ids[name] for name in blueprint.inside],
        "name": blueprint.name,
        "widgets": [list(one) for one in blueprint.widgets],
        "category": blueprint.category,
        "description": blueprint.description,
    }
    return fixed_ids(frontend.subgraph(order), blueprint.name)


def fixed_ids(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """The workflow with ids that depend on `name` and their order alone, instead of random ones."""
    text = json.dumps(workflow)
    for index, found in enumerate(dict.fromkeys(UUID.findall(text))):
        text = text.replace(found, str(uuid.uuid5(NAMESPACE, f"{name}/{index}")))
    fixed: dict[str, Any] = json.loads(text)
    return fixed


def write_screenshot(frontend: Any, path: Path) -> None:
    """Opens the template upscale in Nodes 2.0, runs it and writes what the editor shows."""
    template = next(one for one in TEMPLATES if one.name == "upscale")
    frontend.use_vue_nodes(True)
    frontend.load(workflow_of(frontend, template))
    frontend.run()
    frontend.evaluate("() => new Promise((done) => setTimeout(done, 10000))")  # until "Job completed" is gone
    frontend.screenshot(path)


def write_pictures(folder: Path) -> None:
    """Writes every template's JPEG."""
    import thumbnails  # imports the networks

    nano = thumbnails.Nano()
    for name, thumbnail in thumbnails.THUMBNAILS.items():
        thumbnails.write(folder / f"{name}.jpg", thumbnails.drawn(thumbnail, nano))
    thumbnails.write(folder / "conditions.jpg", thumbnails.conditions_thumbnail())
    thumbnails.write(folder / "region.jpg", thumbnails.region_thumbnail(nano))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    escape_unprintable()
    sys.exit(main())
