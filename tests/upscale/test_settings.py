"""The settings of an upscale: what is refused, and how the error says it."""

import pytest

from icmsr_core.errors import IcmsrError
from icmsr_core.upscale.settings import UpscaleSettings


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"scale": 0.5}, r"scale must be between 1 and 8, got 0\.5"),
        ({"scale": 8.1}, r"scale must be between 1 and 8, got 8\.1"),
        ({"scale": float("nan")}, "scale must be between 1 and 8, got nan"),
        ({"size": (0, 5)}, r"size must be width x height of at least 1x1, got \(0, 5\)"),
        ({"size": (5,)}, r"size must be width x height of at least 1x1, got \(5,\)"),
        ({"tile": 500}, "tile must be a multiple of 64, got 500: try 512"),
        ({"tile": 10, "overlap": 0}, "tile must be a multiple of 64, got 10: try 64"),
        ({"tile": -64, "overlap": 0}, "tile must be a multiple of 64, got -64: try 64"),
        ({"overlap": 257}, r"overlap must be between 0 and half of the tile \(256\), got 257: try 128"),
        ({"overlap": -1}, r"overlap must be between 0 and half of the tile \(256\), got -1: try 128"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"color_fix": "rgb"}, "color_fix must be one of wavelet, adain, none, got 'rgb'"),
        ({"vae": "tiled"}, "vae must be one of auto, exact, bounded, got 'tiled'"),
    ],
)
def test_settings_are_checked_when_made(values: dict, text: str) -> None:
    with pytest.raises(IcmsrError, match=text):
        UpscaleSettings(**values)


def test_limits_of_the_settings_are_allowed() -> None:
    UpscaleSettings(scale=1, tile=64, overlap=32)
    UpscaleSettings(scale=8, tile=0, overlap=1000)
