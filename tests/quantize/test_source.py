"""A published checkpoint's files as tables of tensors: read right, refused when damaged, never run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.pickled import open_pth
from lowvram_quantize.source import (
    TEXT_ENCODER_FILE,
    VAE_FILE,
    check_shapes,
    open_index,
    open_safetensors,
    read_json,
)
from lowvram_quantize.tables import open_component
from tests.quantize.checkpoints import (
    INDEX,
    SHARDS,
    Payload,
    base_of,
    clone,
    load_dit,
    refusal,
    replace,
    replace_json,
)


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    return base_of(clone(tiny.checkpoint, tmp_path / "ckpt"))


@pytest.fixture
def every_dtype() -> dict[str, torch.Tensor]:
    values = torch.arange(24, dtype=torch.float32).sub(7).view(4, 3, 2)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = {str(dtype): values.to(dtype) for dtype in (*dtypes, torch.int64, torch.int32, torch.int8)}
    return tensors | {"bytes": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(1.5), "none": torch.zeros(0)}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_safetensors_are_read_as_the_library_reads_them(tmp_path, every_dtype):
    save_file(every_dtype, tmp_path / "a.safetensors", metadata={"made": "here"})
    table = open_safetensors(tmp_path / "a.safetensors")
    assert set(table) == set(every_dtype)
    assert all(same(table[name].read(), tensor) for name, tensor in every_dtype.items())
    assert table["torch.float32"].nbytes == 96
    assert table["torch.float32"].rows == 4


def test_pth_is_read_as_the_library_reads_it(tmp_path, every_dtype):
    torch.save(every_dtype, tmp_path / "a.pth")
    table = open_pth(tmp_path / "a.pth")
    assert set(table) == set(every_dtype)
    assert all(same(table[name].read(), tensor) for name, tensor in every_dtype.items())


def test_pth_views_that_share_a_storage_are_told_apart(tmp_path):
    whole = torch.arange(12.0)
    torch.save({"whole": whole, "tail": whole[6:].view(2, 3)}, tmp_path / "a.pth")
    assert torch.equal(open_pth(tmp_path / "a.pth")["tail"].read(), whole[6:].view(2, 3))


def test_rows_are_read_flattened_and_alone(tmp_path):
    tensor = torch.randn(5, 2, 3)
    save_file({"pad": torch.zeros(3), "w": tensor}, tmp_path / "a.safetensors")
    ref = open_safetensors(tmp_path / "a.safetensors")["w"]
    assert torch.equal(ref.read_rows(1, 3), tensor[1:4].flatten(1))


def test_the_published_files_come_whole(base):
    table, dit = open_index(base / INDEX), load_dit(base)
    assert set(table) == set(dit)
    assert all(same(table[name].read(), tensor) for name, tensor in dit.items())
    for file in (VAE_FILE, TEXT_ENCODER_FILE):
        published = torch.load(base / file, weights_only=True)
        table = open_pth(base / file)
        assert all(same(table[name].read(), tensor) for name, tensor in published.items())


@pytest.mark.parametrize(
    ("text", "said"), [("{", "JSON"), ("[1]", "list"), ("[" * 5000, "JSON"), (b"\xff\xfe", "JSON"), (None, "JSON")]
)
def test_json_that_is_none(tmp_path, text, said):
    replace(tmp_path / "config.json", text)
    with refusal(CheckpointError, "config.json", said, "fetch it again"):
        read_json(tmp_path / "config.json")


def test_missing_and_truncated_shards(base):
    whole = (base / SHARDS[1]).read_bytes()
    replace(base / SHARDS[1], None)
    with refusal(CheckpointError, SHARDS[1], "missing", "fetch"):
        open_index(base / INDEX)
    for size, said in ((len(whole) - 1, "truncated"), (1000, "header"), (4, "header"), (0, "header")):
        replace(base / SHARDS[1], whole[:size])
        with refusal(CheckpointError, SHARDS[1], said, "fetch"):
            open_index(base / INDEX)
    replace(base / SHARDS[1], whole + b"\0")
    with refusal(CheckpointError, SHARDS[1], f"{len(whole) + 1} bytes", str(len(whole))):
        open_index(base / INDEX)


def test_an_index_that_names_what_is_not_there(base):
    clean = (base / INDEX).read_bytes()
    replace_json(base / INDEX, lambda index: index["weight_map"].update({"blocks.9.absent": SHARDS[0]}))
    with refusal(CheckpointError, INDEX, "blocks.9.absent", SHARDS[0], "fetch"):
        open_index(base / INDEX)
    replace(base / INDEX, clean)
    replace_json(base / INDEX, lambda index: index["weight_map"].update({"a": "other-00003.safetensors"}))
    with refusal(CheckpointError, "other-00003.safetensors", "missing", "fetch"):
        open_index(base / INDEX)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "a"])
def test_an_index_without_a_map(base, weight_map):
    replace_json(base / INDEX, lambda index: index.update(weight_map=weight_map))
    with refusal(CheckpointError, INDEX, "weight_map"):
        open_index(base / INDEX)


def test_an_index_reaches_no_file_outside_its_folder(base):
    save_file({"a": torch.ones(1)}, base.parent / "outside.safetensors")
    replace_json(base / INDEX, lambda index: index.update(weight_map={"a": "../outside.safetensors"}))
    with refusal(CheckpointError, "outside.safetensors", "missing"):
        open_index(base / INDEX)


def header_with(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[" * 5000,
        [],
        {"a": None},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_headers_that_make_no_sense(tmp_path, header):
    with refusal(CheckpointError, "a.safetensors"):
        open_safetensors(header_with(tmp_path / "a.safetensors", header))


def test_a_file_cut_after_its_header_was_read(tmp_path):
    save_file({"w": torch.ones(100)}, tmp_path / "a.safetensors")
    ref = open_safetensors(tmp_path / "a.safetensors")["w"]
    os.truncate(tmp_path / "a.safetensors", 200)
    with refusal(CheckpointError, "a.safetensors", "truncated", "w", "fetch it again"):
        ref.read()


def zipped(value: object, path: Path) -> None:
    torch.save(value, path)


def pickled(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [zipped, pickled, legacy])
def test_nothing_in_a_pth_is_run(tmp_path, save):
    mark, path = tmp_path / "was-run", tmp_path / "a.pth"
    save({"w": torch.ones(2), "x": Payload(mark)}, path)
    with refusal(CheckpointError, "a.pth", "fetch"):
        open_pth(path)
    assert not mark.exists()
    # The payload is a live one: what would run it, does.
    with path.open("rb") as file:
        pickle.load(file) if save is pickled else torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({"weights": {"w": torch.ones(2)}}, "dict of dict"),
        ({"w": torch.ones(2), "step": 3}, "int"),
        ({}, "dict of nothing"),
        ({"w": torch.ones(4, 3).t()}, "contiguous"),
        ({"w": torch.ones(1).expand(4)}, "contiguous"),
        ({"w": torch.ones(4).to_sparse()}, "contiguous"),
        ({"w": torch.ones(4, dtype=torch.complex64)}, "dtype"),
    ],
)
def test_a_pth_of_something_else(tmp_path, value, said):
    torch.save(value, tmp_path / "a.pth")
    with refusal(CheckpointError, "a.pth", said, "fetch the published file"):
        open_pth(tmp_path / "a.pth")


@pytest.mark.parametrize("keep", [0, 10, 2000, -30])
def test_missing_and_truncated_pth(tmp_path, keep):
    path = tmp_path / "a.pth"
    with refusal(CheckpointError, "a.pth", "missing", "fetch"):
        open_pth(path)
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with refusal(CheckpointError, "a.pth", "truncated", "fetch"):
        open_pth(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pth_that_was_packed_again_is_not_misread(tmp_path, method):
    torch.save({"w": torch.ones(50), "v": torch.zeros(50)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with refusal(CheckpointError, "b.pth", "packed again", "fetch"):
        open_pth(tmp_path / "b.pth")


def test_shapes_are_checked_by_name(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    table = open_safetensors(tmp_path / "a.safetensors")
    check_shapes(table, {"a": (2, 3), "b": (1,)}, "the model")
    with refusal(CheckpointError, "the model", "a in", "[2, 3]", "[3, 2]", "check"):
        check_shapes(table, {"a": (3, 2), "b": (1,)}, "the model")
    with refusal(CheckpointError, "lacks 1", "'c'", "1 unknown", "'b'"):
        check_shapes(table, {"a": (2, 3), "c": (1,)}, "the model")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ('"w": {W04}, "w": {W48}', "w is there twice"),
        ('"w": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}', "dtype is there twice"),
        ('"v": {W04}, "w": {W08}', "v and w lie in the same bytes"),
        ('"v": {W04}, "w": {W04}, "x": {W48}', "v and w lie in the same bytes"),
        ('"v": {W08}, "w": {W48}', "v and w lie in the same bytes"),
    ],
)
def test_names_and_bytes_that_are_there_twice(tmp_path, entries, said):
    for name, count, place in (("W04", 1, "[0, 4]"), ("W48", 1, "[4, 8]"), ("W08", 2, "[0, 8]")):
        entries = entries.replace(f"{{{name}}}", f'{{"dtype": "F32", "shape": [{count}], "data_offsets": {place}}}')
    header = f"{{{entries}}}".encode()
    nbytes = 8 if "8]" in entries else 4
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    with refusal(CheckpointError, "a.safetensors", said, "fetch"):
        open_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_that_is_named_alone(tmp_path, index):
    path = tmp_path / "m-00002-of-00003.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.ones(2)}, path)
    if index:
        (tmp_path / "m.safetensors.index.json").write_text("{}")
    advice = "name m.safetensors.index.json" if index else "fetch m.safetensors.index.json and all shards"
    with refusal(CheckpointError, "is shard 2 of 3", advice):
        open_component(path, "dit")
