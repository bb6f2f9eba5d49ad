import pytest
import torch

from lowvram.denoise.kv_format import Int8Format, PlainFormat, kv_format

SHAPES = [(1, 1, 2), (7, 3, 16), (48, 4, 32)]


def keys_and_values(shape, dtype=torch.float32):
    """Keys with channels far from zero, as those behind a trained norm."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return (k + 20 * torch.randn(shape[1:], generator=generator)).to(dtype), v.to(dtype)


def there_and_back(kind, k, v):
    block = torch.zeros(kind.nbytes(len(k)), dtype=torch.uint8)
    kind.write(block, k, v)
    return kind.read(block, len(k), k.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_comes_back_as_it_was(shape, dtype):
    k, v = keys_and_values(shape, dtype)
    k2, v2 = there_and_back(PlainFormat(*shape[1:], dtype), k, v)
    assert torch.equal(k, k2)
    assert torch.equal(v, v2)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_each_token_and_head_or_channel(shape):
    k, v = keys_and_values(shape)
    k2, v2 = there_and_back(Int8Format(*shape[1:]), k, v)
    mean = k.mean(dim=0).bfloat16().float()
    for got, want, spread, along in ((k2, k, k - mean, -1), (v2, v, v, 0)):
        step = spread.abs().amax(dim=along, keepdim=True) / 127
        assert ((got - want).abs() <= step * 0.51 + 1e-6).all()


def test_taking_out_the_mean_pays():
    k, v = keys_and_values((256, 4, 32))
    smoothed, _ = there_and_back(Int8Format(4, 32), k, v)
    step = k.abs().amax(dim=-1, keepdim=True) / 127
    plain = (k / step).round() * step
    assert (smoothed - k).norm() < 0.5 * (plain - k).norm()


def test_what_is_encoded_is_not_touched():
    k, v = keys_and_values((16, 2, 8))
    before = k.clone(), v.clone()
    there_and_back(Int8Format(2, 8), k, v)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_zeros_come_back_as_zeros():
    zeros = torch.zeros(5, 2, 8)
    assert all(not t.any() for t in there_and_back(Int8Format(2, 8), zeros, zeros))


def test_bytes_of_a_block_of_the_14b_model():
    heads, width, tokens = 40, 128, 3168
    assert PlainFormat(heads, width, torch.bfloat16).nbytes(tokens) == 2 * tokens * 5120 * 2
    keys, values = tokens * 5120 + tokens * 40 * 2 + 5120 * 2, 25 * 128 * 5120 + 25 * 5120 * 2 + 5120 * 2
    assert Int8Format(heads, width).nbytes(tokens) == keys + values


def test_a_scheme_names_its_kind():
    assert isinstance(kv_format("int8", 2, 8, torch.float32), Int8Format)
    assert isinstance(kv_format("plain", 2, 8, torch.float32), PlainFormat)


@pytest.mark.parametrize("scheme", ["int8", "plain"])
def test_views_are_made_once_and_go_with_what_they_are_of(scheme):
    kind = kv_format(scheme, 2, 8, torch.float32)
    slab = torch.zeros(2 * kind.nbytes(4), dtype=torch.uint8)
    slot = slab[: kind.nbytes(4)]
    views = kind._views
    assert views.of(slot, 4) is views.of(slot, 4)
    assert views.of(slot, 4) is not views.of(slab[: kind.nbytes(4)], 4)
    del slot
    assert not views._kept
