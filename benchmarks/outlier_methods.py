"""Methods against outliers at 8 bits a weight and an activation: ours by this project's code, others' by their
documented arithmetic, and peers by their own packages where those run on this processor.

Every method gives a Linear's product without its bias, from what calibration saw and what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from trained_networks import Layer

from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rotation import GROUP, largest_group, matrix
from lowvram_kernels.rows import quantize_rows, reference_rows
from lowvram_quantize.smoothing import smooth_factors

Tensor = torch.Tensor
Forward = Callable[[Tensor], Tensor]
LLM_INT8_THRESHOLD = 6.0  # of the paper, https://arxiv.org/abs/2208.07339


@dataclasses.dataclass(frozen=True)
class Method:
    """``prepare`` makes of a layer what computes its product; ``note`` says how it came about; ``runs``: as a user runs
    it, not by float32 products of rounded values."""

    prepare: Callable[[Layer], Forward]
    note: str = ""
    runs: bool = False


def rounded(x: Tensor) -> Tensor:
    """int8 and back, one scale a row, as ours are rounded."""
    q, scale = reference_rows(x, torch.int8)
    return q.float() * scale


def per_tensor(layer: Layer) -> Forward:
    weight = rounded(layer.weight)
    return lambda x: rounded(x.view(1, -1)).view(x.shape) @ weight.t()


def ours(layer: Layer, group: int) -> Forward:
    """As an artifact has it and a run computes it."""
    group = largest_group(layer.weight.shape[1], group)
    q, scale = quantize_rows(layer.weight, torch.int8, group=group)
    return lambda x: linear_w8a8(x, q, scale[:, 0], None, group=group)


def smoothed(layer: Layer, *, measured: bool) -> Forward:
    """Factors an input channel before, as ``convert`` chooses them: from the weight alone where a norm is in front, and
    with activations that were ``measured`` from both. Planted ones are taken for what comes from a norm."""
    if not measured and layer.kind in ("o", "ffn-down"):
        return ours(layer, GROUP)
    rms = layer.calibration.square().mean(dim=0).sqrt() if measured else None
    factors = smooth_factors(layer.weight.norm(dim=0), rms)
    group = largest_group(layer.weight.shape[1], GROUP)
    q, scale = quantize_rows(layer.weight / factors, torch.int8, group=group)
    return lambda x: linear_w8a8(x, q, scale[:, 0], None, group=group, smooth_K=factors)


def by_matrix(layer: Layer, group: int, make: Callable[[int], Tensor]) -> Forward:
    """Groups rotated by another matrix than ours."""
    h = make(largest_group(layer.weight.shape[1], group)).float()

    def turned(x: Tensor) -> Tensor:
        return (x.reshape(-1, len(h)) @ h).view(x.shape)

    weight = rounded(turned(layer.weight))
    return lambda x: rounded(turned(x)) @ weight.t()


def sylvester(group: int) -> Tensor:
    two = matrix(2)
    return two if group == 2 else torch.kron(two, sylvester(group // 2))


def smooth_scale(layer: Layer, alpha: float) -> Tensor:
    """SmoothQuant (https://arxiv.org/abs/2211.10438): s = amax|x|^alpha / amax|w|^(1 - alpha), a channel."""
    x, w = (t.abs().amax(0).clamp_min(1e-5) for t in (layer.calibration, layer.weight))
    return x**alpha / w ** (1 - alpha)


def smooth(layer: Layer, alpha: float) -> Forward:
    scale = smooth_scale(layer, alpha)
    weight = rounded(layer.weight * scale)
    return lambda x: rounded(x / scale) @ weight.t()


def smooth_best(layer: Layer) -> Forward:
    """The alpha of 0.1 to 0.9 that is best where it is calibrated."""
    exact = layer.calibration @ layer.weight.t()
    tried = [smooth(layer, alpha / 10) for alpha in range(1, 10)]
    return max(tried, key=lambda forward: decibels(exact, forward(layer.calibration)))


def low_rank(layer: Layer, rank: int) -> Forward:
    """SVDQuant (https://arxiv.org/abs/2411.05007): SmoothQuant, the weight's largest singular values in bf16 beside."""
    scale = smooth_scale(layer, 0.5)
    u, s, vh = torch.linalg.svd(layer.weight * scale, full_matrices=False)
    up, down = ((u[:, :rank] * s[:rank]).bfloat16().float(), vh[:rank].bfloat16().float())
    weight = rounded(layer.weight * scale - up @ down)
    return lambda x: rounded(x / scale) @ weight.t() + ((x / scale).bfloat16().float() @ down.t()) @ up.t()


def wide_down(layer: Layer) -> Forward:
    if layer.kind != "ffn-down":
        return ours(layer, 1)
    weight = layer.weight.bfloat16().float()
    return lambda x: x.bfloat16().float() @ weight.t()


def plain_linear(layer: Layer) -> nn.Sequential:
    linear = nn.Linear(layer.weight.shape[1], len(layer.weight), bias=False)
    linear.weight.data.copy_(layer.weight)
    return nn.Sequential(linear)


def quanto(layer: Layer) -> Forward:
    """Activations by one scale a tensor, which calibration finds."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = plain_linear(layer)
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        model(layer.calibration)
    freeze(model)
    return lambda x: model(x).dequantize()


def torchao(layer: Layer) -> Forward:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = plain_linear(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def convrot(layer: Layer) -> Forward:
    """The largest power of 4 up to its default of 256 that divides the width."""
    import comfy_kitchen
    from comfy_kitchen.backends.eager.quantization import quantize_int8_convrot_weight

    group = next(size for size in (256, 64, 16, 4) if layer.weight.shape[1] % size == 0)
    q, scale = quantize_int8_convrot_weight(layer.weight, group)
    options = {"out_dtype": torch.float32, "convrot": True, "convrot_groupsize": group}
    return lambda x: comfy_kitchen.int8_linear(x, q, scale, **options)


def llm_int8(layer: Layer) -> Forward:
    """LLM.int8(): in inference a processor rounds activations, too; columns with a value above the threshold apart."""
    import bitsandbytes

    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
    linear = bitsandbytes.nn.Linear8bitLt(
        layer.weight.shape[1], len(layer.weight), bias=False, has_fp16_weights=False, threshold=LLM_INT8_THRESHOLD
    )
    linear.weight = bitsandbytes.nn.Int8Params(layer.weight.clone(), requires_grad=False, has_fp16_weights=False)
    return linear.to("cpu").eval()


LLM_INT8 = "bitsandbytes LLM.int8 (large columns in 16 bit)"
BEFORE, DEFAULT, MEASURED = "int8 a token", "smoothed, rotated by 256 (default)", "smoothed by activations, rotated"
PEERS = {
    "optimum-quanto": "optimum-quanto",
    "torchao": "torchao",
    "comfy-kitchen ConvRot": "comfy-kitchen",
    LLM_INT8: "bitsandbytes",
}
METHODS: dict[str, Method] = {
    "int8 a tensor": Method(per_tensor),
    BEFORE: Method(functools.partial(ours, group=1), "convert --rotate none", runs=True),
    "SmoothQuant 0.5": Method(functools.partial(smooth, alpha=0.5), "needs calibration"),
    "SmoothQuant, best": Method(smooth_best, "needs calibration; the best exponent of each Linear"),
    "SVD of rank 16": Method(functools.partial(low_rank, rank=16), "needs calibration"),
    "SVD of rank 32": Method(functools.partial(low_rank, rank=32), "needs calibration"),
    "FFN-down in bf16": Method(wide_down),
    **{
        f"Sylvester by {group}": Method(functools.partial(by_matrix, group=group, make=sylvester))
        for group in (32, 64, 128, 256)
    },
    **{
        f"rotated by {group}": Method(functools.partial(ours, group=group), f"convert --rotate {group}", runs=True)
        for group in (16, 32, 64, 128)
    },
    "rotated by 256": Method(functools.partial(ours, group=GROUP), "convert --no-smooth", runs=True),
    DEFAULT: Method(functools.partial(smoothed, measured=False), "convert", runs=True),
    MEASURED: Method(functools.partial(smoothed, measured=True), "convert --activations; needs calibration", runs=True),
    "optimum-quanto": Method(quanto, "the package; needs calibration", runs=True),
    "torchao": Method(torchao, "the package", runs=True),
    "comfy-kitchen ConvRot": Method(convrot, "the package", runs=True),
    LLM_INT8: Method(llm_int8, "the package; large columns in 16 bit", runs=True),
}


def installed(name: str) -> str | None:
    """The version of a peer's package, None where it is not installed; of other methods ""."""
    try:
        return version(PEERS[name]) if name in PEERS else ""
    except PackageNotFoundError:
        return None


def decibels(exact: Tensor, value: Tensor) -> float:
    exact = exact.double()
    return 10 * math.log10((exact.square().sum() / (exact - value.double()).square().sum()).item())


def signal_to_noise(layer: Layer, method: Method) -> float:
    """Of the Linear's product, in dB, over all rows."""
    with torch.no_grad():
        return decibels(layer.x.double() @ layer.weight.double().t(), method.prepare(layer)(layer.x))


def milliseconds(layer: Layer, method: Method, repeats: int = 5) -> float:
    """Of this thread's own processor time, which other processes do not lengthen."""
    times: list[float] = []
    with torch.no_grad():
        forward = method.prepare(layer)
        for _ in range(repeats + 1):
            begin = time.thread_time()
            forward(layer.x)
            times.append(time.thread_time() - begin)
    return statistics.median(times[1:]) * 1e3


def facts(name: str, method: Method) -> dict[str, Any]:
    how = ("" if method.runs else "float32 products of rounded values; ") + (method.note or "computed as documented")
    return {"how": how, "version": installed(name) or None}
