"""One name, one meaning: no public name is defined in two modules of the library and the nodes."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT

SHARED = {
    "log": "each module's logger",
    "encoder_steps": "the VAE's encoder as steps, for diffusers' networks and for ComfyUI's",
    "decoder_steps": "the VAE's decoder as steps, for diffusers' networks and for ComfyUI's",
    "summary": "each experiment's report has one",
    "markdown": "each experiment's report has one",
    "write_report": "each experiment's report has one",
}
"""Names that are defined more than once, and the meaning that all their definitions share."""


def defined_names(tree: ast.Module) -> Iterator[str]:
    """The public names that a module defines at its top level: functions, classes, constants, type aliases."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            targets = [inner for target in node.targets for inner in ast.walk(target)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def places_by_name(sources: dict[str, str]) -> dict[str, list[str]]:
    """By public name: the files, of those in `sources`, that define it."""
    places: dict[str, list[str]] = {}
    for file, text in sources.items():
        for name in dict.fromkeys(defined_names(ast.parse(text))):
            places.setdefault(name, []).append(file)
    return places


def sources() -> dict[str, str]:
    """Text of every module of the library and the nodes, by its path."""
    files: list[Path] = [path for room in ("icmsr_core", "nodes") for path in sorted((ROOT / room).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_every_public_name_is_defined_in_one_module() -> None:
    """Unless `SHARED` says what its definitions have in common."""
    repeated = {name: files for name, files in places_by_name(sources()).items() if len(files) > 1}
    assert {name: files for name, files in repeated.items() if name not in SHARED} == {}
    assert set(SHARED) == set(repeated), "SHARED holds names that are defined only once"


def test_a_second_definition_is_found_whatever_its_kind() -> None:
    one = "def a(): pass\nclass B: pass\nC, D = 1, 2\nE: int = 3\n_private = 4\nfor F in (): pass\n"
    other = "class a: pass\nB = int\nD = 1\nC: int = 1\nE = F = _private = 5\n"
    places = places_by_name({"one.py": one, "other.py": other})
    assert {name for name, files in places.items() if len(files) == 2} == {"a", "B", "C", "D", "E"}
