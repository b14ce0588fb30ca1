"""What is checked before a training script reads a weight."""

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.launch import check_precision


def test_bf16_is_refused_on_a_device_that_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr("icmsr_core.train.run.launch.computes_bf16", lambda device: False)
    with pytest.raises(IcmsrError, match=r"precision must be fp32 on cuda:1.*got bf16"):
        check_precision("bf16", torch.device("cuda:1"))
    check_precision("fp32", torch.device("cuda:1"))
    check_precision("bf16", torch.device("cpu"))  # as before: a CPU converts, and nano is trained so
