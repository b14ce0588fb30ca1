"""What the Comfy registry and ComfyUI ask of a node pack, read off the files alone."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.pack.test_architecture import FILES
from tests.pack.test_architecture import imports as every_import
from tests.support.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

NODES = sorted((ROOT / "nodes").rglob("*.py"))
PACK = sorted([ROOT / "__init__.py", *NODES, *(ROOT / "icmsr_core").rglob("*.py")])
LOADED_BY_COMFYUI = [path for path in PACK if "train" not in path.parts]
REFUSED_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.jit.load"}
REFUSED_MODULES = {"pickle", "marshal", "subprocess", "pip", "ctypes", "requests", "aiohttp", "socket"}
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def calls(tree: ast.Module) -> list[ast.Call]:
    """Every call in the file."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """Every module that the file imports, with the level of relative imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def refused_code(tree: ast.Module) -> Iterator[str]:
    """What the Comfy registry refuses in a pack: code from text, processes, the network, unchecked pickles."""
    for call in calls(tree):
        if ast.unparse(call.func) in REFUSED_CALLS:
            yield f"calls {ast.unparse(call.func)}"
        if ast.unparse(call.func) == "torch.load" and "weights_only=True" not in ast.unparse(call):
            yield "calls torch.load without weights_only=True"
    for name, level in imports(tree):
        if level == 0 and name.split(".")[0] in REFUSED_MODULES:
            yield f"imports {name}"


def code_that_needs_a_place(tree: ast.Module) -> Iterator[str]:
    """What works only where the pack's root is on sys.path. In ComfyUI, the pack's name in sys.modules is its path."""
    for name, level in imports(tree):
        if level == 0 and name.split(".")[0] in ("icmsr_core", "nodes"):
            yield f"imports {name} by its absolute name"
    for call in calls(tree):
        if ast.unparse(call.func).startswith("sys.path."):
            yield f"calls {ast.unparse(call.func)}"


def imports_for_training(tree: ast.Module) -> Iterator[str]:
    """Imports that a user's ComfyUI may lack, or that only training needs."""
    for name, _ in imports(tree):
        parts = name.split(".")
        if parts[0] in ("diffusers", "peft", "accelerate") or {"diffusers_backbone", "train"} & set(parts):
            yield f"imports {name}"


def violations(rule: Callable[[ast.Module], Iterator[str]], paths: Sequence[Path]) -> list[str]:
    """What the files do against `rule`, one line each."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    return [f"{path.relative_to(ROOT)} {found}" for path, tree in trees.items() for found in rule(tree)]


def node_ids() -> set[str]:
    """Every id that a schema in nodes/ gives itself."""
    text = "\n".join(path.read_text() for path in NODES)
    return set(re.findall(r'node_id="([^"]+)"', text))


COMFYUI = {"comfy", "comfy_api", "comfy_extras", "folder_paths"}
DISTRIBUTIONS = {"PIL": "Pillow", "cv2": "opencv-python"}
"""Packages whose name differs from that of their module."""


def required_imports(tree: ast.Module) -> set[str]:
    """The outside modules that the file cannot do without: not those whose absence it catches, or that only types need.

    Absolute imports, at the top of the file or inside functions.
    """
    optional: set[int] = set()
    for node in ast.walk(tree):
        caught = isinstance(node, ast.Try) and any("ImportError" in ast.unparse(one.type) for one in node.handlers)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if caught or typing:
            optional |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) not in optional and isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if id(node) not in optional and isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found - COMFYUI - set(sys.stdlib_module_names)


def files_behind_the_nodes() -> set[str]:
    """Every file of the pack that can be imported while a node runs, at once or later."""
    seen: set[str] = set()
    waiting = ["__init__.py", *(name for name in FILES if name.startswith("nodes/"))]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            for entry in every_import(name, ast.parse(FILES[name])):
                parts = entry.target.split(".")
                stems = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
                waiting += [file for stem in stems for file in (f"{stem}.py", f"{stem}/__init__.py") if file in FILES]
    return seen


def test_requirements_are_what_the_nodes_import():
    """ComfyUI installs requirements.txt: not less than the nodes need, and none of the command line's packages."""
    files = files_behind_the_nodes()
    assert len(files) >= 80
    needed = set().union(*(required_imports(ast.parse(FILES[name])) for name in files))
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(re.split("[>=<]", line)[0] for line in requirements) == sorted(
        DISTRIBUTIONS.get(name, name) for name in needed
    )
    dependencies = project()["project"]["dependencies"]
    assert requirements == [line for line in dependencies if line in requirements], "the same bounds, in the same order"


def test_an_import_that_may_fail_is_not_required():
    source = """
import os, torch
import comfy.utils
from .errors import IcmsrError
if TYPE_CHECKING:
    import numpy.typing
try:
    import psutil
except ImportError:
    psutil = None
def f():
    from einops import rearrange
"""
    assert required_imports(ast.parse(source)) == {"torch", "einops"}


def test_dependencies_leave_the_user_s_versions_alone():
    for line in project()["project"]["dependencies"]:
        assert "==" not in line and "<" not in line, line  # noqa: PT018


