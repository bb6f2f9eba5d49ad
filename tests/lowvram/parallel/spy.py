"""Looks over a rank's shoulder: which tensors does it send, how many bytes, and is one a parameter of the DiT?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Everything in torch.distributed that moves tensors (a barrier moves none); not every torch has all of it.
MOVERS = [
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_gather_single",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "recv_object_list", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
    "send_object_list",
]  # fmt: skip


class Spy:
    """``calls`` of each function, ``sent`` bytes of each, ``offences``: what was sent out of a parameter's memory."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.offences: list[str] = []
        self.parameters = 0
        self._models: list[nn.Module] = []

    def watch(self, model: nn.Module) -> nn.Module:
        self._models.append(model)
        return model

    def saw(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.calls[name] += 1
        self.sent[name] += sent_bytes(name, arguments, options)
        mine = self._storages()
        self.parameters = max(self.parameters, len(mine))
        for tensor in tensors_in((arguments, options)):
            if tensor.untyped_storage().data_ptr() in mine:
                self.offences.append(f"{name} of {list(tensor.shape)}")

    def result(self) -> dict[str, Any]:
        names = ("calls", "sent", "offences", "parameters")
        return {name: getattr(self, name) for name in names}

    def _storages(self) -> set[int]:
        bound = [p for model in self._models for p in model.parameters() if p.device.type != "meta"]
        return {p.untyped_storage().data_ptr() for p in bound}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def sent_bytes(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Bytes that leave this rank, of the functions that are expected; of others all, so that they are seen."""
    if name in ("irecv", "recv"):
        return 0
    if name == "all_to_all_single":
        _, flat, _, splits = arguments
        own = splits[dist.get_rank(options["group"])]
        return (sum(splits) - own) * flat.element_size()
    if name == "broadcast":
        tensor, sender = arguments
        others = dist.get_world_size(options["group"]) - 1
        return tensor.nbytes * others if dist.get_rank() == sender else 0
    return sum(tensor.nbytes for tensor in tensors_in((arguments, options)))


@contextlib.contextmanager
def spying() -> Iterator[dict[str, Any]]:
    """Gives what was seen, once the run is over."""
    import lowvram.denoise.denoiser as denoiser

    spy, seen = Spy(), {}
    build = denoiser.build_dit
    real = {name: getattr(dist, name) for name in MOVERS if hasattr(dist, name)}
    denoiser.build_dit = lambda component: spy.watch(build(component))
    for name, function in real.items():
        setattr(dist, name, _seen(spy, name, function))
    try:
        yield seen
    finally:
        denoiser.build_dit = build
        for name, function in real.items():
            setattr(dist, name, function)
        seen |= spy.result()


def _seen(spy: Spy, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def moved(*arguments: Any, **options: Any) -> Any:
        spy.saw(name, arguments, options)
        return function(*arguments, **options)

    return moved
