"""A run kept in a folder block by block, so that its length costs no memory: latents, frames and, of a baseline, every
step.

Shapes: S steps, C latent channels, F latent frames or frames, h x w latent size, H x W pixels.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lowvram.compare.metrics import Frame, pixels_of
from lowvram.compare.trajectories import Trajectory, Watcher
from lowvram.recorder import Recorder
from lowvram.schedule import Block
from lowvram_kernels.errors import InputError, OutputError

Tensor = torch.Tensor

CONDITIONS = "conditions.safetensors"
LATENTS, FRAMES, STEPS = "latents", "frames", "steps"
"""What the names of files begin with; each goes on with the number of its block."""


def block_file(folder: Path, kind: str, block: int) -> Path:
    return folder / f"{kind}-{block:05d}.safetensors"


class BlockRecorder(Recorder):
    """Writes what a run makes into ``folder``, which is there, as soon as it is made: the portrait's and the prompt's
    conditions, each block's latent [C, F, h, w] in float32 and its frames [F, H, W, 3] as bytes.

    Raises, while the run goes on:
        InputError: frames hold NaN or infinity.
        OutputError: a full disk.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self._decoded = folder, 0
        self._conditions: dict[str, Tensor] = {}

    def started(self, total_frames: int, earlier_frames: int = 0) -> None:
        super().started(total_frames, earlier_frames)
        _save(self._folder / CONDITIONS, self._conditions)

    def tensor(self, name: str, value: Tensor) -> None:
        self._conditions[name] = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()

    def latent(self, block: Block, latent_CFhw: Tensor) -> None:
        _save(block_file(self._folder, LATENTS, block.index), {LATENTS: latent_CFhw.detach().float().cpu()})

    def decoded(self, frames_CFHW: Tensor) -> None:
        if not frames_CFHW.isfinite().all():
            raise InputError(f"frames of block {self._decoded} hold NaN or infinity: nothing can be compared with them")
        _save(block_file(self._folder, FRAMES, self._decoded), {FRAMES: torch.from_numpy(pixels_of(frames_CFHW))})
        self._decoded += 1


class BlockFiles:
    """What ``BlockRecorder`` left in a folder, read as it is needed; ``settings`` of the run, as far as they are known.

    Raises:
        InputError: a file is missing, or no whole one.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None):
        self.path, self.settings = path, settings or {}
        self._blocks = _count(path, LATENTS)
        if not self._blocks:
            raise InputError(f"{path} holds no block of a run; make it again")
        self.shapes: dict[str, tuple[int, ...]] = _read(path / CONDITIONS, _shapes)

    @property
    def blocks(self) -> int:
        return self._blocks

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A condition; in one piece, as it is small."""
        yield _read(self.path / CONDITIONS, lambda file: file.get_tensor(name))

    def block_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each block's latent, in order."""
        return [_shape(block_file(self.path, LATENTS, index), LATENTS) for index in range(self._blocks)]

    def block(self, index: int) -> Tensor:
        """The latent [C, F, h, w] of one block."""
        return _tensor(block_file(self.path, LATENTS, index), LATENTS)

    def other_names(self) -> list[str]:
        return sorted(self.shapes)

    def frame_shape(self) -> tuple[int, ...]:
        """How many frames all blocks have; their height and width."""
        shapes = [_shape(block_file(self.path, FRAMES, index), FRAMES) for index in range(_count(self.path, FRAMES))]
        if not shapes:
            raise InputError(f"{self.path} holds no frames; make it again")
        return sum(shape[0] for shape in shapes), *shapes[0][1:3]

    def read(self) -> Generator[Frame, None, None]:
        """Each frame uint8 [H, W, 3]."""
        for index in range(_count(self.path, FRAMES)):
            yield from _tensor(block_file(self.path, FRAMES, index), FRAMES).numpy()


class TrajectoryFiles:
    """What a baseline does, kept in ``folder`` while it is done: ``watcher`` of the first ``limit`` blocks."""

    def __init__(self, folder: Path, *, limit: int | None = None):
        self._folder = folder
        self.blocks = self.total = self.steps = 0
        self.watcher = Watcher(self._keep, limit=limit, at_start=self._begin)

    def _begin(self, total: int, steps: int) -> None:
        self.blocks, self.total, self.steps = 0, total, steps

    def _keep(self, block: int, trajectory: Trajectory) -> None:
        save_trajectory(self._folder, block, trajectory)
        self.blocks = block + 1

    def trajectory(self, block: int) -> Trajectory:
        """Of one block."""
        return read_trajectory(self._folder, block)


def save_trajectory(folder: Path, block: int, trajectory: Trajectory) -> None:
    """Raises: OutputError."""
    tensors = {name: getattr(trajectory, name) for name in ("before", "velocities", "end", "layers")}
    _save(block_file(folder, STEPS, block), {name: tensor for name, tensor in tensors.items() if tensor is not None})


def read_trajectory(folder: Path, block: int) -> Trajectory:
    """Raises: InputError where the file is missing or damaged."""
    path = block_file(folder, STEPS, block)
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    before, velocities, end = (found.get(name) for name in ("before", "velocities", "end"))
    if before is None or velocities is None or end is None:
        raise InputError(f"{path} has {', '.join(found)}; expected before, velocities and end: record it again")
    if not before.shape == velocities.shape == (len(before), *end.shape):
        raise InputError(f"{path} has latents of different shapes: record it again")
    return Trajectory(before=before, velocities=velocities, end=end, layers=found.get("layers"))


def _count(folder: Path, kind: str) -> int:
    """How many blocks have such a file.

    Raises:
        InputError: one is missing between others.
    """
    count = len(list(folder.glob(f"{kind}-*.safetensors")))
    for index in range(count):
        if not (path := block_file(folder, kind, index)).is_file():
            raise InputError(f"{path} is missing, and later blocks are there; record it again")
    return count


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _shape(path: Path, name: str) -> tuple[int, ...]:
    found: tuple[int, ...] = _read(path, lambda file: tuple(file.get_slice(name).get_shape()))
    return found


def _tensor(path: Path, name: str) -> Tensor:
    found: Tensor = _read(path, lambda file: file.get_tensor(name))
    return found


def _read(path: Path, take: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return take(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is missing or damaged ({' '.join(str(error).split())}): record it again")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:  # the latter also where the disk is full
        raise full(path, sum(tensor.nbytes for tensor in tensors.values()), error) from error


def full(path: Path, nbytes: int, error: Exception) -> OutputError:
    """What to say where ``path`` could not be written."""
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    said = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else " ".join(str(error).split())
    return OutputError(
        f"{path} cannot be written ({said}): {nbytes} bytes needed, {free} free; free some space, or choose another "
        "place"
    )
