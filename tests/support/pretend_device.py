"""A pretend accelerator, so that what goes wrong on a graphics card goes wrong in a test on a CPU as well.

`torch.device("pretend")` is torch's spare device type (PrivateUse1) with its parts in Python, which needs torch 2.9. A
tensor on it has a real ``.device`` and holds a CPU tensor, with which every operation is computed: values are right.
What a real device would refuse is refused, by the rules of CUDA or of MPS (`platform_rules`):

- operands on different devices, but for what torch allows (a CPU scalar in pointwise arithmetic, CPU indices);
- types and operations that the platform lacks;
- random numbers from a CPU generator; the device's own numbers are others than the CPU's;
- use in a forked process;
- memory beyond a budget, and any allocation that a test picks (`device_memory`).

What a real device takes time for is counted (`device_trace`), and copies that do not block arrive late (`device_bus`).

    with pretend_device("mps") as device:
        result = upscale(load_backbone(device="pretend"), image)
        assert device.trace.synchronisations.total() < 10

What it cannot show: the precision of real kernels, which attention kernel a card picks, streams, the caching of memory.
The device type is registered once in a process and for good, and torch.accelerator then finds it: tests use it in
processes of their own (`tests.support.apart`).
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from tests.support.device_bus import Bus, is_pinned, pin
from tests.support.device_memory import DeviceMemory
from tests.support.device_trace import Trace
from tests.support.platform_rules import Platform, Rules, kernel_of

NAME = "pretend"
aten = torch.ops.aten

COPIES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
NO_LAUNCH = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
}
SYNCHRONISING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
"""The program must know a value or the size of their result."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ONE_KERNEL = {aten.convolution.default, aten.convolution_backward.default}
"""In torch's table they are made of other operations, but these are kernels of the device's library."""
HEAVY = {
    aten.convolution.default,
    aten.native_group_norm.default,
    aten.var_mean.correction,
    aten.addcmul.default,
    aten.silu.default,
    aten.add.Tensor,
    aten.cat.default,
    aten.clone.default,
    aten.upsample_nearest2d.default,
}
"""What takes the time on large maps. They all make new tensors."""
SUMS = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
}
"""What a CPU without arithmetic in 16 bits computes a hundred times as slowly as in float32."""
GROUP_NORM = {aten.native_group_norm.default, aten.native_group_norm_backward.default}
FUSED = 2
"""What `_fused_sdp_choice` answers for memory-efficient attention (SDPBackend)."""
UNBOUNDED = 2**56
"""Bytes of storage that a `PretendTensor` claims, so that it can be resized."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device."""

    raw: Tensor
    """The same values, on the CPU."""

    @staticmethod
    def __new__(cls, raw: Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            storage_size=UNBOUNDED,
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CURRENT.run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.raw})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretendTensor":
        with torch.no_grad():
            copy = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a tensor of the device was pickled: a file that another machine must read needs .cpu()")

    def match_raw(self) -> None:
        """Takes the shape of `raw`, which an operation has resized in place."""
        raw = self.raw
        if (self.shape, self.stride()) != (raw.shape, raw.stride()):
            python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
            with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(python):
                self.as_strided_(raw.shape, raw.stride(), raw.storage_offset())


