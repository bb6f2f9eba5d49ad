"""The same linear layer through other libraries, those that are installed; each quantizes the weight its own way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Tensor = torch.Tensor
Rival = Callable[[Tensor], Tensor]


def linear_rivals(weight_NK: Tensor, bias_N: Tensor) -> tuple[dict[str, Rival], dict[str, str]]:
    """Layers by name, bfloat16 in and out, and why the others are not among them."""
    rivals: dict[str, Rival] = {}
    absent: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            layer = make(weight_NK, bias_N)
            layer(torch.randn(32, weight_NK.shape[1], device=weight_NK.device, dtype=weight_NK.dtype))
            rivals[name] = layer
        except Exception as error:  # whatever a library that is not ours raises here, its row stays empty and says why
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return rivals, absent


def _plain(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = (nn.Parameter(t.clone(), requires_grad=False) for t in (weight, bias))
    return layer


def _torchao(config: str, **options: object) -> Callable[[Tensor, Tensor], Rival]:
    def make(weight: Tensor, bias: Tensor) -> Rival:
        import torchao.quantization as ao

        model = nn.Sequential(_plain(weight, bias))
        values = {key: getattr(ao, value)() if isinstance(value, str) else value for key, value in options.items()}
        ao.quantize_(model, getattr(ao, config)(**values))
        # Its passes before and behind the product are meant to be fused by the compiler.
        return torch.compile(model, mode="max-autotune-no-cudagraphs")

    return make


def _comfy_kitchen(weight: Tensor, bias: Tensor) -> Rival:
    import comfy_kitchen

    q, scale = comfy_kitchen.quantize_int8_rowwise(weight)
    return lambda x: comfy_kitchen.int8_linear(x, q, scale.reshape(-1), bias, torch.bfloat16)


def _quanto(weight: Tensor, bias: Tensor) -> Rival:
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(_plain(weight, bias))
    quantize(model, weights=qint8)
    freeze(model)
    return model


def _bitsandbytes(weight: Tensor, bias: Tensor) -> Rival:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": weight.cpu(), "bias": bias.cpu()})
    return layer.to(weight.device)


MAKERS: dict[str, Callable[[Tensor, Tensor], Rival]] = {
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8 dynamic, a row": _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"),
    "comfy-kitchen int8": _comfy_kitchen,
    "optimum-quanto int8, weight only": _quanto,
    "bitsandbytes LLM.int8": _bitsandbytes,
}
