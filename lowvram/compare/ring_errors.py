"""KV rings alone: an artifact with its rings in 8 bit, teacher-forced from its own steps with rings in the dtype that
is computed in.

Shapes: L tokens, N heads, H head_dim, D width, K sampled tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lowvram.compare.metrics import TensorSums
from lowvram.compare.teacher_forcing import force, record
from lowvram.compare.trajectories import Sampler
from lowvram.denoise.kv_format import KVFormat, kv_format
from lowvram.denoise.rollout import Rollout
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.schedule import Block
from lowvram_kernels import ring_codec
from lowvram_kernels.errors import InputError
from lowvram_models.attention import AttentionMemory, Heads
from lowvram_models.rope import Rope

Tensor = torch.Tensor
Key = tuple[int, int, int]
"""(block, step, layer)."""

RING_BLOCKS = 4
"""So many are denoised twice more: at the usual 48 frames a clip a ring is full with them."""
_HEADS = 8  # keys and values of so many are encoded and decoded at a time, beside a run that was not planned for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRings:
    """Relative errors in one layer: of what attention gives, all errors of the layers before in it, and of keys and
    values as they are read from the ring."""

    attention: float
    keys: float
    values: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingErrors:
    """Of rings kept as ``kv``, in that version of their format, over the first ``blocks`` of ``of_blocks``: relative
    errors of the velocity, together and by step; of each layer; of all layers together. Attention is of sampled tokens
    of the blocks ``attention_of``."""

    kv: str
    kv_format: int
    velocity: float
    by_step: tuple[float, ...]
    layers: tuple[LayerRings, ...]
    together: LayerRings
    blocks: int
    of_blocks: int
    attention_of: tuple[int, ...]
    seconds: float

    @property
    def values(self) -> dict[str, float]:
        """The single figures: of velocities; of what attention gives, all layers together and the worst; of all keys
        and all values."""
        return {
            "ring_velocity_error": self.velocity,
            "ring_attention_error": self.together.attention,
            "ring_attention_error_max": max(layer.attention for layer in self.layers),
            "ring_key_error": self.together.keys,
            "ring_value_error": self.together.values,
        }

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def ring_errors(
    candidate: AvatarPipeline, request: Request, *, blocks: int = RING_BLOCKS, quiet: bool = False
) -> RingErrors | None:
    """Measure the rings of a candidate that has made the video of ``request`` already; None where it keeps them in the
    dtype that is computed in, which loses nothing.

    Raises:
        OutOfMemoryError: rings in that dtype do not fit the candidate's budgets.
        InputError: NaN or infinity.
    """
    kv = candidate.run.rung.placement.kv
    if kv == "plain":
        return None
    begin = time.perf_counter()
    exact, rounded = _like(candidate, "bf16"), _like(candidate, kv)
    heard = _Heard(blocks)
    trajectories = record(exact, request, blocks=blocks, begun=heard.begun)
    student = _Student(heard, kv)
    forced = force(rounded, request, trajectories, quiet=quiet, what="rings alone", begun=student.begun)
    return RingErrors(
        kv=kv,
        kv_format=ring_codec.FORMAT,
        velocity=forced.velocity.relative_error.value,
        by_step=tuple(step.relative_error.value for step in forced.by_step),
        layers=student.layers(),
        together=student.together(),
        blocks=trajectories.blocks,
        of_blocks=trajectories.total,
        attention_of=tuple(sorted({0, heard.last})),
        seconds=time.perf_counter() - begin,
    )


def _like(pipeline: AvatarPipeline, kv: str) -> AvatarPipeline:
    """The same artifact on the same device with other rings; without CUDA graphs, which nobody can look into."""
    runtime = pipeline.runtime
    memory: MemoryOptions = dataclasses.replace(runtime.memory, kv=kv, cuda_graphs=False)
    if memory.placement is not None:
        placement = dataclasses.replace(memory.placement, kv="plain" if kv == "bf16" else kv)
        memory = dataclasses.replace(memory, placement=placement)
    return AvatarPipeline(runtime.artifact, runtime.device, runtime.dtype_name, memory=memory, engine=runtime.engine)


@dataclasses.dataclass(frozen=True)
class _Around:
    """A layer's memory, and who is told of keys and values before they are in it, and of what attention gives."""

    memory: AttentionMemory
    given: Callable[[Tensor, Tensor], object] | None
    gave: Callable[[Tensor], object]

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        if self.given is not None:
            self.given(keys(rope), v_LNH)
        out = self.memory.attend(queries, keys, v_LNH, rope)
        self.gave(out)
        return out


