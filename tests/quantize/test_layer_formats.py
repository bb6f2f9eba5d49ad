"""Formats that ComfyUI states of layers, in a file's metadata or beside the weight: read, or refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import convert
from lowvram_quantize.scaled import _say_unused
from lowvram_quantize.source import check_shapes
from lowvram_quantize.tables import open_table
from tests.golden_cases import relative_error
from tests.quantize.checkpoints import refusal
from tests.quantize.repackaged import dit_of, is_layer, prefixed
from tests.quantize.test_scaled import INT8, ROW, fp8, note, positive

Tensor = torch.Tensor
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.tensor(0.3)
CODES = fp8().float()


def metadata(**layers: object) -> dict[str, str]:
    named = {name.replace("__", "."): facts for name, facts in layers.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})}


def squares(scale: Tensor, edge: int) -> Tensor:
    """One scale a square for each value of a matrix of 300 by 200."""
    return scale.repeat_interleave(edge, 0)[:300].repeat_interleave(edge, 1)[:, :200]


def weights(values: Tensor, scale: Tensor | None = ONE, prefix: str = "", **more: Tensor) -> dict[str, Tensor]:
    tensors = {"x.weight": values} | ({} if scale is None else {"x.weight_scale": scale})
    return {f"{prefix}{name}": t.clone() for name, t in (tensors | {f"x.{n}": t for n, t in more.items()}).items()}


SQUARES = {edge: positive(-(-300 // edge), -(-200 // edge)) for edge in (64, 128)}
READ = {
    "fp8": (weights(fp8()), "float8_e4m3fn", CODES * 0.3),
    "fp8 in its short spelling": (weights(fp8()), {"format": "float8_e4m3fn"}, CODES * 0.3),
    "e5m2": (weights(fp8(E5M2)), {"format": "float8_e5m2"}, fp8(E5M2).float() * 0.3),
    "fp8 in a container of bytes": (weights(fp8().view(torch.uint8)), {"format": "float8_e4m3fn"}, CODES * 0.3),
    "fp8 a row": (weights(fp8(), ROW), {"format": "float8_e4m3fn_rowwise"}, CODES * ROW),
    "fp8 in squares of 64": (
        weights(fp8(), SQUARES[64]), {"format": "float8_e4m3fn_blockwise", "group_size": 64},
        CODES * squares(SQUARES[64], 64),
    ),
    "int8": (weights(INT8), {"format": "int8_tensorwise", "full_precision_matrix_mult": True}, INT8.float() * 0.3),
    "int8 a row": (weights(INT8, ROW), {"format": "int8_tensorwise", "per_channel": True}, INT8.float() * ROW),
    "int8 that says it is not rotated": (
        weights(INT8, ROW[:, 0]), {"format": "int8_tensorwise", "convrot": False, "convrot_groupsize": 256},
        INT8.float() * ROW,
    ),
    "int8 in squares": (
        weights(INT8, SQUARES[128]), {"format": "int8_blockwise", "group_size": 128},
        INT8.float() * squares(SQUARES[128], 128),
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["in the metadata", "without the file's prefix", "beside the weight"])
@pytest.mark.parametrize("kind", READ)
def test_each_format_is_codes_times_scale_wherever_it_is_stated(tmp_path, kind, where):
    tensors, facts, expected = READ[kind]
    tensors = {f"diffusion_model.{name}": t for name, t in tensors.items()}
    stated = {"in the metadata": metadata(diffusion_model__x=facts), "without the file's prefix": metadata(x=facts)}
    if where == "beside the weight":
        tensors["diffusion_model.x.comfy_quant"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "a.safetensors", stated.get(where))
    table = open_table(tmp_path / "a.safetensors")
    assert list(table) == ["diffusion_model.x.weight"]
    assert torch.equal(table["diffusion_model.x.weight"].read(), expected)
    assert torch.equal(table["diffusion_model.x.weight"].read_rows(127, 60), expected[127:187])


PACKED = torch.randint(0, 256, (300, 100), dtype=torch.uint8)
REFUSED = {
    "nvfp4": (weights(PACKED, fp8(), weight_scale_2=ONE), {"format": "nvfp4"}, "'nvfp4' (4 bit in blocks of 16)"),
    "mxfp8": (weights(fp8(), PACKED), {"format": "mxfp8"}, "'mxfp8' (8 bit in blocks of 32"),
    "rotated int8": (
        weights(INT8, ROW), {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
        "convrot = True, a rotated weight",
    ),
    "rotated int8, said further inside": (
        weights(INT8, ROW), {"format": "int8_tensorwise", "params": {"convrot": True}}, "a rotated weight",
    ),
    "rotated 4 bit": (weights(PACKED, ROW), {"format": "convrot_w4a4"}, "'convrot_w4a4' (4 bit, rotated)"),
    "4 bit with a code book": (
        weights(INT8, None, weight_s_channel=ROW), "asym_w4a8_int8", "'asym_w4a8_int8' (4 bit with a code book)",
    ),
    "a format of tomorrow": (weights(INT8, ROW), {"format": "int5_fancy"}, "'int5_fancy', which is not read"),
    "a known name with a tail": (weights(fp8()), {"format": "float8_e4m3fn_fancy"}, "'float8_e4m3fn_fancy'"),
    "an option of tomorrow": (weights(INT8, ROW), {"format": "int8_tensorwise", "lut": [1]}, "lut = [1], an option"),
    "no scale": (weights(fp8(), None), {"format": "float8_e4m3fn"}, "has no scale of it"),
    "int8 without a scale": (weights(INT8, None), {"format": "int8_tensorwise"}, "has no scale of it"),
    "another dtype": (weights(INT8), {"format": "float8_e4m3fn"}, "which is I8"),
    "a scale that fits no square": (weights(INT8, SQUARES[64]), {"format": "int8_blockwise"}, "does not fit x.weight"),
    "squares of nothing": (weights(INT8), {"format": "int8_blockwise", "group_size": 0}, "in blocks of 0"),
    "no format": (weights(fp8()), {"bits": 8}, "no JSON with a format"),
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, kind, beside):
    tensors, facts, said = REFUSED[kind]
    if beside:
        tensors = tensors | {"x.comfy_quant": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors", None if beside else metadata(x=facts))
    with refusal(CheckpointError, "a.safetensors", said, "fetch"):
        open_table(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (weights(fp8(), positive(300).to(torch.uint8)), "x.weight_scale is U8; expected a scale in a float's dtype"),
        (weights(PACKED, ONE), "nothing says what its bytes mean"),
        (weights(INT8, ONE, pre_quant_scale=positive(200)), "smoothed (AWQ)"),
        (weights(INT8, None, weight_codebook=positive(16)), "a code book (w4a8)"),
        (weights(PACKED, fp8(), weight_scale_2=ONE), "nvfp4"),
    ],
    ids=["scales in bytes", "bytes", "smoothed", "a code book", "two scales"],
)
def test_codes_of_which_nothing_is_stated(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "a.safetensors")
    with refusal(CheckpointError, "a.safetensors", said, "fetch"):
        open_table(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', "{}", "null"])
def test_metadata_that_is_damaged(tmp_path, text):
    save_file(weights(fp8()), tmp_path / "a.safetensors", {"_quantization_metadata": text})
    with refusal(CheckpointError, "a.safetensors", "_quantization_metadata holds no JSON with layers", "fetch"):
        open_table(tmp_path / "a.safetensors")


def test_two_places_that_disagree_and_a_layer_that_is_not_there(tmp_path, caplog):
    tensors = weights(fp8()) | {"x.comfy_quant": note(format="float8_e4m3fn")}
    save_file(tensors, tmp_path / "a.safetensors", metadata(x={"format": "float8_e4m3fn_rowwise"}))
    with refusal(CheckpointError, "says otherwise", "fetch"):
        open_table(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata(y={"format": "float8_e4m3fn"}))
    with caplog.at_level(logging.WARNING):
        open_table(tmp_path / "b.safetensors")
    assert "there is no y.weight" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool])
def test_codes_without_a_scale_are_never_weights(tmp_path, dtype):
    save_file({"x.weight": torch.ones(3, 2).to(dtype)}, tmp_path / "a.safetensors")
    with refusal(CheckpointError, "x.weight", "no scale lies beside it", "fetch"):
        check_shapes(open_table(tmp_path / "a.safetensors"), {"x.weight": (3, 2)}, "the DiT")


def test_scales_of_activations_are_left_out_aloud_and_once(tmp_path, caplog):
    _say_unused.cache_clear()
    save_file(weights(fp8(), input_scale=ONE), tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_table(tmp_path / "a.safetensors")
    assert [r.message for r in caplog.records if "1 scales of activations are not used, as x.input_scale" in r.message]
    assert len(caplog.records) == 1


def test_dtypes_that_only_packed_files_have_are_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = Path(tmp_path / "a.safetensors")
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with refusal(CheckpointError, "w has dtype F8_E8M0, as in mxfp8", "fetch"):
        open_table(path)


def test_a_whole_dit_of_mixed_formats_is_converted(tiny, tmp_path):
    """As ComfyUI's mixed files are: some layers in fp8, others in int8 a row; only the metadata says so."""
    tensors, layers = {}, {}
    for number, (name, tensor) in enumerate(dit_of(tiny.checkpoint).items()):
        tensors[name] = tensor
        if is_layer(name):
            row = number % 2
            largest = tensor.float().abs().amax(1, keepdim=True) / 127 if row else tensor.float().abs().amax() / 448
            codes = tensor.float() / largest
            tensors[name] = codes.round().to(torch.int8) if row else codes.to(E4M3)
            tensors[f"{name}_scale"] = largest
            layers[name.removesuffix(".weight")] = {"format": "int8_tensorwise" if row else "float8_e4m3fn"}
    stated = json.dumps({"layers": {f"model.diffusion_model.{name}": facts for name, facts in layers.items()}})
    tensors = {name: tensor.clone() for name, tensor in prefixed("model.diffusion_model.", tensors).items()}
    path = tmp_path / "dit.safetensors"
    save_file(tensors, path, {"_quantization_metadata": stated})
    out = convert(tiny.checkpoint, tmp_path / "out", precision="fp32", dit_file=path, components=("dit",))
    stored, published = load_file(out / "dit.safetensors"), dit_of(tiny.checkpoint)
    assert {facts["format"] for facts in layers.values()} == {"int8_tensorwise", "float8_e4m3fn"}
    for name, tensor in published.items():
        off = relative_error(stored[name], tensor.float())
        assert (0 < off < 0.04) if name.removesuffix(".weight") in layers else off == 0, (name, off)
