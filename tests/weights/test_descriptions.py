"""JSON descriptions in metadata and next to weights: what is read, and the one set of errors for what is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.weights.descriptions import info_from, own_description, parse_description, read_description


@dataclass(frozen=True)
class Info:
    """What a file could say of itself."""

    family: str
    rank: int = 0
    alpha: float = 1.0


def test_an_object_is_read_from_a_file_and_from_metadata(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"a": "ü"}', encoding="utf-8")
    assert read_description(tmp_path / "config.json") == {"a": "ü"}
    assert own_description("x.safetensors", {"icmsr": '{"a": 1}', "format": "pt"}) == {"a": 1}


def test_a_file_that_says_nothing_of_itself_has_an_empty_description() -> None:
    assert own_description("x.safetensors", {"format": "pt"}) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"cannot be read as JSON \(Expecting .*\): download or export it again"),
        ("", r"cannot be read as JSON"),
        ("[1]", "must be a JSON object, got list: download or export it again"),
        ('"text"', "must be a JSON object, got str"),
        ("null", "must be a JSON object, got NoneType"),
    ],
)
def test_anything_but_an_object_is_refused_wherever_it_stands(tmp_path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(IcmsrError, match=f"^{path}: the file {words}"):
        read_description(path)
    with pytest.raises(IcmsrError, match=rf"^x\.safetensors: its description {words}"):
        own_description("x.safetensors", {"icmsr": text})
    with pytest.raises(IcmsrError, match=rf"^x\.safetensors: the index {words}"):
        parse_description("x.safetensors", text, "the index")


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(IcmsrError, match=rf"^{path}: the file cannot be read \(No such file or directory\): download"):
        read_description(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IcmsrError, match=rf"^{path}: the file cannot be read as JSON \('utf-8' codec .*\): download"):
        read_description(path)


def test_known_fields_are_taken_and_others_ignored() -> None:
    assert info_from("x", Info, {"family": "nano", "alpha": 4, "colour": "red"}) == Info("nano", 0, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 4}, r"its description cannot be read \(.*'family'\): download or export it again"),
        ({"family": 3}, "family in its description must be a str, got 3"),
        ({"family": "nano", "rank": True}, "rank in its description must be a int, got True"),
        ({"family": "nano", "alpha": float("nan")}, "alpha in its description must be a float, got nan"),
    ],
)
def test_fields_of_another_kind_are_refused(values: dict, words: str) -> None:
    with pytest.raises(IcmsrError, match=f"^some file: {words}"):
        info_from(Path("some file"), Info, values)