class PretendDevice:
    """The device under the rules of one platform; `trace` and `memory` tell what it was asked for."""

    def __init__(self, platform: Platform, budget: int | None = None, values: bool = True) -> None:
        """`budget` is the device's memory in bytes, None for any amount.

        Without `values`, attention and what is `HEAVY` give zeros: what is counted stays the same, in much less time.
        """
        self.rules = Rules(platform)
        self._values = values
        self.trace = Trace()
        self.memory = DeviceMemory(self.rules, budget)
        self._bus = Bus(self.trace)
        self._process = os.getpid()
        self._random = torch.Generator().manual_seed(0x5EED)
        self._late: Exception | None = None

    def synchronise(self) -> None:
        """Waits for everything that was asked for."""
        self.trace.synchronise()
        self._bus.settle()

    def refuse(self, error: Exception) -> None:
        """Raises `error`; in a backward pass, which Python errors out of an operation abort, right after it."""
        if torch._C._current_graph_task_id() != -1:
            self._late = self._late or error
            return
        try:
            raise error
        finally:
            del error  # the frame is in its traceback: together they would keep tensors alive

    def raise_late(self) -> None:
        """Raises what was refused in a backward pass that is over."""
        if self._late is not None and torch._C._current_graph_task_id() == -1:
            error, self._late = self._late, None
            raise error

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation `func`, some of whose arguments are on the device, or which makes a tensor there."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "Cannot re-initialize the device in forked subprocess. To use it with multiprocessing, you must use "
                "the 'spawn' start method"
            )
        self.raise_late()
        if func is aten.scaled_dot_product_attention.default:
            return self._attention(*args, **kwargs)
        if func is aten._fused_sdp_choice.default and self.rules.platform == "cuda":
            return FUSED if self.rules.fuses_attention(*args[:3]) else 0  # looks at shapes, runs nothing
        if _has_kernel(func.name(), "CompositeImplicitAutograd"):  # in inference mode these arrive whole
            return func.decompose(*args, **kwargs)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        if self.rules.platform == "mps" and func in GROUP_NORM:
            return _mps_group_norm(func)(*args, **kwargs)
        free = _is_view(func) or func in NO_LAUNCH
        if not free and func not in ONE_KERNEL:
            kind = _kernel(self.rules.platform, func)
            if kind == "missing":
                self.refuse(self.rules.missing_kernel_error(_short(func)))
            elif kind == "composite" and _has_kernel(func.name(), "CompositeExplicitAutograd"):
                return _in_parts(func, args, kwargs)
        self._check_operands(func, args, kwargs)
        if not free:
            self.trace.launch(_short(func))
        if func in SYNCHRONISING or _selects_by_mask(func, args):
            self.synchronise()
        return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func` on the CPU tensors within; what it makes is on the device."""
        self._check_dtype(kwargs.get("dtype"))
        on_device = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, PretendTensor)]
        raw_args, raw_kwargs = mapped(_raw, args), mapped(_raw, kwargs)
        raw_kwargs.pop("pin_memory", None)
        if _draws(func):
            raw_kwargs["generator"] = self._random
        if func in HEAVY and not self._values:
            shapes = func(*mapped(_shape_of, raw_args), **mapped(_shape_of, raw_kwargs))
            result = mapped(lambda shape: torch.zeros(shape.shape, dtype=shape.dtype), shapes)
        elif func in SUMS:
            result = _summed_in_float32(func, raw_args, raw_kwargs)
        else:
            result = func(*raw_args, **raw_kwargs)
        known = {id(leaf.raw): leaf for leaf in on_device}
        # A view of a tensor that was made outside of inference mode is not one of inference mode's either.
        normal_view = bool(on_device) and _is_view(func) and not on_device[0].is_inference()
        return mapped(lambda value: self._placed(value, known, normal_view), result)

    def _placed(self, value: Any, known: dict[int, PretendTensor], normal_view: bool) -> Any:
        """`value` as a tensor of the device: a new one, or the one of `known` that it was written into."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            known[id(value)].match_raw()
            return known[id(value)]
        self._check_dtype(value.dtype)
        try:
            self.memory.take(value)
        except RuntimeError as error:
            self.refuse(error)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not normal_view):
            return PretendTensor(value)

    def _check_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype in self.rules.missing_dtypes:
            self.refuse(self.rules.missing_dtype_error(dtype))

    def _check_operands(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses operands of another device, and random numbers of the CPU's generator."""
        leaves = leaves_of((args, kwargs))
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            self.refuse(RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'"))
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PretendTensor)]
        if not others or not any(isinstance(leaf, PretendTensor) for leaf in leaves):
            return
        written = [args[index] for index, entry in enumerate(func._schema.arguments) if _is_written(entry, index, args)]
        written += [kwargs["out"]] if "out" in kwargs else []
        scalars_pass = torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor
        if func in INDEXING and isinstance(args[0], PretendTensor):
            indices = [entry for entry in args[1] if entry is not None and not isinstance(entry, PretendTensor)]
            for index in indices:
                self._bus.to_device(index)
            others, scalars_pass = [other for other in others if not _among(other, indices)], True
        if any(other.dim() > 0 or not scalars_pass or _among(other, written) for other in others):
            shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
            self.refuse(
                RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{NAME}:0 and cpu! ({func}, shapes {shapes})"
                )
            )

    def _attention(self, *args: Any, **options: Any) -> Any:
        """scaled_dot_product_attention as the platform runs it: in one kernel, or in parts that hold the scores."""
        query, key = args[:2]
        self._check_operands(aten.scaled_dot_product_attention.default, args, options)
        fused = self.rules.fuses_attention(*args[:3])
        if self.rules.platform == "cuda" and not fused:
            options.pop("enable_gqa", None)
            return aten._scaled_dot_product_attention_math.default.decompose(*args, **options)[0]
        if not fused:
            scores = query.shape[:-1].numel() * key.shape[-2] * query.element_size()
            try:
                self.memory.check(scores)
            except RuntimeError as error:
                self.refuse(error)
        self.trace.launch("scaled_dot_product_attention")
        raw_args, raw_options = mapped(_raw, args), mapped(_raw, options)
        if self._values:
            found = _summed_in_float32(torch.nn.functional.scaled_dot_product_attention, raw_args, raw_options)
        else:
            found = torch.zeros(*query.shape[:-1], args[2].shape[-1], dtype=query.dtype)
        return self._placed(found, {}, False)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy on the device, or between it and main memory."""
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        target, source = args[:2] if func is aten.copy_.default else (args[1], args[0])
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if not isinstance(target, PretendTensor):
            self._bus.to_host(source.raw, target, non_blocking)
            return target
        if isinstance(source, PretendTensor):
            self.trace.launch("copy_")
        else:
            self._bus.to_device(source, non_blocking)
        target.raw.copy_(_raw(source))
        return target

    def _to_copy(self, source: PretendTensor, *, device: torch.device | None = None, **options: Any) -> Tensor:
        """`source` in another type, memory layout or place."""
        non_blocking, raw = options.pop("non_blocking", False), source.raw
        options.pop("pin_memory", None)
        if device is not None and device.type == "cpu":
            options.pop("layout", None)
            target = torch.empty_like(raw, **options)
            self._bus.to_host(raw, target, non_blocking)
            return target
        self._check_dtype(options.get("dtype"))
        self.trace.launch("copy_")
        return self._placed(aten._to_copy.default(raw, **options), {}, False)


@functools.cache
def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, getattr(torch._C.DispatchKey, key))


@functools.cache
def _kernel(platform: Platform, func: Any) -> str:
    if func.namespace == "aten":
        return kernel_of(platform, _short(func))
    return "composite" if func.namespace == "prims" else "missing"  # prims: what torch's decompositions are made of


@functools.cache
def _short(func: Any) -> str:
    """The name that torch's table has for `func`, such as ``add.Tensor``."""
    return func.name().rpartition("::")[2]


def _mps_group_norm(func: Any) -> Any:
    """What torch/backends/mps/__init__.py registers for these two, which the table does not show."""
    from torch._decomp.decompositions import native_group_norm_backward
    from torch._refs import native_group_norm

    return native_group_norm if func is aten.native_group_norm.default else native_group_norm_backward


def _in_parts(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` by torch's own kernel that is made of other operations, each of which comes here in turn."""
    result = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    if any(isinstance(leaf, Tensor) and not isinstance(leaf, PretendTensor) for leaf in leaves_of(result)):
        raise NotImplementedError(f"{func} makes a tensor by itself: name it in ONE_KERNEL")
    return result


