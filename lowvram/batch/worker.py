"""A worker of a batch on some node: it opens the model once, keeps it, and makes one job after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowvram.batch.jobs import Job
from lowvram.batch.results import FILES
from lowvram.batch.run import Maker, made_already, words_of
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import InputError, LowvramError
from lowvram_quantize.claims import writing
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.slabs import sha256_file

Answer = tuple[str, str, dict[str, Any]]
"""The kind of an ``Event``, its words and its report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orders:
    """What every worker is told: how to open a pipeline, how jobs are made, where the model and results are, which all
    nodes see; and whether all that is logged is of interest."""

    open_pipeline: Callable[[], AvatarPipeline]
    maker: Maker
    model: Path
    folder: Path
    verbose: bool = False


class Worker:
    """One card's, or one processor's. ``threads``: of the processor, that it may take; None as they are."""

    def __init__(self, orders: Orders, node: str, threads: int | None = None) -> None:
        self._orders, self._node, self._threads = orders, node, threads
        self._pipeline: AvatarPipeline | None = None

    def open(self) -> Answer:
        """Whether it is ready; what is wrong with this node where it is not."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        _log_as(self._node, verbose=self._orders.verbose)
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            self._check()
            self._pipeline = self._orders.open_pipeline()
        except LowvramError as error:
            return "unfit", words_of(error), {}
        return "ready", "", {}

    def _check(self) -> None:
        manifest, folder = self._orders.model / MANIFEST, self._orders.folder
        advice = "all nodes need the same storage under the same path"
        if not manifest.is_file():
            raise InputError(f"the model {self._orders.model} is not there; {advice}")
        if sha256_file(manifest) != self._orders.maker.beside["artifact_sha256"]:
            raise InputError(f"the model {self._orders.model} is another there; {advice}")
        if not (folder / FILES[0]).is_file():
            raise InputError(f"the folder {folder} with the batch's {FILES[0]} is not there; {advice}")

    def make(self, job: Job, *, again: bool) -> Answer:
        """What became of it; ``again``: what another worker began and left there may go."""
        assert self._pipeline is not None
        assert job.request is not None
        assert job.video is not None
        lacking = [str(path) for path in job.request.files.values() if not path.is_file()]
        if lacking:
            return "lacks", ", ".join(lacking), {}
        maker = self._orders.maker
        try:
            if again:
                maker = dataclasses.replace(maker, cut=maker.cut | {str(job.video.absolute())})
                if (report := made_already(job, maker)) is not None:
                    return "made", "", report
                _clear(job.video)
            return "made", "", maker.make(self._pipeline, job)
        except torch.AcceleratorError as error:
            logging.getLogger("lowvram").error("the GPU failed: %s", error)
            os._exit(1)  # nothing of this process can use it again; another one may
        except Exception as error:
            return "failed", words_of(error), {}


def _clear(video: Path) -> None:
    """The unfinished video of a worker that died goes; of one that lives the claim is in the way.

    Raises:
        InputError: somebody writes it still.
    """
    with writing(video, "lowvram batch"), contextlib.suppress(FileNotFoundError):
        Outputs(video=video).partial.unlink()


def _log_as(node: str, *, verbose: bool) -> None:
    """What is logged says where; Ray brings it to where the batch was started."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{node}: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("lowvram", "lowvram_quantize", "lowvram_kernels", "lowvram_models"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("lowvram.plan").setLevel(logging.INFO)
