"""No function is too long to read or takes too many parameters. ruff limits parameters too, and nesting."""

import ast
from collections.abc import Iterator

import pytest

from tests.support.places import ROOT

FOLDERS = ("icmsr_core", "nodes", "train", "benchmarks", "release", "tests")
MOST_LINES = 80
MOST_PARAMETERS = 7
"""Including ``self``, which ruff's PLR0913 does not count."""
NODE_METHODS = ("define_schema", "execute")
"""Methods of a ComfyUI node that need lines and a parameter for each of its inputs, however many there are."""


def too_large(name: str, source: str) -> Iterator[str]:
    """The functions in the file `name` (its path below the root) that break a limit, one line each."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if name.startswith("nodes/") and node.name in NODE_METHODS:
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        arguments = node.args
        parameters = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        if lines > MOST_LINES:
            yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {MOST_LINES}: split it"
        if parameters > MOST_PARAMETERS:
            yield f"{name}:{node.lineno}: {node.name} takes {parameters} parameters, at most {MOST_PARAMETERS}"


def test_functions_are_short_and_take_few_parameters() -> None:
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert len(files) > 200
    found = [
        line
        for path in files
        for line in too_large(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert found == []


LONG = "def f():\n" + "    x = 1\n" * MOST_LINES
MANY = "class A:\n    def f(self, a, b, c, d, *, e, g, h):\n        pass\n"


@pytest.mark.parametrize(("source", "words"), [(LONG, "81 lines"), (MANY, "8 parameters")])
def test_the_limits_bite(source: str, words: str) -> None:
    (line,) = too_large("icmsr_core/bad.py", source)
    assert words in line


def test_only_the_methods_of_a_node_may_be_longer() -> None:
    schema = LONG.replace("def f", "def define_schema")
    assert list(too_large("nodes/upscale.py", schema)) == []
    assert len(list(too_large("icmsr_core/upscale/bad.py", schema))) == 1
    assert list(too_large("icmsr_core/good.py", LONG.replace("    x = 1\n", "", 1))) == []
    assert list(too_large("icmsr_core/good.py", MANY.replace("self, ", ""))) == []
