"""Fixtures that several files share. Those that need a real ComfyUI skip their tests where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.comfy_harness import Server, find_comfyui, find_uv, prepare_python
from tests.support.script_process import ROOT, ScriptProcess

NO_COMFYUI = "no ComfyUI: set COMFYUI_PATH, put the pack into its custom_nodes, or clone it to ~/.cache/icm-sr/ComfyUI"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in the ComfyUI process; beside other work, more threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout."""
    path = find_comfyui()
    if path is None:
        pytest.skip(NO_COMFYUI)
    return path


@pytest.fixture(scope="session")
def comfy_python(comfyui: Path) -> Path:
    """A Python that has ComfyUI's requirements and no diffusers."""
    try:
        python = prepare_python(comfyui)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    print(f"ComfyUI {comfyui} runs on {python} (uv: {find_uv()})")
    return python


@pytest.fixture(scope="session")
def comfy_server(comfyui: Path, comfy_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with the pack."""
    server = Server(comfy_python, comfyui, tmp_path_factory.mktemp("comfy"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the committed toy configurations train, through the real scripts: the folder that holds `runs`."""
    folder = tmp_path_factory.mktemp("toy")
    for name in ("adapter", "distill"):
        config = ROOT / "train" / "configs" / f"toy_{name}.yaml"
        process = ScriptProcess(f"{name}.py", "--config", config, folder=folder)
        assert process.wait(400) == 0, process.output()
    return folder / "runs"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Shows the end of the server's log with a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("comfy_server")
    if report.failed and server is not None:
        report.sections.append(("end of ComfyUI's log", server.log()[-4000:]))
    return report
