"""The nodes' texts and help pages in every language of the frontend, against the English ones; needs no ComfyUI.

What a change of an English text or page moves here (names, numbers, code words, table rows, headings) fails until all
translations follow. test_comfy_server.py compares the list of languages with that of the frontend.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.locales import LOCALES
from tests.support.places import ROOT

DOCS = ROOT / "web" / "docs"
UNTRANSLATED = {"MODEL", "VAE", "IMAGE", "CONTROL_NET", "model", "vae", "image", "control_net", "hint", "seed"}
UNTRANSLATED |= {"megapixels", "prompt", "clip", "coeff_t"}
"""Texts that may be as in English: names that some languages share, or that their ComfyUI leaves as they are."""
SYNTAX = "{}@|"
"""Characters that the frontend's vue-i18n takes for syntax in names and descriptions."""


def texts_of(locale: str) -> dict:
    return json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text(encoding="utf-8"))


ENGLISH = texts_of("en")


def flat(texts: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text with its place, such as ("ICMSR_Upscale/inputs/tile/tooltip", ...)."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def page_of(node: str, locale: str) -> str:
    """The text of the help page."""
    path = DOCS / f"{node}.md" if locale == "en" else DOCS / node / f"{locale}.md"
    return path.read_text(encoding="utf-8")


def numbers(text: str) -> Counter[str]:
    """The numbers of two digits or more, whatever their script: 5.3 and 5,3 are the same. Smaller ones may be words."""
    digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)
    return Counter(re.sub("[,٫]", ".", number) for number in re.findall(r"\d[\d.,٫]*\d", digits))


def nodes_named(text: str, names: dict[str, str]) -> set[str]:
    """The ids of those nodes whose display name, given by id, is in `text`."""
    return {node for node, name in names.items() if name in text}


def display_names(texts: dict) -> dict[str, str]:
    return {node: entry["display_name"] for node, entry in texts.items()}


