"""One run of ``lowvram infer``: stream frames into a file, show progress, leave a report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from lowvram.devices import is_out_of_memory
from lowvram.media.video import VideoWriter
from lowvram.memory_log.writer import MemoryLog, path_of_rank
from lowvram.offload.oom import smaller_request
from lowvram.outputs import Outputs, check_apart, check_file
from lowvram.pipeline import AvatarPipeline, Begun, Request, read_inputs
from lowvram.progress import RunProgress
from lowvram.recorder import Recorder, TensorRecorder
from lowvram.segments.files import SegmentFiles, finished_segments, segments_there
from lowvram_kernels import choices
from lowvram_kernels.errors import ConfigError, OutOfMemoryError, OutputError
from lowvram_models.constants import FPS
from lowvram_quantize.claims import reading
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.places import real
from lowvram_quantize.slabs import sha256_file

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """Who looks on while a video is made: ``begun`` as of ``AvatarPipeline.stream``; ``recorder`` makes the one that
    keeps tensors, in the folder ``kept``, instead of the one that makes a dump. ``written`` is shown the recorder
    behind every block that stands in the file; what it raises ends the run, and what was written stays.

    Raises:
        ConfigError: one of ``recorder`` and ``kept`` without the other.
    """

    begun: Begun | None = None
    recorder: Callable[[], Recorder] | None = None
    kept: Path | None = None
    written: Callable[[Recorder], object] | None = None

    def __post_init__(self) -> None:
        if (self.recorder is None) != (self.kept is None):
            here, missing = ("recorder", "kept") if self.kept is None else ("kept", "recorder")
            raise ConfigError(f"Watching has {here} and no {missing}; expected both, or neither")


def infer(
    pipeline: AvatarPipeline,
    request: Request,
    outputs: Outputs,
    *,
    quiet: bool = False,
    watching: Watching | None = None,
    noted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the video and return the run's report, which is also written where ``outputs`` says; ``noted`` stands in it
    too.

    Of several ranks the media rank does so; the others do their part of the work and return their part of the report.

    Where memory runs out, nothing more can be moved, and the pipeline's options allow a loss of quality, the video is
    begun again with less to compute.

    Raises:
        ConfigError: ``outputs.dump_tensors`` and ``watching.recorder``, which takes the place of the one that dumps.
        LowvramError: bad input before anything is written; a failed write leaves what was made under a partial name.
    """
    watching = watching or Watching()
    if watching.recorder and outputs.dump_tensors:
        raise ConfigError(
            f"outputs.dump_tensors is {outputs.dump_tensors}, and watching.recorder keeps tensors in {watching.kept}; "
            "expected one of them"
        )
    artifact = pipeline.runtime.artifact
    pipeline.runtime.count_anew()
    if not pipeline.team.role.media:
        with _kept(artifact), _memory_log(pipeline, outputs):
            return _serve(pipeline, request, outputs)
    outputs.check({**request.files, "--model": artifact.path})
    if outputs.segment_minutes is not None and pipeline.runtime.memory.allow_quality_loss:
        raise ConfigError(
            "--allow-quality-loss may begin a video again, and --segment-minutes goes on with it; leave one out"
        )
    with outputs.claimed(), _kept(artifact), _memory_log(pipeline, outputs):
        return _infer(pipeline, request, outputs, quiet, watching, noted or {})


@contextlib.contextmanager
def _kept(artifact: Artifact) -> Iterator[None]:
    """Keep the artifact from being replaced while the run reads it, and make sure that it was not meanwhile."""
    with reading(artifact.path / MANIFEST):
        artifact.check_unchanged()
        yield


def _memory_log(pipeline: AvatarPipeline, outputs: Outputs) -> contextlib.AbstractContextManager[object]:
    """Every rank's own, where one was asked for; ranks beside the one that writes the video number theirs.

    Raises:
        InputError, OutputError: another rank's log is there already, or cannot be written.
    """
    path, runtime = _log_of(pipeline, outputs), pipeline.runtime
    if path is None:
        return contextlib.nullcontext()
    if not pipeline.team.role.media:  # of the other one ``Outputs.check`` has looked
        check_file("--memory-log of this rank", path, overwrite=outputs.overwrite)
    return MemoryLog(path, runtime.stages, runtime.engine, rank=pipeline.team.role.rank)


