"""Split GGUF files: all parts are read as one from whichever is named; what is missing or mixed is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.checkpoint import Checkpoint, Named
from lowvram_quantize.convert import convert
from lowvram_quantize.gguf_file import open_gguf
from lowvram_quantize.gguf_parts import part_files
from lowvram_quantize.tables import open_component, open_table
from tests.quantize.checkpoints import load_dit, refusal
from tests.quantize.repackaged import base_of, copy_rest

Type = gguf.GGMLQuantizationType
VALUES = {f"w{i}": np.random.default_rng(i).standard_normal((8, 32)).astype(np.float32) for i in range(5)}
FOLDED = np.random.default_rng(9).standard_normal((4, 64)).astype(np.float32)


def split(path: Path, tensors: dict[str, np.ndarray], each: int = 2, **types: Type) -> list[Path]:
    """``path``'s parts as the gguf package splits them, ``each`` tensors a part."""
    writer = gguf.GGUFWriter(path, "wan", split_max_tensors=each)
    writer.add_array("comfy.gguf.orig_shape.folded", [8, 32])
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=types.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*"))


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """Three parts, the flattened tensor in the last, whose shape only the first has."""
    return split(tmp_path / "m.gguf", VALUES | {"folded": FOLDED})


def test_all_parts_are_read_from_any(parts):
    assert [part.name for part in parts] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for named in parts:
        table = open_table(named)
        assert list(table) == [*VALUES, "folded"]
        assert all(torch.equal(table[name].read(), torch.from_numpy(v)) for name, v in VALUES.items())
        assert torch.equal(table["folded"].read(), torch.from_numpy(FOLDED).view(8, 32))
        assert {ref.file for ref in table.values()} == set(parts)
        assert "'wan'" in describe_refusal(named)


def describe_refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_component(path, "dit")
    return str(caught.value)


def one_is_missing(parts: list[Path]) -> None:
    parts[1].unlink()


def two_are_missing(parts: list[Path]) -> None:
    parts[1].unlink()
    parts[2].unlink()


def the_first_is_missing(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("other.gguf"))


def two_parts_are_one(parts: list[Path]) -> None:
    shutil.copyfile(parts[0], parts[1])


def a_part_of_another_set(parts: list[Path]) -> None:
    other = split(parts[0].parent / "other" / "m.gguf", dict(list(VALUES.items())[:4]) | {"folded": FOLDED})
    shutil.copyfile(other[2], parts[2])


def a_pointer(parts: list[Path]) -> None:
    parts[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n")


def cut_by_bytes(parts: list[Path]) -> None:
    whole = b"".join(part.read_bytes() for part in parts)
    for i, part in enumerate(parts):
        part.write_bytes(whole[i * len(whole) // 3 : (i + 1) * len(whole) // 3])


def cut_off(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-400])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (one_is_missing, ["one of 3 parts", "m-00002-of-00003.gguf is missing", "all parts into one folder"]),
        (two_are_missing, ["m-00002-of-00003.gguf, m-00003-of-00003.gguf are missing"]),
        (two_parts_are_one, ["m-00002-of-00003.gguf says that it is part 1 of 3, its name that it is part 2 of 3"]),
        (a_part_of_another_set, ["hold 5 tensors, of 6", "not of one set"]),
        (a_pointer, ["m-00002-of-00003.gguf is a Git LFS pointer"]),
        (cut_by_bytes, ["cut into pieces of bytes", "join"]),
        (cut_off, ["m-00003-of-00003.gguf", "truncated"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_missing_or_mixed_is_said(parts, spoil, said):
    (parts[0].parent / "other").mkdir()
    spoil(parts)
    with refusal(CheckpointError, "m-0000", *said):
        open_gguf(parts[0])


def test_a_missing_first_part_and_a_part_under_another_name(parts):
    the_first_is_missing(parts)
    with refusal(CheckpointError, "m-00001-of-00003.gguf is missing", "fetch all parts"):
        open_table(parts[2])
    with refusal(CheckpointError, "other.gguf is part 1 of 3", "NAME-00001-of-00003.gguf"):
        open_table(parts[0].with_name("other.gguf"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("a-00001-of-00003.gguf", 3), ("a-2-of-4.GGUF", 4), ("a-00004-of-00003.gguf", 1), ("a-0-of-3.gguf", 1),
        ("a-00001-of-00001.gguf", 1), ("a.gguf", 1), ("a-00001-of-00003.safetensors", 1), ("-of-.gguf", 1),
    ],
)  # fmt: skip
def test_names_of_parts(tmp_path, name, count):
    files = part_files(tmp_path / name)
    assert len(files) == count
    assert tmp_path / name in files


def test_a_split_dit_is_found_and_converted(tiny, tmp_path):
    tensors = load_dit(base_of(tiny.checkpoint))
    raw = {name: t.flatten(1) if t.dim() == 5 else t for name, t in tensors.items()}
    raw = {name: t.contiguous().view(torch.uint8).numpy() for name, t in raw.items()}
    folder = tmp_path / "files"
    folder.mkdir()
    parts = split(folder / "dit.gguf", raw, each=60, **dict.fromkeys(raw, Type.BF16))
    copy_rest(tiny.checkpoint, folder)
    assert len(parts) > 1
    assert Checkpoint(folder, Named()).file("dit") == parts[0]
    out = convert(folder, tmp_path / "out", precision="bf16", components=("dit",))
    plain = convert(tiny.checkpoint, tmp_path / "plain", precision="bf16", components=("dit",))
    assert (out / "dit.safetensors").read_bytes() == (plain / "dit.safetensors").read_bytes()
    parts[1].unlink()
    with refusal(CheckpointError, "holds no file of the DiT", f"{parts[1].name} is missing"):
        Checkpoint(folder, Named()).file("dit")
