"""One tensor into the artifact: in pieces as in one, merged before it is quantized, refused when it is not finite."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.rotation import rotated
from lowvram_quantize import store
from lowvram_quantize.components import Item
from lowvram_quantize.lora_updates import Delta
from lowvram_quantize.schemes import EIGHT_BIT, KEPT, Scheme
from lowvram_quantize.slabs import TensorSpec
from lowvram_quantize.source import open_safetensors
from lowvram_quantize.store import stored_specs, write_item
from tests.quantize.checkpoints import quantized_rows, refusal

ALPHA = 3.0


class Sink:
    """Collects what is written, as the writer puts it on the disk."""

    def __init__(self, item: Item):
        self.specs = {spec.name: spec for spec in stored_specs(item)}
        self.buffers = {name: bytearray(spec.nbytes) for name, spec in self.specs.items()}
        self.calls = 0

    def __call__(self, name: str, start: int, values: torch.Tensor) -> None:
        raw = bytes(values.contiguous().flatten().view(torch.uint8).tolist())
        assert start + len(raw) <= self.specs[name].nbytes
        self.buffers[name][start : start + len(raw)] = raw
        self.calls += 1

    def tensor(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        return torch.frombuffer(self.buffers[name], dtype=torch.uint8).view(spec.dtype).view(spec.shape)


@pytest.fixture
def make(tmp_path):
    """An item of a tensor that lies in a file."""

    def item(tensor: torch.Tensor, scheme: Scheme) -> Item:
        save_file({"w": tensor}, tmp_path / "w.safetensors")
        return Item("w", open_safetensors(tmp_path / "w.safetensors")["w"], scheme, "shared")

    return item


@pytest.fixture
def make_delta(tmp_path):
    def delta(a: torch.Tensor, b: torch.Tensor) -> Delta:
        save_file({"a": a, "b": b}, tmp_path / "lora.safetensors")
        table = open_safetensors(tmp_path / "lora.safetensors")
        return Delta(table["a"], table["b"], ALPHA / len(a))

    return delta


def rows_scheme(precision: str) -> Scheme:
    return Scheme(precision, "rows", EIGHT_BIT[precision])


def kept_scheme(precision: str) -> Scheme:
    return Scheme(precision, "kept", KEPT[precision])


def write(item: Item, delta: Delta | None = None) -> tuple[Sink, float | None]:
    sink = Sink(item)
    return sink, write_item(item, delta, sink)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_names_under_which_the_libraries_expect_what_is_stored(make):
    weight = randn(6, 4)
    assert stored_specs(make(weight, kept_scheme("bf16"))) == [
        TensorSpec(name="w", dtype=torch.bfloat16, shape=(6, 4)),
    ]
    assert stored_specs(make(weight, rows_scheme("int8"))) == [
        TensorSpec(name="w", dtype=torch.int8, shape=(6, 4)),
        TensorSpec(name="w_scale", dtype=torch.float32, shape=(6,)),
    ]
    assert stored_specs(make(weight, Scheme("fp8_quanto", "quanto", torch.float8_e4m3fn))) == [
        TensorSpec(name="w._data", dtype=torch.float8_e4m3fn, shape=(6, 4)),
        TensorSpec(name="w._scale", dtype=torch.float32, shape=(6, 1)),
    ]
    assert stored_specs(make(randn(5, 13), Scheme("nf4", "nf4", torch.uint8))) == [
        TensorSpec(name="w", dtype=torch.uint8, shape=(33, 1)),
        TensorSpec(name="w.absmax", dtype=torch.float32, shape=(2,)),
    ]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(37, 24), (37, 4, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_bits_of_the_whole(make, monkeypatch, precision, shape, dtype):
    item = make(randn(*shape).to(dtype), rows_scheme(precision))
    whole, whole_error = write(item)
    monkeypatch.setattr(store, "CHUNK_VALUES", 24 * 5)
    pieces, pieces_error = write(item)
    assert (whole.calls, pieces.calls) == (2, 9)  # 8 pieces of 5 rows or what is left, and the scales
    assert pieces.buffers == whole.buffers
    assert pieces_error == pytest.approx(whole_error, rel=1e-12)
    expected, scale = quantized_rows(item.ref.read().flatten(1), EIGHT_BIT[precision])
    assert torch.equal(whole.tensor("w").view(torch.uint8), expected.view(shape).view(torch.uint8))
    assert torch.equal(whole.tensor("w_scale"), scale)


def test_groups_are_rotated_behind_the_lora_and_before_quantizing(make, make_delta, monkeypatch):
    weight, a, b = randn(40, 48).bfloat16(), randn(4, 48, seed=1), randn(40, 4, seed=2)
    scheme, delta = dataclasses.replace(rows_scheme("int8"), group=16), make_delta(a, b)
    monkeypatch.setattr(store, "CHUNK_VALUES", 48 * 7)
    sink, error = write(make(weight, scheme), delta)
    merged = weight.double() + ALPHA / 4 * (b.double() @ a.double())
    turned, scale = rotated(merged, 16), sink.tensor("w_scale")[:, None].double()
    back = sink.tensor("w").double() * scale
    assert ((back - turned).abs() <= 0.5001 * scale).all()
    assert sink.tensor("w").abs().amax(1).eq(127).all()
    assert error == pytest.approx(((back - turned).norm() / turned.norm()).item(), rel=1e-5)
    # Turned back it is the weight that it was, with the same error.
    assert error == pytest.approx(((rotated(back, 16) - merged).norm() / merged.norm()).item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_kept_tensors_change_their_dtype_only(make, monkeypatch, precision):
    monkeypatch.setattr(store, "CHUNK_VALUES", 50)
    weight = randn(13, 10)
    sink, error = write(make(weight, kept_scheme(precision)))
    assert error is None
    assert torch.equal(sink.tensor("w"), weight.to(KEPT[precision]))


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.zeros(0, 3), torch.ones(1)])
def test_scalars_and_empty_tensors(make, tensor):
    sink, _ = write(make(tensor, kept_scheme("fp32")))
    assert sink.buffers["w"] == bytearray(tensor.numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_is_merged_in_float32_before_anything_else(make, make_delta, monkeypatch, dtype):
    weight, a, b = randn(40, 24).to(dtype), randn(4, 24, seed=1).to(dtype), randn(40, 4, seed=2).to(dtype)
    item, delta = make(weight, kept_scheme("fp32")), make_delta(a, b)
    merged = write(item, delta)[0].tensor("w")
    expected = weight.double() + ALPHA / 4 * (b.double() @ a.double())
    # Float32 rounding of five terms: nothing was rounded to the weight's own dtype on the way.
    magnitude = weight.double().abs() + ALPHA / 4 * (b.double().abs() @ a.double().abs())
    assert ((merged.double() - expected).abs() <= 6 * 2**-24 * magnitude).all()
    # What is quantized is this very tensor.
    seen = []
    quantize = store.quantize_chunk
    monkeypatch.setattr(store, "quantize_chunk", lambda w, *rest: (seen.append(w.clone()), quantize(w, *rest))[1])
    sink, _ = write(make(weight, rows_scheme("int8")), delta)
    assert torch.equal(torch.cat(seen), merged)
    assert torch.equal(sink.tensor("w"), quantized_rows(merged, torch.int8)[0])
    # And what is kept in bf16 was rounded once.
    assert torch.equal(write(make(weight, kept_scheme("bf16")), delta)[0].tensor("w"), merged.bfloat16())


def test_a_merge_in_pieces_is_the_merge(make, make_delta, monkeypatch):
    item, delta = make(randn(40, 24), kept_scheme("fp32")), make_delta(randn(4, 24, seed=1), randn(40, 4, seed=2))
    whole = write(item, delta)[0].tensor("w").clone()
    monkeypatch.setattr(store, "CHUNK_VALUES", 24 * 7)
    assert torch.allclose(write(item, delta)[0].tensor("w"), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "quanto"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_error_reported_is_that_of_what_was_written(make, make_delta, kind, precision):
    weight, delta = randn(40, 24), make_delta(randn(4, 24, seed=1), randn(40, 4, seed=2))
    sink, error = write(make(weight, Scheme(precision, kind, EIGHT_BIT[precision])), delta)
    data, scale = (sink.tensor(name) for name in sink.specs)
    merged = write(make(weight, kept_scheme("fp32")), delta)[0].tensor("w").double()
    back = data.double() * scale.double().view(-1, 1)
    assert error == pytest.approx(((back - merged).norm() / merged.norm()).item(), rel=1e-5)
    assert 1e-3 < error < 0.04


def test_nf4_is_bitsandbytes_own(make):
    weight = randn(20, 24)
    sink, error = write(make(weight, Scheme("nf4", "nf4", torch.uint8)))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(sink.tensor("w"), packed)
    assert torch.equal(sink.tensor("w.absmax"), state.absmax)
    back = bnb.dequantize_4bit(packed, state).double()
    assert error == pytest.approx(((back - weight).norm() / weight.double().norm()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "scheme", [rows_scheme("int8"), rows_scheme("fp8"), Scheme("int8_quanto", "quanto", torch.int8),
               Scheme("nf4", "nf4", torch.uint8)], ids=lambda s: s.name,
)  # fmt: skip
def test_a_weight_of_zeros_has_no_error(make, scheme):
    sink, error = write(make(torch.zeros(8, 16), scheme))
    assert error == 0
    assert not math.isnan(error)
    if scheme.kind != "nf4":
        data, scale = (sink.tensor(name) for name in sink.specs)
        assert not data.float().any()
        assert (scale == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "scheme", [kept_scheme("fp32"), kept_scheme("bf16"), rows_scheme("int8"), rows_scheme("fp8"),
               Scheme("int8_quanto", "quanto", torch.int8), Scheme("nf4", "nf4", torch.uint8)], ids=lambda s: s.name,
)  # fmt: skip
def test_a_value_that_is_not_finite(make, scheme, value):
    weight = randn(8, 16)
    weight[6, 2] = value
    with refusal(CheckpointError, "w holds NaN or infinity", "expected finite", "fetch"):
        write(make(weight, scheme))


def test_a_lora_that_is_not_finite(make, make_delta):
    a, b = randn(4, 24), randn(40, 4)
    b[3, 3] = float("inf")
    for scheme in (kept_scheme("bf16"), rows_scheme("int8")):
        with refusal(CheckpointError, "NaN or infinity"):
            write(make(randn(40, 24), scheme), make_delta(a, b))
