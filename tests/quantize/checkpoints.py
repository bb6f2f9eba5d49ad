"""Checkpoints to spoil: copies whose files can be replaced one by one, and what a refusal has to look like."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import LowvramError
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.source import BASE_FOLDER

Tensor = torch.Tensor
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]


def clone(source: Path, target: Path) -> Path:
    """A copy of a folder that takes no room: its files are to be replaced, never written to."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace(path: Path, data: bytes | str | None) -> None:
    """Give a cloned file other bytes, or remove it."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def replace_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    replace(path, json.dumps(value))


def replace_pth(path: Path, value: object, **options: object) -> None:
    path.unlink(missing_ok=True)
    torch.save(value, path, **options)


def change_pth(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = torch.load(path, weights_only=True)
    replace_pth(path, tensors | {name: change(tensors[name].clone())})


def replace_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def change_dit(base: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    shard = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    replace_tensors(shard, tensors | {name: change(tensors[name].clone())})


def load_dit(base: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in SHARDS:
        tensors |= load_file(base / shard)
    return tensors


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    """Put ``value`` in one place, near the end."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-2 if tensor.numel() > 1 else 0] = value
        return tensor

    return change


def base_of(checkpoint: Path) -> Path:
    return checkpoint / BASE_FOLDER


@contextmanager
def refusal(kind: type[LowvramError], *parts: str, exit_code: int = 2) -> Iterator[None]:
    """An error of exactly that kind whose one line holds all ``parts``."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert caught.type is kind
    assert caught.value.exit_code == exit_code
    assert message
    assert "\n" not in message
    assert all(part in message for part in parts), message


def quantized_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scheme as it is written down: a row's largest value becomes the dtype's largest (of int8, 127)."""
    largest = 127.0 if dtype is torch.int8 else 448.0
    scale = weight.float().abs().amax(dim=1) / largest
    scale[scale == 0] = 1
    scaled = weight.float() / scale[:, None]
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), scale


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


class FullDisk:
    """A file on a disk that takes ``room`` more bytes: the last write that fits is a short one."""

    def __init__(self, file, room: int):
        self._file, self.room = file, room

    def write(self, raw) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._file.write(raw[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def journaled(partial: Path) -> dict[str, set[str]]:
    """Component -> slabs that an interrupted run has noted as finished."""
    return {
        path.name.split(".")[0]: {json.loads(line)["slab"] for line in path.read_text().splitlines()[1:]}
        for path in partial.glob("*.journal")
    }


def tensors_left(artifact: Path, finished: dict[str, set[str]]) -> int:
    """How many of an artifact's tensors do not lie in those slabs."""
    opened = Artifact.open(artifact)
    count = 0
    for name in opened.precisions():
        component = opened.component(name)
        for slab in set(component.slab_names) - finished.get(name, set()):
            stored = {spec.name.removesuffix("._data") for spec in component.slab_specs(slab)}
            count += len(stored & set(component.facts["tensors"]))
    return count


# What is quick to convert, for tests in which the other components would only repeat it.
SOME = ("dit", "audio_encoder", "tokenizer")


def run(checkpoint: Path, out: Path, **options: object) -> Path:
    """Convert some components, with the checkpoint's LoRA."""
    return convert(checkpoint, out, **{"lora": lora_of(checkpoint), "lora_alpha": 2.0, "components": SOME} | options)


def lora_of(checkpoint: Path) -> Path:
    return checkpoint / "LiveAvatar" / "liveavatar.safetensors"


class Stop(Exception):
    pass


def stop_at(count: int) -> Callable[..., None]:
    """A progress display that ends the run at its ``count``-th call."""
    calls = iter(range(count - 1))

    def progress(*_state: object) -> None:
        if next(calls, None) is None:
            raise Stop

    return progress
