"""Triton's interpreter with bounds: an access outside of the storages that a launch was given is a fault.

A kernel with a table of addresses (``table``) may reach every tensor that is alive. Gaps inside of a storage, as
between the rows of a slice, count as inside.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_spans: list[tuple[np.ndarray, np.ndarray]] = []  # first bytes and ends, sorted, of the launches under way


def install() -> None:
    """Check each load, store and launch from now on."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def checked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        _check("load", ptrs, mask)
        return load(self, ptrs, mask, *others)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        _check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *others)

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = dict(zip(self.arg_names, args, strict=False)) if hasattr(self, "arg_names") else {}
        tabled = "table" in names or "table" in self.fn.__code__.co_varnames
        _spans.append(_storages(gc.get_objects() if tabled else (*args, *kwargs.values())))
        try:
            return launch(self, *args, **kwargs)
        finally:
            _spans.pop()

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = checked_launch


def _storages(objects: Any) -> tuple[np.ndarray, np.ndarray]:
    tensors = [it for it in objects if type(it) in (torch.Tensor, torch.nn.Parameter) and it.device.type == "cpu"]
    spans = {(it.untyped_storage().data_ptr(), it.untyped_storage().nbytes()) for it in tensors}
    spans = sorted((first, first + length) for first, length in spans if length)
    found = np.array(spans, dtype=np.uint64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _check(what: str, ptrs: Any, mask: Any) -> None:
    size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    first = np.asarray(ptrs.data).astype(np.uint64)[np.asarray(mask.data).astype(bool)].reshape(-1)
    if not first.size:
        return
    starts, ends = _spans[-1]
    place = np.searchsorted(starts, first, side="right").astype(np.int64) - 1
    inside = (place >= 0) & (first + size <= ends[np.maximum(place, 0)]) if len(starts) else first < 0
    if not inside.all():
        where = int(first[~inside][0])
        raise IndexError(f"{what} of {int(size)} bytes at {where:#x}, outside of every tensor of this launch")
