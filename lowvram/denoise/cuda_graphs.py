"""CUDA graphs of layers: what a layer asks of the device is recorded once and asked again in one piece.

A graph reads and writes the addresses that it was recorded with. It is recorded only where they stay until the next
``Rollout.place``: weights and KV ring on the device, the whole ring in sight, and the call's own tensors in a ``Lane``.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from lowvram.denoise.kv_cache import Cell
from lowvram.devices import is_out_of_memory
from lowvram.offload.copy_engine import Engine
from lowvram.offload.oom import first_sentences
from lowvram.offload.placement import Placement
from lowvram.parallel.ulysses import Sequence, Whole
from lowvram_kernels.errors import DeviceError
from lowvram_kernels.holding import holding
from lowvram_kernels.trace import record, trace_kernels
from lowvram_models.audio_adapter import AudioTokens
from lowvram_models.dit import LayerInputs
from lowvram_models.rope import Rope

Tensor = torch.Tensor
Work = Callable[[], object]
Replay = Callable[[], None]
Capture = Callable[[Work], Replay]
"""Records what a piece of work asks of the device, which does not do it yet; what it returns has the device do it."""
Key = tuple[int, int]
"""(layer, slot of the ring) of a call in a lane."""
log = logging.getLogger(__name__)


class CudaCapture:
    """Captures on a stream of its own; all graphs share one pool of memory.

    That is sound because nothing in the pool outlives a graph's run, and graphs run one after the other.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back also where a capture cannot be ended. Other threads may go on asking
        # the device for what a capture must not.
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        replay: Replay = graph.replay
        return replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
    """``kernels`` are counted at every replay; ``held`` is what the graph reads and somebody else may let go."""

    replay: Replay
    kernels: Counter[tuple[str, str]]
    held: list[Tensor]


class Lane:
    """Where all calls of one denoising step, with tensors of the same shapes, have what changes from block to block.

    ``x_LD`` is the residual that goes through the layers; ``inputs`` and ``sink_rope`` are those of the call.
    ``captured`` are the lane's graphs, ``seen`` the calls that went through it eagerly.
    """

    def __init__(self, x_LD: Tensor, inputs: LayerInputs, sink_rope: Rope):
        self._tensors = [t if t is None else _packed(t) for t in _changing(x_LD, inputs, sink_rope)]
        x, cos, sin, sink_cos, sink_sin, frame, clip, masks = self._tensors
        self.x_LD, self.sink_rope = _there(x), Rope(_there(sink_cos), _there(sink_sin))
        audio = None if frame is None or clip is None else AudioTokens(frame, clip)
        rope = Rope(_there(cos), _there(sin))
        self.inputs = dataclasses.replace(inputs, rope=rope, audio=audio, actor_masks=masks)
        self.captured: dict[Key, Captured] = {}
        self.seen: set[Key] = set()

    def fill(self, x_LD: Tensor, inputs: LayerInputs, sink_rope: Rope) -> None:
        """Copy a call's tensors in."""
        for mine, given in zip(self._tensors, _changing(x_LD, inputs, sink_rope), strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)


