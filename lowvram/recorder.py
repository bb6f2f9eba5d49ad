"""Recorder of what a run leaves behind besides its video: dumped tensors and timings of each block."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowvram.schedule import Block
from lowvram_kernels.errors import OutputError

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One finished block: ``frames`` video frames; seconds of denoising (of waiting for it, where other ranks denoise)
    and of decoding."""

    clip: int
    block: int
    frames: int
    denoise_s: float
    decode_s: float


class Recorder:
    """Sees every stage's output. This one keeps block timings only; ``TensorRecorder`` keeps the tensors too."""

    def __init__(self) -> None:
        self.blocks: list[BlockRecord] = []
        self.total_frames = self.earlier_frames = 0

    @property
    def frames(self) -> int:
        """Of the video, that are there by now."""
        return self.earlier_frames + sum(block.frames for block in self.blocks)

    def started(self, total_frames: int, earlier_frames: int = 0) -> None:
        """All conditions are encoded; the video has ``total_frames``, of which ``earlier_frames`` were made before."""
        self.total_frames, self.earlier_frames = total_frames, earlier_frames

    def tensor(self, name: str, value: Tensor) -> None:
        """A condition: audio_emb, input_ids, context, ref_latents or motion_latents."""

    def part(self, name: str, value: Tensor) -> None:
        """The next part, along the last dimension, of a condition that comes bit by bit; from any thread."""

    def latent(self, block: Block, latent_CFhw: Tensor) -> None:
        """A block's denoised latent."""

    def decoded(self, frames_CFHW: Tensor) -> None:
        """Decoded frames in [-1, 1] before they become bytes."""

    def finished(self, record: BlockRecord) -> None:
        self.blocks.append(record)


class TensorRecorder(Recorder):
    """Keeps everything in memory for ``--dump-tensors``: grows with the length of the video."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._latents: list[Tensor] = []
        self._frames: list[Tensor] = []

    def tensor(self, name: str, value: Tensor) -> None:
        self._tensors[name] = _stored(value)

    def part(self, name: str, value: Tensor) -> None:
        self._parts.setdefault(name, []).append(_stored(value))

    def latent(self, block: Block, latent_CFhw: Tensor) -> None:
        self._latents.append(_stored(latent_CFhw))

    def decoded(self, frames_CFHW: Tensor) -> None:
        self._frames.append(_stored(frames_CFHW))

    def tensors(self) -> dict[str, Tensor]:
        """Conditions; ``latents`` [blocks, 16, 3, h, w], or one ``latents.block{i}`` each where a block is shorter;
        ``frames`` [3, F, H, W]."""
        found = self._tensors | {name: torch.cat(parts, dim=-1) for name, parts in self._parts.items()}
        if len({t.shape for t in self._latents}) == 1:
            found["latents"] = torch.stack(self._latents)
        else:
            found |= {f"latents.block{i}": t for i, t in enumerate(self._latents)}
        if self._frames:
            found["frames"] = torch.cat(self._frames, dim=1)
        return found

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Raises: OutputError where the file cannot be written; nothing is left under its name then."""
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(self.tensors(), partial, metadata={k: str(v) for k, v in metadata.items()})
            partial.replace(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # the last of them also where the disk is full
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.absolute().parent).free
            raise OutputError(
                f"tensors could not be written to {path}: {' '.join(str(error).split())} ({free} bytes free); choose "
                "another place"
            ) from error


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).clone().contiguous()
