"""Denoiser: the DiT's part of a run, loaded, its sink filled, and block after block denoised, again where memory runs
out.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch

from lowvram.denoise.cuda_graphs import LayerGraphs, layer_graphs
from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.denoise.rollout_state import restore
from lowvram.encode.conditions import Conditions
from lowvram.loading.weights import build_dit, check_complete, drop_start, load_shared, load_start
from lowvram.offload.layers import Layers
from lowvram.offload.oom import Attempt, Rung
from lowvram.parallel.team import Chain, Team
from lowvram.request import Request
from lowvram.runtime import Run
from lowvram.schedule import Block, Denoised, Tick, clip_noise, latent_frames_per_clip, ticks
from lowvram_models.constants import FRAMES_PER_LATENT, LATENT_CHANNELS
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Component

Tensor = torch.Tensor
Resumed = tuple[Block, Callable[[str], Mapping[str, Tensor]]]
"""The block that comes next, and the parts, by their names, of the state to go on from."""


class Denoiser:
    """Runs ``steps`` of every block, for this rank's part of tokens and heads; ``resumed`` goes on where another one
    was."""

    def __init__(
        self,
        run: Run,
        request: Request,
        latent_size: tuple[int, int],
        conditions: Conditions,
        team: Team,
        steps: range,
        *,
        resumed: Resumed | None = None,
    ):
        self._run, self._runtime = run, run.runtime
        self._conditions, self._team, self.steps = conditions, team, steps
        self.settings = RolloutSettings(
            frames_per_clip=latent_frames_per_clip(request.infer_frames),
            latent_size=latent_size,
            sample_steps=request.sample_steps,
            base_seed=request.base_seed,
            cond_rope_distance=request.cond_rope_distance,
        )
        for attempt in run.ladder.attempts("load_dit"):
            with attempt:
                self.rollout = self._load()
        if resumed is None:
            self.fill_sink(conditions.reference)
            return
        block, state = resumed
        reference = state("start")["reference"] if block.sees_generated_reference else conditions.reference
        restore(self.rollout, state, (reference, conditions.motion))

    def _load(self) -> Rollout:
        runtime = self._runtime
        with runtime.stages.stage("load_dit"), self._team.doing("loading the DiT", "load"):
            component = runtime.artifact.component("dit")
            dit, layers = self._model(component)
            rollout = Rollout(
                dit,
                layers,
                self._conditions.context,
                self.settings,
                dtype=runtime.dtype,
                engine=runtime.engine,
                placement=self._run.rung.placement,
                sequence=self._team.sequence,
                steps=self.steps,
                graphs=self._graphs(dit.config.num_layers) if self._run.with_graphs else None,
            )
            drop_start(dit, component)
            if runtime.kept is not None:
                runtime.kept.model = dit, layers
            return rollout

    def _model(self, component: Component) -> tuple[CausalDiT, Layers]:
        """As an earlier video left it, or without its layers, which the rollout places; in both cases with what a
        rollout is set up with."""
        runtime = self._runtime
        if runtime.kept is not None and runtime.kept.model is not None:
            load_start(runtime.kept.model[0], component, runtime.device, runtime.dtype)
            return runtime.kept.model
        dit = build_dit(component)
        check_complete(dit, component)
        load_shared(dit, component, runtime.device, runtime.dtype)
        return dit, Layers(dit, component, runtime.engine, runtime.dtype, self._team.host_weights)

    def _graphs(self, layers: int) -> LayerGraphs | None:
        run, cells = self._run, [(step, layer) for step in self.steps for layer in range(layers)]
        asked = run.runtime.memory.cuda_graphs is not None
        gave_up = functools.partial(
            run.ladder.went_without if asked else run.ladder.let_go,
            "cuda_graphs",
            words="layers run without graphs from here on",
        )
        engine, sequence = run.runtime.engine, self._team.sequence
        return layer_graphs(engine, sequence, run.rung.placement, cells, gave_up, run.graphs, asked=asked)

    def fill_sink(self, reference: Tensor) -> None:
        """Fill the sink from the reference [C, 1, h, w] and the conditions' motion latents."""
        self._team.meet()
        for attempt in self._attempts("prefill_sink", self.rollout.prefill_with_nothing):
            with (
                attempt,
                self._runtime.stages.stage("prefill_sink"),
                self._team.doing("filling the sink", "prefill"),
            ):
                self._team.sequence.begins()
                self.rollout.prefill(reference, self._conditions.motion)

    def _attempts(self, what: str, with_nothing: Callable[[], None]) -> Iterator[Attempt]:
        """``with_nothing`` exchanges what the work does with the ranks that share tokens and heads."""
        keep_up = functools.partial(self._keep_up, with_nothing)
        any_ran_out = self._team.any_ran_out
        return self._run.ladder.attempts_together(what, self.degrade, keep_up=keep_up, any_ran_out=any_ran_out)

    def _keep_up(self, with_nothing: Callable[[], None]) -> None:
        with self._team.doing("letting the other ranks of its stage go on", "keep up"):
            with_nothing()

    def degrade(self, rung: Rung) -> None:
        """Move weights and rings to where a lower rung has them."""
        self.rollout.place(rung.placement)

    def end(self) -> None:
        """No more blocks come: host memory of the rings goes to the next video, where there may be one."""
        if self._runtime.kept is not None:
            self._runtime.engine.spare(self.rollout.rings.let_go())

    def run(self, blocks: Iterable[Block], chain: Chain, *, cuts: Collection[int] = ()) -> Iterator[Denoised]:
        """Yield each block when it has taken its last step here; of one that comes before one of ``cuts``, while no
        other is under way."""
        seconds: dict[int, float] = {}  # of blocks that are under way, by their index
        for tick in ticks(blocks, len(self.steps), self._run.rung.placement.wave, cuts=cuts):
            begin = time.perf_counter()
            if tick.refresh:
                # From the second clip on, the first frame that was generated stands for the portrait.
                self.fill_sink(chain.reference())
            latent = chain.take(tick.starts) if tick.starts is not None else None
            self._advance(tick, latent)
            share = (time.perf_counter() - begin) / len(tick.items)
            for block, _ in tick.items:
                seconds[block.index] = seconds.get(block.index, 0.0) + share
            finished = tick.finished(len(self.steps))
            if finished is not None:
                latent = self.rollout.finish(finished)
                chain.pass_on(finished, latent)
                yield Denoised(finished, latent, seconds.pop(finished.index))

    def _advance(self, tick: Tick, latent: Tensor | None) -> None:
        # Once, whatever has to be done again.
        audio = self._audio(tick.starts) if tick.starts is not None else None
        self._runtime.stages.block = tick.items[0][0].index
        self._team.meet()
        where = ", ".join(f"block {block.index}" for block, _ in tick.items)
        before, blocks = self.rollout.latents(), [block for block, _ in tick.items]
        for attempt in self._attempts("denoise", functools.partial(self.rollout.advance_with_nothing, blocks)):
            with attempt, self._runtime.traced("denoise"), self._team.doing(f"denoising {where}", "denoise"):
                self._team.sequence.begins()
                self.rollout.begin_again(before)
                if tick.starts is not None and audio is not None:
                    noise = self._noise(tick.starts) if latent is None else latent
                    pose, masks = self._pose(tick.starts), self._masks(tick.starts)
                    self.rollout.start(tick.starts, noise, audio, pose_CFhw=pose, actor_masks=masks)
                self.rollout.advance([(block, self.steps[step]) for block, step in tick.items])

    def _noise(self, block: Block) -> Tensor:
        shape = (LATENT_CHANNELS, self.settings.frames_per_clip, *self.settings.latent_size)
        noise = clip_noise(self.settings.base_seed, block.clip, shape)
        return noise[:, block.offset : block.offset + block.frames]

    def _pose(self, block: Block) -> Tensor | None:
        pose = self._conditions.pose
        return None if pose is None else pose[:, block.first_frame : block.first_frame + block.frames]

    def _masks(self, block: Block) -> Tensor | None:
        """[people, F, tokens, 1]: people stay where they are."""
        masks = self._conditions.masks
        return None if masks is None else masks[:, None, :, None].expand(-1, block.frames, -1, -1).contiguous()

    def _audio(self, block: Block) -> Tensor:
        first = block.first_frame * FRAMES_PER_LATENT
        return self._conditions.audio.frames(first, block.frames * FRAMES_PER_LATENT)
