"""Rollout: denoising of blocks without an end, one or several steps at a time; model-spec section 3.

Shapes: C latent channels, F latent frames, h x w latent size, T tokens a latent frame, A actors.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from lowvram.denoise.cuda_graphs import Lane, LayerGraphs
from lowvram.denoise.kv_cache import RingMemory, Rings, RingShape, Sink, Window
from lowvram.denoise.kv_format import kv_format
from lowvram.loading.residual import Residual, joined
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import Placement
from lowvram.parallel.ulysses import Sequence, Whole, own_rope
from lowvram.schedule import FRAMES_PER_BLOCK, Block
from lowvram_kernels.uploads import upload
from lowvram_models.attention import AttentionMemory
from lowvram_models.audio_adapter import AudioTokens
from lowvram_models.dit import CausalDiT, LayerInputs
from lowvram_models.rope import Rope, block_rope, condition_rope, reference_time

Tensor = torch.Tensor
log = logging.getLogger(__name__)

SCHEDULER_SHIFT = 3.0


def cond_rope_distance(setting: int | str, base_seed: int, block: int, step: int) -> int:
    """Distance between a block and the reference frame: fixed, or drawn from 4..30 for each call ("random").

    The draw depends on (seed, block, step) alone, so that the order in which calls run does not matter.
    """
    return random.Random(f"{base_seed}/{block}/{step}").randint(4, 30) if setting == "random" else int(setting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """``latent_size`` is (h, w) of the latents; ``cond_rope_distance`` 0..30 or "random"."""

    frames_per_clip: int
    latent_size: tuple[int, int]
    frames_per_block: int = FRAMES_PER_BLOCK
    sample_steps: int = 4
    base_seed: int = 420
    cond_rope_distance: int | str = 30

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a latent frame as (rows, columns)."""
        height, width = self.latent_size
        return height // 2, width // 2


@dataclasses.dataclass
class _UnderWay:
    """A block between its first and its last step. ``rope`` is that of all its tokens, ``own_rope`` of this rank's;
    ``sink_ropes`` are those of the sink's keys, by step."""

    block: Block
    latent: Tensor
    audio: AudioTokens
    rope: Rope
    own_rope: Rope
    sink_ropes: dict[int, Rope]
    pose: Tensor | None
    masks: Tensor | None


@dataclasses.dataclass
class _Call:
    """One step of one block on its way through the layers."""

    block: Block
    step: int
    x: Tensor | Residual
    inputs: LayerInputs
    rope: Rope
    window: Window
    sink_rope: Rope
    lane: Lane | None = None


