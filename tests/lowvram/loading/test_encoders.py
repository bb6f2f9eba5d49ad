"""The text encoder's 8-bit Linears need no compiler, also where their library would like to use one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from optimum.quanto import WeightQBytesTensor
from optimum.quanto.library.extensions import extension
from optimum.quanto.tensor.weights import qbytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.loading.encoders import swap_text_linears

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture
def compilers(monkeypatch) -> list[str]:
    """A GPU of sm_89 under CUDA as the library sees it, with its extension at hand; what was compiled."""
    asked: list[str] = []

    def load(name: str, **_: object) -> None:
        asked.append(name)
        raise RuntimeError("no nvcc here")

    monkeypatch.setattr(extension, "load", load)
    monkeypatch.setattr(qbytes, "is_extension_available", lambda name: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    return asked


def swapped(kind: str, device: str, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """A Linear of a shape that the library has kernels for."""
    data = torch.ones(128, 64, device=device).to(KINDS[kind])
    tensors = tensors or {"l.weight._data": data, "l.weight._scale": torch.ones(128, 1, device=device)}
    component = SimpleNamespace(quantized_names=["l.weight"], tensor_scheme=lambda name: kind)
    model = nn.Module()
    model.l = nn.Linear(64, 128, bias=False, device="meta")
    swap_text_linears(model, component, tensors, torch.bfloat16)
    return model.l


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_weights_are_dequantized_at_use(compilers, kind):
    with FakeTensorMode():  # tensors of a GPU without their values
        linear = swapped(kind, "cuda")
        assert linear.weight.device.type == "cuda"
        assert type(linear.weight.data) is WeightQBytesTensor
        assert type(linear.qweight) is WeightQBytesTensor
    assert compilers == []


def test_its_own_choice_would_be_compiled(compilers):
    """What is gone around is still there; else this, and its comment, can go."""
    from optimum.quanto import qfloat8_e4m3fn
    from optimum.quanto.tensor.weights.marlin import MarlinF8QBytesTensor

    made = []

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarlinF8QBytesTensor, "__new__", lambda cls, *args, **_: made.append(cls))
        data = torch.ones(128, 64, device="cuda").to(torch.float8_e4m3fn)
        scale = torch.ones(128, 1, device="cuda", dtype=torch.bfloat16)
        WeightQBytesTensor.create(qfloat8_e4m3fn, 0, data.shape, data.stride(), data, scale, None)
    assert made == [MarlinF8QBytesTensor]


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weight(compilers, kind):
    generator = torch.Generator().manual_seed(1)
    data = (torch.rand(128, 64, generator=generator) * 100 - 50).to(KINDS[kind])
    scale = torch.rand(128, 1, generator=generator)
    linear = swapped(kind, "cpu", {"l.weight._data": data, "l.weight._scale": scale})
    x = torch.randn(3, 64, generator=generator).to(torch.bfloat16)
    with torch.inference_mode():
        found = linear(x)
    expected = x.float() @ (data.float() * scale.to(torch.bfloat16).float()).T
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert compilers == []
