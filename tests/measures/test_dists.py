"""DISTS against the class of the package dists-pytorch, over a random VGG16."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.dists import Dists, load_dists
from icmsr_core.measures.feature_networks import VGG16
from tests.support.loss_pictures import assert_same_distance, noisy, picture
from tests.support.metric_sources import random_features


@pytest.fixture(scope="module")
def converted(metric_weights: Path) -> Path:
    return metric_weights / "dists.safetensors"


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_dists_equals_the_published_class(converted, monkeypatch, dtype, precision):
    published = pytest.importorskip("DISTS_pytorch.DISTS_pt")
    features = VGG16.layers()[0].to_empty(device="cpu")
    features.load_state_dict({key.removeprefix("features."): value for key, value in random_features(VGG16).items()})
    # Its constructor downloads torchvision's weights, whatever is asked for.
    monkeypatch.setattr(published.models, "vgg16", lambda **_: SimpleNamespace(features=features))
    theirs = published.DISTS(load_weights=False)
    tensors = load_file(converted)
    theirs.alpha.data, theirs.beta.data = (tensors[key].view(1, -1, 1, 1) for key in ("alpha", "beta"))
    theirs, ours = theirs.to(dtype), load_dists(converted).to(dtype)
    truth = picture(72, 2).to(dtype)
    result, truth = noisy(truth)[..., :65], truth[..., :65]

    def published_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return theirs((a + 1) / 2, (b + 1) / 2, require_grad=True, batch_average=True)

    assert_same_distance(ours, published_distance, result, truth, precision)


def test_dists_is_0_for_equal_pictures_and_runs_in_float32_under_autocast(converted):
    before = torch.random.get_rng_state()
    measure, image = load_dists(converted), picture(32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in measure.parameters())
    assert measure(image, image).item() == pytest.approx(0, abs=1e-5)
    plain = measure(noisy(image), image)
    assert plain > 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(noisy(image), image), plain)


def test_dists_in_bf16_is_the_same_but_for_rounding(converted):
    image = picture(32)
    given = noisy(image).requires_grad_()
    exact, rounded = load_dists(converted)(given, image), load_dists(converted, bf16=True)(given, image)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact
    here, there = (torch.autograd.grad(value, given)[0].flatten() for value in (rounded, exact))
    assert torch.cosine_similarity(here, there, 0) > 0.9


@pytest.mark.parametrize(("result", "message"), [((1, 3, 32, 48), "one shape"), ((1, 1, 32, 32), "3, H, W")])
def test_dists_refuses_pictures_it_cannot_take(converted, result, message):
    with pytest.raises(IcmsrError, match=message):
        load_dists(converted)(torch.zeros(result), torch.zeros(1, 3, 32, 32))


def test_loading_refuses_other_files(metric_weights, tmp_path):
    with pytest.raises(
        IcmsrError, match=r"no such file: make it with .* --vgg vgg16-397923af\.pth --dists weights\.pt"
    ):
        load_dists(tmp_path / "dists.safetensors")
    with pytest.raises(IcmsrError, match="not a converted DISTS file"):
        load_dists(metric_weights / "lpips_vgg.safetensors")
    tensors = load_file(metric_weights / "dists.safetensors")
    with pytest.raises(IcmsrError, match=r"alpha is \[3\], expected \[1475\]"):
        Dists({**tensors, "alpha": torch.zeros(3)})
