"""The DiT's part of a run: loaded, its sink filled, and block after block denoised, with relief where memory runs out.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from lowvram.denoise.cuda_graphs import LayerGraphs, layer_graphs
from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.encode.conditions import Conditions
from lowvram.loading.weights import build_dit, check_complete, drop_start, load_shared
from lowvram.offload.layers import Layers
from lowvram.offload.oom import Layout
from lowvram.parallel.team import LATENT_CHANNELS, Chain, Team
from lowvram.request import Request
from lowvram.runtime import Runtime
from lowvram.schedule import VIDEO_FRAMES_PER_LATENT, Block, Tick, clip_noise, latent_frames_per_clip, ticks

Tensor = torch.Tensor


class Denoiser:
    """Runs ``steps`` of every block, for this rank's part of tokens and heads."""

    def __init__(
        self,
        runtime: Runtime,
        request: Request,
        latent_size: tuple[int, int],
        conditions: Conditions,
        team: Team,
        steps: range,
    ):
        self._runtime, self._conditions, self._team, self.steps = runtime, conditions, team, steps
        self.settings = RolloutSettings(
            frames_per_clip=latent_frames_per_clip(request.infer_frames),
            latent_size=latent_size,
            sample_steps=request.sample_steps,
            base_seed=request.base_seed,
            cond_rope_distance=request.cond_rope_distance,
        )
        self.seconds: dict[int, float] = {}
        """Spent on a block so far, waiting for other ranks included, by its index; whoever finishes a block takes its
        seconds out."""
        self.rollout = runtime.relief.attempt("load_dit", self._load, _nothing_yet)
        self.fill_sink(conditions.reference)

    def _load(self) -> Rollout:
        runtime = self._runtime
        with runtime.stages.stage("load_dit"), self._team.doing("loading the DiT", "load"):
            component = runtime.artifact.component("dit")
            dit = build_dit(component)
            check_complete(dit, component)
            load_shared(dit, component, runtime.device, runtime.dtype)
            rollout = Rollout(
                dit,
                Layers(dit, component, runtime.engine, runtime.dtype, self._team.host_weights),
                self._conditions.context,
                self.settings,
                dtype=runtime.dtype,
                engine=runtime.engine,
                placement=runtime.layout.placement,
                sequence=self._team.sequence,
                steps=self.steps,
                graphs=self._graphs(dit.config.num_layers) if runtime.memory.cuda_graphs else None,
            )
            drop_start(dit, component)
            return rollout

    def _graphs(self, layers: int) -> LayerGraphs | None:
        runtime, cells = self._runtime, [(step, layer) for step in self.steps for layer in range(layers)]

        def gave_up(reason: str) -> None:
            runtime.relief.went_without("cuda_graphs", reason, "layers run without graphs from here on")

        placement = runtime.layout.placement
        graphs = layer_graphs(runtime.engine, self._team.sequence, placement, cells, gave_up)
        runtime.cuda_graphs = graphs.facts if graphs else None
        return graphs

    def fill_sink(self, reference: Tensor) -> None:
        """Fill the sink from the reference [C, 1, h, w] and the conditions' motion latents."""

        def fill() -> None:
            with self._runtime.stages.stage("prefill_sink"), self._team.doing("filling the sink", "prefill"):
                self._team.sequence.begins()
                self.rollout.prefill(reference, self._conditions.motion)

        self._team.meet()
        self._attempt("prefill_sink", fill, self.rollout.prefill_with_nothing)

    def _attempt(self, what: str, work: Callable[[], None], with_nothing: Callable[[], None]) -> None:
        """``with_nothing`` exchanges what ``work`` does with the ranks that share tokens and heads."""

        def keep_up() -> None:
            with self._team.doing("letting the other ranks of its stage go on", "keep up"):
                with_nothing()

        team = self._team
        self._runtime.relief.attempt_together(what, work, self.give_way, keep_up=keep_up, any_ran_out=team.any_ran_out)

    def give_way(self, layout: Layout) -> None:
        self.rollout.place(layout.placement)

    def run(self, blocks: Iterable[Block], chain: Chain) -> Iterator[tuple[Block, Tensor]]:
        """Yield each block and its latent [C, F, h, w], float32, when it has taken its last step here."""
        for tick in ticks(blocks, len(self.steps), self._runtime.layout.placement.wave):
            begin = time.perf_counter()
            if tick.refresh:
                # From the second clip on, the first frame that was generated stands for the portrait.
                self.fill_sink(chain.reference())
            latent = chain.take(tick.starts) if tick.starts is not None else None
            self._advance(tick, latent)
            self._note(tick, time.perf_counter() - begin)
            block = tick.finished(len(self.steps))
            if block is not None:
                latent = self.rollout.finish(block)
                chain.pass_on(block, latent)
                yield block, latent

    def _advance(self, tick: Tick, latent: Tensor | None) -> None:
        # Once, whatever has to be done again.
        audio = self._audio(tick.starts) if tick.starts is not None else None
        self._team.meet()
        where = ", ".join(f"block {block.index}" for block, _ in tick.items)
        before = self.rollout.latents()

        def advance() -> None:
            with self._runtime.traced("denoise"), self._team.doing(f"denoising {where}", "denoise"):
                self._team.sequence.begins()
                self.rollout.begin_again(before)
                if (block := tick.starts) is not None and audio is not None:
                    noise = self._noise(block) if latent is None else latent
                    self.rollout.start(block, noise, audio)
                self.rollout.advance([(block, self.steps[step]) for block, step in tick.items])

        self._attempt("denoise", advance, lambda: self.rollout.advance_with_nothing(block for block, _ in tick.items))

    def _note(self, tick: Tick, seconds: float) -> None:
        for block, _ in tick.items:
            self.seconds[block.index] = self.seconds.get(block.index, 0.0) + seconds / len(tick.items)

    def _noise(self, block: Block) -> Tensor:
        shape = (LATENT_CHANNELS, self.settings.frames_per_clip, *self.settings.latent_size)
        noise = clip_noise(self.settings.base_seed, block.clip, shape)
        return noise[:, block.offset : block.offset + block.frames]

    def _audio(self, block: Block) -> Tensor:
        first = block.first_frame * VIDEO_FRAMES_PER_LATENT
        return self._conditions.audio.frames(first, block.frames * VIDEO_FRAMES_PER_LATENT)


def _nothing_yet(layout: Layout) -> None:
    """What failed is built anew from the layout: nothing has to move."""
