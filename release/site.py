"""Builds the documentation as a web site: all documents, the nodes' help pages, and the library's reference.

    uv run --isolated --only-group docs python release/site.py --out site

Every warning is an error: a link to a page, a file, a picture or a heading that does not exist, and a name in the
reference that cannot be found. Links to the web are not followed. The pages keep the places that they have in the
repository, so the links between them need no change. Nothing is imported: the reference is read off the source. Exit
codes: 0 done, 1 a warning or an error, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**/*.md", "web/docs/*.md")
CARD = "icmsr_core/assets/README.md"
LINKS = {("href", "a"), ("href", "link"), ("src", "img"), ("src", "script")}
"""Attributes and tags that lead to another file."""
LINK = re.compile(r"\]\(([^)\s#]+)")
ROOMS = {
    "backbone": "networks as the library sees them",
    "conditions": "structures of a picture",
    "pictures": "files of pictures",
    "tiled_vae": "the VAE in stripes",
    "weights": "bases, generators, adapters",
    "foreign": "weights of other projects",
    "upscale": "the one-step pass",
    "measures": "measures of quality",
    "runtime": "diffusers, devices, precision",
    "exchange": "import and export",
    "train.losses": "losses",
    "train.data": "training samples",
    "train.networks": "networks in training",
    "train.tasks": "what a run trains",
    "train.run": "the loop",
}
"""Rooms of icmsr_core with a page in the reference, and what each is about."""
USE = ("docs/command_line.md", "docs/models.md", "docs/many_pictures.md", "docs/measures.md", "docs/training.md", CARD)
MEASURED = ("docs/performance.md", "docs/reliability.md", "docs/nano.md", "docs/reproduction.md", "docs/collapse.md")
CHANGE = (
    "docs/architecture.md",
    "CONTRIBUTING.md",
    "docs/testing.md",
    "docs/releasing.md",
    "CHANGELOG.md",
    "SECURITY.md",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the site and returns the exit code."""
    parser = argparse.ArgumentParser(description="Builds the documentation as a web site.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the site; it is replaced")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if out.exists() and not (out / "index.html").is_file() and any(out.iterdir()):
        parser.error(f"{options.out} holds something other than a site: name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_sources(work)
        (work / "zensical.toml").write_text(configuration(), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        code = subprocess.run(command, cwd=work, check=False).returncode
        broken = [] if code else broken_links(work / "site")
        for line in broken:
            print(f"site: {line}", file=sys.stderr)
        if code or broken:
            return 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work / "site", out)
    print(f"wrote {options.out}: {len(list(out.rglob('*.html')))} pages")
    return 0


class Page(HTMLParser):
    """What a page of HTML links to, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one tag."""
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            if value and (name, tag) in LINKS:
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """A line for each link inside the site that leads to no file, or to no heading; 404.html's are left out."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else None
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and known is not None and anchor not in known):
                found.append(f"{path.relative_to(site)} links to {link}, which does not exist")
    return found


def write_sources(work: Path) -> None:
    """Copies the pages, and the files that they link to, below `work`/docs, and writes the pages of the reference."""
    pages = [ROOT / CARD, *(path for pattern in PAGES for path in sorted(ROOT.glob(pattern)))]
    wanted = set(pages)
    for page in pages:
        links = LINK.findall(page.read_text(encoding="utf-8"))
        wanted |= {(page.parent / link).resolve() for link in links if "://" not in link}
    for path in wanted:
        if path.is_file():
            place = work / "docs" / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    for room, subject in ROOMS.items():
        place = work / "docs" / "reference" / f"{room}.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(reference_page(room, subject), encoding="utf-8")


def reference_page(room: str, subject: str) -> str:
    """The page of a room: its modules, each with what is public in it."""
    folder = ROOT / "icmsr_core" / room.replace(".", "/")
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    lines = [f"# icmsr_core.{room}: {subject}\n"]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        if any(not name.startswith("_") for name in names):
            dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            lines.append(f"::: {dotted}\n")
    return "\n".join(lines)


def configuration() -> str:
    """zensical.toml."""
    help_pages = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("web/docs/*.md"))
    nav = [
        {"Start": "README.md"},
        {"Use": [*USE, {"Nodes": help_pages}]},
        {"Measured": [*MEASURED, "docs/side_by_side/README.md"]},
        {"Change": list(CHANGE)},
        {"Reference": [{room: f"reference/{room}.md"} for room in ROOMS]},
    ]
    return f"""[project]
site_name = "ICM-SR for ComfyUI"
site_description = "One-step diffusion super-resolution: nodes, command line, library, training"
docs_dir = "docs"
site_dir = "site"
use_directory_urls = false
nav = {_toml(nav)}

[project.theme]
variant = "modern"
font = false
features = ["navigation.indexes", "navigation.top", "content.code.copy", "toc.follow"]

[project.markdown_extensions]
tables = {{}}
attr_list = {{}}
toc = {{ permalink = true }}

[project.markdown_extensions.pymdownx.highlight]
[project.markdown_extensions.pymdownx.superfences]

[project.plugins.mkdocstrings.handlers.python]
paths = [{json.dumps(str(ROOT))}]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
heading_level = 2
show_root_heading = true
show_root_full_path = true
show_source = false
members_order = "source"
show_signature_annotations = true
separate_signature = true
"""


def _toml(value: object) -> str:
    """`value`, made of lists, texts and mappings with one key, as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
