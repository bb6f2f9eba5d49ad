"""GGUF files: every usual type read as the gguf package reads it, stretch by stretch; what cannot be read is said."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.gguf_file import open_gguf
from lowvram_quantize.tables import open_component, open_table
from tests.quantize.checkpoints import refusal

Type = gguf.GGMLQuantizationType
QUANTS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
          Type.IQ4_NL, Type.IQ4_XS]  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], types: dict[str, Type] | None = None, arch: str = "wan", **notes):
    """A GGUF file; tensors of ``types`` are given as their bytes."""
    writer = gguf.GGUFWriter(path, arch)
    for name, shape in notes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name.replace('__', '.')}", shape)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(quant: Type, rows: int, width: int) -> np.ndarray:
    """Bytes of ``rows`` x ``width`` values; scales in half precision stay finite, so that all can be compared."""
    size, nbytes = gguf.GGML_QUANT_SIZES[quant]
    raw = np.random.default_rng(quant.value).integers(0, 256, (rows, width // size, nbytes), np.uint8)
    halves = raw.view(np.float16)
    halves[~np.isfinite(halves)] = 1
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: q.name)
def test_each_type_is_read_as_the_package_reads_it(tmp_path, quant):
    raw = blocks(quant, 40, 512)
    path = write(tmp_path / "a.gguf", {"pad": np.ones((3, 32), np.float32), "w": raw}, {"w": quant})
    ref = open_gguf(path)["w"]
    expected = torch.from_numpy(gguf.dequantize(raw, quant))
    assert ref.shape == (40, 512)
    assert ref.kind == f"GGUF {quant.name}"
    assert ref.nbytes == raw.nbytes
    assert torch.isfinite(expected).all()
    assert torch.equal(ref.read(), expected)
    assert torch.equal(ref.read_rows(13, 9), expected[13:22])


def test_quantized_values_are_near_what_they_were(tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"w": gguf.quantize(values, Type.Q8_0)}, {"w": Type.Q8_0})
    read = open_gguf(path)["w"].read().numpy()
    assert np.abs(read - values).max() <= np.abs(values).max() / 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_floats_are_read_bit_by_bit(tmp_path, dtype):
    tensor = torch.randn(3, 4, 2, 5).to(dtype)
    kind = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}[dtype]
    raw = tensor.view(torch.uint8).numpy() if dtype is torch.bfloat16 else tensor.numpy()
    path = write(tmp_path / "a.gguf", {"w": raw}, {"w": kind} if dtype is torch.bfloat16 else None)
    ref = open_gguf(path)["w"]
    assert (ref.dtype, ref.shape) == (dtype, (3, 4, 2, 5))  # GGUF has shapes the other way round
    assert torch.equal(ref.read(), tensor)


def test_a_tensor_flattened_for_its_blocks_has_its_noted_shape(tmp_path):
    values = np.random.default_rng(0).standard_normal((80, 80)).astype(np.float32)
    raw = gguf.quantize(values.reshape(25, 256), Type.Q8_0)
    ref = open_gguf(write(tmp_path / "a.gguf", {"x.w": raw}, {"x.w": Type.Q8_0}, x__w=[80, 80]))["x.w"]
    expected = torch.from_numpy(gguf.dequantize(raw, Type.Q8_0)).view(80, 80)
    assert ref.shape == (80, 80)
    assert torch.equal(ref.read(), expected)
    for start, count in ((0, 1), (1, 1), (7, 3), (79, 1)):  # rows of 80 values that begin within blocks of 32
        assert torch.equal(ref.read_rows(start, count), expected[start : start + count])


def a_language_model(path: Path) -> None:
    write(path, {"blk.0.attn_q.weight": np.ones((2, 32), np.float32)}, arch="llama")


def flux(path: Path) -> None:
    write(path, {"double_blocks.0.img_attn.qkv.weight": np.ones((2, 32), np.float32)}, arch="flux")


def truncated(path: Path) -> None:
    path.write_bytes(write(path, {"w": np.ones((64, 64), np.float32)}).read_bytes()[:-100])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(write(path, {"w": np.ones((64, 64), np.float32)}).read_bytes()[:60])


def only_the_magic(path: Path) -> None:
    path.write_bytes(b"GGUF")


def a_type_that_is_not_dequantized(path: Path) -> None:
    size, nbytes = gguf.GGML_QUANT_SIZES[Type.Q8_K]
    write(path, {"w": np.zeros((2, 256 // size * nbytes), np.uint8)}, {"w": Type.Q8_K})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_language_model, "architecture 'llama') holds a language model; expected the DiT"),
        (flux, "architecture 'flux') holds a transformer of FLUX"),
        (truncated, "truncated"),
        (cut_in_the_header, "truncated"),
        (only_the_magic, "truncated"),
        (a_type_that_is_not_dequantized, "type Q8_K"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_used_is_said(tmp_path, make, said):
    path = tmp_path / "a.gguf"
    make(path)
    with refusal(CheckpointError, "a.gguf", said, "fetch"):
        open_component(path, "dit")


def test_a_gguf_under_another_name_is_one(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": np.ones((2, 32), np.float32)})
    assert torch.equal(open_table(path)["w"].read(), torch.ones(2, 32))
