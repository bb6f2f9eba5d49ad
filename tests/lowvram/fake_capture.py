"""A stand-in for CUDA graphs on the CPU: operations are recorded with the very tensors they read and wrote.

A replay asks for the same operations on the same tensors again, without running any Python of the work: what has to
stay at its address and does not is read stale, and shows. As on a GPU a capture computes nothing, and what is allocated
in one is worth nothing once the graph has run, because other graphs write there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor


class FakeCapture:
    """One pool. ``fail`` runs before each capture and may raise."""

    def __init__(self, fail: Callable[[], None] = lambda: None):
        self.fail, self.graphs = fail, list[FakeGraph]()

    def __call__(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = FakeGraph()
        with graph:
            self.fail()
            work()
        graph.undo()
        self.graphs.append(graph)
        return graph.replay


class FakeGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._pool: dict[int, Tensor] = {}
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in _written(func, args, kwargs):
            if _storage(tensor) not in self._pool:
                self._before.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        there = {_storage(t) for t in given}
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _storage(t) not in there]
        self._pool |= {_storage(t): t for t in fresh}
        self._operations.append((func, args, kwargs, fresh))
        return out

    def undo(self) -> None:
        """As if nothing had been computed."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()
        self._spoil()

    def replay(self) -> None:
        for func, args, kwargs, fresh in self._operations:
            out = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for tensor, value in zip(fresh, out, strict=False):
                tensor.copy_(value)
        self._spoil()

    def _spoil(self) -> None:
        for tensor in self._pool.values():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)  # NaN as floating point


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Tensors among the arguments that an operation changes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))