def _log_of(pipeline: AvatarPipeline, outputs: Outputs) -> Path | None:
    role = pipeline.team.role
    if outputs.memory_log is None:
        return None
    path = real(outputs.memory_log).absolute()
    return path if role.media else path_of_rank(path, role.rank)


def _infer(
    pipeline: AvatarPipeline,
    request: Request,
    outputs: Outputs,
    quiet: bool,
    watching: Watching,
    noted: Mapping[str, Any],
) -> dict[str, Any]:
    begin = time.perf_counter()
    lost: list[str] = []
    while True:
        try:
            recorder, written = _make(pipeline, request, outputs, quiet, watching)
            break
        except (OutOfMemoryError, RuntimeError) as error:
            if not (isinstance(error, OutOfMemoryError) or is_out_of_memory(error)):
                raise
            rung = smaller_request(request.size, request.infer_frames, request.sample_steps)
            if rung is None or not pipeline.runtime.memory.allow_quality_loss:
                raise
            changes, words = rung
            log.warning("%s: the video is begun again with %s", error, words)
        lost.append(words)
        request = dataclasses.replace(request, **changes)
    if isinstance(recorder, TensorRecorder) and outputs.dump_tensors:
        recorder.save(real(outputs.dump_tensors), {"base_seed": request.base_seed, "size": request.size})
    report = make_report(pipeline, request, outputs, recorder, time.perf_counter() - begin)
    report |= written | {"quality_lost": lost} | dict(noted)
    if watching.kept:
        report["dump_tensors"] = str(watching.kept.absolute())
    if pipeline.team.layout.world_size > 1:
        layout = dataclasses.asdict(pipeline.team.layout)
        mine = rank_report(pipeline, _log_of(pipeline, outputs))
        report |= {"layout": layout, "ranks": pipeline.team.share("reports", mine)}
    if outputs.report:
        write_json(real(outputs.report), report)
    return report


def _serve(pipeline: AvatarPipeline, request: Request, outputs: Outputs) -> dict[str, Any]:
    for _ in pipeline.serve(request):
        pass
    report = rank_report(pipeline, _log_of(pipeline, outputs))
    pipeline.team.share("reports", report)
    return report


def _make(
    pipeline: AvatarPipeline, request: Request, outputs: Outputs, quiet: bool, watching: Watching
) -> tuple[Recorder, dict[str, Any]]:
    """One attempt: what the report says of files read and written, and what was recorded on the way. The stream is
    closed at once where this fails: what it holds goes before the next video comes."""
    inputs = read_inputs(request)
    recorder = (watching.recorder or (TensorRecorder if outputs.dump_tensors else Recorder))()
    height, width = inputs.portrait.shape[1:]
    video, sound, segments, take = real(outputs.video), inputs.sound or request.audio, None, None
    if outputs.segment_minutes is not None:
        of_all = take_of(pipeline, request)
        check_apart({f"the segment {path.name}": path for path in segments_there(video)}, request.files)
        if outputs.resume and (there := finished_segments(video, of_all)):
            log.warning("the take is finished: nothing is left to be made of it")
            return recorder, inputs.facts | {"segments": [str(path) for path in there]}
        segments = SegmentFiles(
            video, of_all, height=height, width=width, sound=sound, resume=outputs.resume, overwrite=outputs.overwrite
        )
        take = segments.take(outputs.segment_minutes)
    with (
        segments or VideoWriter(video, height, width, FPS, audio_path=sound) as writer,
        RunProgress(pipeline.runtime.device, enabled=not quiet) as progress,
        contextlib.closing(pipeline.stream(inputs, recorder=recorder, begun=watching.begun, take=take)) as stream,
    ):
        for frames in stream:
            with pipeline.runtime.stages.stage("write_video"):
                writer.write(frames)
                if segments is not None and (coming := recorder.blocks[-1].block + 1) in pipeline.cuts:
                    segments.cut(coming, pipeline.state())
            progress.update(recorder)
            if watching.written is not None:
                watching.written(recorder)
    written: dict[str, Any] = {"frames_written": writer.frames_written, "fragmented": writer.fragmented}
    if segments is not None and take is not None:
        written |= {"segments": [str(path) for path in segments.paths], "resumed_at_block": take.next_block or None}
    return recorder, inputs.facts | written