class _Heard:
    """What attention gives with exact rings: sampled tokens [K, D] of the first and the last of ``limit`` blocks."""

    def __init__(self, limit: int) -> None:
        self.kept: dict[Key, Tensor] = {}
        self._limit = self.last = limit - 1
        self._sampler = Sampler()

    def begun(self, rollout: Rollout, blocks: int) -> None:
        self.last = min(self._limit, blocks - 1)
        rollout.on_attention = self._around

    def sampled(self, out_LNH: Tensor) -> Tensor:
        return self._sampler(out_LNH.flatten(1))

    def _around(self, block: Block, step: int, layer: int, memory: AttentionMemory) -> AttentionMemory:
        if block.index not in (0, self.last):
            return memory

        def gave(out_LNH: Tensor) -> None:
            self.kept[block.index, step, layer] = self.sampled(out_LNH)

        return _Around(memory, None, gave)


class _Student:
    """Compares, while the candidate's rings are in use."""

    def __init__(self, heard: _Heard, kv: str):
        self._heard, self._kv = heard, kv
        self._attention: dict[int, TensorSums] = {}
        self._keys: dict[int, TensorSums] = {}
        self._values: dict[int, TensorSums] = {}

    def begun(self, rollout: Rollout, _blocks: int) -> None:
        rollout.on_attention = self._around
        self._dtype = rollout.dtype

    def _around(self, block: Block, step: int, layer: int, memory: AttentionMemory) -> AttentionMemory:
        if block.index > self._heard.last:
            return memory
        where = f"block {block.index}, step {step}, layer {layer}"

        def given(k_LNH: Tensor, v_LNH: Tensor) -> None:
            with _finite(where):
                self._stored(layer, k_LNH, v_LNH)

        def gave(out_LNH: Tensor) -> None:
            wanted = self._heard.kept.get((block.index, step, layer))
            if wanted is not None:
                with _finite(where):
                    self._attention.setdefault(layer, TensorSums()).add(self._heard.sampled(out_LNH), wanted)

        return _Around(memory, given, gave)

    def _stored(self, layer: int, k_LNH: Tensor, v_LNH: Tensor) -> None:
        """A head's codes do not depend on other heads."""
        keys, values = (sums.setdefault(layer, TensorSums()) for sums in (self._keys, self._values))
        for k, v in zip(k_LNH.split(_HEADS, dim=1), v_LNH.split(_HEADS, dim=1), strict=True):
            kind = kv_format(self._kv, k.shape[1], k.shape[2], self._dtype)
            for sums, pair in zip((keys, values), _there_and_back(kind, k.contiguous(), v.contiguous()), strict=True):
                sums.add(*pair)

    def layers(self) -> tuple[LayerRings, ...]:
        return tuple(
            _errors([self._attention[layer]], [self._keys[layer]], [self._values[layer]])
            for layer in sorted(self._attention)
        )

    def together(self) -> LayerRings:
        return _errors(self._attention.values(), self._keys.values(), self._values.values())


def _there_and_back(kind: KVFormat, k_LNH: Tensor, v_LNH: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(as read, as written) of keys, then of values."""
    slot = torch.empty(kind.nbytes(len(k_LNH)), dtype=torch.uint8, device=k_LNH.device)
    kind.write(slot, k_LNH, v_LNH)
    yield from zip(kind.read(slot, len(k_LNH), torch.float32), (k_LNH, v_LNH), strict=True)


@contextlib.contextmanager
def _finite(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}: {error}; look at the artifact that it was made with") from error


def _errors(*sums: Iterable[TensorSums]) -> LayerRings:
    found = []
    for parts in sums:
        total = TensorSums()
        for part in parts:
            total.merge(part)
        found.append(total.score("").relative_error)
    attention, keys, values = found
    return LayerRings(attention=attention, keys=keys, values=values)
