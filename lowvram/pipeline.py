"""Pipeline: a portrait, a voice and a prompt in; frames out, block by block, without an end.

A frame's way reads downwards in ``AvatarPipeline.stream``. Shapes: C latent channels, F frames, h x w latent size,
H x W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram.decode import BlockDecoder, to_pixels
from lowvram.denoise.denoiser import Denoiser, Resumed
from lowvram.denoise.rollout import Rollout
from lowvram.devices import choose_device, computing_on, each_within
from lowvram.encode.conditions import Conditions, encode_inputs
from lowvram.encode.voice import listening
from lowvram.offload.copy_engine import Engine
from lowvram.offload.kept import give_back_freed
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.team import Alone, LatentSize, SingleRank, Team
from lowvram.planning.members import Machines
from lowvram.planning.workload import Workload
from lowvram.recorder import BlockRecord, Recorder
from lowvram.request import Inputs, Request, read_inputs
from lowvram.runtime import Run, Runtime, memory_report
from lowvram.schedule import Block, Denoised, Extent, block_at
from lowvram.segments.parts import Parts
from lowvram.segments.take import Take
from lowvram_kernels.errors import ConfigError
from lowvram_models.constants import DROPPED_FIRST_FRAMES, FRAMES_PER_LATENT
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor
Begun = Callable[[Rollout, int], None]
plan_log = logging.getLogger("lowvram.plan")


class AvatarPipeline:
    """Makes avatar videos from one artifact on one device, or one rank's part of them. See ``from_artifact`` and
    ``stream``."""

    def __init__(
        self,
        artifact: Artifact,
        device: torch.device,
        dtype: str = "auto",
        *,
        memory: MemoryOptions | None = None,
        team: Team | None = None,
        machines: Machines | None = None,
        engine: Engine | None = None,
    ):
        self.runtime = Runtime(artifact, device, dtype, memory or MemoryOptions(), engine)
        self.team: Team = team or SingleRank()
        self._machines = machines
        self._parts: Parts | None = None
        self.cuts: frozenset[int] = frozenset()
        """Numbers of the blocks that segments of the latest take begin with, but for the first one's."""
        if self.runtime.kept is not None and (ranks := self.team.layout.world_size) > 1:
            raise ConfigError(f"weights are to stay for the next video, and {ranks} ranks share the work; expected one")

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        memory: MemoryOptions | None = None,
        team: Team | None = None,
        machines: Machines | None = None,
        verify: bool = False,
        resident: bool = False,
    ) -> AvatarPipeline:
        """Open what ``convert`` wrote. Weights are read when a stage needs them.

        Args:
            path: the artifact's folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: of what is not 8-bit: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16.
            memory: budgets, and what is to be offloaded or kept in 8 bit; the default leaves it to the plan.
            team: the other ranks, where several share the work.
            machines: what all ranks run on, where they are several GPUs.
            verify: read every byte and compare the checksums first.
            resident: weights stay for the next video, which reads none of them again; ``let_go`` ends that. Of a GPU
                they take what the plan says, between two videos, too.

        Raises:
            CheckpointError: no artifact, a damaged one, or one of another format version.
            HardwareError: the device is not there.
            ConfigError: ``resident``, and there are other ranks.
        """
        where = choose_device(device)
        if resident:
            memory = dataclasses.replace(memory or MemoryOptions(), resident=True)
        return cls(Artifact.open(Path(path), verify=verify), where, dtype, memory=memory, team=team, machines=machines)

    def stream(
        self,
        request: Request | Inputs,
        *,
        recorder: Recorder | None = None,
        begun: Begun | None = None,
        take: Take | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """Yield the video's frames, uint8 [k, H, W, 3], one block at a time as soon as it is decoded.

        All frames of all clips come; the last clip may go on behind the end of the audio, and ``Inputs.voice_frames``
        says how many are needed. Of several ranks, this is for the one that reads and writes; ``serve`` is for the
        others. The current CUDA device and PyTorch's switches for float32 are the caller's own between two blocks.
        ``begun``, for a pipeline of one rank, is as of ``denoise``. Of a ``take``, also of one rank, ``state`` can be
        asked for when a segment's last block was yielded; the frames are those of a video that is not cut.

        Raises:
            ConfigError: ``begun`` or ``take`` is given, and there are other ranks.
        """
        self._check_alone(begun, take)
        return each_within(self._computing, self._stream(request, recorder or Recorder(), begun, take))

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the take goes on from behind the last block that ``stream`` has yielded, with which a segment ends:
        parts by name, to be read before the next block is asked for. They are large: one after the other.

        Raises:
            RuntimeError: nothing is being made, or blocks are under way.
        """
        if self._parts is None:
            raise RuntimeError("nothing is being made; expected a take whose segment has just ended")
        return self._parts.state()

    def denoise(
        self, request: Request | Inputs, begun: Begun, *, recorder: Recorder | None = None
    ) -> Generator[tuple[Block, Tensor], None, None]:
        """Yield each block and its latent [C, F, h, w], float32, of which nothing is decoded; ``begun`` is shown the
        rollout before its first step, and told how many blocks there will be. For a pipeline of one rank.

        Raises:
            ConfigError: there are other ranks.
        """
        self._check_alone(begun)
        return each_within(self._computing, self._denoise(request, begun, recorder or Recorder()))

    def serve(self, request: Request) -> Iterator[Block]:
        """Do the part of a rank that neither reads nor writes; yields each block that has taken its steps here."""
        return each_within(self._computing, self._serve(request))

    def _check_alone(self, begun: Begun | None, take: Take | None = None) -> None:
        ranks = self.team.layout.world_size
        for given, what in ((begun, "single steps are to be seen"), (take, "segments are to be made")):
            if given is not None and ranks > 1:
                raise ConfigError(f"{what} of {ranks} ranks, each of which has a part; expected one")

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return computing_on(self.runtime.device)

    def let_go(self) -> None:
        """Give back what stays for a next video; one that comes all the same loads it again."""
        self.runtime.let_go()

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep nothing of a video that failed: nobody knows in what state."""
        try:
            yield
        except Exception:
            if self.runtime.kept is not None:
                self.let_go()
            raise

    def _stream(
        self, request: Request | Inputs, recorder: Recorder, begun: Begun | None, take: Take | None
    ) -> Iterator[np.ndarray]:
        inputs = read_inputs(request) if isinstance(request, Request) else request
        with self._keeping():
            run, conditions = self._conditions(inputs, recorder, take)
            try:
                with listening(conditions.audio):
                    shared = self.team.share_conditions(conditions)
                    yield from self._frames(run, inputs, shared, recorder, begun, take)
            finally:
                self._parts = None
                if self.runtime.kept is not None:
                    give_back_freed()

    def _conditions(self, inputs: Inputs, recorder: Recorder, take: Take | None = None) -> tuple[Run, Conditions]:
        self.team.share("latent_size", inputs.latent_size)
        self.team.share("voice_on_host", inputs.voice_on_host)
        run = self._begin(inputs.request, inputs.latent_size, voice_on_host=inputs.voice_on_host)
        if self.runtime.kept is not None:
            self.runtime.kept.hold(self.runtime.artifact, apart=self.runtime.engine.apart)
        with self.team.doing("encoding portrait, voice and prompt", "encode"):
            block = block_at(0 if take is None else take.next_block, inputs.request.infer_frames)
            return run, encode_inputs(run, inputs, recorder, first_frame=block.first_frame * FRAMES_PER_LATENT)

    def _denoise(self, request: Request | Inputs, begun: Begun, recorder: Recorder) -> Iterator[tuple[Block, Tensor]]:
        inputs = read_inputs(request) if isinstance(request, Request) else request
        with self._keeping():
            size, (run, conditions) = inputs.latent_size, self._conditions(inputs, recorder)
            with listening(conditions.audio):
                extent = _extent(inputs.request, conditions)
                parts = self._made_by(run, inputs.request, size, conditions)
                begun(parts.denoises().rollout, extent.count)
                with parts:
                    for block, latent, _ in self._denoised(extent, size, parts):
                        yield block, latent

    def _frames(
        self,
        run: Run,
        inputs: Inputs,
        conditions: Conditions,
        recorder: Recorder,
        begun: Begun | None,
        take: Take | None,
    ) -> Iterator[np.ndarray]:
        request, size = inputs.request, inputs.latent_size
        extent = _extent(request, conditions)
        self.cuts = _cuts(take, extent, inputs)
        first, state = (0, None) if take is None else (take.next_block, take.state)
        parts = self._made_by(
            run, request, size, conditions, None if state is None else (next(extent.blocks(first)), state)
        )
        if begun is not None:
            begun(parts.denoises().rollout, extent.count)
        degrade = parts.denoiser.degrade if parts.denoiser else None
        decoder = BlockDecoder(run, conditions.motion, degrade, state("decoder") if state else None)
        self._parts = parts = dataclasses.replace(parts, decoder=decoder)
        recorder.started(
            conditions.audio.num_frames - DROPPED_FIRST_FRAMES, next(extent.blocks(first)).first_video_frame
        )
        waiting: list[Denoised] = []
        with parts:
            for denoised in self._denoised(extent, size, parts, first):
                recorder.latent(denoised.block, denoised.latent_CFhw)
                waiting.append(denoised)
                if run.rung.online_decode or denoised.block.last_of_clip:
                    yield from self._decode(decoder, waiting, recorder)
                    waiting.clear()

    def _serve(self, request: Request) -> Iterator[Block]:
        height, width = self.team.share("latent_size", None)[self.team.layout.media_rank]
        size = height, width
        voice_on_host = bool(self.team.share("voice_on_host", None)[self.team.layout.media_rank])
        run = self._begin(request, size, voice_on_host=voice_on_host)
        conditions = self.team.share_conditions(None)
        with listening(conditions.audio):
            parts = self._made_by(run, request, size, conditions)
            for denoised in self._denoised(_extent(request, conditions), size, parts):
                yield denoised.block

    def _begin(self, request: Request, latent_size: LatentSize, *, voice_on_host: bool) -> Run:
        """A run whose everything has its place, before anything loads.

        Raises:
            OutOfMemoryError: it does not fit the budgets, and how much would.
        """
        work = Workload(
            latent_size=latent_size,
            infer_frames=request.infer_frames,
            sample_steps=request.sample_steps,
            voice_on_host=voice_on_host,
            dtype=self.runtime.dtype,
        )
        steps = self._steps(request)
        return self.runtime.begin(work, self.team, self._machines, steps=steps, online_decode=request.online_decode)

    def _steps(self, request: Request) -> range:
        stage = self.team.role.stage
        return range(0) if stage is None else self.team.layout.steps(stage, request.sample_steps)

    def _made_by(
        self,
        run: Run,
        request: Request,
        latent_size: LatentSize,
        conditions: Conditions,
        resumed: Resumed | None = None,
    ) -> Parts:
        """Without a decoder."""
        if not self.team.role.denoises:
            return Parts()
        if resumed is None:
            extent = _extent(request, conditions)
            chain = self.team.chain(extent.blocks(), latent_size, clips=extent.clips_begun)
        else:
            chain = Alone(resumed[1]("start")["reference"])
        denoiser = Denoiser(run, request, latent_size, conditions, self.team, self._steps(request), resumed=resumed)
        return Parts(denoiser=denoiser, chain=chain)

    def _denoised(self, extent: Extent, latent_size: LatentSize, parts: Parts, first: int = 0) -> Iterator[Denoised]:
        """Each block from number ``first`` on: denoised here, or by other ranks."""
        if parts.denoiser is None or parts.chain is None:
            return _waited(self.team.arriving(extent.blocks(), latent_size))
        return parts.denoiser.run(extent.blocks(first), parts.chain, cuts=self.cuts)

    def _decode(self, decoder: BlockDecoder, waiting: list[Denoised], recorder: Recorder) -> Iterator[np.ndarray]:
        for block, latent, seconds in waiting:
            begin = time.perf_counter()
            self.runtime.stages.block = block.index
            with self.team.doing(f"decoding block {block.index}", "decode"):
                frames, pixels = decoder.decode(block, latent)
            recorder.decoded(frames)
            record = BlockRecord(
                clip=block.clip,
                block=block.index,
                frames=len(pixels),
                denoise_s=seconds,
                decode_s=time.perf_counter() - begin,
            )
            recorder.finished(record)
            yield pixels

    @property
    def run(self) -> Run:
        """The latest run.

        Raises:
            RuntimeError: none has begun.
        """
        if self.runtime.latest is None:
            raise RuntimeError("nothing is laid out yet; expected a run that has begun")
        return self.runtime.latest

    def memory_report(self) -> dict[str, Any]:
        """How the latest run was laid out, and the bytes that crossed between host and device."""
        return memory_report(self.runtime, self.runtime.latest)


def _cuts(take: Take | None, extent: Extent, inputs: Inputs) -> frozenset[int]:
    if take is None:
        return frozenset()
    within_clips, needed = inputs.request.online_decode, inputs.voice_frames
    cuts = extent.cuts(take.segment_frames, within_clips=within_clips, needed=needed)
    return frozenset(block.index for block in cuts)


def _waited(latents: Iterator[tuple[Block, Tensor]]) -> Iterator[Denoised]:
    """Note how long each block was waited for."""
    begin = time.perf_counter()
    for block, latent in latents:
        yield Denoised(block, latent, time.perf_counter() - begin)
        begin = time.perf_counter()


def _extent(request: Request, conditions: Conditions) -> Extent:
    """What every rank has heard the length of with the conditions."""
    return Extent.of(conditions.audio.num_frames, request.infer_frames)


__all__ = ["AvatarPipeline", "Begun", "Inputs", "Request", "read_inputs", "to_pixels"]
