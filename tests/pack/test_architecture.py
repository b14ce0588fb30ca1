"""The walls of docs/architecture.md, read off the source: imports point down only, and the library is quiet."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

import pytest

from tests.support.places import ROOT

FLOORS = (
    (
        "icmsr_core.console",
        "icmsr_core.errors",
        "icmsr_core.steps",
        "icmsr_core.transfer",
        "icmsr_core.whole_file",
    ),
    ("icmsr_core.backbone", "icmsr_core.conditions", "icmsr_core.pictures"),
    ("icmsr_core.tiled_vae", "icmsr_core.weights"),
    ("icmsr_core.foreign", "icmsr_core.measures", "icmsr_core.upscale"),
    ("icmsr_core.runtime",),
    ("icmsr_core.exchange",),
    ("icmsr_core.cli",),
    ("icmsr_core.train.settings",),
    ("icmsr_core.train.losses", "icmsr_core.train.data", "icmsr_core.train.networks"),
    ("icmsr_core.train.tasks",),
    ("icmsr_core.train.run",),
    ("icmsr_core.train.experiments",),
    ("nodes.native",),
    ("nodes",),
    ("train",),
    ("benchmarks", "release"),
)
"""The rooms, from the lowest floor up. A file imports from its own room and from lower floors only."""

CLOSED = {
    "icmsr_core.train": ("icmsr_core.exchange", "icmsr_core.cli"),
    "nodes": ("icmsr_core.runtime", "icmsr_core.exchange", "icmsr_core.cli", "icmsr_core.train"),
    "train": ("nodes",),
    "benchmarks": ("nodes", "train"),
    "release": ("nodes", "train"),
}
"""Lower rooms that are closed to a room all the same."""

ENTRIES = {
    ("__init__.py", "nodes.extension.IcmsrExtension"),
    ("__init__.py", "nodes.core_version.refuse_older_core"),
    ("icmsr_core/__main__.py", "icmsr_core.cli.main.run"),
}
"""What the files outside of all rooms import."""

TOP_LEVEL = ("nodes", "icmsr_core", "train", "benchmarks", "release")
DIFFUSERS = {"diffusers", "peft", "accelerate", "transformers"}
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution"}
DIFFUSERS_BACKBONE = "icmsr_core/runtime/diffusers_backbone.py"
COMMAND_LINE = "icmsr_core/cli/main.py"
PROMPTS = "icmsr_core/runtime/prompts.py"
SEARCH_PATH_SCRIPTS = "train/*.py"


class Import(NamedTuple):
    """One imported name, as an absolute dotted path from the pack's root."""

    target: str
    line: int
    relative: bool
    lazy: bool
    """Inside a function or under TYPE_CHECKING: not executed when the module is imported."""


def imports(name: str, tree: ast.Module) -> Iterator[Import]:
    """Every import of the file `name` (its path below the root), importlib.import_module("...") included."""
    package = PurePosixPath(name).parts[:-1]
    lazy: set[int] = set()
    for node in ast.walk(tree):
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or type_checking:
            lazy |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        late = id(node) in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, late)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(".".join(filter(None, [module, alias.name])), node.lineno, node.level > 0, late)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield Import(str(first.value), node.lineno, False, late)


def inside(target: str, *modules: str) -> bool:
    return any(target == module or target.startswith(module + ".") for module in modules)


