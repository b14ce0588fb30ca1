"""The pretend device itself: right values, and the faults of real devices."""

import multiprocessing
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.apart import apart
from tests.support.platform_rules import PLATFORMS, Platform, kernel_of, out_of_memory_error
from tests.support.pretend_device import PretendTensor, pretend_device

pytestmark = pytest.mark.long

Make = Callable[..., Tensor]
"""Seeded values of a shape, on the device that is asked."""


def attention(make: Make) -> Tensor:
    query, key, value = (make(1, 2, 9, 4) for _ in range(3))
    return F.scaled_dot_product_attention(query, key, value)


def written_through_a_view(make: Make) -> Tensor:
    whole = make(4, 6)
    whole[1:3].mul_(2)
    whole[:, 0] = 7.0
    whole.narrow(1, 2, 2).copy_(make(4, 2))
    return whole


def gradients(make: Make) -> Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, stride=2))
    picture = make(2, 3, 8, 8)
    net.to(picture.device)
    F.mse_loss(net(picture), make(2, 3, 3, 3)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def steps_of_adamw(make: Make) -> Tensor:
    weights = [nn.Parameter(make(3, 3)), nn.Parameter(make(5))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, foreach=True)
    for _ in range(3):
        sum(weight.square().sum() for weight in weights).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach().flatten() for weight in weights])


OPERATIONS: dict[str, Callable[[Make], Tensor]] = {
    "arithmetic": lambda make: (make(3, 4) + 2) * make(4) - make(3, 1) / 3,
    "a CPU scalar": lambda make: make(3) * torch.tensor(2.0) + torch.tensor(1, dtype=torch.float64),
    "comparison": lambda make: torch.where(make(5, 5) > 0, make(5, 5), torch.tensor(0.5)),
    "casts": lambda make: make(5).to(torch.float16).float() + make(5).bfloat16().float() + make(5).long(),
    "in place": lambda make: make(4).mul_(3).add_(make(4), alpha=2).clamp_(-1, 1),
    "views written through": written_through_a_view,
    "shapes": lambda make: make(2, 3, 4).transpose(0, 1).reshape(3, 8).unflatten(1, (2, 4)).flatten(1)[:, ::2],
    "stack, cat, split": lambda make: torch.cat([*torch.stack([make(4, 2), make(4, 2)]).split(1), make(1, 4, 2)]),
    "reductions": lambda make: torch.stack([make(6, 6).mean(), make(6, 6).var(), make(6, 6).amax(), make(9).sum()]),
    "sorting": lambda make: make(7).sort(descending=True).values + make(7).cumsum(0),
    "indices": lambda make: make(6, 2)[torch.tensor([4, 0, 4])] + make(3, 2).index_select(0, make(3).argsort()),
    "a mask": lambda make: (lambda values: values[values > 0])(make(20)),
    "places written by index": lambda make: make(6).index_put_((torch.tensor([1, 2]),), torch.tensor(5.0)),
    "factories": lambda make: torch.cat(
        [factory(make(1).device) for factory in (_zeros, _full, _arange, _linspace, _eye, _tensor)]
    ),
    "reshaped in place": lambda make: make(2, 1, 3).squeeze_(1).unsqueeze_(0).transpose_(1, 2),
    "like": lambda make: torch.zeros_like(make(3)) + torch.ones_like(make(3)) + make(3).new_full((3,), 4),
    "matrices": lambda make: torch.einsum("ux,vy->uvxy", make(2, 3), make(4, 5)).flatten(2) @ make(15, 2),
    "linear": lambda make: F.linear(make(2, 3, 8), make(4, 8), make(4)),
    "softmax": lambda make: make(3, 9).softmax(-1) + F.log_softmax(make(3, 9), 0),
    "convolution": lambda make: F.conv2d(make(2, 3, 9, 9), make(4, 3, 3, 3), make(4), stride=2, padding=1),
    "grouped convolution": lambda make: F.conv2d(make(1, 4, 9, 9), make(4, 1, 3, 1), groups=4, dilation=2),
    "group norm": lambda make: F.group_norm(make(2, 8, 5, 5), 4, make(8), make(8)),
    "layer norm": lambda make: F.layer_norm(make(2, 5, 8), (8,), make(8), make(8)),
    "activations": lambda make: F.silu(make(9)) + F.gelu(make(9)) + F.relu(make(9)) + make(9).sigmoid().tanh(),
    "attention": attention,
    "padding": lambda make: sum(F.pad(make(1, 2, 5, 5), (1, 2, 0, 1), mode=mode) for mode in ("reflect", "replicate")),
    "zero padding": lambda make: F.pad(make(1, 2, 5, 5), (0, 1, 0, 1)),
    "bicubic": lambda make: F.interpolate(make(1, 3, 7, 9), (11, 13), mode="bicubic", antialias=True),
    "nearest": lambda make: F.interpolate(make(1, 3, 7, 9), scale_factor=2.0, mode="nearest"),
    "pooling": lambda make: F.avg_pool2d(make(1, 2, 8, 8), 3, stride=1) + F.max_pool2d(make(1, 2, 8, 8), 3, stride=1),
    "pixel unshuffle": lambda make: F.pixel_unshuffle(make(1, 3, 8, 8), 4),
    "spectrum": lambda make: torch.fft.rfft2(make(2, 8, 8), norm="ortho").abs(),
    "norms": lambda make: torch.linalg.vector_norm(make(3, 5), dim=1) + make(3).abs().pow(1.5).log1p(),
    "embedding": lambda make: F.embedding(torch.tensor([2, 0, 1], device=make(1).device), make(3, 5)),
    "losses": lambda make: F.mse_loss(make(9), make(9)) + F.l1_loss(make(9), make(9)),
    "channels last": lambda make: (
        make(1, 4, 5, 5).contiguous(memory_format=torch.channels_last) * make(1, 4, 1, 1)
    ).permute(0, 2, 3, 1),
    "gradients": gradients,
    "AdamW": steps_of_adamw,
}


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(2, device=device)


