"""LPIPS, DISTS and NIQE of the pictures that OSEDiff's authors published, with the published weights.

Needs RealSR's pairs with those pictures ($ICMSR_REALSR) and what train/metric_weights.py made of the published weights
($ICMSR_METRIC_WEIGHTS).
"""

from pathlib import Path

import numpy as np
import pytest

from icmsr_core.measures.metrics import metric
from icmsr_core.pictures.files import find_pictures, read_picture
from tests.support.places import METRIC_WEIGHTS, REALSR

pytestmark = [
    pytest.mark.skipif(not (REALSR / "osediff").is_dir(), reason=f"no OSEDiff pictures in {REALSR}: set ICMSR_REALSR"),
    pytest.mark.skipif(
        not METRIC_WEIGHTS.is_dir(), reason=f"no converted weights in {METRIC_WEIGHTS}: set ICMSR_METRIC_WEIGHTS"
    ),
]


def mean_of(name: str, every: int) -> float:
    measure = metric(name, METRIC_WEIGHTS)
    results = find_pictures(REALSR / "osediff")[::every]
    truths = {path.stem: path for path in find_pictures(REALSR / "hr")}

    def value(path: Path) -> float:
        return measure(read_picture(path).rgb, read_picture(truths[path.stem]).rgb)

    return float(np.mean([value(path) for path in results]))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "value"), [("lpips", 0.264603), ("lpips_vgg", 0.345515), ("dists", 0.200538), ("niqe", 7.330519)]
)
def test_values_of_every_twentieth_picture(name: str, value: float) -> None:
    assert mean_of(name, 20) == pytest.approx(value, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("lpips", 0.2921), ("dists", 0.2128)])
def test_all_pictures_have_the_published_mean(name: str, published: float) -> None:
    assert round(mean_of(name, 1), 4) == published


@pytest.mark.slow
def test_all_pictures_have_nearly_the_published_niqe() -> None:
    """Published: 5.6476. How exact halves of Y are rounded moves it from 5.6474 to 5.6480; see `niqe`."""
    assert mean_of("niqe", 1) == pytest.approx(5.6477, abs=5e-5)
