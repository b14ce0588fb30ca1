"""What counts as a lack of memory on each platform, what is tried then, and what is said when nothing helps."""

import errno
import weakref

import numpy as np
import pytest
import torch

from icmsr_core.backbone.protocol import BackboneDescriptor
from icmsr_core.errors import IcmsrError
from icmsr_core.upscale.out_of_memory import TooLittleMemory, is_out_of_memory, retries_of, until_it_fits
from icmsr_core.upscale.plan import UpscalePlan, plan_upscale
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.platform_rules import buffer_too_large_error, out_of_memory_error

NANO = BackboneDescriptor("nano", 8, 4, 8, 999, "residual")


def numpy_error() -> BaseException:
    with pytest.raises(MemoryError) as raised:
        np.empty((10**6, 10**6, 10**3))
    return raised.value


def torch_error_on_the_cpu() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


def windows_error(code: int) -> OSError:
    error = OSError(22, "The paging file is too small for this operation to complete")
    error.winerror = code
    return error


LACKS = {
    "cuda": out_of_memory_error("cuda", 2**30),
    "cuda, older torch": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuda, the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "rocm": torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
    "xpu": torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB"),
    "xpu, the driver": RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "mps": out_of_memory_error("mps", 2**30),
    "mps, one buffer": buffer_too_large_error(2**34),
    "cpu": torch_error_on_the_cpu(),
    "cpu of Linux": out_of_memory_error("cpu", 2**30),
    "cpu of Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "17179869184 bytes."
    ),
    "numpy": numpy_error(),
    "Python": MemoryError(),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "mmap of Windows": windows_error(1455),
}
OTHERS = [
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("unsupported operation: some elements of the input tensor refer to a single memory location"),
    RuntimeError("shape '[1, 2]' is invalid for input of size 3"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory of what happened"),
    IcmsrError("MPS backend out of memory"),
]


@pytest.mark.parametrize("platform", LACKS)
def test_a_lack_of_memory_is_known_on_each_platform(platform: str) -> None:
    assert is_out_of_memory(LACKS[platform])


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)


class Run:
    """Runs plans, of which those that `fits` refuses raise `error`; notes what was tried and what was said."""

    def __init__(self, error: BaseException, fits) -> None:
        self.error, self.fits = error, fits
        self.tried: list[tuple[int, int, str]] = []
        self.said: list[tuple[UpscalePlan, UpscalePlan]] = []

    def __call__(self, plan: UpscalePlan) -> str:
        settings = plan.settings
        self.tried.append((settings.batch, settings.tile, settings.vae))
        if not self.fits(plan):
            raise self.error
        return "done"

    def until_it_fits(self, tile_too: bool = True, **settings) -> str:
        plan = plan_upscale(NANO, 250, 300, UpscaleSettings(**{"batch": 4, **settings}))
        retries = retries_of(NANO, plan, tile_too)
        return until_it_fits(self, plan, retries, lambda *plans: self.said.append(plans))


EXACT = [(1, 512, "auto"), (1, 256, "auto"), (1, 128, "auto")]
BOUNDED = [(1, 512, "bounded"), (1, 256, "bounded"), (1, 128, "bounded")]


@pytest.mark.parametrize("platform", LACKS)
def test_smaller_tiles_are_tried_then_bounded_then_it_is_said(platform: str) -> None:
    run = Run(LACKS[platform], lambda plan: plan.settings.tile <= 128)
    assert run.until_it_fits() == "done"
    assert run.tried == [(4, 512, "auto"), *EXACT]
    assert [(one.settings.tile, other.settings.tile) for one, other in run.said] == [(512, 512), (512, 256), (256, 128)]

    run = Run(LACKS[platform], lambda plan: plan.settings.vae == "bounded")
    assert run.until_it_fits() == "done"
    assert run.tried == [(4, 512, "auto"), *EXACT, BOUNDED[0]]

    run = Run(LACKS[platform], lambda plan: False)
    with pytest.raises(TooLittleMemory) as raised:
        run.until_it_fits()
    assert run.tried == [(4, 512, "auto"), *EXACT, *BOUNDED]
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(
        "out of memory with tile 128, 1 at a time, vae bounded, for 300 x 250 to 1200 x 1000 pixels: upscale to a "
        "smaller size, or close other programs ("
    )
    assert raised.value.__context__ is None  # it would hold the tensors that did not fit


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass_at_once(error: Exception) -> None:
    run = Run(error, lambda plan: False)
    with pytest.raises(type(error)) as raised:
        run.until_it_fits()
    assert raised.value is error
    assert (len(run.tried), run.said) == (1, [])


def test_a_tile_that_was_asked_for_stays() -> None:
    run = Run(LACKS["mps"], lambda plan: False)
    with pytest.raises(TooLittleMemory, match=r"vae bounded, for .*: choose a smaller tile, or upscale to a smaller"):
        run.until_it_fits(tile_too=False)
    assert run.tried == [(4, 512, "auto"), EXACT[0], BOUNDED[0]]


def test_exact_that_was_asked_for_stays_and_bounded_is_named() -> None:
    run = Run(LACKS["cpu"], lambda plan: False)
    with pytest.raises(TooLittleMemory, match="choose bounded instead of exact as the VAE's mode"):
        run.until_it_fits(vae="exact")
    assert [vae for _, _, vae in run.tried] == ["exact"] * 4


def test_bounded_that_was_asked_for_is_not_tried_twice() -> None:
    run = Run(LACKS["cpu"], lambda plan: False)
    with pytest.raises(TooLittleMemory):
        run.until_it_fits(vae="bounded")
    assert run.tried == [(4, 512, "bounded"), *BOUNDED]


def test_what_would_run_the_same_is_not_tried() -> None:
    """A picture of one tile and one stripe; an area that is bounded in auto anyway; the whole picture at once."""
    for size, settings, expected in (
        ((20, 30), {"batch": 1}, []),
        ((20, 50), {"batch": 1}, [(128, "auto")]),  # its area is one stripe of 128 x 128
        ((600, 600), {"tile": 128, "overlap": 32}, []),
        ((600, 600), {"tile": 256, "overlap": 32}, [(128, "auto")]),
        ((100, 60), {"tile": 0, "overlap": 0}, [(256, "auto"), (128, "auto"), (256, "bounded"), (128, "bounded")]),
        ((100, 60), {"tile": 0, "overlap": 0, "vae": "exact"}, [(256, "exact"), (128, "exact")]),
    ):
        plan = plan_upscale(NANO, *size, UpscaleSettings(**settings))
        assert [(one.settings.tile, one.settings.vae) for one in retries_of(NANO, plan)] == expected, size
    whole = plan_upscale(NANO, 100, 60, UpscaleSettings(tile=0, overlap=0))
    assert list(retries_of(NANO, whole, tile_too=False)) == []


def test_a_plan_that_did_not_fit_is_free_before_the_next() -> None:
    """The tensors of the failed attempt are gone when the caches are emptied."""
    alive: list[weakref.ref] = []

    def run(plan: UpscalePlan) -> int:
        tensor = torch.empty(3)
        alive.append(weakref.ref(tensor))
        if len(alive) == 1:
            raise out_of_memory_error("mps", 2**30)
        return 1

    seen = []
    plan = plan_upscale(NANO, 100, 60, UpscaleSettings(tile=256))
    until_it_fits(run, plan, retries_of(NANO, plan), lambda *_: seen.append(alive[0]()))
    assert seen == [None]
