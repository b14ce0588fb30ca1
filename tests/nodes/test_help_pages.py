"""The help pages of the nodes (web/docs) against the nodes' inputs and errors; needs no ComfyUI.

The inputs are those of locales/en/nodeDefs.json, which test_comfy_server.py compares with the nodes themselves.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.support.places import ROOT

PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
NODES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
SOURCES = [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "icmsr_core").rglob("*.py")]


def rows(page: Path, heading: str) -> list[str]:
    """The first cells of the table whose first column is called `heading`."""
    found: list[str] = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == heading)
        if inside and cells[0] not in (heading, "---"):
            found.append(cells[0])
    return found


def texts(source: str) -> list[str]:
    """Every text in Python code, with a replacement character for each value in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\ufffd" for part in node.values]
            found.append("".join(map(str, parts)))
    return found


def test_every_node_has_a_help_page() -> None:
    assert [page.stem for page in PAGES] == sorted(NODES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_names_every_input_and_output_of_its_node_once(page: Path) -> None:
    for heading, kind in (("input", "inputs"), ("output", "outputs")):
        named = [name for row in rows(page, heading) for name in re.findall(r"`(\w+)`", row)]
        sockets = [socket["name"] for socket in NODES[page.stem][kind].values()]
        assert sorted(named) == sorted(sockets)


def test_the_messages_in_the_help_pages_are_those_of_the_code() -> None:
    known = [text for path in SOURCES for text in texts(path.read_text(encoding="utf-8"))]
    listed = [(page.stem, message) for page in PAGES for message in rows(page, "message")]
    assert len(listed) > 20
    assert [entry for entry in listed if not any(entry[1] in text for text in known)] == []


def test_texts_joins_the_parts_of_a_message() -> None:
    assert "tile \ufffd is wrong: try 512" in texts('f"tile {tile} is wrong: "\\\n"try 512"')
