"""Devices by name, and what is automatic."""

from types import SimpleNamespace

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.device import pick_device


def machine_with(monkeypatch: pytest.MonkeyPatch, accelerator: str | None) -> None:
    """Lets torch find `accelerator`, which takes empty tensors."""
    found = SimpleNamespace(
        is_available=lambda: accelerator is not None, current_accelerator=lambda: torch.device(accelerator)
    )
    monkeypatch.setattr(torch, "accelerator", found, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_of_the_machine(monkeypatch, name):
    machine_with(monkeypatch, name)
    assert pick_device("auto") == torch.device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    machine_with(monkeypatch, None)
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("cuda", "mps", "name"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_finds_cuda_and_mps_in_a_torch_that_does_not_know_accelerators(monkeypatch, cuda, mps, name):
    machine_with(monkeypatch, None)
    monkeypatch.delattr(torch, "accelerator")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == torch.device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(IcmsrError, match="device cuda:7 cannot be used here"):
        pick_device("cuda:7")
