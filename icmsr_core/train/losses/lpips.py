"""LPIPS with VGG16: the learned perceptual distance, and the one file that its public weights are converted into.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 of its
weights. The converted file is a .safetensors with the keys ``features.<n>.weight`` and ``.bias`` (torchvision's names,
VGG16 without its classifier) and ``heads.<n>`` [channels]; its metadata entry ``format`` is ``icmsr-lpips`` and
``icmsr`` is JSON: format version, network, SHA-256 of both sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import IcmsrError
from ...weights.descriptions import OWN_ENTRY, own_description
from ...weights.pickles import read_tensor_pickle
from ...weights.tensor_files import read_tensors, write_tensors

LPIPS_FORMAT = "icmsr-lpips"
FORMAT_VERSION = 1
CONVERT = "python train/lpips_weights.py --vgg vgg16-397923af.pth --heads vgg.pth --out lpips_vgg.safetensors"
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
"""torchvision's vgg16-397923af.pth (its name carries the first eight digits)."""
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
"""lpips/weights/v0.1/vgg.pth of the PyPI package lpips 0.1.4."""
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions, block by block; pooling stands between the blocks."""
SMALLEST_SIDE = 2 ** (len(WIDTHS) - 1)
# The published scaling layer: ImageNet's mean and deviation, for pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """LPIPS of [N, 3, H, W] pictures in [-1, 1], the mean over the batch; frozen, in the precision of its weights.

    Autocast is switched off inside: differences of unit vectors lose most of their digits in bfloat16. The weights'
    precision is float32 as loaded; ``.double()`` works.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "LPIPS weights") -> None:
        """`tensors`: as the converted file holds them. Raises `IcmsrError`, which says `name`, if they do not fit."""
        super().__init__()
        check_tensors(name, tensors)
        layers: list[nn.Module] = []
        self._taps = set()
        channels = 3
        for block in WIDTHS:
            if layers:
                layers.append(nn.MaxPool2d(2, 2))
            for width in block:
                # On "meta": no memory, and no draw from the global random state that a seeded run depends on.
                layers += [nn.Conv2d(channels, width, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
                channels = width
            self._taps.add(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.empty(block[-1], device="meta") for block in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, result: Tensor, truth: Tensor) -> Tensor:
        """The distance, a scalar; 0 for equal pictures. Gradients reach `result`; `truth` counts as constant.

        Raises `IcmsrError` for pictures of different or wrong shapes, or under 16 px.
        """
        if result.shape != truth.shape or result.ndim != 4 or result.shape[1] != 3:
            raise IcmsrError(
                f"LPIPS takes two batches [N, 3, H, W] of one shape, got {list(result.shape)} and {list(truth.shape)}"
            )
        if min(result.shape[-2:]) < SMALLEST_SIDE:
            raise IcmsrError(
                f"LPIPS takes pictures of {SMALLEST_SIDE} px and more, got {list(result.shape[-2:])}: use larger crops"
            )
        heads = iter(self.heads)
        with torch.autocast(result.device.type, enabled=False):
            left = (result.to(self.shift) - self.shift) / self.scale
            right = (truth.detach().to(self.shift) - self.shift) / self.scale
            total = left.new_zeros(left.shape[0])
            # Side by side, so that the truth's activations are freed level by level.
            for index, layer in enumerate(self.features):
                left, right = layer(left), layer(right)
                if index in self._taps:
                    difference = (_unit(left) - _unit(right)).square()
                    total = total + (difference * next(heads).view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total.mean()


def _unit(features: Tensor) -> Tensor:
    # vector_norm and not the root of a sum, whose gradient at the zero vector is NaN: the ReLU before it would mask
    # that, but anomaly detection stops there.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def load_lpips(path: Path) -> Lpips:
    """The LPIPS in a converted file, on the CPU. Raises `IcmsrError` for a file that is missing, damaged or another."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != LPIPS_FORMAT:
        raise IcmsrError(
            f"{path}: not a converted LPIPS file (its format is {metadata.get('format', 'not stated')!r}, expected "
            f"{LPIPS_FORMAT!r}): make one with {CONVERT}"
        )
    version = own_description(path, metadata).get("format_version")
    if version != FORMAT_VERSION:
        raise IcmsrError(
            f"{path}: format version {version}, this version of ICM-SR reads {FORMAT_VERSION}: convert it again with "
            f"{CONVERT}"
        )
    return Lpips(tensors, str(path))


def convert_lpips(vgg: Path, heads: Path, out: Path, trust: bool = False) -> None:
    """Writes the two public pickles as one .safetensors at `out`, atomically, in float32.

    `vgg`: torchvision's ``vgg16-397923af.pth``; `heads`: ``weights/v0.1/vgg.pth`` of the package lpips. Both are read
    with ``weights_only``, so code in them never runs. `trust` takes files of another SHA-256. Raises `IcmsrError` for
    a wrong hash, a file that holds more than tensors, and tensors that are missing, of another shape or not finite.
    """
    if out.suffix != ".safetensors":
        raise IcmsrError(f"out must end in .safetensors, got {out}")
    sums = {}
    for path, known in ((vgg, VGG_SHA256), (heads, HEADS_SHA256)):
        if not path.is_file():
            raise IcmsrError(f"{path}: no such file")
        found = sums[path] = _sha256(path)
        if found != known and not trust:
            raise IcmsrError(
                f"{path}: SHA-256 {found}, the published file has {known}: download it again, or pass "
                "--trust=true to use these weights all the same"
            )
    tensors = {key: value for key, value in read_tensor_pickle(vgg).items() if key.startswith("features.")}
    _check_keys(str(vgg), tensors, [key for key in _shapes() if key.startswith("features.")])
    public = read_tensor_pickle(heads)
    names = [f"lin{level}.model.1.weight" for level in range(len(WIDTHS))]
    _check_keys(str(heads), public, names)
    for level, (name, block) in enumerate(zip(names, WIDTHS)):
        if tuple(public[name].shape) != (1, block[-1], 1, 1):
            raise IcmsrError(f"{heads}: {name} is {list(public[name].shape)}, expected {[1, block[-1], 1, 1]}")
        tensors[f"heads.{level}"] = public[name].flatten()
    check_tensors(f"{vgg} and {heads}", tensors)
    about = {
        "format_version": FORMAT_VERSION,
        "network": "vgg16",
        "lpips": "0.1",
        "vgg_sha256": sums[vgg],
        "heads_sha256": sums[heads],
    }
    # Clones: tensors of a pickle may share memory, which safetensors does not write.
    plain = {key: value.detach().float().clone() for key, value in tensors.items()}
    write_tensors(out, plain, {"format": LPIPS_FORMAT, OWN_ENTRY: json.dumps(about, sort_keys=True)})


def check_tensors(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `IcmsrError`, which says `name`, unless `tensors` are exactly those of an `Lpips`, floating and finite."""
    shapes = _shapes()
    _check_keys(name, tensors, shapes)
    for key, shape in shapes.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise IcmsrError(f"{name}: {key} is {list(tensor.shape)}, expected {list(shape)}: not the weights of VGG16")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise IcmsrError(f"{name}: {key} holds values that are not finite floating-point numbers")


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    index, channels = 0, 3
    for block in WIDTHS:
        for width in block:
            shapes[f"features.{index}.weight"] = (width, channels, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            index, channels = index + 2, width
        index += 1
    return {**shapes, **{f"heads.{level}": (block[-1],) for level, block in enumerate(WIDTHS)}}


def _check_keys(name: str, tensors: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    expected = list(expected)
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise IcmsrError(f"{name}: not the expected weights: {len(missing)} tensors are missing, such as {missing[0]}")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise IcmsrError(
            f"{name}: not the expected weights: {len(surplus)} tensors are unexpected, such as {surplus[0]}"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