def _full(device: torch.device) -> Tensor:
    return torch.full((2,), 1.5, device=device)


def _arange(device: torch.device) -> Tensor:
    return torch.arange(3, device=device).float()


def _linspace(device: torch.device) -> Tensor:
    return torch.linspace(0, 1, 3, device=device)


def _eye(device: torch.device) -> Tensor:
    return torch.eye(2, device=device).flatten()


def _tensor(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 2.0], device=device)


def values_of(name: str, device: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return OPERATIONS[name](lambda *shape: torch.randn(shape, generator=random).to(device))


def errors_of_all(platform: Platform) -> dict[str, float | str]:
    """For each of `OPERATIONS`, without gradients and in inference mode, how far it is from the CPU's result."""
    found: dict[str, float | str] = {}
    with pretend_device(platform):
        for name in OPERATIONS:
            modes = [torch.enable_grad] if name in ("gradients", "AdamW") else [torch.no_grad, torch.inference_mode]
            expected = values_of(name, "cpu")
            for mode in modes:
                try:
                    with mode():
                        got = values_of(name, "pretend")
                        assert got.device.type == "pretend"
                        assert (got.shape, got.dtype, got.stride()) == (
                            expected.shape,
                            expected.dtype,
                            expected.stride(),
                        )
                        off = float((got.cpu() - expected).abs().max()) / float(expected.abs().max())
                        found[name] = max(found.get(name, 0.0), off)
                except Exception as error:
                    found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module", params=PLATFORMS)
def errors(request: pytest.FixtureRequest) -> dict[str, float | str]:
    return apart(errors_of_all, request.param)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_values_of_the_cpu(errors: dict[str, float | str], name: str) -> None:
    assert isinstance(errors[name], float), errors[name]
    assert errors[name] < 1e-6


def gradient_of_bicubic(x: Tensor) -> Tensor:
    picture = x.new_ones(1, 1, 4, 4).requires_grad_()
    F.interpolate(picture, (2, 2), mode="bicubic", antialias=True).sum().backward()
    return picture.grad + 1


def refusals(platform: Platform) -> dict[str, str]:
    """What each of some faulty programs raises, as type and text; "passes" where nothing does."""
    cpu, index = torch.ones(3), torch.tensor([0])
    programs: dict[str, Callable[[Tensor], object]] = {
        "operands on two devices": lambda x: x + cpu,
        "the CPU's operand first": lambda x: cpu * x,
        "cat": lambda x: torch.cat([x, cpu]),
        "a convolution's weight": lambda x: F.conv2d(x.new_ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)),
        "in place into the CPU's": lambda x: cpu.add_(x),
        "out on the CPU": lambda x: torch.mul(x, 2, out=torch.empty(3)),
        "a scalar of the CPU where none may be": lambda x: torch.cat([x, torch.ones(())[None]]),
        "indices on the device into the CPU's": lambda x: cpu[index.to("pretend")],
        "a CPU scalar": lambda x: x + torch.ones(()),
        "CPU indices": lambda x: x[index],
        "to numpy": lambda x: x.numpy(),
        "a CPU generator": lambda x: torch.randn(3, device="pretend", generator=torch.Generator().manual_seed(0)),
        "float64 by a cast": lambda x: x.double(),
        "float64 by a copy": lambda x: torch.ones(3, dtype=torch.float64).to("pretend"),
        "float64 by a factory": lambda x: torch.zeros(3, dtype=torch.float64, device="pretend"),
        "float64 from a list": lambda x: torch.tensor([1.0], dtype=torch.float64, device="pretend"),
        "float64 by a sum's type": lambda x: x.sum(dtype=torch.float64),
        "float64 cast on its way": lambda x: torch.ones(3, dtype=torch.float64).to("pretend", torch.float32),
        "eigenvalues": lambda x: torch.linalg.eigvals(x.new_ones(2, 2)),
        "gradient of bicubic": gradient_of_bicubic,
        "pickled": lambda x: x.__reduce_ex__(2),
    }
    found = {}
    with pretend_device(platform):
        for name, program in programs.items():
            try:
                program(torch.ones(3, device="pretend"))
                found[name] = "passes"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