def take_of(pipeline: AvatarPipeline, request: Request) -> str:
    """What a take is called: a checksum of all that its frames and its sound come from."""
    runtime = pipeline.runtime
    settings = dataclasses.asdict(request) | dict.fromkeys(("image", "audio", "masks", "pose_video"))
    files = [sha256_file(path) for path in (runtime.artifact.path / MANIFEST, *request.files.values())]
    said = json.dumps([settings, files, str(runtime.dtype), runtime.memory.kv], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def make_report(
    pipeline: AvatarPipeline, request: Request, outputs: Outputs, recorder: Recorder, seconds: float
) -> dict[str, Any]:
    frames = sum(block.frames for block in recorder.blocks)
    working = sum(block.denoise_s + block.decode_s for block in recorder.blocks)
    settings = dataclasses.asdict(request) | {
        "image": str(request.image),
        "audio": str(request.audio),
        "masks": [str(path) for path in request.masks],
        "pose_video": None if request.pose_video is None else str(request.pose_video),
    }
    return {
        "lowvram": version("lowvram"),
        "artifact": str(pipeline.runtime.artifact.path),
        "artifact_sha256": sha256_file(pipeline.runtime.artifact.path / MANIFEST),
        "precision": pipeline.runtime.artifact.precisions(),
        "settings": settings,
        "device": str(pipeline.runtime.device),
        "dtype": str(pipeline.runtime.dtype).removeprefix("torch."),
        "memory": pipeline.memory_report(),
        "machine": machine(pipeline.runtime.device),
        "video": str(outputs.video.absolute()),
        "dump_tensors": str(outputs.dump_tensors.absolute()) if outputs.dump_tensors else None,
        "memory_log": str(outputs.memory_log.absolute()) if outputs.memory_log else None,
        "seconds": seconds,
        "frames": frames,
        "frames_per_second": frames / working if working else None,
        "stages": pipeline.runtime.stages.to_json(),
        "blocks": [dataclasses.asdict(block) for block in recorder.blocks],
        "kernels": kernels_of(pipeline),
        "kernel_choices": [dataclasses.asdict(note) for note in choices.noted()],
    }


def rank_report(pipeline: AvatarPipeline, memory_log: Path | None = None) -> dict[str, Any]:
    """What one rank of several has to say of its part."""
    return {
        "rank": pipeline.team.role.rank,
        "role": pipeline.team.role.name,
        "memory_log": str(memory_log) if memory_log else None,
        "device": str(pipeline.runtime.device),
        "machine": machine(pipeline.runtime.device),
        "memory": pipeline.memory_report(),
        "stages": pipeline.runtime.stages.to_json(),
        "kernels": kernels_of(pipeline),
        "kernel_choices": [dataclasses.asdict(note) for note in choices.noted()],
        "sent_bytes": pipeline.team.sent_bytes(),
    }


def kernels_of(pipeline: AvatarPipeline) -> list[dict[str, Any]]:
    return [
        {"operation": operation, "kernel": kernel, "calls": calls}
        for (operation, kernel), calls in sorted(pipeline.runtime.kernels.items())
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: processor or GPU, memory and versions."""
    facts = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "cpu_threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["vram_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Raises: OutputError; nothing half-written stays under the name."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.absolute().parent).free
        raise OutputError(f"{path} could not be written: {error} ({free} bytes free); choose another place") from error