def tables(page: str) -> list[list[str]]:
    """The cells of every row, of all tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def messages(page: str) -> list[str]:
    """The first cells of the table below the last heading of the second level: what the program says, in English."""
    return [row[0] for row in tables(page.split("\n## ")[-1])[2:]] if "\n## " in page else []


def rows_of_tables(page: str) -> Counter[str]:
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    return Counter({f"of table {index}": table.count("\n") for index, table in enumerate(found, start=1)})


COUNTED: dict[str, Callable[[str], Counter]] = {
    "headings": lambda page: Counter(re.findall(r"^(#+) ", page, re.MULTILINE)),
    "rows": rows_of_tables,
    "cells of rows": lambda page: Counter({len(row) for row in tables(page)}),
    "messages": lambda page: Counter(messages(page)),
    "code words": lambda page: Counter(" ".join(word.split()) for word in re.findall(r"`([^`]+)`", page)),
    "bold words": lambda page: Counter({"**": page.count("**") // 2}),
}
"""What a page and its translations have in equal numbers."""


def differences(english: str, translation: str) -> list[str]:
    """What the translated help page has more or less of than the English one."""
    found = []
    for what, count in COUNTED.items():
        missing, surplus = count(english) - count(translation), count(translation) - count(english)
        if missing or surplus:
            found.append(f"{what}: {dict(missing)} are missing, {dict(surplus)} are too many")
    lost = numbers(english) - numbers(translation)
    return [*found, f"numbers: {sorted(lost)} are missing"] if lost else found


def test_every_language_has_texts_and_every_help_page() -> None:
    assert {path.name for path in (ROOT / "locales").iterdir()} == {"en", *LOCALES}
    pages = {f"{path.parent.name}/{path.stem}" for path in DOCS.glob("*/*")}
    assert pages == {f"{node}/{locale}" for node in ENGLISH for locale in LOCALES}


@pytest.mark.parametrize("locale", LOCALES)
def test_the_texts_of_a_language_are_complete_and_translated(locale: str) -> None:
    english, translated = dict(flat(ENGLISH)), dict(flat(texts_of(locale)))
    assert list(translated) == list(english)
    assert [place for place, text in translated.items() if not text.strip() or set(SYNTAX) & set(text)] == []
    same = [place for place, text in translated.items() if text == english[place]]
    assert [place for place in same if english[place] not in UNTRANSLATED] == []


@pytest.mark.parametrize("locale", LOCALES)
def test_a_text_names_the_numbers_and_the_nodes_of_the_english_one(locale: str) -> None:
    texts = texts_of(locale)
    own, theirs = display_names(texts), display_names(ENGLISH)
    assert len(set(own.values())) == len(own)
    assert all(name.startswith("ICM-SR ") for name in own.values())
    translated = dict(flat(texts))
    wrong = [
        place
        for place, text in flat(ENGLISH)
        if numbers(text) - numbers(translated[place])
        or nodes_named(text, theirs) != nodes_named(translated[place], own)
    ]
    assert wrong == []


@pytest.mark.parametrize("locale", LOCALES)
def test_a_help_page_follows_the_english_one(locale: str) -> None:
    own, theirs = display_names(texts_of(locale)), display_names(ENGLISH)
    wrong = {}
    for node in ENGLISH:
        english, page = page_of(node, "en"), page_of(node, locale)
        found = differences(english, page)
        if re.findall(r"^# (.+)$", page, re.MULTILINE) != [own[node]]:
            found.append("the title is not the node's name")
        if nodes_named(page, own) != nodes_named(english, theirs):
            found.append(f"names {nodes_named(page, own)}, not {nodes_named(english, theirs)}")
        if found:
            wrong[node] = found
    assert wrong == {}


@pytest.mark.parametrize("locale", LOCALES)
def test_a_help_page_says_what_the_sockets_are_called_on_the_node(locale: str) -> None:
    """A workflow and the page's text have the English name, the node on the screen the translated one."""
    missing = []
    for node, entry in texts_of(locale).items():
        cells = "\n".join(row[0] for row in tables(page_of(node, locale)))
        for kind in ("inputs", "outputs"):
            for key, socket in entry[kind].items():
                english = ENGLISH[node][kind][key]["name"]
                shown = rf"`{english}` ?[(（]{re.escape(socket['name'])}[)）]"
                if socket["name"] != english and not re.search(shown, cells):
                    missing.append(f"{node}: `{english}` ({socket['name']})")
    assert missing == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("| `tile` | 0 or 512. |\n", ""), "rows"),
        (("| Wait. |", "| Wait. | Then go on. |"), "cells of rows"),
        (("`tile` | 0", "`Kachel` | 0"), "code words"),
        (("512", "256"), "numbers"),
        (("## Errors", "Errors"), "headings"),
        (("out of memory |", "kein Speicher |"), "messages"),
        (("**Note**", "Note"), "bold words"),
    ],
)
def test_a_page_that_does_not_follow_is_found(change: tuple[str, str], what: str) -> None:
    page = "# Node\n\n| input | |\n|---|---|\n| `tile` | 0 or 512. |\n\n**Note** this.\n\n## Errors\n\n"
    page += "| message | what to do |\n|---|---|\n| out of memory | Wait. |\n"
    assert differences(page, page) == []
    assert what in [found.split(":")[0] for found in differences(page, page.replace(*change))]


def test_digits_of_other_scripts_are_numbers() -> None:
    assert numbers("۱۲ of 5, ٣,5 or 3.5") == Counter({"12": 1, "3.5": 2})


def test_the_helpers_see_more_than_one_page_and_text() -> None:
    assert Path(DOCS / "ICMSR_Upscale.md").is_file()
    assert len(dict(flat(ENGLISH))) > 90
    assert len(messages(page_of("ICMSR_Upscale", "en"))) > 10
