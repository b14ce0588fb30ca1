"""Folders of photographs and the pairs that training draws from them."""

from pathlib import Path

import numpy as np
from PIL import Image

from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs


def noise(height: int = 80, width: int = 90, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photographs(folder: Path, count: int = 4) -> str:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(noise(seed=index)).save(folder / f"{index}.png")
    return str(folder)


def flat(folder: Path, *levels: int) -> str:
    """Photographs of one grey level each, which tells them apart in a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / f"{level}.png")
    return str(folder)


def levels_of(pairs: TrainingPairs, count: int = 400) -> list[int]:
    return [int(pairs[index]["sharp"][0, 0, 0]) for index in range(count)]


def plain(*folders: str, **changes: object) -> DataConfig:
    return DataConfig(folders, **{"synthetic": 0.0, "crop": 32, **changes})  # type: ignore[arg-type]


def awkward(folder: Path) -> str:
    """Two good photographs of noise, a small one and two that cannot be read."""
    photographs(folder, 2)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    Image.fromarray(noise()).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:9000])
    Image.fromarray(noise(20, 30)).save(folder / "small.png")
    return str(folder)
