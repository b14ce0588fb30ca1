"""LPIPS as published, over a random VGG16, and the file that is made of it."""

from pathlib import Path

import lpips as published
import pytest
import torch

from icmsr_core.train.losses.lpips import convert_lpips
from tests.support.loss_pictures import HEADS


@pytest.fixture(scope="module")
def reference() -> published.LPIPS:
    """The published LPIPS with its heads and a random VGG16 whose biases are not 0."""
    torch.manual_seed(0)
    model = published.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def vgg(reference: published.LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same VGG16 as torchvision's file is: the old pickle format, with a classifier."""
    state = {"features." + key.split(".", 1)[1]: value for key, value in reference.net.state_dict().items()}
    state["classifier.6.bias"] = torch.zeros(10)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def converted(vgg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    convert_lpips(vgg, HEADS, path, trust=True)
    return path