def dotted(name: str) -> str:
    """The module in the file `name`."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(target: str) -> tuple[int, str] | None:
    """Floor and name of the room that the module or name `target` is in; None outside of the rooms."""
    found = [(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if inside(target, room)]
    return max(found, key=lambda place: len(place[1]), default=None)


def points_up(name: str, target: str) -> bool:
    """Whether an import of `target` leads from the file `name` to a higher floor, a neighbour or a closed room."""
    here, there = room_of(dotted(name)), room_of(target)
    if there is None:
        above_all_rooms = inside(target, *TOP_LEVEL, "tests")  # a bare `icmsr_core` or `icmsr_core.train`
        return above_all_rooms and not inside(dotted(name), target) and target != "icmsr_core.__version__"
    if here is None:
        return (name, target) not in ENTRIES
    closed = [room for inner, rooms in CLOSED.items() if inside(dotted(name), inner) for room in rooms]
    return inside(target, *closed) or (there[1] != here[1] and there[0] >= here[0])


def forbidden_import(name: str, entry: Import) -> str | None:
    """Why the file `name` may not import `entry`, or None."""
    top, target = name.split("/")[0], entry.target
    training = name.startswith("icmsr_core/train/")
    if top in ("nodes", "icmsr_core") and not entry.relative and inside(target, "icmsr_core", "nodes", "train"):
        return "relative imports only: ComfyUI imports the pack under its path"
    if inside(target, "tests"):
        return "only tests import tests"
    if inside(target, dotted(DIFFUSERS_BACKBONE)) and top == "icmsr_core" and not training:
        return None if name == COMMAND_LINE and entry.lazy else f"only {COMMAND_LINE} may, inside a function"
    if inside(target, "transformers") and name == PROMPTS and entry.lazy:
        return None
    if inside(target, *DIFFUSERS) and (top == "nodes" or (top == "icmsr_core" and not training)):
        return None if name == DIFFUSERS_BACKBONE else f"only icmsr_core/train and {DIFFUSERS_BACKBONE} may"
    if inside(target, *COMFYUI) and top != "nodes":
        return "only nodes may"
    return "the arrow points up or out" if points_up(name, target) else None


def violations(name: str, source: str) -> list[str]:
    """What the file `name` does against the rules, one line each."""
    tree = ast.parse(source)
    found = []
    for entry in imports(name, tree):
        reason = forbidden_import(name, entry)
        if reason is not None:
            found.append(f"{name}:{entry.line}: imports {entry.target}: {reason}")
    library = name.startswith(("icmsr_core/", "nodes/")) or name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and library and name != COMMAND_LINE:
            found.append(f"{name}:{node.lineno}: print in the library: use logging")
        search_path = (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path") or (
            isinstance(node, ast.ImportFrom)
            and node.module == "sys"
            and any(alias.name == "path" for alias in node.names)
        )
        if search_path and not PurePosixPath(name).match(SEARCH_PATH_SCRIPTS):
            found.append(f"{name}:{node.lineno}: sys.path is for {SEARCH_PATH_SCRIPTS}")
        if search_path and library:
            found.append(f"{name}:{node.lineno}: sys.path in the library")
    return found


def project_files() -> dict[str, str]:
    """Path below the root and text of every source file of the rooms."""
    paths = [ROOT / "__init__.py"] if (ROOT / "__init__.py").is_file() else []
    for room in TOP_LEVEL:
        paths += sorted((ROOT / room).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


FILES = project_files()


def test_every_file_is_in_a_room() -> None:
    """All but the roots of packages and the entry of the command."""
    outside = {name for name in FILES if room_of(dotted(name)) is None}
    assert outside == {
        "__init__.py",
        "icmsr_core/__init__.py",
        "icmsr_core/__main__.py",
        "icmsr_core/train/__init__.py",
    }
    assert len(FILES) >= 150


def test_every_room_has_a_file() -> None:
    rooms = {room_of(dotted(name)) for name in FILES}
    assert rooms >= {(floor, room) for floor, named in enumerate(FLOORS) for room in named}


def test_every_import_points_down_and_the_library_is_quiet() -> None:
    assert [line for name, source in FILES.items() for line in violations(name, source)] == []


@cache
def executed_imports(name: str, source: str) -> tuple[str, ...]:
    """What the file `name` imports when it is imported itself."""
    return tuple(entry.target for entry in imports(name, ast.parse(source)) if not entry.lazy)


def loaded_with(name: str, files: dict[str, str]) -> set[str]:
    """Everything that is imported when the file `name` is, through the project's own modules."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for target in executed_imports(current, files[current]):
            if target in seen:
                continue
            seen.add(target)
            parts = target.split(".")
            for length in range(1, len(parts) + 1):
                stem = "/".join(parts[:length])
                waiting += [file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in files]
    return seen


def test_importing_the_nodes_imports_no_diffusers() -> None:
    """Not through any other module either: no version of it can then break a user's ComfyUI."""
    for name in FILES:
        if name.startswith("nodes/"):
            heavy = {entry for entry in loaded_with(name, FILES) if inside(entry, *DIFFUSERS, "jsonargparse")}
            assert not heavy, name


