"""Counts the bytes that real code has alive at once, without computing anything: on the "meta" device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


_NOTHING_MOVED = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}


class LiveBytes(TorchDispatchMode):
    """``peak`` is the most bytes alive at once of tensors made inside, those in ``known`` apart; ``operations`` counts
    the multiplications and additions of convolutions, ``moved`` the bytes that everything else reads and writes."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self._kept = list(known)
        self._known = {StorageWeakRef(t.untyped_storage()).cdata for t in self._kept}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.operations = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.operations += 2 * out.numel() * args[1][0].numel()
        elif not func.is_view and func.overloadpacket.__name__ not in _NOTHING_MOVED:
            leaves = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in leaves)
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._live.values())

    def restart(self) -> None:
        self.peak = self.operations = self.moved = 0

    def _note(self, storage) -> None:
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._known:
            self._live[reference.cdata] = (reference, storage.nbytes())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
