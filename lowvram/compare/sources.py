"""What a comparison reads: dumped tensors, videos and run reports, opened one way and read piece by piece."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowvram.compare.block_files import BlockFiles
from lowvram.compare.metrics import Frame, pixels_of
from lowvram.media.video import probe, read_frames
from lowvram_kernels.errors import InputError
from lowvram_quantize.format import MANIFEST

Tensor = torch.Tensor

DUMP_FPS = 25.0
REFERENCE = "reference.json"
"""What lists the files of a reference, in its folder; see ``lowvram.compare.reference``."""
FRAMES = "frames"
LATENTS = "latents"
_RUN = ("artifact", "artifact_sha256", "lowvram", "device", "dtype", "seconds", "frames", "frames_per_second")
_KINDS = (".safetensors", ".mp4", ".json")
_BLOCK = re.compile(r"latents\.block(\d+)")
# Elements read at once: 64 MiB in float32.
_PIECE = 2**24


class Dump:
    """Tensors that a run left, read from the file as they are needed.

    Raises:
        InputError: no file, or not a whole safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        _check_file(path, "dump")
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"dump {path} is no whole safetensors file ({error}): write it again") from error
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        self.settings: dict[str, Any] = dict(self._file.metadata() or {})

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces along its longest dimension; equal shapes give equal pieces."""
        shape = self.shapes[name]
        count = math.ceil(math.prod(shape) / _PIECE)
        if count <= 1:
            yield self._file.get_tensor(name)
            return
        dim = shape.index(max(shape))
        step = math.ceil(shape[dim] / count)
        for start in range(0, shape[dim], step):
            index = (slice(None),) * dim + (slice(start, start + step),)
            yield self._file.get_slice(name)[index]

    def block_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each block's latent, in order: rows of ``latents``, or every ``latents.block{i}``."""
        if LATENTS in self.shapes:
            count, *shape = self.shapes[LATENTS] or (0,)
            if len(shape) != 4:
                raise InputError(
                    f"dump {self.path} has latents of shape {list(self.shapes[LATENTS])}; expected "
                    "[blocks, 16, latent frames, height, width]"
                )
            return [tuple(shape)] * count
        return [self.shapes[name] for name in self._block_names()]

    def block(self, index: int) -> Tensor:
        """The latent [16, k, h, w] of one block."""
        if LATENTS in self.shapes:
            rows: Tensor = self._file.get_slice(LATENTS)[index : index + 1]
            return rows[0]
        latent: Tensor = self._file.get_tensor(self._block_names()[index])
        return latent

    def other_names(self) -> list[str]:
        """Names of all tensors that are no latents of blocks."""
        return sorted(name for name in self.shapes if name != LATENTS and not _BLOCK.fullmatch(name))

    def frames(self) -> Frames | None:
        """The video's frames, where the dump has them."""
        if FRAMES not in self.shapes:
            return None
        shape = self.shapes[FRAMES]
        if len(shape) != 4 or shape[0] != 3:
            raise InputError(f"dump {self.path} has frames of shape {list(shape)}; expected [3, frames, height, width]")
        return Frames(source=self, count=shape[1], height=shape[2], width=shape[3], fps=DUMP_FPS)

    def read(self) -> Generator[Frame, None, None]:
        """Each frame as its pixels are written to a video: [-1, 1] to uint8 [H, W, 3]."""
        for index in range(self.shapes[FRAMES][1]):
            frame = self._file.get_slice(FRAMES)[:, index : index + 1]
            if not frame.isfinite().all():
                raise InputError(f"dump {self.path} has NaN or infinity in frame {index}: nothing can be compared")
            yield pixels_of(frame)[0]

    def _block_names(self) -> list[str]:
        numbered = sorted((int(found[1]), name) for name in self.shapes if (found := _BLOCK.fullmatch(name)))
        if [number for number, _ in numbered] != list(range(len(numbered))):
            raise InputError(
                f"dump {self.path} has latents of blocks {[number for number, _ in numbered]}; expected all from 0 on"
            )
        return [name for _, name in numbered]


class BlockDump(BlockFiles):
    """What a run left block by block, as a reference does."""

    @property
    def files(self) -> list[Path]:
        listed = self.path.with_name(REFERENCE)
        return [listed] if listed.is_file() else []

    def frames(self) -> Frames:
        count, height, width = self.frame_shape()
        return Frames(source=self, count=count, height=height, width=width, fps=DUMP_FPS)


