"""Files that torch.save wrote, read without running them."""

from pathlib import Path

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.weights.pickles import read_pickle, read_tensor_pickle
from tests.support.hostile_pickle import HostileValue, assert_runs_code

VALUES = {"weight": torch.arange(6.0).view(2, 3), "steps": 3, "names": ["a", "b"]}


def saved(path: Path, values: object, **options: bool) -> Path:
    torch.save(values, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_come_back_from_both_formats_of_torch_save(tmp_path: Path, zipped: bool) -> None:
    found = read_pickle(saved(tmp_path / "some.pth", VALUES, _use_new_zipfile_serialization=zipped))
    assert torch.equal(found.pop("weight"), VALUES["weight"])
    assert found == {"steps": 3, "names": ["a", "b"]}


def test_a_file_of_tensors_may_hold_nothing_else(tmp_path: Path) -> None:
    tensors = {"weight": VALUES["weight"]}
    assert read_tensor_pickle(saved(tmp_path / "tensors.pth", tensors)).keys() == tensors.keys()
    with pytest.raises(IcmsrError, match=r"tensors only, these entries are not: steps, names$"):
        read_tensor_pickle(saved(tmp_path / "mixed.pth", VALUES))


@pytest.mark.parametrize("read", [read_pickle, read_tensor_pickle])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, read) -> None:
    mark = tmp_path / "ran"
    path = saved(tmp_path / "evil.pth", {"weight": HostileValue(mark)})
    with pytest.raises(IcmsrError, match="refused, and no code in it was run"):
        read(path)
    assert_runs_code(path, mark)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "truncated, damaged"), (b"PK\x03\x04 half", "truncated, damaged")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(IcmsrError, match=f"damaged.pth: {words}"):
        read_pickle(path)
    with pytest.raises(IcmsrError, match="no such file"):
        read_pickle(tmp_path / "nothing.pth")
