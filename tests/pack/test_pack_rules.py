"""What the Comfy registry and ComfyUI ask of a node pack, read off the files alone."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PACK = sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "icmsr_core").rglob("*.py")])
LOADED_BY_COMFYUI = [path for path in PACK if "train" not in path.parts and path.name not in ("cli.py",)]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def calls(path: Path) -> set[str]:
    """Names of everything that the file calls: eval, torch.load, ..."""
    tree = ast.parse(path.read_text())
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imports(path: Path) -> dict[str, int]:
    """Modules that the file imports, with the level of relative imports."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: 0 for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found[node.module or ""] = node.level
    return found


def node_ids() -> set[str]:
    """Every id that a schema in nodes/ gives itself."""
    text = "\n".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    return set(re.findall(r'node_id="([^"]+)"', text))


def test_requirements_are_the_project_s_dependencies():
    assert (ROOT / "requirements.txt").read_text().split("\n")[:-1] == project()["project"]["dependencies"]


def test_dependencies_leave_the_user_s_versions_alone():
    for line in project()["project"]["dependencies"]:
        assert "==" not in line and "<" not in line, line  # noqa: PT018


def test_registry_entry():
    entry = project()["project"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{1,99}", entry["name"])
    assert "comfyui" not in entry["name"].lower()
    assert "comfyui" not in project()["tool"]["comfy"]["DisplayName"].lower()
    assert "Operating System :: OS Independent" in entry["classifiers"]
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


@pytest.mark.parametrize("path", PACK, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_that_a_registry_refuses(path):
    forbidden = {"eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.jit.load"}
    assert not calls(path) & forbidden
    roots = {name.split(".")[0] for name, level in imports(path).items() if level == 0}
    assert not roots & {"pickle", "marshal", "subprocess", "pip", "ctypes", "requests", "aiohttp", "socket"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)


@pytest.mark.parametrize("path", LOADED_BY_COMFYUI, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_work_wherever_comfyui_loads_the_pack_from(path):
    """The pack's name in sys.modules is its path: imports of its own parts are relative, sys.path stays as it is."""
    names = imports(path)
    assert not [name for name, level in names.items() if level == 0 and name.split(".")[0] in ("icmsr_core", "nodes")]
    assert not {name for name in calls(path) if name.startswith("sys.path.")}


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_nodes_need_neither_diffusers_nor_training(path):
    for name in imports(path):
        assert name.split(".")[0] not in ("diffusers", "peft", "accelerate")
        assert "diffusers_backbone" not in name
        assert "train" not in name.split(".")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_complete(path):
    """A picture beside each (jpg is the only kind that is shown), known nodes, a note that explains."""
    from PIL import Image

    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 180
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


def test_archive_holds_the_pack_and_nothing_else():
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {"/tests/", "/train/", "/benchmarks/", "/docs/", "/.github/", "__pycache__/", "*.py[cod]"} <= set(lines)
    # A name without a leading slash would be left out at every depth: web/docs would go with docs.
    assert [line for line in lines if not line.startswith("/")] == ["__pycache__/", "*.py[cod]"]
    shipped = {"nodes", "icmsr_core", "web", "locales", "example_workflows", "requirements.txt", "LICENSE", "README.md"}
    assert not shipped & {line.strip("/") for line in lines}


def test_no_symbolic_links():
    for folder in ("nodes", "icmsr_core", "web", "locales", "example_workflows"):
        assert not [path for path in (ROOT / folder).rglob("*") if path.is_symlink()]
