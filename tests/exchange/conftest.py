"""A small Stable Diffusion base and networks trained on it."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file

from icmsr_core.weights.base import PROMPT_FILE
from tests.support.foreign_files import load_unet, osediff_checkpoint, targets
from tests.support.sd_files import write_sd_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """SD2.1's networks at a tenth of the width, with a constant prompt."""
    folder = write_sd_folder(tmp_path_factory.mktemp("base") / "sd21", width_divisor=10)
    save_file({"prompt_embedding": torch.randn(5, 96)}, folder / PROMPT_FILE)
    return folder


@pytest.fixture(scope="module")
def osediff(base) -> dict:
    return osediff_checkpoint(base)


@pytest.fixture(scope="module")
def trained(base) -> UNet2DConditionModel:
    """A UNet with a LoRA of rank 4 and alpha 6 by PEFT, on every standard target."""
    torch.manual_seed(6)
    unet = load_unet(base)
    patterns = {"rank_pattern": {"conv_in": 2}, "alpha_pattern": {"conv_out": 3}}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets(unet), **patterns), adapter_name="default")
    for name, value in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.02)
    return unet