def test_core_is_importable_without_diffusers() -> None:
    for name in FILES:
        if name.startswith("icmsr_core/") and "/train/" not in name and name != DIFFUSERS_BACKBONE:
            heavy = {entry for entry in loaded_with(name, FILES) if inside(entry, *DIFFUSERS, "jsonargparse")}
            assert not heavy, name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nodes/bad.py", "import diffusers"),
        ("nodes/bad.py", "def f():\n    from peft import LoraConfig"),
        ("nodes/native/bad.py", "import accelerate.utils"),
        ("nodes/native/bad.py", "from ..upscale import Upscale"),
        ("nodes/bad.py", "from ..icmsr_core.runtime.diffusers_backbone import load_backbone"),
        ("nodes/bad.py", "from ..icmsr_core.runtime import diffusers_backbone"),
        ("nodes/bad.py", "from ..icmsr_core.runtime.precision import choose_dtype"),
        ("nodes/bad.py", "from ..icmsr_core.train.run.loop import train"),
        ("nodes/bad.py", "from icmsr_core.upscale.one_step import upscale"),
        ("nodes/bad.py", "from ..tests.support.model_files import write_base"),
        ("nodes/bad.py", "importlib.import_module('diffusers')"),
        ("icmsr_core/upscale/bad.py", "from ...nodes.upscale import x"),
        ("icmsr_core/upscale/bad.py", "from ... import nodes"),
        ("icmsr_core/cli/bad.py", "from ..train.run import loop"),
        ("icmsr_core/cli/bad.py", "from .. import train"),
        ("icmsr_core/cli/bad.py", "def f():\n    from ..train.run.loop import train"),
        ("icmsr_core/errors.py", "from .whole_file import replace_file"),
        ("icmsr_core/backbone/bad.py", "from ..pictures.files import read_picture"),
        ("icmsr_core/backbone/bad.py", "from ..tiled_vae.tiled import encode_tiled"),
        ("icmsr_core/weights/bad.py", "from ..measures.metrics import psnr_y"),
        ("icmsr_core/weights/bad.py", "def f():\n    from ..exchange.importers import import_checkpoint"),
        ("icmsr_core/runtime/bad.py", "def f():\n    import diffusers"),
        ("icmsr_core/upscale/bad.py", "import peft"),
        ("icmsr_core/cli/bad.py", "def f():\n    from ..runtime.diffusers_backbone import load_backbone"),
        (COMMAND_LINE, "from ..runtime.diffusers_backbone import load_backbone"),
        (COMMAND_LINE, "from icmsr_core.upscale.one_step import upscale"),
        (PROMPTS, "import transformers"),
        (PROMPTS, "def f():\n    import diffusers"),
        ("icmsr_core/runtime/bad.py", "def f():\n    import transformers"),
        ("icmsr_core/upscale/bad.py", "import comfy.sd"),
        ("icmsr_core/upscale/bad.py", "print('hello')"),
        ("icmsr_core/train/run/bad.py", "print('hello')"),
        ("nodes/bad.py", "def f():\n    print('hello')"),
        ("icmsr_core/upscale/bad.py", "import sys\nsys.path.insert(0, '.')"),
        ("icmsr_core/train/run/bad.py", "import sys\nsys.path += ['.']"),
        ("nodes/bad.py", "import sys\nsys.path[:] = []"),
        ("benchmarks/bad.py", "from sys import path"),
        ("benchmarks/bad.py", "from nodes.upscale import Upscale"),
        ("__init__.py", "import sys\nsys.path.append('.')"),
        ("icmsr_core/train/run/bad.py", "from ....nodes import upscale"),
        ("icmsr_core/train/run/bad.py", "from ....train import prior"),
        ("icmsr_core/train/run/bad.py", "from ..experiments.collapse import Bench"),
        ("icmsr_core/train/losses/bad.py", "from ..networks.roles import Roles"),
        ("icmsr_core/train/tasks/bad.py", "from ...cli.demo import run_demo"),
        ("train/bad.py", "from nodes.upscale import x"),
        ("train/bad.py", "import folder_paths"),
    ],
)
def test_each_rule_finds_what_it_forbids(name: str, line: str) -> None:
    found = violations(name, line)
    assert found
    assert all(entry.startswith(f"{name}:") for entry in found)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "nodes/good.py",
            "from ..icmsr_core.upscale.one_step import upscale\nimport comfy.sd\nfrom .native.sockets import x",
        ),
        (COMMAND_LINE, "def f():\n    from ..runtime.diffusers_backbone import load_backbone\n    print('done')"),
        (COMMAND_LINE, "if TYPE_CHECKING:\n    from ..runtime.diffusers_backbone import DiffusersBackbone"),
        (DIFFUSERS_BACKBONE, "from diffusers import AutoencoderKL\nfrom ..backbone.protocol import Backbone"),
        ("icmsr_core/train/run/good.py", "import peft\nfrom ...upscale.sizes import resize\nfrom .loop import train"),
        (
            "train/good.py",
            "import sys\nsys.path.insert(0, '.')\nfrom icmsr_core.train.run.loop import train\nprint('x')",
        ),
        ("icmsr_core/upscale/good.py", "from .tiling import x\nimport sys\nsys.stderr.write('x')"),
    ],
)
def test_no_rule_forbids_what_is_allowed(name: str, line: str) -> None:
    assert violations(name, line) == []


def test_imports_are_followed_through_other_modules_unless_they_are_lazy() -> None:
    files = {
        "nodes/a.py": "from ..icmsr_core.b import x",
        "icmsr_core/__init__.py": "",
        "icmsr_core/b.py": "from . import c",
        "icmsr_core/c.py": "import diffusers",
    }
    assert "diffusers" in loaded_with("nodes/a.py", files)
    files["icmsr_core/c.py"] = "def f():\n    import diffusers"
    assert "diffusers" not in loaded_with("nodes/a.py", files)
