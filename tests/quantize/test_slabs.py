"""Slabs of an artifact's file: layout, header, checksums of stretches."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors import safe_open

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.slabs import (
    PAD,
    SLAB_ALIGNMENT,
    TENSOR_ALIGNMENT,
    TensorSpec,
    header_bytes,
    plan_slabs,
    read_header,
    sha256_file,
    sha256_range,
)
from tests.quantize.checkpoints import refusal


def spec(name: str, dtype: torch.dtype, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_a_plan_fills_every_hole_with_padding():
    tensors = {
        "shared": [spec("a", torch.int8, 3, 5), spec("b", torch.float32, 3), spec("c", torch.bfloat16, 7, 1)],
        "layer.0": [spec("d", torch.int8, 5000)],
        "layer.1": [],
    }
    slabs = plan_slabs(tensors)
    assert [slab.name for slab in slabs] == list(tensors)
    assert [(slab.offset, slab.nbytes) for slab in slabs] == [(0, 4096), (4096, 8192), (12288, 0)]
    for slab in slabs:
        end = 0
        for placed in slab.tensors:
            assert placed.offset == end
            assert placed.name.startswith(PAD) or placed.offset % TENSOR_ALIGNMENT == 0
            end += placed.nbytes
        assert end == slab.nbytes
        assert sorted(t.name for t in slab.tensors if not t.name.startswith(PAD)) == sorted(
            t.name for t in tensors[slab.name]
        )
    pads = [t.name for slab in slabs for t in slab.tensors if t.name.startswith(PAD)]
    assert len(pads) == len(set(pads))


def test_a_header_is_what_the_library_reads(tmp_path):
    slabs = plan_slabs({"shared": [spec("a", torch.float8_e4m3fn, 3), spec("b", torch.bfloat16, 2, 2)]})
    head = header_bytes(slabs, {"made": "here"})
    path = tmp_path / "a.safetensors"
    path.write_bytes(head + bytes(slabs[0].nbytes))
    assert len(head) % SLAB_ALIGNMENT == 0
    header, offset = read_header(path)
    assert offset == len(head)
    assert header["__metadata__"] == {"made": "here"}
    with safe_open(path, "pt") as file:
        assert file.get_tensor("b").shape == (2, 2)
        assert file.get_tensor("a").dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, (1 << 20) + 5])
def test_checksums_of_stretches(tmp_path, nbytes):
    data = os.urandom(nbytes)
    (tmp_path / "a").write_bytes(b"head" + data + b"tail")
    assert sha256_range(tmp_path / "a", 4, nbytes) == hashlib.sha256(data).hexdigest()
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"head" + data + b"tail").hexdigest()
    with refusal(CheckpointError, "ends 1 bytes before", "fetch"):
        sha256_range(tmp_path / "a", 0, nbytes + 9)
