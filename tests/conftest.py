"""Fixtures that several files share, and how a run is set up: one thread a process, two processes for a folder.

Fixtures that need a real ComfyUI skip their tests where there is none.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock  # torch brings it

from tests.support.comfy_harness import Server, find_comfyui, find_uv, prepare_python
from tests.support.model_files import TINY, write_base
from tests.support.places import ROOT
from tests.support.script_process import ScriptProcess, start_server
from tests.support.workers import rank_of, scheduler, share_out

NO_COMFYUI = "no ComfyUI: set COMFYUI_PATH, put the pack into its custom_nodes, or clone it to ~/.cache/icm-sr/ComfyUI"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What torch, OpenMP and MKL read in the processes that tests start."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    share_out(config)


def pytest_configure() -> None:
    """One thread, here and in child processes, which are also strict about the encoding of text.

    The networks are small, and threads wait for each other: on two busy cores a test took 20 s with one thread and
    114 s with two.
    """
    for name in THREADS:
        os.environ.setdefault(name, "1")
    # Processes that the tests start fail where our code opens a text file without naming its encoding.
    strict = str(ROOT / "tests" / "support" / "strict_text")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [strict, os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONWARNDEFAULTENCODING"] = "1"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Containers often forbid compiled files, and then each of many processes compiles torch anew: 20 s, not 8.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="skip tests marked long or comfy: under two minutes, before each commit"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the fast tests with --fast; in a process among several, the files that take long come first."""
    if config.getoption("fast"):
        skipped = {item for item in items if item.get_closest_marker("long") or item.get_closest_marker("comfy")}
        config.hook.pytest_deselected(items=[item for item in items if item in skipped])
        items[:] = [item for item in items if item not in skipped]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: rank_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    return scheduler(config, log)


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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of TINY's sizes with random weights. Many tests share it, so none writes into it.

    Where a file's tests need another kind of base, the file has a fixture of this name.
    """
    return write_base(tmp_path_factory.mktemp("base"), TINY)


@pytest.fixture(scope="session")
def metric_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `tests.support.metric_sources`; no test writes into it."""
    from tests.support.metric_sources import write_sources  # imports torchvision, which few tests need

    folder = tmp_path_factory.mktemp("metric_sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="session")
def metric_weights(metric_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files that train/metric_weights.py makes of them; no test writes into it."""
    from tests.support.metric_sources import convert

    folder = tmp_path_factory.mktemp("metric_weights")
    sources = {"vgg": "vgg.pth", "alex": "alex.pth", "dists": "dists.pt", "niqe": "niqe.npz"}
    flags = [f"--{name}={metric_sources / file}" for name, file in sources.items()]
    assert convert("--out", folder, "--trust=true", *flags) == 0
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What the committed toy configurations train, through the real scripts: the folder that holds `runs`.

    The distillation ends at 64 images instead of 192.

    Test processes that run next to each other share it.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "toy"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp("toy")
            for name, more in {"adapter": [], "distill": ["--loop.images=64"]}.items():
                config = ROOT / "train" / "configs" / f"toy_{name}.yaml"
                process = ScriptProcess(f"{name}.py", "--config", config, *more, folder=unfinished)
                assert process.wait(400) == 0, process.output()
            shutil.move(unfinished, folder)
    return folder / "runs"


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ by its name, as a script there does. What it measures runs in forks."""
    start_server()  # its list of imports holds what the measuring processes need
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Shows the end of the server's log with a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("comfy_server")
    if report.failed and server is not None:
        report.sections.append(("end of ComfyUI's log", server.log()[-4000:]))
    return report
