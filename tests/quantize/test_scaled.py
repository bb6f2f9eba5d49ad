"""8-bit weights with scales beside them: each spelling is read as values times scale, whole and row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.tables import open_table
from tests.quantize.checkpoints import refusal

Tensor = torch.Tensor
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT, IN = 300, 200  # three rows of blocks of 128 and two columns of them, none of which divides


def fp8(dtype: torch.dtype = E4M3, seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).mul_(20).to(dtype)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1


def note(**facts: object) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def comfy(values: Tensor, scale: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {"x.weight": values, "x.scale_weight": scale, "scaled_fp8": torch.zeros(2, dtype=E4M3)} | more


def blocks(scale: Tensor) -> Tensor:
    """One scale of a block of 128 x 128 for each value, by counting."""
    return torch.tensor([[float(scale[r // 128, c // 128]) for c in range(IN)] for r in range(OUT)])


INT8 = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
ROW, BLOCK = positive(OUT, 1), positive(3, 2)
SPELLINGS = {
    "comfy": (comfy(fp8(), torch.tensor(0.25)), fp8().float() * 0.25),
    "comfy, one number in a list": (comfy(fp8(), torch.tensor([0.5])), fp8().float() * 0.5),
    "comfy with scale_input": (
        comfy(fp8(), torch.tensor(0.25), **{"x.scale_input": torch.ones(())}), fp8().float() * 0.25
    ),
    "comfy e5m2": (comfy(fp8(E5M2), torch.tensor(3.0)), fp8(E5M2).float() * 3),
    "comfy behind a prefix": (
        {f"model.diffusion_model.{n}": t for n, t in comfy(fp8(), torch.tensor(0.25)).items()}, fp8().float() * 0.25
    ),
    "comfy_quant": (
        {"x.weight": fp8(), "x.weight_scale": torch.tensor(0.3), "x.input_scale": torch.ones(()),
         "x.comfy_quant": note(format="float8_e4m3fn", full_precision_matrix_mult=True)},
        fp8().float() * 0.3,
    ),
    "a scale a row": ({"x.weight": fp8(), "x.weight_scale": ROW}, fp8().float() * ROW),
    "a flat scale a row in bf16": (
        {"x.weight": fp8(), "x.weight_scale": ROW[:, 0].bfloat16()}, fp8().float() * ROW.bfloat16().float()
    ),
    "int8 a row": ({"x.weight": INT8, "x.weight_scale": ROW}, INT8.float() * ROW),
    "blocks of 128": ({"x.weight": fp8(), "x.weight_scale_inv": BLOCK}, fp8().float() * blocks(BLOCK)),
    "scale alone": ({"x.weight": fp8(), "x.scale": torch.tensor(0.3)}, fp8().float() * 0.3),
    "weight.scale": ({"x.weight": fp8(), "x.weight.scale": ROW}, fp8().float() * ROW),
    "in float64": ({"x.weight": fp8(), "x.weight_scale": torch.tensor(0.5).double()}, fp8().float() * 0.5),
    "quanto": (
        {"x.weight._data": INT8, "x.weight._scale": ROW, "x.input_scale": torch.ones(()),
         "x.output_scale": torch.ones(())},
        INT8.float() * ROW,
    ),
}  # fmt: skip


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_values_times_scale(tmp_path, spelling):
    tensors, expected = SPELLINGS[spelling]
    table = open_table(save(tmp_path / "a.safetensors", tensors))
    (name,) = table
    assert name.removeprefix("model.diffusion_model.") == "x.weight"
    ref, expected = table[name], expected.float()
    assert ref.shape == (OUT, IN)
    assert ref.dtype == torch.float32
    assert torch.equal(ref.read(), expected)
    for start, count in ((0, 1), (100, 60), (127, 2), (250, 50)):
        assert torch.equal(ref.read_rows(start, count), expected[start : start + count])
    assert ref.nbytes == OUT * IN  # what is read of the file, for who shows progress
    assert ref.kind.startswith(("F8_E4M3 times", "F8_E5M2 times", "I8 times"))
    assert all(scale.name in tensors for scale in ref.scales)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_without_scales_is_read_as_it_is(tmp_path, dtype):
    values = fp8(dtype)
    ref = open_table(save(tmp_path / "a.safetensors", {"x.weight": values}))["x.weight"]
    assert ref.dtype == dtype
    assert torch.equal(ref.read().float(), values.float())


def test_scales_in_a_pth_and_over_a_convolution(tmp_path):
    values, scale = fp8().view(OUT, 50, 4), ROW.view(OUT, 1, 1)
    torch.save({"state_dict": {"x.weight": values, "x.weight_scale": scale}}, tmp_path / "a.pth")
    assert torch.equal(open_table(tmp_path / "a.pth")["x.weight"].read(), values.float() * scale)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x.weight": fp8(), "x.weight_scale": positive(7)}, "x.weight_scale [7] does not fit x.weight [300, 200]"),
        ({"x.weight": fp8(), "x.weight_scale_inv": positive(2, 3)}, "blocks of 128 x 128"),
        ({"x.bias": positive(4), "x.weight_scale": positive(1)}, "no x.weight"),
        ({"x.weight": fp8(), "x.weight_scale": positive(1), "x.scale_weight": positive(1)}, "two scales for x.weight"),
        ({"x.weight": fp8(), "x.weight_scale": positive(1), "x.weight_scale_2": positive(1)}, "nvfp4"),
        ({"x.weight": INT8, "x.weight.SCB": positive(OUT)}, "bitsandbytes' 8 bit"),
        ({"x.weight": INT8, "x.weight.absmax": positive(OUT)}, "bitsandbytes' 4 bit"),
        ({"x.qweight": INT8, "x.qzeros": INT8}, "GPTQ"),
        ({"x.weight": fp8(), "x.weight_scale": positive(1), "x.comfy_quant": note(format="mxfp8")}, "'mxfp8'"),
        ({"x.weight": fp8(), "x.weight_scale": positive(1), "x.comfy_quant": note()}, "no JSON with a format"),
        ({"x.weight": INT8, "x.weight_scale": ROW, "x.weight_zero_point": ROW}, "integers with zero points"),
        ({"x.weight": fp8(), "x.scale_inv": positive(1)}, "x.scale_inv beside x.weight in F8_E4M3, and how it scales"),
        ({"x.weight": INT8, "x.scales": ROW}, "x.scales beside x.weight in I8"),
        ({"x.weight": INT8, "x.weight_amax": positive(1)}, "x.weight_amax beside x.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_read_is_said(tmp_path, tensors, said):
    said = said.replace("blocks of 128 x 128", "each block of 128 x 128")
    with refusal(CheckpointError, "a.safetensors", said, "fetch"):
        open_table(save(tmp_path / "a.safetensors", {n: t.clone() for n, t in tensors.items()}))


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(), (OUT, 1), (3, 2)])
def test_scales_that_are_none_are_said(tmp_path, value, shape):
    scale = torch.ones(shape)
    scale.view(-1)[-1] = value
    ref = open_table(save(tmp_path / "a.safetensors", {"x.weight": fp8(), "x.weight_scale": scale}))["x.weight"]
    with refusal(CheckpointError, "a.safetensors", "x.weight_scale is negative, NaN or infinite", "fetch"):
        ref.read()


def test_a_parameter_of_no_layer_and_names_that_are_no_scales(tmp_path):
    """A modulation's scale is found; a norm's, or one beside bf16, is a tensor as others."""
    tensors = {
        "m": fp8(), "m_scale": torch.tensor(0.3), "norm.scale": positive(4), "y.weight": torch.ones(3, 2),
        "y.scale": positive(1), "y.scaled.weight": torch.ones(2),
    }  # fmt: skip
    table = open_table(save(tmp_path / "a.safetensors", tensors))
    assert set(table) == set(tensors) - {"m_scale"}
    assert torch.equal(table["m"].read(), fp8().float() * 0.3)