class Rollout:
    """Holds what lives from block to block: schedule, sink, rings, and the blocks that are under way.

    ``layers`` makes a layer's weights present while it runs; ``dtype`` is that of the matrix products. ``sequence``
    says which tokens and heads are this rank's, ``steps`` which denoising steps run here (None: all of them).
    ``graphs`` replay layers that stay on the device, from the third clip on.
    ``on_prediction(block, step, velocity)`` sees every output of the DiT, ``on_latent(block, step, latent)`` what each
    step begins with and, with the step behind the last one, what a block ends with: what it returns takes its place.
    ``on_layer(block, step, count, x_LD)`` sees this rank's tokens when they have gone through ``count`` layers, from 0,
    and copies what it keeps of them; what ``on_attention(block, step, layer, memory)`` returns is attended to in the
    place of a layer's ``memory``.
    """

    def __init__(
        self,
        dit: CausalDiT,
        layers: Layers,
        context: Tensor,
        settings: RolloutSettings,
        *,
        dtype: torch.dtype,
        engine: Engine,
        placement: Placement,
        sequence: Sequence | None = None,
        steps: range | None = None,
        graphs: LayerGraphs | None = None,
        on_prediction: Callable[[Block, int, Tensor], None] | None = None,
        on_latent: Callable[[Block, int, Tensor], Tensor] | None = None,
        on_layer: Callable[[Block, int, int, Tensor], None] | None = None,
        on_attention: Callable[[Block, int, int, AttentionMemory], AttentionMemory] | None = None,
    ):
        self.dit, self.layers, self.settings, self.dtype = dit, layers, settings, dtype
        self.engine, self.device = engine, engine.device
        self.on_prediction, self.on_latent, self.on_layer = on_prediction, on_latent, on_layer
        self.on_attention = on_attention
        self.graphs = graphs
        self.sequence: Sequence = sequence or Whole()
        self.steps = range(settings.sample_steps) if steps is None else steps
        # Seconds to import, which a rank that only decodes, and an input that is refused, need not wait for.
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SCHEDULER_SHIFT)
        self.scheduler = scheduler
        self.scheduler.set_timesteps(settings.sample_steps)
        self.times = [self.dit.embed_time(float(t)) for t in self.scheduler.timesteps]
        self.zero_time = self.dit.embed_time(0.0)
        self.text = dit.embed_text(context.to(self.device, dtype))
        self._of_text: dict[Any, Any] = {}
        self._remember(placement)
        self._under_way: dict[int, _UnderWay] = {}
        self.filled_from: tuple[Tensor, Tensor] | None = None

    def _remember(self, placement: Placement) -> None:
        """Make room for sink and rings."""
        config, grid = self.dit.config, self.settings.grid
        kind = kv_format(placement.kv, self.sequence.heads(config.num_heads), config.head_dim, self.dtype)
        shape = RingShape.of(self.settings.frames_per_clip, self.settings.frames_per_block, math.prod(grid))
        sink_tokens = len(condition_rope(*grid, config.head_dim).cos)
        self.sink = Sink(kind, config.num_layers, sink_tokens, self.device)
        self.rings = Rings(shape, kind, self.engine, self.steps, config.num_layers)
        self.sink.keep_rotated()
        self.place(placement)

    def place(self, placement: Placement) -> None:
        """Move weights and rings to where ``placement`` wants them; what they hold stays. Between two passes only."""
        if self.graphs is not None:
            self.graphs.drop()
        self.layers.place(placement.streamed_layers, placement.weight_slots)
        self.rings.place(placement.host_rings, placement.ring_slots)

    @torch.inference_mode()
    def prefill(self, reference_C1hw: Tensor, motion_CFhw: Tensor) -> None:
        """Fill the sink from reference [C, 1, h, w] and motion latents [C, 19, h, w]; replaces what it held. They are
        kept for whoever changes layers and fills it again."""
        self.filled_from = (reference_C1hw, motion_CFhw)
        reference, motion = (t.to(self.device, self.dtype) for t in (reference_C1hw, motion_CFhw))
        x: Tensor | Residual = self.sequence.own(self.dit.embed_conditions(reference, motion), 1)
        rope = condition_rope(*self.settings.grid, self.dit.config.head_dim).to(self.device)
        own = own_rope(self.sequence, rope, 1)
        time = dataclasses.replace(self.zero_time, derived={})  # not to be kept: a sink is rarely filled
        inputs = LayerInputs(time=time, text=self.text, of_text=self._of_text, rope=own, frames=1)
        for layer in range(self.layers.count):
            self.layers.enter(layer)
            memory = self.sequence.around(self.sink.recorder(layer), rope, 1)
            x = self.dit.layer(layer, x, inputs, memory)
            self.layers.leave(layer)

    @torch.inference_mode()
    def start(
        self,
        block: Block,
        noise_CFhw: Tensor,
        audio_ASCT: Tensor,
        *,
        pose_CFhw: Tensor | None = None,
        actor_masks: Tensor | None = None,
    ) -> None:
        """Take a block under way: its noise [C, F, h, w], or what the steps before have made of it; of its audio
        [A, 25, audio_dim, 4 F] the part that is this block's; ``actor_masks`` [A, F, T, 1]."""
        rope = block_rope(block.first_frame, block.frames, *self.settings.grid, self.dit.config.head_dim)
        rope = self._uploaded(rope)
        self._under_way[block.index] = _UnderWay(
            block=block,
            latent=upload(noise_CFhw.to(torch.float32), self.device),
            audio=dataclasses.replace(self.dit.embed_audio(upload(audio_ASCT.to(self.dtype), self.device)), derived={}),
            rope=rope,
            own_rope=own_rope(self.sequence, rope, block.frames),
            sink_ropes=self._sink_ropes(block),
            pose=None if pose_CFhw is None else upload(pose_CFhw.to(self.dtype), self.device),
            masks=None if actor_masks is None else self._own_masks(upload(actor_masks, self.device)),
        )

    @torch.inference_mode()
    def advance(self, items: Iterable[tuple[Block, int]]) -> None:
        """Take one Euler step of each (block, step): all of them go through a layer before the next layer comes.

        A step of a block has to come after the block's step before it, and after the same step of the block before
        it. A pass that failed can be repeated: latents change at its end only, and of the rings just what the same
        blocks write again.
        """
        calls = [self._call(self._under_way[block.index], step) for block, step in items]
        self._keep_in_lanes(calls)
        layers = range(self.layers.count)
        self.rings.expect(((call.step, layer), call.window) for layer in layers for call in calls)
        for layer in layers:
            self.layers.enter(layer)
            for call in calls:
                self._show(call, layer)
                call.x = self._through(layer, call)
            self.layers.leave(layer)
        for call in calls:
            self._show(call, self.layers.count)
        latents = [self._stepped(call) for call in calls]
        for call, latent in zip(calls, latents, strict=True):
            self._under_way[call.block.index].latent = latent

    def latents(self) -> dict[int, Tensor]:
        """Of the blocks that are under way, by their index."""
        return {index: flight.latent for index, flight in self._under_way.items()}

    def begin_again(self, latents: Mapping[int, Tensor]) -> None:
        """Blocks that are under way have the latents of before a pass that is to be repeated."""
        for index, latent in latents.items():
            self._under_way[index].latent = latent

    def forget_derived(self) -> None:
        """Layers of the DiT are others from here on: what they made of times, text and voice is made again. Between two
        passes only."""
        if self.graphs is not None:
            self.graphs.drop()
        self._of_text.clear()
        for time in (*self.times, self.zero_time):
            time.derived.clear()
        for flight in self._under_way.values():
            if flight.audio.derived is not None:
                flight.audio.derived.clear()

    def advance_with_nothing(self, blocks: Iterable[Block]) -> None:
        """What the other ranks wait for in an ``advance`` of these blocks that this rank could not finish."""
        sizes = [(block.frames * math.prod(self.settings.grid), block.frames) for block in blocks]
        self._attend_nothing(sizes)

    def prefill_with_nothing(self) -> None:
        """The same of a ``prefill``."""
        self._attend_nothing([(self.sink.tokens, 1)], outputs=False)

    @torch.inference_mode()
    def _attend_nothing(self, sizes: list[tuple[int, int]], *, outputs: bool = True) -> None:
        """``sizes`` are (tokens, equal groups of them) of the calls that share the pass."""
        config, sequence = self.dit.config, self.sequence
        like = torch.empty(config.num_heads, config.head_dim, dtype=self.dtype, device=self.device)
        with sequence.catching_up():
            for _ in range(self.layers.count):
                for total, groups in sizes:
                    sequence.attend_nothing(like, total, groups)
            for total, groups in sizes if outputs else ():
                patches = torch.zeros(total, 4 * config.out_dim, device=self.device)
                sequence.whole(sequence.own(patches, groups), total, groups)

    def finish(self, block: Block) -> Tensor:
        """The latent [C, F, h, w], float32, of a block that has taken its last step here."""
        return self._seen(self._under_way.pop(block.index), self.steps.stop)

    def denoise(self, block: Block, noise_CFhw: Tensor, audio_ASCT: Tensor, **conditions: Tensor | None) -> Tensor:
        """A block alone: ``start``, all steps that run here, ``finish``."""
        self.start(block, noise_CFhw, audio_ASCT, **conditions)
        for step in self.steps:
            self.advance([(block, step)])
        return self.finish(block)

    def _seen(self, flight: _UnderWay, step: int) -> Tensor:
        if self.on_latent is not None:
            flight.latent = self.on_latent(flight.block, step, flight.latent)
        return flight.latent

    def _show(self, call: _Call, layers: int) -> None:
        if self.on_layer is not None:
            x_LD = joined(call.x)
            self.on_layer(call.block, call.step, layers, x_LD)
            call.x = x_LD

    def _call(self, flight: _UnderWay, step: int) -> _Call:
        block = flight.block
        self._seen(flight, step)
        x_LD = self.dit.embed_latent(flight.latent.to(self.dtype), flight.pose)
        return _Call(
            block=block,
            step=step,
            x=self.sequence.own(x_LD, block.frames),
            inputs=LayerInputs(
                time=self.times[step],
                text=self.text,
                of_text=self._of_text,
                rope=flight.own_rope,
                frames=block.frames,
                audio=flight.audio,
                actor_masks=flight.masks,
            ),
            rope=flight.rope,
            window=self.rings.shape.window(block.clip, block.slot),
            sink_rope=flight.sink_ropes[step],
        )

    def _keep_in_lanes(self, calls: list[_Call]) -> None:
        """Move what later calls of the same steps will replace to where graphs find it."""
        steps = {call.step for call in calls}
        if self.graphs is None or len(steps) < len(calls):  # two blocks at one step would share a lane
            return
        for call in calls:
            if call.block.clip == 0:  # it sees a part of the ring
                continue
            x_LD = joined(call.x)
            call.lane = lane = self.graphs.lane(call.step, x_LD, call.inputs, call.sink_rope)
            if lane is not None:
                x_LD, call.inputs, call.sink_rope = lane.x_LD, lane.inputs, lane.sink_rope
            call.x = x_LD

    def _through(self, layer: int, call: _Call) -> Tensor | Residual:
        cell = (call.step, layer)
        memory: AttentionMemory = RingMemory(self.rings, self.sink, cell, call.window, call.sink_rope)
        if self.on_attention is not None:
            memory = self.on_attention(call.block, call.step, layer, memory)
        shared = self.sequence.around(memory, call.rope, call.block.frames)

        def run(x: Tensor | Residual) -> Tensor | Residual:
            through: Tensor | Residual = self.dit.layer(layer, x, call.inputs, shared)
            return through

        if self.graphs is None or call.lane is None:
            return run(call.x)
        if not (self.layers.resident(layer) and self.rings.on_device(cell)):
            return run(call.x)
        # What a graph takes and gives stands at one address, and is changed there.
        key = (layer, call.window.slot)
        return self.graphs.through(call.lane, key, joined(call.x), lambda x_LD: joined(run(Residual(x_LD))))

    def _own_masks(self, masks_AFT1: Tensor) -> Tensor:
        frames = masks_AFT1.shape[1]
        own = [self.sequence.own(actor.flatten(0, 1), frames).unflatten(0, (frames, -1)) for actor in masks_AFT1]
        return torch.stack(own)

    def _sink_ropes(self, block: Block) -> dict[int, Rope]:
        """Of all steps at once, and one for all steps at the same distance: nothing is left to copy within a step."""
        of_time: dict[int, Rope] = {}
        ropes = {}
        for step in self.steps:
            distance = cond_rope_distance(self.settings.cond_rope_distance, self.settings.base_seed, block.index, step)
            time = reference_time(block.first_frame, distance)
            if time not in of_time:
                rope = condition_rope(*self.settings.grid, self.dit.config.head_dim, reference_time=time)
                of_time[time] = self._uploaded(rope)
            ropes[step] = of_time[time]
        return ropes

    def _uploaded(self, rope: Rope) -> Rope:
        return Rope(upload(rope.cos, self.device), upload(rope.sin, self.device))

    def _stepped(self, call: _Call) -> Tensor:
        grid = (call.block.frames, *self.settings.grid)
        patches = self.dit.head(joined(call.x), call.inputs.time, self.dtype)
        velocity = self.dit.unpatchify(self.sequence.whole(patches, math.prod(grid), call.block.frames), grid)
        if self.on_prediction is not None:
            self.on_prediction(call.block, call.step, velocity)
        self.scheduler._step_index = call.step
        latent = self._under_way[call.block.index].latent
        return self.scheduler.step(velocity, self.scheduler.timesteps[call.step], latent).prev_sample
