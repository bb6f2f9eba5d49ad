"""Operations on a simulated device: what each does to its memory, by torch's dispatch.

What stands in for values: copies to the CPU give zeros (a copy into a tensor that is there leaves it alone, so that
tens of GiB of host memory stay untouched), ``torch.equal`` answers False, and whatever else would look at a value
raises. Composite operations are taken apart first, so what they hold in between counts too; what a kernel takes inside
(a convolution's workspace, the space of a sort) does not. Scaled dot product attention takes what the fused kernels
take, its output and the log-sum-exp of each row.

A tensor that only stands for weights to come is not memory on a device: what is made inside
``with torch.device("meta")``, or in the constructor of an ``nn.Module``, is a placeholder and not counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.simulate.op_cache import Outcome, key_of, outcome_of

Tensor = torch.Tensor


class Device(Protocol):
    """What operations ask of a ``lowvram.simulate.device.SimulatedDevice``."""

    h2d_bytes: int
    d2h_bytes: int

    def claim(self, tensors: Iterable[Tensor], *, placeholder: bool) -> None:
        """Take memory for storages that are not known yet."""
        ...

    def knows(self, tensor: Tensor) -> bool: ...

    def takes_memory(self, tensor: Tensor) -> bool: ...

    def resized(self, tensor: Tensor) -> None:
        """A storage has another size."""
        ...

    def scratch(self, nbytes: int) -> contextlib.AbstractContextManager[None]:
        """Memory that is taken for the duration of a copy."""
        ...

    def computed(self, name: str) -> None:
        """One kernel ran."""
        ...


class Operations(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call goes through a wrapper that keeps torch.compile out, which nothing here uses

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for kind in types:
            if kind.__torch_dispatch__ is not _plain:
                return NotImplemented  # a tensor made of tensors: let it come back with what it is made of
        with torch._C.DisableTorchFunction():
            return self._run(_operation(func), func, args, kwargs or {})

    def _run(self, operation: _Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operation.stand_in is not None and _on_device(args, kwargs):
            return operation.stand_in(self._device, func, *args, **kwargs)
        if operation.parts is not None or operation.composite:
            with self:
                result = (operation.parts or func.decompose)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = self._compute(operation, func, args, kwargs)
        outputs = [t for t in tensors_in(result) if t.is_meta]
        if outputs:
            self._note(operation, outputs, args, kwargs)
        return result

    def _compute(self, operation: _Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if operation.view else key_of(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = self._outcomes.get(key)
        if known is not None:
            return known.again(args, kwargs)
        result = func(*args, **kwargs)
        fresh = not any(self._device.knows(t) for t in tensors_in(result))
        outcome = outcome_of(result, args, kwargs)
        if outcome is not None and (fresh or outcome.changed is not None):
            self._outcomes[key] = outcome
        return result

    def _note(
        self, operation: _Operation, outputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        device = self._device
        if operation.resizes:
            device.resized(outputs[0])
        fresh = [t for t in outputs if not device.knows(t)]
        if fresh:
            inputs = [t for t in tensors_in((args, kwargs)) if t.is_meta]
            # What was there before the device was entered counts from when it is first used.
            device.claim(inputs, placeholder=False)
            device.claim(fresh, placeholder=_is_placeholder(device, inputs))
        if not operation.view and any(device.takes_memory(t) for t in outputs):
            device.computed(operation.name)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Scaled dot product attention as its fused kernels: on ``meta`` torch would take the scores as a whole.

    The function is replaced in its module: a ``TorchFunctionMode`` would be asked at every ``x.shape``, too, which
    takes a third of a simulated run. Tensors that are elsewhere get what they always get, in whatever thread.
    """
    usual = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_fused_attention if query.is_meta else usual)(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Output [B, N, L, H], laid out [B, L, N, H] as the kernels write it, and for as long [B, N, L] in float32."""
    *batch, heads, rows, _width = q.shape
    out = torch.zeros(*batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device).transpose(-3, -2)
    _log_sum_exp = torch.empty(*batch, heads, rows, dtype=torch.float32, device=q.device)
    return out


def _equal(gpu: Device, func: Any, a: Tensor, b: Tensor) -> bool:
    """Whether values are the same is not known; False is the answer that saves nothing."""
    return False


def _value(gpu: Device, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"{func} asks for a value of a tensor on the simulated device, which has none; expected code that goes by "
        "shapes there: keep such values on the CPU"
    )


def _copy(gpu: Device, func: Any, /, dst: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if dst.is_meta and src.is_meta:
        func(dst, src, non_blocking)
        gpu.claim([src, dst], placeholder=False)
        gpu.computed("copy")
    else:
        _cross(gpu, dst, src)
    return dst


def _to_copy(gpu: Device, func: Any, /, src: Tensor, **kwargs: Any) -> Tensor:
    target = torch.device(kwargs.get("device") or src.device)
    if src.is_meta and target.type != "meta":
        out: Tensor = torch.zeros_like(src, dtype=kwargs.get("dtype"), device=target)
    else:
        out = func(src, **kwargs)
    if src.is_meta and out.is_meta:
        gpu.claim([src], placeholder=False)
        gpu.claim([out], placeholder=not gpu.takes_memory(src))
        gpu.computed("copy")
    else:
        gpu.claim([out] if out.is_meta else [], placeholder=False)
        _cross(gpu, out, src)
    return out


def _cross(gpu: Device, dst: Tensor, src: Tensor) -> None:
    """Count a copy between host and device as CUDA does it: the dtype is changed where the source is, and what is not
    contiguous on the device goes through a copy there that is."""
    nbytes = dst.numel() * dst.element_size()
    on_device = dst if dst.is_meta else src
    gpu.claim([on_device], placeholder=False)
    converts = src.is_meta and src.dtype != dst.dtype
    with gpu.scratch(nbytes if converts or not on_device.is_contiguous() else 0):
        if dst.is_meta:
            gpu.h2d_bytes += nbytes
        else:
            gpu.d2h_bytes += nbytes


def _quanto_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """optimum-quanto's product as CUDA runs it for activations that are not quantized: torch does not see its parts."""
    from optimum.quanto.library.qbytes_mm import qbytes_mm

    out: Tensor = qbytes_mm(x, weight, scale)
    return out


def _nf4_linear(
    x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, blocksize: int, quant_type: str, bias: Tensor | None = None
) -> Tensor:
    """bitsandbytes' product: for few rows it has a fused kernel on some chips, this is what all others do."""
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return F.linear(x, weight, bias)


# Instead of an operation: what it does to the device.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "aten::equal": _equal,
    "aten::_local_scalar_dense": _value,
    "aten::nonzero": _value,
    "aten::copy_": _copy,
    "aten::_to_copy": _to_copy,
}
# Operations in other words, each of which counts.
_PARTS: dict[str, Callable[..., Any]] = {
    "aten::scaled_dot_product_attention": _fused_attention,
    "quanto::qbytes_mm": _quanto_linear,
    "bitsandbytes::gemm_4bit": _nf4_linear,
}