MIXED = "RuntimeError: Expected all tensors to be on the same device"
REFUSED = {
    **dict.fromkeys(
        (
            "operands on two devices",
            "the CPU's operand first",
            "cat",
            "a convolution's weight",
            "in place into the CPU's",
            "out on the CPU",
            "a scalar of the CPU where none may be",
            "indices on the device into the CPU's",
        ),
        MIXED,
    ),
    "a CPU scalar": "passes",
    "CPU indices": "passes",
    "to numpy": "TypeError: can't convert pretend:0 device type tensor to numpy",
    "a CPU generator": "RuntimeError: Expected a 'pretend' device type for generator",
    "float64 cast on its way": "passes",
    "pickled": "TypeError: a tensor of the device was pickled",
}
"""How the answers of both platforms begin."""
FLOAT64 = [f"float64 by a {way}" for way in ("cast", "copy", "factory", "sum's type")] + ["float64 from a list"]
REFUSED_BY = {
    "cuda": {**REFUSED, **dict.fromkeys([*FLOAT64, "eigenvalues", "gradient of bicubic"], "passes")},
    "mps": {
        **REFUSED,
        **dict.fromkeys(FLOAT64, "TypeError: Cannot convert a MPS Tensor to float64 dtype"),
        "eigenvalues": "NotImplementedError: The operator 'aten::linalg_eig",
        "gradient of bicubic": "NotImplementedError: The operator 'aten::_upsample_bicubic2d_aa_backward",
    },
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_a_real_device_refuses_is_refused(platform: Platform) -> None:
    found = apart(refusals, platform)
    assert set(found) == set(REFUSED_BY[platform])
    wrong = {name: text for name, text in found.items() if not text.startswith(REFUSED_BY[platform][name])}
    assert not wrong


def test_the_table_of_kernels_is_read_as_torch_means_it() -> None:
    """One operation of each form that the table has: own lines, delegated, generated, made of others, absent."""
    assert kernel_of("mps", "addcmul") == "own"
    assert kernel_of("mps", "_upsample_bicubic2d_aa") == "own"
    assert kernel_of("cuda", "add.Tensor") == "own"
    assert kernel_of("mps", "native_group_norm") == "composite"
    assert kernel_of("cuda", "native_group_norm") == "own"
    assert kernel_of("mps", "_upsample_bicubic2d_aa_backward") == "missing"
    assert kernel_of("cuda", "_upsample_bicubic2d_aa_backward") == "own"
    assert kernel_of("mps", "mkldnn_linear") == "missing"
    assert kernel_of("mps", "no_such_operation") == "missing"


def counted() -> None:
    with pretend_device("cuda") as device:
        trace, there = device.trace, torch.ones(8, device="pretend")
        here = torch.zeros(8)
        pinned = here.pin_memory()
        assert pinned.is_pinned()
        assert not here.is_pinned()

        def spent(function: Callable[[], object]) -> tuple[int, int, int]:
            trace.clear()
            function()
            return trace.launches.total(), trace.synchronisations.total(), len(trace.copies)

        assert spent(lambda: there + 1) == (1, 0, 0)
        assert spent(lambda: there.view(2, 4).transpose(0, 1)[1:]) == (0, 0, 0), "views are free"
        assert spent(lambda: torch.empty(3, device="pretend")) == (0, 0, 0)
        assert spent(lambda: there.add_(1).mul_(2)) == (2, 0, 0)
        assert spent(lambda: bool((there > 0).all())) == (2, 1, 0)
        assert spent(lambda: there[0].item()) == (0, 1, 0)
        assert spent(lambda: there[there > 0]) == (2, 1, 0), "the true places must be counted"
        assert spent(lambda: there.nonzero()) == (1, 1, 0)
        assert spent(lambda: there[torch.tensor([1])]) == (1, 1, 1), "indices of the CPU are copied"
        assert spent(lambda: here.to("pretend")) == (0, 1, 1)
        assert not trace.copies[0].pinned
        assert (trace.copies[0].direction, trace.copies[0].bytes, trace.copies[0].blocking) == ("to device", 32, True)
        assert spent(lambda: pinned.to("pretend", non_blocking=True)) == (0, 0, 1)
        assert trace.copies[0].pinned
        assert spent(lambda: there.to("pretend")) == (0, 0, 0)
        assert spent(lambda: there.clone()) == (1, 0, 0)
        assert spent(lambda: there.cpu()) == (0, 1, 1)
        assert trace.copied("to host") == 32
        assert spent(lambda: there.tolist()) == (0, 1, 1)
        assert spent(lambda: here.copy_(there)) == (0, 1, 1)
        assert spent(lambda: there.copy_(here)) == (0, 1, 1)
        assert spent(lambda: torch.pretend.synchronize()) == (0, 1, 0)
        assert spent(lambda: torch.tensor([1.0], device="pretend")) == (0, 1, 1)
        with torch.inference_mode():
            query = torch.ones(1, 1, 64, 8, device="pretend")
            assert spent(lambda: F.scaled_dot_product_attention(query, query, query)) == (1, 0, 0)
            upright = query.transpose(2, 3).contiguous().transpose(2, 3)
            launches, _, _ = spent(lambda: F.scaled_dot_product_attention(upright, upright, upright))
            assert launches > 3, "no fused kernel takes a last stride that is not 1"


def test_launches_waits_and_copies_are_counted() -> None:
    apart(counted)


def treacherous_copies() -> None:
    with pretend_device("cuda") as device:
        there = torch.arange(4.0, device="pretend")
        here = there.to("cpu", non_blocking=True)
        assert bool(here.isnan().all()), "not there before the program has waited"
        device.synchronise()
        assert here.tolist() == [0, 1, 2, 3]
        source = torch.zeros(4).pin_memory()
        arrived = source.to("pretend", non_blocking=True)
        source.fill_(7)
        with pytest.raises(RuntimeError, match="written into while it was being copied"):
            arrived.cpu()


def test_copies_that_do_not_block_arrive_when_the_program_waits() -> None:
    apart(treacherous_copies)


def own_random_numbers() -> None:
    with pretend_device("cuda"):
        torch.manual_seed(0)
        there = torch.randn(8, device="pretend").cpu()
        torch.manual_seed(0)
        assert not torch.equal(there, torch.randn(8))


def test_random_numbers_of_the_device_are_not_those_of_the_cpu() -> None:
    apart(own_random_numbers)


def memory_of(platform: Platform) -> None:
    with pretend_device(platform, budget=1000) as device:
        first = torch.zeros(100, device="pretend")
        assert device.memory.now == 400
        view = first[10:]
        assert device.memory.now == 400, "a view takes no memory"
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            first.repeat(2)
        assert isinstance(raised.value, torch.OutOfMemoryError) == (platform == "cuda")
        del first, raised
        assert device.memory.now == 400
        del view
        assert device.memory.now == 0
        assert device.memory.peak == 400
        device.memory.run_out_at(1)
        first = torch.zeros(1, device="pretend")
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.zeros(1, device="pretend")
        assert torch.zeros(1, device="pretend").device == first.device, "that one alone fails"
        assert torch.pretend.mem_get_info() == (996, 1000)
    with pretend_device("mps"), torch.inference_mode():
        query = torch.ones(1, 1, 40_000, 1, device="pretend")
        with pytest.raises(RuntimeError, match=r"Invalid buffer size: 5\.96 GiB"):
            F.scaled_dot_product_attention(query, query, query)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_memory_is_counted_and_runs_out(platform: Platform) -> None:
    apart(memory_of, platform)


def test_the_error_of_the_cpu_is_torchs_own() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**46)
    own, ours = str(raised.value), str(out_of_memory_error("cpu", 4 * 2**46))
    assert type(raised.value) is type(out_of_memory_error("cpu", 1))
    assert own.partition("DefaultCPUAllocator")[2] == ours.partition("DefaultCPUAllocator")[2]


def in_other_threads_and_processes() -> None:
    with pretend_device("cuda"):
        there = torch.ones(3, device="pretend")
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(torch.zeros(3, device="pretend") + there))
        thread.start()
        thread.join()
        assert isinstance(found[0], PretendTensor)
        forked = multiprocessing.get_context("fork").Process(target=lambda: there + 1)
        forked.start()
        forked.join()
        assert forked.exitcode == 1


def test_the_device_works_in_threads_and_not_in_forked_processes() -> None:
    apart(in_other_threads_and_processes)
