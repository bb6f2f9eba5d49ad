"""Command ``infer``: a run of one; or, where several ranks share the work, start them, or be one of them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowvram.commands.shared_options import (
    make_rank_options,
    make_request,
    memory_options,
    open_pipeline,
    place_of_video,
    prompt_file,
    refuse_seeds_of_their_own,
)
from lowvram.infer import infer
from lowvram.offload.placement import MemoryOptions
from lowvram.outputs import Outputs
from lowvram.parallel.launch import launch
from lowvram.parallel.layout_agreement import LayoutAgreement, RankOptions, check_for_ranks, check_gpus
from lowvram.parallel.rank import facts_to_agree_on, joined, share_weights
from lowvram.parallel.rank_env import RankEnv, rank_device
from lowvram.pipeline import AvatarPipeline
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.request import Request, read_inputs
from lowvram.selftest.first_run import get_ready
from lowvram_kernels.errors import ConfigError, LowvramError
from lowvram_quantize.format import Artifact

log = logging.getLogger("lowvram.plan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRun:
    """One run, as every rank is told it; ``model`` is the artifact's folder."""

    model: Path
    request: Request
    outputs: Outputs
    memory: MemoryOptions
    options: RankOptions
    device: str
    dtype: str
    verify: bool
    quiet: bool
    examine: bool = True
    """Whether a rank examines a card of which nothing is known."""

    def start(self, layout: ParallelLayout, arguments: Sequence[str]) -> None:
        """Start the ranks of ``layout`` here, each as ``lowvram`` with ``arguments``, and wait for them.

        Raises:
            LowvramError: what can be told beforehand is told once, before processes start; or a rank failed.
        """
        self._check_outputs()
        check_for_ranks(layout, self.memory)
        check_gpus(self.device, layout.world_size)
        height, width = read_inputs(self.request).latent_size
        heads = Artifact.open(self.model).component("dit").config["num_heads"]
        layout.check(sample_steps=self.request.sample_steps, heads=heads, tokens_per_frame=height // 2 * (width // 2))
        launch(layout.world_size, arguments, port=self.options.port or 0)

    def take_part(self, env: RankEnv, layout: ParallelLayout) -> bool:
        """Be one of the ranks, to the end of the run; whether it is the one that writes.

        Raises:
            LowvramError: this rank failed, or another one did.
        """
        check_for_ranks(layout, self.memory)
        self._examine_card(env)
        artifact = Artifact.open(self.model)
        agreement = LayoutAgreement(
            options=self.options, artifact=artifact, request=self.request, memory=self.memory, dtype=self.dtype
        )
        with joined(env, layout, self.device, agreement.settle) as (team, device, machines):
            if team.role.media:
                self._check_outputs()
            pipeline = AvatarPipeline.from_artifact(
                self.model,
                device=device,
                dtype=self.dtype,
                memory=self.memory,
                team=team,
                machines=machines,
                verify=self.verify,
            )
            team.agree(facts_to_agree_on(artifact, self.request, self.memory, team.layout, device, self.dtype))
            share_weights(team, pipeline.runtime)
            infer(pipeline, self.request, self.outputs, quiet=self.quiet)
        return team.role.media

    def _examine_card(self, env: RankEnv) -> None:
        """Before the ranks meet: from then on they watch how long each takes."""
        if not self.examine:
            return
        try:
            where = rank_device(self.device, env)
        except LowvramError:
            return  # raised again when the ranks have met, so that all of them hear it
        get_ready(torch.device(where))

    def _check_outputs(self) -> None:
        self.outputs.check({**self.request.files, "--model": self.model})


def infer_as_asked(options: dict[str, Any], arguments: Sequence[str]) -> list[Path]:
    """Make the video. Returns its path, or those of its segments, where this process wrote it; none where other ranks
    did.

    Args:
        options: all of ``infer``, by the names of their parameters.
        arguments: the command line that they came from, for ranks that are started with the same.

    Raises:
        LowvramError: an option that cannot be used, or a run that failed.
    """
    env, ranks = RankEnv.from_environ(os.environ), make_rank_options(options)
    refuse_seeds_of_their_own(options["base_seed"], 1 if env is None else env.world_size)
    request = make_request(options)
    outputs = _outputs(options, request)
    if env is None and (file := prompt_file(options["prompt"])) is not None:
        log.info("the prompt is what stands in %s", file)
    layout = ranks.layout(env, Artifact.open(options["model"]), request.sample_steps)
    if layout.world_size > 1:
        if outputs.segment_minutes is not None:
            raise ConfigError(
                f"--segment-minutes is of one GPU, and {layout.world_size} ranks share the work; leave one of them out"
            )
        several = _rank_run(options, request, outputs, ranks)
        return _as_ranks(several, env, layout, arguments)
    outputs.check({**request.files, "--model": options["model"]})
    report = infer(open_pipeline(options), request, outputs, quiet=options["quiet"])
    if outputs.segment_minutes is None:
        return [outputs.video]
    return [Path(path) for path in report["segments"]]


def _outputs(options: dict[str, Any], request: Request) -> Outputs:
    outputs = Outputs(
        video=place_of_video(options["out"], options["save_dir"], request),
        make_folder=options["save_dir"] is not None,
        **{name: options[name] for name in _OUTPUTS},
    )
    if (file := prompt_file(options["prompt"])) is not None:
        outputs.check({"--prompt": file})
    return outputs


_OUTPUTS = ("dump_tensors", "report", "memory_log", "overwrite", "segment_minutes", "resume")


def _rank_run(options: dict[str, Any], request: Request, outputs: Outputs, ranks: RankOptions) -> RankRun:
    return RankRun(
        request=request,
        outputs=outputs,
        memory=memory_options(options),
        options=ranks,
        examine=not options["no_selftest"],
        **{name: options[name] for name in ("model", "device", "dtype", "verify", "quiet")},
    )


def _as_ranks(several: RankRun, env: RankEnv | None, layout: ParallelLayout, arguments: Sequence[str]) -> list[Path]:
    if env is None:
        seed = ["--base_seed", str(several.request.base_seed)]  # one for all, also where it was drawn
        several.start(layout, [*arguments, *seed])
        return []
    if env.by_hand:
        log.info("this is rank %d of %d, and waits for the others%s", env.rank, env.world_size, env.hint)
    _log_as(f"rank {env.rank}: ")
    return [several.outputs.video] if several.take_part(env, layout) else []


def _log_as(prefix: str) -> None:
    """Begin every line of the log with who says it."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
