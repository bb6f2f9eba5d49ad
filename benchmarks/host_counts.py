"""What a rollout asks of a GPU, counted without one: its own code for CUDA on ``meta``, each kernel of ours a counter.

Shapes decide everything here, values nothing. A launch is a Triton kernel, or an ATen operation on the device that is
neither a view nor an allocation; a dispatcher call is what a ``TorchDispatchMode`` sees, composite operations and their
parts each. A synchronisation is whatever would let the host wait for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.loading.weights import build_dit, check_complete, load_shared
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import Placement
from lowvram.schedule import Block, blocks_of
from lowvram.simulate.device import SimulatedDevice
from lowvram.simulate.operations import tensors_in
from lowvram_kernels import uploads
from lowvram_kernels.chips import without_triton
from lowvram_kernels.launch import telling
from lowvram_kernels.stand_ins import meta_as
from lowvram_models.config import DiTConfig
from lowvram_models.constants import LATENT_CHANNELS, MOTION_LATENTS
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
META = torch.device("meta")
GENERATION = 89
FRAMES_PER_CLIP, STEPS = 12, 4
_WITHOUT_LAUNCH = ("empty", "new_empty", "lift", "_unsafe_view", "_reshape_alias", "set_", "resize_")
_ASKS_A_VALUE = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero"}


@dataclasses.dataclass
class Counts:
    """Of one stretch of a run. ``launches`` by the kernel's name, ``syncs`` by what caused them."""

    dispatched: int = 0
    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    syncs: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def launched(self) -> int:
        return sum(self.launches.values())


class Counting(TorchDispatchMode):
    """``scopes`` collects by the name of the innermost ``scope``; all names of a stack are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.scopes: dict[str, list[Counts]] = {}
        self._open: list[Counts] = []
        self._pinned: list[Tensor] = []

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        counts = Counts()
        self.scopes.setdefault(name, []).append(counts)
        self._open.append(counts)
        try:
            yield
        finally:
            self._open.remove(counts)

    def pinned_copy(self, tensor: Tensor) -> Tensor:
        """Stands for ``uploads.pinned``: a copy that is known to be pinned."""
        self._pinned.append(tensor.clone())
        return self._pinned[-1]

    def launched(self, name: str) -> None:
        for counts in self._open:
            counts.launches[name] += 1

    def waited(self, why: str) -> None:
        for counts in self._open:
            counts.syncs[why] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for counts in self._open:
            counts.dispatched += 1
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._schema.name.partition("::")[2]
        here = [t for t in tensors_in((args, kwargs)) if t.is_meta]
        if here and _asks_a_value(name, args):
            self.waited(name)
        result = func(*args, **kwargs)
        self._note_copy(name, args, kwargs, result)
        made = here or [t for t in tensors_in(result) if t.is_meta]
        if made and not func.is_view and not name.startswith(_WITHOUT_LAUNCH):
            self.launched(name)
        return result

    def _note_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        target, source = (result, args[0]) if name == "_to_copy" else args[:2]
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if source.is_meta and not target.is_meta:
            self.waited("copy to the host")
        elif target.is_meta and not source.is_meta and (source.ndim or name == "_to_copy"):
            if blocking:
                self.waited("blocking copy to the device")
            elif not any(source is one for one in self._pinned):
                self.waited("copy from memory that is not pinned")


def _asks_a_value(name: str, args: tuple[Any, ...]) -> bool:
    if name in ("index", "index_put_", "index_put"):
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))
    return name in _ASKS_A_VALUE


class _WatchedEngine(Engine):
    def __init__(self, waited: Callable[[str], None]):
        super().__init__(META)
        self._waited = waited

    def settle(self) -> None:
        self._waited("settle")


@contextlib.contextmanager
def as_if_cuda(counting: Counting) -> Iterator[None]:
    """Let ``meta`` pass for a CUDA device with Triton: dispatchers choose as they would there, and what would wait for
    the device is seen.

    Raises:
        RuntimeError: Triton is not installed, or LOWVRAM_TRITON is 0.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(meta_as(GENERATION))
        if (found := without_triton(META)) is not None:
            raise RuntimeError(f"{found.why}: its launches cannot be counted")
        stack.enter_context(telling(lambda name: counting.launched(name.strip("_"))))
        stack.enter_context(mock.patch.object(torch, "tensor", _watched_tensor(counting)))
        stack.enter_context(mock.patch.object(uploads, "waits", lambda device: device.type == "meta"))
        stack.enter_context(mock.patch.object(uploads, "pinned", counting.pinned_copy))
        yield


