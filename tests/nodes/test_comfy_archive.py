"""The registry's archive, as comfy-cli packs it, unpacked into an empty ComfyUI: it loads, and a template runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.comfy_harness import PACK_NAME, Server, to_prompt
from tests.support.registry_archive import packed_archive

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def server(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    archive = packed_archive(tmp_path_factory.mktemp("checkout") / "pack")
    server = Server(comfy_python, comfyui, tmp_path_factory.mktemp("archive"), archive)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def test_the_archive_loads_and_upscales(server: Server) -> None:
    pack = server.base / "custom_nodes" / PACK_NAME
    assert not pack.is_symlink()
    assert not (pack / "tests").exists()
    info = server.get("/object_info")
    workflow = json.loads((pack / "example_workflows" / "upscale.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, info)
    loader = next(node for node in prompt.values() if node["class_type"] == "LoadImage")
    loader["inputs"]["image"] = server.upload(Image.new("RGB", (40, 24), (200, 90, 10)), "flat.png")
    kind, data, entry = server.run(prompt)
    assert kind == "execution_success", data
    result = server.picture(entry)
    assert result.size == (160, 96)
    red, green, blue = result.resize((1, 1)).getpixel((0, 0))
    assert max(abs(red - 200), abs(green - 90), abs(blue - 10)) < 8, "the colour of the input"
    assert "Traceback" not in server.log()