def test_name_version_and_licence_are_what_the_registry_asks_for():
    entry = project()["project"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{1,99}", entry["name"])
    assert "comfyui" not in entry["name"].lower()
    assert "comfyui" not in project()["tool"]["comfy"]["DisplayName"].lower()
    assert "Operating System :: OS Independent" in entry["classifiers"]
    accelerators = {name for name in entry["classifiers"] if name.startswith("Environment :: ")}
    assert accelerators <= {f"Environment :: GPU :: {name}" for name in ("NVIDIA CUDA", "AMD ROCm", "Apple Metal")}
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry["version"])
    assert (ROOT / entry["license"]["file"]).is_file()
    assert (ROOT / entry["readme"]).is_file()


def test_entry_is_v3_only():
    """ComfyUI ignores comfy_entrypoint where NODE_CLASS_MAPPINGS exists."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    names |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert names == {"comfy_entrypoint", "WEB_DIRECTORY"}


def test_node_ids_are_prefixed_and_documented():
    ids = node_ids()
    assert len(ids) >= 5
    assert all(name.startswith("ICMSR_") for name in ids)
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == ids
    assert set(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())) == ids


def test_no_file_has_code_that_a_registry_refuses():
    assert len(PACK) >= 107
    assert violations(refused_code, PACK) == []


def test_every_file_can_be_imported_wherever_comfyui_loads_the_pack_from():
    assert len(LOADED_BY_COMFYUI) >= 74
    assert violations(code_that_needs_a_place, LOADED_BY_COMFYUI) == []


def test_nodes_import_neither_diffusers_nor_training():
    assert len(NODES) >= 16
    assert violations(imports_for_training, NODES) == []


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (refused_code, "eval('1')"),
        (refused_code, "import os\nos.system('true')"),
        (refused_code, "def read(file):\n    return torch.load(file)"),
        (refused_code, "torch.load(file, weights_only=False)"),
        (refused_code, "from pickle import load"),
        (refused_code, "import ctypes.util"),
        (code_that_needs_a_place, "from icmsr_core.errors import IcmsrError"),
        (code_that_needs_a_place, "import nodes.upscale"),
        (code_that_needs_a_place, "import sys\nsys.path.insert(0, '.')"),
        (imports_for_training, "import accelerate"),
        (imports_for_training, "from ..icmsr_core.runtime.diffusers_backbone import load_backbone"),
        (imports_for_training, "def f():\n    from ..icmsr_core.train.run.loop import train"),
    ],
)
def test_each_rule_finds_what_it_forbids(rule, line):
    assert list(rule(ast.parse(line)))


@pytest.mark.parametrize("rule", [refused_code, code_that_needs_a_place, imports_for_training])
def test_no_rule_forbids_what_is_allowed(rule):
    line = "import torch\nfrom ..icmsr_core.errors import IcmsrError\ntorch.load(file, weights_only=True)"
    assert list(rule(ast.parse(line))) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_has_a_picture_known_nodes_and_a_note(path):
    """A picture beside each (jpg is the only kind that is shown), known nodes, a note that explains."""
    from PIL import Image

    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 180
    assert path.with_suffix(".jpg").stat().st_size <= 100_000
    workflow = json.loads(path.read_text())
    types = [node["type"] for node in workflow["nodes"]]
    own = {name for name in types if name.startswith("ICMSR_")}
    assert own <= node_ids()
    assert own & {"ICMSR_Upscale", "ICMSR_InspectManifold"}, "a picture comes out of it"
    assert "MarkdownNote" in types
    for node in workflow["nodes"]:
        assert all(isinstance(length, (int, float)) for length in [*node["pos"], *node["size"]])


def test_there_is_a_workflow():
    assert WORKFLOWS


SHIPPED = {
    "__init__.py",
    "LICENSE",
    "README.md",
    "example_workflows",
    "icmsr_core",
    "locales",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
    "subgraphs",
    "web",
}
"""What a user's ComfyUI gets: the only names at the top of the registry's archive."""


def test_the_archive_holds_the_pack_and_nothing_else():
    """comfy-cli packs what git tracks, less what .comfyignore names."""
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    # A name without a leading slash is kept out at every depth: web/docs would go with docs.
    assert [line for line in lines if not line.startswith("/")] == ["__pycache__/", "*.py[cod]"]
    kept_out = {line.strip("/") for line in lines}
    assert not SHIPPED & kept_out
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what git tracks is unknown")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in tracked.splitlines()} - kept_out == SHIPPED


def test_the_library_is_marked_as_typed():
    """PEP 561: without the marker a type checker ignores the library's annotations."""
    assert (ROOT / "icmsr_core" / "py.typed").read_bytes() == b""
    assert "Typing :: Typed" in project()["project"]["classifiers"]


def test_every_version_of_python_that_is_promised_is_tested():
    """The classifiers, the oldest version that pyproject.toml allows, and the versions that CI runs."""
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["project"]["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"python: \[(.*)\]", workflow)[1].replace('"', "").split(", ") == stated
    assert project()["project"]["requires-python"] == f">={stated[0]}"


def test_the_pack_has_no_symbolic_links():
    for folder in ("nodes", "icmsr_core", "web", "locales", "example_workflows", "subgraphs"):
        assert not [path for path in (ROOT / folder).rglob("*") if path.is_symlink()]