class _Operation:
    """What has to be known of an operation."""

    def __init__(self, func: Any):
        qualified = func._schema.name
        self.name = qualified.partition("::")[2]
        self.stand_in = _STAND_INS.get(qualified)
        self.parts = _PARTS.get(qualified)
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        self.view = func.is_view or self.name.startswith(("empty", "new_empty", "lift"))
        self.resizes = self.name in ("resize_", "set_", "resize_as_")


_known: dict[Any, _Operation] = {}
_plain = Tensor.__torch_dispatch__


def _operation(func: Any) -> _Operation:
    found = _known.get(func)
    if found is None:
        found = _known[func] = _Operation(func)
    return found


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in results or arguments, which nest lists and dictionaries only."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return found
    for value in values:  # no call for each: this is asked several times an operation
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value)
    return found


def _on_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    target = kwargs.get("device")
    return (target is not None and torch.device(target).type == "meta") or any(
        t.is_meta for t in tensors_in((args, kwargs))
    )


def _is_placeholder(gpu: Device, inputs: list[Tensor]) -> bool:
    """Whether something new only stands for weights to come: made of placeholders, or where modules are made."""
    if inputs:
        return not any(gpu.takes_memory(t) for t in inputs)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _DEVICE_CONTEXT_CODE:
            context: DeviceContext = frame.f_locals["self"]
            return context.device.type == "meta"
        if code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


_DEVICE_CONTEXT_CODE = DeviceContext.__torch_function__.__code__