class Video:
    """A video file, decoded as it is read.

    Raises:
        InputError: no file, or not a video.
    """

    def __init__(self, path: Path):
        self.path = path
        _check_file(path, "video")
        self._facts = probe(path)

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def frames(self) -> Frames:
        facts = self._facts
        fps = float(facts["fps"]) or DUMP_FPS
        return Frames(source=self, count=facts["frames"], height=facts["height"], width=facts["width"], fps=fps)

    def read(self) -> Generator[Frame, None, None]:
        yield from read_frames(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames that can be read in order from ``source``; sizes in px."""

    source: Dump | BlockDump | Video
    count: int
    height: int
    width: int
    fps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds and peak bytes of one stage of a run; None where the report does not say."""

    name: str
    seconds: float | None
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One side of a comparison: what was named, and what it leads to; ``run`` says which artifact ran where."""

    path: Path
    dump: Dump | BlockDump | None = None
    video: Video | None = None
    settings: dict[str, Any]
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @property
    def files(self) -> list[Path]:
        """All that is read of it; of blocks' files in their stead what lists them with their checksums, if anything."""
        parts = [path for part in (self.dump, self.video) if part for path in part.files]
        return list(dict.fromkeys([self.path, *parts]))

    def describe(self) -> str:
        """What it is and what can be compared in it, for a message."""
        if self.path.suffix.lower() == ".json":
            kind = "a report"
        elif self.video:
            return "a video"
        else:
            kind = "a dump"
        parts = [f"of {', '.join(self.dump.shapes)}"] if self.dump else []
        return " ".join([kind, *parts, *(["with a video"] if self.video else [])])


def open_source(path: Path) -> Source:
    """Open a dump (.safetensors), a video (.mp4) or a run's report (.json) with the files it names.

    Raises:
        InputError: another kind of file, a folder, no file, or a damaged one.
    """
    suffix = path.suffix.lower()
    if suffix not in _KINDS or path.is_dir():
        raise InputError(_another(path))
    if suffix == ".safetensors":
        dump = Dump(path)
        return Source(path=path, dump=dump, settings=dump.settings)
    if suffix == ".mp4":
        return Source(path=path, video=Video(path), settings={})
    return _open_report(path)


def _another(path: Path) -> str:
    """What is wrong with a path that no kind of file is to be seen by."""
    expected = "expected .safetensors (a dump), .mp4 or .json (a run's report)"
    if (path / MANIFEST).is_file():
        return f"{path} is an artifact, and runs are compared; name both with --model and --baseline to run them"
    if (path / REFERENCE).is_file():
        return f"{path} is a reference; score an artifact against it: --model and --reference"
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _KINDS)
        held = f", with {', '.join(files[:4])} in it" if files else ""
        return f"{path} is a folder{held}: {expected}; name the file"
    if not path.exists():
        return f"{path} is not there; check the path: {expected}"
    return f"{path} cannot be compared: {expected}"


def _open_report(path: Path) -> Source:
    _check_file(path, "report")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"report {path} cannot be read as JSON ({error}): write it again") from error
    if not isinstance(report, dict) or not any(report.get(key) for key in ("dump_tensors", "video", "stages")):
        raise InputError(f"{path} is no run report: expected what --report writes: dump_tensors, video, stages")
    try:
        stages = tuple(_stage(entry) for entry in report.get("stages") or [])
        settings, run = dict(report.get("settings") or {}), _run_facts(report)
        dump, video = (path.parent / report[key] if report.get(key) else None for key in ("dump_tensors", "video"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"report {path} is damaged ({error!r}): run again with --report") from error
    return Source(
        path=path,
        dump=None if dump is None else BlockDump(dump, settings) if dump.is_dir() else Dump(dump),
        video=Video(video) if video else None,
        settings=settings,
        run=run,
        stages=stages,
    )


def _run_facts(report: dict[str, Any]) -> dict[str, Any]:
    """What made the run, in one line each."""
    facts = {name: report[name] for name in _RUN if report.get(name) is not None}
    for name, inner in (("precision", report.get("precision")), ("machine", report.get("machine"))):
        if inner:
            facts[name] = ", ".join(f"{key} {value}" for key, value in dict(inner).items())
    if memory := dict(report.get("memory") or {}):
        facts["kv"] = _rings(memory, report.get("dtype"))
    return facts


def _rings(memory: dict[str, Any], dtype: Any) -> Any:
    """What the KV rings were kept as: as the run was laid out, or what was asked for where it says nothing of that."""
    if layout := memory.get("layout"):
        kv = layout["placement"]["kv"]
        if kv == "plain" and dtype:
            return dtype
        version = memory.get("kv_format")
        return f"{kv}, format {version}" if version else kv
    return dict(memory.get("options") or {}).get("kv")


def _stage(entry: dict[str, Any]) -> Stage:
    seconds, peak = entry.get("seconds"), entry.get("peak_bytes")
    return Stage(
        name=str(entry["name"]),
        seconds=None if seconds is None else float(seconds),
        peak_bytes=None if peak is None else int(peak),
    )


def _check_file(path: Path, kind: str) -> None:
    if not path.is_file():
        raise InputError(f"{kind} {path} is not there; check the path, or make it again")
