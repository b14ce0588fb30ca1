"""What the benchmarks measure with: fresh processes, stage times, counted work, the matmul rate, peak memory.

Free of the pack's own modules, so that it can be used in a ComfyUI process, where the pack has another name.
"""

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = ("encode", "unet", "decode")
PRELOAD = [
    "torch",
    "torch.utils.flop_counter",
    "diffusers",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "accelerate",
]
"""Imported once by the server that the measuring processes are forked from, where the platform forks."""
CLOCKS = ("wall", "cpu")
"""What is timed: the clock on the wall, or the processor time of the process shared by its threads, which on a machine
that does other work comes near to what the wall clock would show without it."""


_Case = TypeVar("_Case")
_Found = TypeVar("_Found")


class ChildFailed(Exception):
    """A measuring process ended without a result; the message says why in one line."""


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of `arguments` in a process of its own that holds nothing of earlier measurements.

    Raises `ChildFailed` when it raised or died (a lack of memory, as a rule).
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "the process died: most likely out of memory"
    process.join()
    if error is not None:
        raise ChildFailed(error)
    return result


def measure_all(
    cases: Sequence[_Case], measure_case: Callable[[_Case], _Found], label: Callable[[_Case], str]
) -> dict[_Case, _Found | str]:
    """What `measure_case` found for each of `cases`, each in its own process; a text says why a case failed.

    Prints the number and the label of each case on stderr when it starts.
    """
    found: dict[_Case, _Found | str] = {}
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)}: {label(case)}", file=sys.stderr, flush=True)
        try:
            found[case] = in_child(measure_case, case)
        except ChildFailed as error:
            found[case] = str(error)
    return found


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer: tuple[Any, str | None]
    try:
        answer = (function(*arguments), None)
    except Exception as error:
        answer = (None, " ".join(f"{type(error).__name__}: {error}".split())[:300])
    sender.send(answer)


class Stopwatch:
    """Seconds on one of `CLOCKS`, once `device` has finished its work."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.device, self._clock = device, clock

    def now(self) -> float:
        """Seconds since some moment."""
        synchronize(self.device)
        return time.process_time() / torch.get_num_threads() if self._clock == "cpu" else time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Returns when `device` has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def use_threads(count: int) -> None:
    """Sets torch's threads if `count` is not 0."""
    if count:
        torch.set_num_threads(count)


def matmul_rate(dtype: torch.dtype, watch: Stopwatch) -> float:
    """Operations a second (2 per multiply-add) of a square matrix product on the watch's device: the best of five."""
    side = 1024 if watch.device.type == "cpu" else 8192
    one = torch.randn(side, side, device=watch.device).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first of them warms up
        started = watch.now()
        one @ one
        best = min(best, watch.now() - started)
    return 2 * side**3 / best


class Peak:
    """The most memory in use since `reset`: of the process, or of the device as torch allocates it. Bytes.

    On MPS, which counts no peak: what torch's pool has taken from the system, as it gives nothing back by itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forgets what has been."""
        gc.collect()
        if self._device.type == "mps":
            torch.mps.empty_cache()
            return
        if self._device.type != "cpu":
            getattr(torch, self._device.type).reset_peak_memory_stats()
            return
        # Linux: the peak resident size begins anew. Elsewhere it counts from the start of the process, with loading.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def bytes(self) -> float:
        """The peak; NaN where the platform does not say."""
        if self._device.type == "mps":
            return float(torch.mps.driver_allocated_memory())
        if self._device.type != "cpu":
            return float(getattr(torch, self._device.type).max_memory_allocated())
        try:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            return 1024 * next(float(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            pass
        try:
            import resource
        except ImportError:  # Windows
            return float("nan")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else 1024 * peak)


class Run(NamedTuple):
    """One run of a procedure, in `STAGES`."""

    seconds: tuple[float, ...]
    operations: tuple[float, ...]
    """2 per multiply-add, attention counted; zeros if they were not counted."""

    @property
    def total(self) -> float:
        """Seconds from picture to picture."""
        return sum(self.seconds)


def run_in_stages(procedure: Callable[[], Tensor], unet: torch.nn.Module, watch: Stopwatch, count: bool = False) -> Run:
    """`procedure` once. Encoding ends where `unet` begins first, decoding begins where it ends last.

    What comes before the networks (resizing) counts as encoding, what comes after (colours) as decoding. With `count`
    the operations are counted, which takes some time of its own on small networks.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted()) if count else None
    marks: list[tuple[float, float]] = []

    def mark(*_: Any) -> None:
        marks.append((watch.now(), counter.get_total_flops() if counter is not None else 0.0))

    hooks = [unet.register_forward_pre_hook(mark), unet.register_forward_hook(mark)]
    try:
        with counter or nullcontext():
            mark()
            procedure()
            mark()
    finally:
        for hook in hooks:
            hook.remove()
    if len(marks) < 4:
        raise RuntimeError("the procedure never ran the UNet it was to be measured with")
    steps = [marks[0], marks[1], marks[-2], marks[-1]]
    seconds, operations = (
        tuple(after[index] - before[index] for before, after in pairwise(steps)) for index in range(2)
    )
    return Run(seconds, operations)


def _uncounted() -> dict[Any, Callable[..., int]]:
    """Attention on the CPU, which torch's counter does not know.

    In inference mode the counter sees the call itself, too, and takes it apart into matrix products unless it is here
    as an overload: no memory holds their matrix of scores at 2048 px.
    """

    def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[-2] * (width + value[-1])

    whole = torch.ops.aten.scaled_dot_product_attention
    return dict.fromkeys((torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, whole, whole.default), attention)


class Measurement(NamedTuple):
    """What one measuring process found."""

    runs: tuple[Run, ...]
    operations: tuple[float, ...]
    """Of one run, in `STAGES`."""
    peak_bytes: float
    matmul_rate: float
    """Operations a second, measured in the same process just before."""
    threads: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> tuple[float, ...]:
        """Median of each stage."""
        return tuple(statistics.median(run.seconds[stage] for run in self.runs) for stage in range(len(STAGES)))

    @property
    def total(self) -> float:
        """Median of the whole."""
        return statistics.median(run.total for run in self.runs)

    @property
    def peak_share(self) -> float:
        """Operations a second over the matmul rate."""
        return sum(self.operations) / self.total / self.matmul_rate


def measure(
    procedure: Callable[[], Tensor],
    unet: torch.nn.Module,
    watch: Stopwatch,
    dtype: torch.dtype,
    *,
    runs: int,
    warmup: int,
    notes: Sequence[str] = (),
) -> Measurement:
    """Runs `procedure`, loaded and ready on the watch's device in `dtype`, `warmup` times and then `runs` times.

    The operations are counted in the first run, also where its time counts. `notes` go into the result.
    """
    peak, rate = Peak(watch.device), matmul_rate(dtype, watch)
    peak.reset()
    first = run_in_stages(procedure, unet, watch, count=True)
    for _ in range(warmup - 1):
        run_in_stages(procedure, unet, watch)
    done = [] if warmup else [first]
    done += [run_in_stages(procedure, unet, watch) for _ in range(runs - len(done))]
    return Measurement(tuple(done), first.operations, peak.bytes(), rate, torch.get_num_threads(), tuple(notes))
