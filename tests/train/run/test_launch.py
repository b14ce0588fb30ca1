"""What is checked before a training script reads a weight."""

from dataclasses import dataclass, field

import pytest
import torch

from icmsr_core.errors import IcmsrError
from icmsr_core.train.run.launch import check_precision, parse_config
from icmsr_core.train.run.loop_config import LoopConfig


def test_bf16_is_refused_on_a_device_that_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr("icmsr_core.train.run.launch.computes_bf16", lambda device: False)
    with pytest.raises(IcmsrError, match=r"precision must be fp32 on cuda:1.*got bf16"):
        check_precision("bf16", torch.device("cuda:1"))
    check_precision("fp32", torch.device("cuda:1"))
    check_precision("bf16", torch.device("cpu"))  # as before: a CPU converts, and nano is trained so


@dataclass(frozen=True)
class Settings:
    """A configuration."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """Training."""


@pytest.mark.parametrize("text", ["loop: 1.5", "loop: true", f"loop: {{clip: {10**400}}}", 'loop: "a\\0b"'])
def test_a_value_that_the_parser_does_not_expect_is_wrong_usage(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, ["--config", str(tmp_path / "config.yaml")])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
