"""The walls of docs/architecture.md, read off the source with ast: imports point down only, and the library is quiet.

    nodes -> icmsr_core          train -> icmsr_core.train -> icmsr_core
"""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("nodes", "icmsr_core", "train", "benchmarks")
DIFFUSERS = {"diffusers", "peft", "accelerate", "transformers"}
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution"}
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


def forbidden_import(name: str, entry: Import) -> str | None:
    """Why the file `name` may not import `entry`, or None."""
    room = name.split("/")[0]
    training = name.startswith("icmsr_core/train/")
    target = entry.target
    if room in ("nodes", "icmsr_core") and not entry.relative and inside(target, "icmsr_core", "nodes", "train"):
        return "relative imports only: ComfyUI imports the pack under its path"
    if inside(target, "tests"):
        return "only tests import tests"
    if inside(target, "icmsr_core.diffusers_backbone") and room == "icmsr_core" and not training:
        return None if name == "icmsr_core/cli.py" and entry.lazy else "only cli.py may, inside a function"
    allowed = training or name == "icmsr_core/diffusers_backbone.py"
    if inside(target, "transformers") and name == "icmsr_core/prompts.py" and entry.lazy:
        return None
    if inside(target, *DIFFUSERS) and room == "icmsr_core" and not allowed:
        return "only icmsr_core/train and diffusers_backbone.py may"
    above = {
        "nodes": {"train", "icmsr_core.train", "icmsr_core.diffusers_backbone", "icmsr_core.cli", *DIFFUSERS},
        "icmsr_core": {"nodes", "train", *COMFYUI} | (set() if training else {"icmsr_core.train"}),
        "train": {"nodes", *COMFYUI},
        "benchmarks": {"nodes", "train", *COMFYUI},
    }
    return "the arrow points up or out" if inside(target, *above.get(room, set())) else None


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
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and library and name != "icmsr_core/cli.py":
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
    for room in ROOMS:
        paths += sorted((ROOT / room).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


FILES = project_files()


def test_all_rooms_are_read() -> None:
    for name in ("icmsr_core/one_step.py", "icmsr_core/train/loop.py", "train/prior.py", "train/distill.py"):
        assert name in FILES


@pytest.mark.parametrize("name", FILES)
def test_walls(name: str) -> None:
    assert violations(name, FILES[name]) == []


def loaded_with(name: str, files: dict[str, str]) -> set[str]:
    """Everything that is imported when the file `name` is, through the project's own modules."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for entry in imports(current, ast.parse(files[current])):
            if entry.lazy or entry.target in seen:
                continue
            seen.add(entry.target)
            parts = entry.target.split(".")
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
        if name.startswith("icmsr_core/") and "/train/" not in name and name != "icmsr_core/diffusers_backbone.py":
            heavy = {entry for entry in loaded_with(name, FILES) if inside(entry, *DIFFUSERS, "jsonargparse")}
            assert not heavy, name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nodes/bad.py", "import diffusers"),
        ("nodes/bad.py", "def f():\n    from peft import LoraConfig"),
        ("nodes/bad.py", "import accelerate.utils"),
        ("nodes/bad.py", "from ..icmsr_core.diffusers_backbone import load_backbone"),
        ("nodes/bad.py", "from ..icmsr_core import diffusers_backbone"),
        ("nodes/bad.py", "from ..icmsr_core.train.loop import train"),
        ("nodes/bad.py", "from icmsr_core.one_step import upscale"),
        ("nodes/bad.py", "from ..tests.model_files import write_base"),
        ("nodes/bad.py", "importlib.import_module('diffusers')"),
        ("icmsr_core/bad.py", "from ..nodes.upscale import x"),
        ("icmsr_core/bad.py", "from .. import nodes"),
        ("icmsr_core/bad.py", "from .train import loop"),
        ("icmsr_core/bad.py", "from . import train"),
        ("icmsr_core/bad.py", "def f():\n    from .train.loop import train"),
        ("icmsr_core/bad.py", "def f():\n    import diffusers"),
        ("icmsr_core/bad.py", "import peft"),
        ("icmsr_core/bad.py", "def f():\n    from .diffusers_backbone import load_backbone"),
        ("icmsr_core/cli.py", "from .diffusers_backbone import load_backbone"),
        ("icmsr_core/cli.py", "from icmsr_core.one_step import upscale"),
        ("icmsr_core/prompts.py", "import transformers"),
        ("icmsr_core/prompts.py", "def f():\n    import diffusers"),
        ("icmsr_core/bad.py", "def f():\n    import transformers"),
        ("icmsr_core/bad.py", "import comfy.sd"),
        ("icmsr_core/bad.py", "print('hello')"),
        ("icmsr_core/train/bad.py", "print('hello')"),
        ("nodes/bad.py", "def f():\n    print('hello')"),
        ("icmsr_core/bad.py", "import sys\nsys.path.insert(0, '.')"),
        ("icmsr_core/train/bad.py", "import sys\nsys.path += ['.']"),
        ("nodes/bad.py", "import sys\nsys.path[:] = []"),
        ("benchmarks/bad.py", "from sys import path"),
        ("__init__.py", "import sys\nsys.path.append('.')"),
        ("icmsr_core/train/bad.py", "from ...nodes import upscale"),
        ("icmsr_core/train/bad.py", "from ...train import prior"),
        ("train/bad.py", "from nodes.upscale import x"),
    ],
)
def test_the_rules_bite(name: str, line: str) -> None:
    found = violations(name, line)
    assert found
    assert all(entry.startswith(f"{name}:") for entry in found)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nodes/good.py", "from ..icmsr_core.one_step import upscale\nimport comfy.sd\nfrom .image_sockets import x"),
        ("icmsr_core/cli.py", "def f():\n    from .diffusers_backbone import load_backbone\n    print('done')"),
        ("icmsr_core/cli.py", "if TYPE_CHECKING:\n    from .diffusers_backbone import DiffusersBackbone"),
        ("icmsr_core/diffusers_backbone.py", "from diffusers import AutoencoderKL\nfrom .backbone import Backbone"),
        ("icmsr_core/train/good.py", "import peft\nfrom ..one_step import resize\nfrom .loop import train"),
        ("train/good.py", "import sys\nsys.path.insert(0, '.')\nfrom icmsr_core.train.loop import train\nprint('x')"),
        ("icmsr_core/good.py", "from .trainer import x\nimport sys\nsys.stderr.write('x')"),
    ],
)
def test_the_rules_allow_what_they_should(name: str, line: str) -> None:
    assert violations(name, line) == []


def test_the_closure_bites() -> None:
    files = {
        "nodes/a.py": "from ..icmsr_core.b import x",
        "icmsr_core/__init__.py": "",
        "icmsr_core/b.py": "from . import c",
        "icmsr_core/c.py": "import diffusers",
    }
    assert "diffusers" in loaded_with("nodes/a.py", files)
    files["icmsr_core/c.py"] = "def f():\n    import diffusers"
    assert "diffusers" not in loaded_with("nodes/a.py", files)
