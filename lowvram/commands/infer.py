"""Command ``infer``: a run of one, ranks to be started, or the part of one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram.commands.infer_ranks import RankRun
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
from lowvram.outputs import Outputs
from lowvram.parallel.options import RankOptions
from lowvram.parallel.rank_env import RankEnv
from lowvram.planning.rank_layout import ParallelLayout
from lowvram.request import Request
from lowvram_quantize.format import Artifact

log = logging.getLogger("lowvram.plan")


def infer_as_asked(options: dict[str, Any], arguments: Sequence[str]) -> Path | None:
    """Make the video. Returns its path where this process wrote it; other ranks did where it is None.

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
        several = _rank_run(options, request, outputs, ranks)
        return _as_ranks(several, env, layout, arguments)
    outputs.check({"--image": request.image, "--audio": request.audio, "--model": options["model"]})
    infer(open_pipeline(options), request, outputs, quiet=options["quiet"])
    return outputs.video


def _outputs(options: dict[str, Any], request: Request) -> Outputs:
    outputs = Outputs(
        video=place_of_video(options["out"], options["save_dir"], request),
        make_folder=options["save_dir"] is not None,
        **{name: options[name] for name in ("dump_tensors", "report", "overwrite")},
    )
    if (file := prompt_file(options["prompt"])) is not None:
        outputs.check({"--prompt": file})
    return outputs


def _rank_run(options: dict[str, Any], request: Request, outputs: Outputs, ranks: RankOptions) -> RankRun:
    return RankRun(
        request=request,
        outputs=outputs,
        memory=memory_options(options),
        options=ranks,
        examine=not options["no_selftest"],
        **{name: options[name] for name in ("model", "device", "dtype", "verify", "quiet")},
    )


def _as_ranks(several: RankRun, env: RankEnv | None, layout: ParallelLayout, arguments: Sequence[str]) -> Path | None:
    if env is None:
        seed = ["--base_seed", str(several.request.base_seed)]  # one for all, also where it was drawn
        several.start(layout, [*arguments, *seed])
        return None
    if env.by_hand:
        log.info("this is rank %d of %d, and waits for the others%s", env.rank, env.world_size, env.hint)
    _log_as(f"rank {env.rank}: ")
    return several.outputs.video if several.take_part(env, layout) else None


def _log_as(prefix: str) -> None:
    """Begin every line of the log with who says it."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
