"""Rank, its life: it joins the others, agrees with them, and ends with them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch

from lowvram.offload.layers import layer_slab
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.rank_env import RankEnv, rank_device
from lowvram.parallel.rank_team import EndedFromOutside, RankTeam
from lowvram.planning.members import Machines
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.request import Request
from lowvram.runtime import Runtime
from lowvram_quantize.format import Artifact, of_weights


@contextlib.contextmanager
def joined(
    env: RankEnv,
    layout: ParallelLayout,
    device: str,
    settle: Callable[[RankTeam, torch.device], Machines | None] | None = None,
) -> Iterator[tuple[RankTeam, str, Machines | None]]:
    """Be one of the ranks: gives the team, the rank's device, and what ``settle`` found that all ranks run on; it may
    give the team another layout.

    Of a failure all ranks are told, and where another rank is at fault, that is what is raised.

    Raises:
        DistributedError: another rank failed, died or hung; or the ranks did not meet.
    """
    with _ended_in_order():
        team = RankTeam(env, layout)
        try:
            where = rank_device(device, env)
            machines = settle(team, torch.device(where)) if settle is not None else None
            team.connect(torch.device(where))
            yield team, where, machines
            team.leave()
        except BaseException as error:
            if (found := team.explain(error)) is not None:
                raise found from error
            raise


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM be an exception, so that what was written so far is closed in order."""

    def terminated(number: int, frame: FrameType | None) -> None:
        raise EndedFromOutside("the run was ended from outside (SIGTERM); what was written so far is kept")

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def facts_to_agree_on(
    artifact: Artifact, request: Request, memory: MemoryOptions, layout: ParallelLayout, device: str, dtype: str
) -> dict[str, Any]:
    """What has to be the same on all ranks. Budgets may differ, as cards do; one rank reads portrait and voice."""
    manifest = json.dumps(of_weights(artifact.manifest), sort_keys=True).encode()
    settings = dataclasses.asdict(request)
    for name in ("image", "audio"):
        del settings[name]
    for name in ("kv", "wave", "offload_model", "offload_kv_cache", "cuda_graphs", "t5_cpu", "fallback"):
        settings[name] = getattr(memory, name)
    facts = {
        "lowvram": version("lowvram"),
        "artifact": hashlib.sha256(manifest).hexdigest()[:16],
        "layout": dataclasses.asdict(layout),
        "device": device.partition(":")[0],
        "dtype": dtype,
    }
    return facts | settings


def share_weights(team: RankTeam, runtime: Runtime) -> None:
    """On GPUs. On the CPU layers are copied out of the mapped file, which is one for all ranks anyway."""
    if runtime.device.type == "cuda":
        component = runtime.artifact.component("dit")
        layers = range(runtime.dit_config["num_layers"])
        team.keep_weights_once([component.slab_nbytes(layer_slab(index)) for index in layers])