@functools.cache
def _is_view(func: Any) -> bool:
    aliases = [entry.alias_info for entry in func._schema.returns if entry.alias_info is not None]
    views = torch.Tag.inplace_view in func.tags or func is aten._unsafe_view.default
    return views or any(not alias.is_write for alias in aliases)


@functools.cache
def _draws(func: Any) -> bool:
    return any(entry.name == "generator" for entry in func._schema.arguments)


def _is_written(entry: Any, index: int, args: Any) -> bool:
    return index < len(args) and entry.alias_info is not None and entry.alias_info.is_write


def _among(tensor: Tensor, others: list[Any]) -> bool:
    return any(tensor is other for other in others)


def _selects_by_mask(func: Any, args: Any) -> bool:
    """Whether `func` is indexing with a mask, whose true places must be counted first."""
    if func not in INDEXING:
        return False
    masked = any(entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in args[1])
    return masked and (func is aten.index.Tensor or args[2].numel() > 1)


def _shape_of(value: Any) -> Any:
    """`value` without data, where it is a tensor."""
    return value.to("meta") if isinstance(value, Tensor) else value


def _summed_in_float32(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on the CPU; of operands in 16 bits it sums the products in float32 and rounds once, as cards do."""
    dtypes = {leaf.dtype for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)}
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        return func(*args, **kwargs)  # also of mixed types, which are refused

    def cast(values: Any, dtype: torch.dtype) -> Any:
        return mapped(lambda value: value.to(dtype) if isinstance(value, Tensor) else value, values)

    return cast(func(*cast(args, torch.float32), **cast(kwargs, torch.float32)), dtypes.pop())


def leaves_of(values: Any) -> list[Any]:
    """What the nested tuples, lists and dictionaries of an operation's operands hold. torch's pytree, which knows more
    kinds, took a fifth of the time of all operations."""
    if not isinstance(values, (tuple, list, dict)):
        return [values]
    found: list[Any] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list, dict)):
            found += leaves_of(value)
        else:
            found.append(value)
    return found


def mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """`values` with `function` applied to each of its leaves (see `leaves_of`)."""
    if isinstance(values, (tuple, list)):
        return type(values)([mapped(function, value) for value in values])
    if isinstance(values, dict):
        return {name: mapped(function, value) for name, value in values.items()}
    return function(values)


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.raw if isinstance(value, PretendTensor) else value


class _Module(backend_registration._DummyBackendModule):
    """What stands under ``torch.pretend``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        _CURRENT.synchronise()

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        memory = _CURRENT.memory
        total = 2**40 if memory.budget is None else memory.budget
        return total - memory.now, total


_CURRENT = PretendDevice("cuda")
_LIBRARY: Any = None


def _register() -> None:
    """Makes the device type known to torch; once in a process."""
    global _LIBRARY
    if _LIBRARY is not None:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _LIBRARY = torch.library.Library("aten", "IMPL")
    # Factories have no argument on the device, and torch.tensor copies below the level of tensors with Python parts.
    for name, func in (
        ("empty.memory_format", aten.empty.memory_format),
        ("empty_strided", aten.empty_strided.default),
        ("_copy_from", aten._copy_from.default),
        ("copy_", aten.copy_.default),
    ):
        _LIBRARY.impl(name, lambda *args, _func=func, **kwargs: _CURRENT.run(_func, args, kwargs), "PrivateUse1")
    _LIBRARY.impl("_pin_memory", pin, "CPU")
    _LIBRARY.impl("is_pinned", is_pinned, "CPU")


@contextmanager
def pretend_device(platform: Platform, budget: int | None = None, values: bool = True) -> Iterator[PretendDevice]:
    """The device under the rules of `platform`, for the length of the block; see `PretendDevice` for the rest."""
    global _CURRENT
    _register()
    before, _CURRENT = _CURRENT, PretendDevice(platform, budget, values)
    try:
        # In the thread that asks, so that a backward pass is counted where it was asked for.
        with torch.autograd.set_multithreading_enabled(False):
            yield _CURRENT
            _CURRENT.raise_late()
    finally:
        _CURRENT = before
