"""Command ``infer`` where several ranks share the work: start them, or be one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from lowvram.infer import infer
from lowvram.offload.placement import MemoryOptions
from lowvram.outputs import Outputs
from lowvram.parallel.launch import launch
from lowvram.parallel.layout_agreement import LayoutAgreement
from lowvram.parallel.options import RankOptions, check_for_ranks, check_gpus
from lowvram.parallel.rank import facts_to_agree_on, joined, share_weights
from lowvram.parallel.rank_env import RankEnv, rank_device
from lowvram.pipeline import AvatarPipeline
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.request import Request, read_inputs
from lowvram.selftest.first_run import get_ready
from lowvram_kernels.errors import LowvramError
from lowvram_quantize.format import Artifact


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
        self.outputs.check({"--image": self.request.image, "--audio": self.request.audio, "--model": self.model})
