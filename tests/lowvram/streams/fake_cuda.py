"""The part of ``torch.cuda`` that orders streams, without a GPU: streams, events and pinned memory, over CPU tensors.

``CudaEngine`` runs on it unchanged. What is asked of a stream goes to a ``Model``: ``clocks.Clocks`` says which
accesses nothing orders, ``late.Late`` copies as late as the order allows. Operations outside of a ``torch.cuda.stream``
are the computation's; of what touches registered host memory there, the host does it itself.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.offload.copy_engine import CudaEngine
from lowvram.offload.pinning import Registry

Tensor = torch.Tensor
COMPUTE, INWARDS, OUTWARDS, HOST = "compute", "copies in", "copies out", "host"


class Model(Protocol):
    def computed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation ran outside of side streams."""
        ...

    def copy(self, stream: str, dst: Tensor, src: Tensor) -> None:
        """A copy is asked of a side stream."""
        ...

    def recorded(self, stream: str) -> Any:
        """What an event recorded now stands for."""
        ...

    def waits(self, stream: str, point: Any) -> None:
        """What is asked of ``stream`` from here on comes after ``point``; of the host, where that is the stream."""
        ...

    def synchronized(self) -> None:
        """The host has waited for everything."""
        ...

    def registered(self, address: int, nbytes: int) -> None: ...

    def unregistered(self, address: int) -> None: ...


class FakeCuda(TorchDispatchMode):
    """Enter it, with ``installed``, for as long as a model is to watch."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.current = Stream(self, COMPUTE)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call goes through a wrapper that keeps torch.compile out, which nothing here uses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.current.name != COMPUTE:
            if func is not torch.ops.aten.copy_.default:
                assert func.is_view, f"{func} on the stream of {self.current.name}; expected copies alone"
                return func(*args, **kwargs)
            assert kwargs.get("non_blocking") or len(args) > 2, "the host would wait for this copy"
            self.model.copy(self.current.name, args[0], args[1])
            return args[0]
        out = func(*args, **kwargs)
        self.model.computed(func, args, kwargs, out)
        return out

    @contextlib.contextmanager
    def installed(self, monkeypatch: Any) -> Iterator[CudaEngine]:
        """The engine whose streams these are."""
        with monkeypatch.context() as patch, self:
            patch.setattr("lowvram.offload.copy_engine.registry", lambda: Registry(Driver(self.model)))
            for name, value in {
                "Stream": lambda device=None: Stream(self, "unnamed"),
                "Event": lambda **_: Event(self),
                "current_stream": lambda device=None: self.current,
                "stream": self._on,
                "synchronize": lambda device=None: self.model.synchronized(),
                "max_memory_allocated": lambda device=None: 0,
                "max_memory_reserved": lambda device=None: 0,
                "reset_peak_memory_stats": lambda device=None: None,
            }.items():
                patch.setattr(torch.cuda, name, value)
            engine = CudaEngine(torch.device("cpu"))
            engine._inwards.stream.name, engine._outwards.stream.name = INWARDS, OUTWARDS
            yield engine

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Stream:
    def __init__(self, cuda: FakeCuda, name: str):
        self.name, self._cuda = name, cuda

    def wait_event(self, event: Event) -> None:
        self._cuda.model.waits(self.name, event.point)


class Event:
    """Waiting for one that was never recorded is waiting for nothing, as on a GPU."""

    def __init__(self, cuda: FakeCuda):
        self.point: Any = None
        self._cuda = cuda

    def record(self, stream: Stream | None = None) -> None:
        self.point = self._cuda.model.recorded((stream or self._cuda.current).name)

    def synchronize(self) -> None:
        self._cuda.model.waits(HOST, self.point)


class Driver:
    """A ``lowvram.offload.pinning.Driver``: registering always succeeds."""

    def __init__(self, model: Model):
        self._model = model

    def register(self, address: int, nbytes: int) -> int:
        self._model.registered(address, nbytes)
        return 0

    def unregister(self, address: int) -> int:
        self._model.unregistered(address)
        return 0

    def settle(self) -> None:
        self._model.synchronized()


class Registered:
    """Stretches of host memory that copies run beside the computation from and to."""

    def __init__(self) -> None:
        self._stretches: dict[int, int] = {}
        self._starts: list[int] = []

    def add(self, address: int, nbytes: int) -> None:
        self._stretches[address] = nbytes
        bisect.insort(self._starts, address)

    def drop(self, address: int) -> None:
        del self._stretches[address]
        self._starts.remove(address)

    def holds(self, address: int) -> bool:
        at = bisect.bisect_right(self._starts, address)
        return at > 0 and address < self._starts[at - 1] + self._stretches[self._starts[at - 1]]


def tensors(values: Any) -> list[Tensor]:
    """The tensors in results or arguments, which nest lists and dictionaries only."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors(value)]


@functools.cache
def changes(func: Any) -> tuple[tuple[int, str], ...]:
    """Index and name of the arguments that an operation changes, by its schema."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among the arguments that an operation changes."""
    found: list[Tensor] = []
    for index, name in changes(func):
        found += tensors(args[index] if index < len(args) else kwargs.get(name))
    return found