def _watched_tensor(counting: Counting) -> Callable[..., Tensor]:
    made = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            counting.waited("torch.tensor on the device")
        return made(*args, **kwargs)

    return tensor


class _Scoped(Rollout):
    """A rollout whose layers are counted apart, once ``counting`` is set."""

    counting: Counting | None = None

    def _through(self, layer: int, call: Any) -> Tensor:
        if self.counting is None:
            return super()._through(layer, call)
        heard = layer in self.dit.config.audio_inject_layers
        with self.counting.scope("audio layer" if heard else "plain layer"):
            return super()._through(layer, call)


class Host:
    """A rollout of ``artifact``'s DiT, everything on the device, KV rings "int8" or "plain", that has two clips behind
    it: what is prepared once is prepared. Size in latents (h, w)."""

    def __init__(self, artifact: Path, kv: str, latent_size: tuple[int, int], counting: Counting):
        component = Artifact.open(artifact).component("dit")
        dit = build_dit(component)
        check_complete(dit, component)
        load_shared(dit, component, META, torch.bfloat16)
        self.config: DiTConfig = dit.config
        self.settings = RolloutSettings(frames_per_clip=FRAMES_PER_CLIP, latent_size=latent_size, sample_steps=STEPS)
        engine = _WatchedEngine(counting.waited)
        self.counting = counting
        self.rollout = _Scoped(
            dit,
            Layers(dit, component, engine, torch.bfloat16),
            torch.zeros(self.config.text_len, self.config.text_dim),
            self.settings,
            dtype=torch.bfloat16,
            engine=engine,
            placement=Placement(kv=kv),
        )
        size = self.settings.latent_size
        self.rollout.prefill(
            torch.zeros(LATENT_CHANNELS, 1, *size), torch.zeros(LATENT_CHANNELS, MOTION_LATENTS, *size)
        )
        blocks = list(blocks_of(4, FRAMES_PER_CLIP))
        self._blocks = iter(blocks[len(blocks) // 2 :])
        for block in blocks[: len(blocks) // 2]:
            self.denoise(block)

    def denoise(self, block: Block) -> None:
        noise = torch.zeros(LATENT_CHANNELS, block.frames, *self.settings.latent_size)
        audio = torch.zeros(1, self.config.audio_layers, self.config.audio_dim, block.frames * 4)
        self.rollout.start(block, noise, audio)
        for step in range(STEPS):
            with self.counting.scope("step"):
                self.rollout.advance([(block, step)])
        self.rollout.finish(block)

    def count(self) -> dict[str, Counts]:
        """One block: of each kind of stretch the largest, by launches."""
        self.counting.scopes.clear()
        self.rollout.counting = self.counting
        with SimulatedDevice(), self.counting, self.counting.scope("block"):
            self.denoise(next(self._blocks))
        self.rollout.counting = None
        return {
            name: max(some, key=lambda c: (c.launched, c.dispatched)) for name, some in self.counting.scopes.items()
        }

    def seconds(self) -> float:
        """Processor time of a block, nothing counted but our own launches; the least of three."""
        found = []
        for _ in range(3):
            begin = time.process_time()
            self.denoise(next(self._blocks))
            found.append(time.process_time() - begin)
        return min(found)

    def seconds_without_attention(self) -> float:
        """The same with room for its result in place of PyTorch's attention, which on a GPU is a call into C++ and on
        ``meta`` is put together in Python."""
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attended):
            return self.seconds()


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, L, H], laid out [B, L, N, H]."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
