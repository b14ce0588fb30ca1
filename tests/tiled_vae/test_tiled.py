"""The VAE in stripes: plans, steps, errors."""

import pytest
import torch

from icmsr_core.backbone.vae_steps import Pointwise, conv_step, down_step
from icmsr_core.errors import IcmsrError
from icmsr_core.steps import Steps
from icmsr_core.tiled_vae.tiled import is_exact, plan_stripes
from tests.support.stripes import encode_in_stripes
from tests.support.vaes import backbone_of, decoded, random_vae, uneven_picture


def test_stripes_run_across_the_shorter_side_with_a_tiles_area() -> None:
    assert plan_stripes(512, 512, 64) == (2, 8, 64, 64)
    assert plan_stripes(256, 2048, 64) == (3, 16, 128, 64)
    assert plan_stripes(64, 64, 64).number == plan_stripes(5, 800, 64).number == plan_stripes(999, 77, 0).number == 1
    assert plan_stripes(3000, 2000, 16) == (2, 1, 3000, 16)
    for height, width, tile in ((513, 511, 64), (37, 90, 12), (90, 37, 20), (1, 50, 3)):
        axis, cells, stripes, _ = plan_stripes(height, width, tile)
        length, across = max(height, width), min(height, width)
        assert axis == (2 if height >= width else 3)
        assert cells * across <= max(tile * tile, across)
        assert (stripes - 1) * cells < length <= stripes * cells


def test_auto_is_exact_up_to_the_area_of_2048_by_2048() -> None:
    assert is_exact("auto", 2048, 2048)
    assert is_exact("auto", 1, 2048)
    assert is_exact("auto", 4096, 1024)
    assert not is_exact("auto", 2064, 2048)
    assert is_exact("exact", 9000, 9000)
    assert not is_exact("bounded", 64, 64)


@pytest.mark.parametrize("exact", [True, False])
@torch.inference_mode()
def test_progress_counts_every_stripe_once(exact: bool) -> None:
    backbone = backbone_of(random_vae(3, False, True))
    seen: list[int] = []
    steps = Steps(lambda done, total: seen.append(done))
    latent = encode_in_stripes(backbone, uneven_picture(64, 40), tile=6, exact=exact, steps=steps)
    assert seen[-1] == plan_stripes(16, 10, 6).number == 6
    decoded(backbone, latent, tile=6, exact=exact, steps=steps)
    assert seen[-1] == 12
    assert seen == sorted(set(seen))
    assert len(seen) >= 8


@torch.inference_mode()
def test_a_stop_spoils_nothing() -> None:
    class Stop(BaseException):
        pass

    backbone = backbone_of(random_vae(3, False, True))
    image = uneven_picture(64, 40)
    expected = encode_in_stripes(backbone, image, tile=6)

    def stop(done: int, total: int) -> None:
        raise Stop

    for exact in (True, False):
        with pytest.raises(Stop):
            encode_in_stripes(backbone, image, tile=6, exact=exact, steps=Steps(stop))
    assert torch.equal(encode_in_stripes(backbone, image, tile=6), expected)


def test_layers_without_a_step_are_named() -> None:
    with pytest.raises(IcmsrError, match=r"cannot run in tiles: .*got Conv2d\(4, 4, kernel_size=\(5, 5\).*tile 0"):
        conv_step(torch.nn.Conv2d(4, 4, 5, padding=2))
    with pytest.raises(IcmsrError, match="stride 2 and padding 0 or 1, got AvgPool2d"):
        down_step(torch.nn.AvgPool2d(2))
    assert isinstance(conv_step(torch.nn.Conv2d(4, 8, 1)), Pointwise)