class LayerGraphs:
    """All graphs of one rollout. ``capture`` is asked anew for each pool of memory; ``gave_up`` is told why, where
    memory ran out in a capture: from then on layers run without graphs. So it is with a layer that cannot be captured,
    unless graphs were ``asked`` for. How many were captured, the seconds of it, and their replays stand in ``facts``.
    """

    def __init__(
        self,
        capture: Callable[[], Capture],
        engine: Engine,
        gave_up: Callable[[str], object],
        facts: dict[str, float] | None = None,
        *,
        asked: bool = True,
    ):
        self._new_pool, self._engine, self._gave_up, self._asked = capture, engine, gave_up, asked
        self._capture: Capture | None = None
        self._lanes: dict[object, Lane] = {}
        self._off = False
        self.facts = {} if facts is None else facts
        self.facts.update(captured=0, capture_s=0.0, replayed=0)

    def lane(self, step: int, x_LD: Tensor, inputs: LayerInputs, sink_rope: Rope) -> Lane | None:
        """The lane of a call, filled with its tensors; None once graphs were given up."""
        if self._off:
            return None
        shapes = [t if t is None else (t.shape, t.dtype) for t in _changing(x_LD, inputs, sink_rope)]
        key = (step, inputs.frames, *shapes)
        if key not in self._lanes:
            self._lanes[key] = Lane(x_LD, inputs, sink_rope)
        lane = self._lanes[key]
        lane.fill(x_LD, inputs, sink_rope)
        return lane

    def through(self, lane: Lane, key: Key, x_LD: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """A layer's [L, D] from its input [L, D], which it may change: eagerly the first time, which compiles and sets
        up what it needs.

        What comes back may be the lane's ``x_LD``, which the next call through the lane changes.

        Raises:
            DeviceError: the layer cannot be captured, and graphs were asked for.
        """
        captured = lane.captured.get(key)
        if self._off or (captured is None and key not in lane.seen):
            out = layer(x_LD)
            lane.seen.add(key)
            return out
        if x_LD is not lane.x_LD:
            lane.x_LD.copy_(x_LD)
        # A layer that changes its input copies nothing here: it comes back itself.
        captured = captured or self._captured(lane, key, lambda: lane.x_LD.copy_(layer(lane.x_LD)))
        if captured is None:
            return layer(lane.x_LD)
        self._replay(captured)
        return lane.x_LD

    def _captured(self, lane: Lane, key: Key, work: Work) -> Captured | None:
        """None where memory ran out, or what nobody asked for does not go: all graphs are gone then."""
        begin = time.perf_counter()
        self._capture = self._capture or self._new_pool()
        try:
            with trace_kernels() as kernels, holding() as held:
                replay = self._capture(work)
        except RuntimeError as error:
            if self._asked and not is_out_of_memory(error):
                raise DeviceError(
                    f"layer {key[0]} could not be captured as a CUDA graph ({error}); go on with --cuda-graphs "
                    "false, and what was written before is kept"
                ) from error
            reason = first_sentences(error)
        else:
            lane.captured[key] = Captured(replay=replay, kernels=kernels, held=held)
            self.facts["captured"] += 1
            self.facts["capture_s"] += time.perf_counter() - begin
            return lane.captured[key]
        self._off = True
        self.drop()
        self._gave_up(reason)
        return None

    def _replay(self, captured: Captured) -> None:
        captured.replay()
        self.facts["replayed"] += 1
        for (operation, kernel), calls in captured.kernels.items():
            record(operation, kernel, calls)

    def drop(self) -> None:
        """Let go of all graphs, their memory and the lanes, once the device is done with them."""
        if not self._lanes:
            return
        self._engine.settle()
        for lane in self._lanes.values():  # calls that are under way hold lanes, too
            lane.captured.clear()
        self._lanes.clear()
        self._capture = None
        self._engine.empty_cache()


def layer_graphs(
    engine: Engine,
    sequence: Sequence,
    placement: Placement,
    cells: Iterable[Cell],
    gave_up: Callable[[str], object],
    facts: dict[str, float],
    *,
    asked: bool = True,
) -> LayerGraphs | None:
    """Graphs for a rollout over ``cells``; None, and a warning if ``asked`` for them, where nothing is captured."""
    device, why = engine.device, ""
    if device.type != "cuda":
        why = f"on {device.type}: there is nothing to capture"
    elif not isinstance(sequence, Whole):
        why = "with --ulysses-size above 1: ranks exchange in the middle of a layer"
    elif all(cell[1] in placement.streamed_layers or cell in placement.host_rings for cell in cells):
        why = "here: every layer, or its KV ring, comes from the host"
    if why:
        if asked:
            log.warning("--cuda-graphs has no effect %s", why)
        return None
    return LayerGraphs(lambda: CudaCapture(device), engine, gave_up, facts, asked=asked)


def _changing(x_LD: Tensor, inputs: LayerInputs, sink_rope: Rope) -> list[Tensor | None]:
    audio = inputs.audio
    heard = (None, None) if audio is None else (audio.frame, audio.clip)
    rope = (inputs.rope.cos, inputs.rope.sin)
    return [x_LD, *rope, sink_rope.cos, sink_rope.sin, *heard, inputs.actor_masks]


def _packed(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
