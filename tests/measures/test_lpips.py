"""LPIPS on both networks against the published package, and the files it is loaded from."""

from pathlib import Path

import lpips as published
import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.measures.feature_networks import ALEXNET, VGG16, FeatureNetwork
from icmsr_core.measures.lpips import Lpips, load_lpips
from icmsr_core.weights.tensor_files import write_tensors
from tests.support.loss_pictures import assert_same_distance, noisy, picture
from tests.support.metric_sources import random_features


@pytest.fixture(scope="module")
def converted(metric_weights: Path) -> Path:
    return metric_weights / "lpips_vgg.safetensors"


def published_lpips(short: str, network: FeatureNetwork) -> published.LPIPS:
    """The package's LPIPS with its heads, on the features that the fixtures' files hold."""
    model = published.LPIPS(net=short, pnet_rand=True, verbose=False)
    features = random_features(network)
    model.net.load_state_dict({key: features["features." + key.split(".", 1)[1]] for key in model.net.state_dict()})
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    ("short", "network", "height", "width"),
    [("vgg", VGG16, 72, 65), ("alex", ALEXNET, 72, 65), ("alex", ALEXNET, 31, 31)],  # 65: the poolings do not divide it
)
def test_lpips_equals_the_published_one(metric_weights, short, network, height, width):
    theirs = published_lpips(short, network)
    for dtype, precision in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        truth = picture(72, 2).to(dtype)
        result, truth = noisy(truth)[..., :height, :width], truth[..., :height, :width]
        ours = load_lpips(metric_weights / f"lpips_{short}.safetensors", network).to(dtype)
        assert_same_distance(ours, theirs.to(dtype), result, truth, precision)


def test_lpips_is_frozen_and_draws_no_random_number(converted):
    before = torch.random.get_rng_state()
    measure = load_lpips(converted)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in measure.parameters())
    image = picture(32)
    assert measure(image, image) == 0
    truth = noisy(image).requires_grad_()
    measure(image.requires_grad_(), truth).backward()
    assert image.grad is not None
    assert truth.grad is None


def test_lpips_runs_in_float32_under_autocast(converted):
    measure, image = load_lpips(converted), picture(32)
    plain = measure(noisy(image), image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(noisy(image), image), plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_lpips_in_bf16_is_the_same_but_for_rounding(converted, autocast):
    image = picture(32)
    given = noisy(image).requires_grad_()
    exact = load_lpips(converted)(given, image)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = load_lpips(converted, bf16=True)(given, image)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact
    here, there = (torch.autograd.grad(value, given)[0].flatten() for value in (rounded, exact))
    assert torch.cosine_similarity(here, there, 0) > 0.9


def test_lpips_of_dead_features_has_a_gradient(converted):
    tensors = load_file(converted)
    tensors["features.2.bias"] = torch.full_like(tensors["features.2.bias"], -1e4)
    image = picture(32)
    given = noisy(image).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        Lpips(tensors)(given, image).backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "network", "result", "truth", "message"),
    [
        ("lpips_vgg", VGG16, (1, 3, 32, 32), (1, 3, 32, 48), "one shape"),
        ("lpips_vgg", VGG16, (1, 1, 32, 32), (1, 1, 32, 32), "3, H, W"),
        ("lpips_vgg", VGG16, (1, 3, 32, 15), (1, 3, 32, 15), "vgg16 takes pictures of 16 px"),
        ("lpips_alex", ALEXNET, (1, 3, 30, 32), (1, 3, 30, 32), "alexnet takes pictures of 31 px"),
    ],
)
def test_lpips_refuses_pictures_it_cannot_take(metric_weights, name, network, result, truth, message):
    with pytest.raises(IcmsrError, match=message):
        load_lpips(metric_weights / f"{name}.safetensors", network)(torch.zeros(result), torch.zeros(truth))


def test_lpips_takes_the_smallest_picture(converted):
    assert load_lpips(converted)(noisy(picture(16)), picture(16)) > 0


def test_loading_refuses_other_files(converted, metric_weights, tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(IcmsrError, match=r"no such file: make it with python train/metric_weights\.py --vgg"):
        load_lpips(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(IcmsrError, match=r"not a converted LPIPS file.*metric_weights\.py"):
        load_lpips(path)
    tensors = load_file(converted)
    write_tensors(path, tensors, {"format": "icmsr-lpips", "icmsr": '{"format_version": 2}'})
    with pytest.raises(IcmsrError, match="format version 2"):
        load_lpips(path)
    write_tensors(path, tensors, {"format": "icmsr-lpips"})
    with pytest.raises(IcmsrError, match="convert it again"):
        load_lpips(path)
    del tensors["heads.4"]
    write_tensors(path, tensors, {"format": "icmsr-lpips", "icmsr": '{"format_version": 1}'})
    with pytest.raises(IcmsrError, match=r"tensors are missing, such as heads\.4"):
        load_lpips(path)
    with pytest.raises(IcmsrError, match=r"holds LPIPS with alexnet, vgg16 is needed here: take lpips_vgg"):
        load_lpips(metric_weights / "lpips_alex.safetensors")
    with pytest.raises(IcmsrError, match="not a converted LPIPS file"):
        load_lpips(metric_weights / "dists.safetensors")


def test_a_file_made_before_there_were_two_networks_is_still_read(converted, tmp_path):
    path = tmp_path / "old.safetensors"
    about = '{"format_version": 1, "heads_sha256": "a7", "lpips": "0.1", "network": "vgg16", "vgg_sha256": "39"}'
    write_tensors(path, load_file(converted), {"format": "icmsr-lpips", "icmsr": about})
    image = picture(32)
    assert torch.equal(load_lpips(path)(noisy(image), image), load_lpips(converted)(noisy(image), image))
