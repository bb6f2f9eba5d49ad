"""Trials of every operation of ``lowvram_kernels`` on random operands, its backends side by side, and their judgement.

Bounds are those of the kernels' tests. Expected values are float64 on the same quantized operands, for a sample of the
rows where all would take gigabytes; that nothing is NaN or infinite is asked of every number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from lowvram_kernels.channel_norm import reference_channel_norm_silu
from lowvram_kernels.choices import ONE_BY_ONE, RIVALS, TORCH, TRITON
from lowvram_kernels.cpu_products import FLOAT32, INT_MM, SCALED_MM
from lowvram_kernels.linear import Operands, fp8_mm, int8_mm, library_mm, linear_q8, reference_w8a8, wide_mm
from lowvram_kernels.norm import reference_add_gated, reference_norm_rows
from lowvram_kernels.rotation import largest_group, rotated
from lowvram_kernels.rows import reference_rows

Tensor = torch.Tensor
HALF_STEP = 0.502
"""Of rounding to integers; what is beyond a half is the rounding of scale and product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """An error and the largest that is right."""

    error: float
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # never where the error is NaN


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN where either has one, which no bound lets through."""
    expected = expected.double()
    return ((out.to(expected.device).double() - expected).norm() / expected.norm()).item()


def steps_off(values: Tensor, scale: Tensor, exact: Tensor) -> float:
    """The largest distance of ``values * scale`` from ``exact``, in steps of ``scale``: half a step where every number
    was rounded to the nearest."""
    return ((values.double() * scale.double() - exact.double()).abs() / scale.double()).max().item()


def worst(measured: Mapping[str, Measured]) -> tuple[str, Measured]:
    """The first that is wrong, otherwise the one nearest to its bound."""
    for name, one in measured.items():
        if not one.right:
            return name, one
    return max(measured.items(), key=lambda item: item[1].error / item[1].bound if item[1].bound else 0.0)


def beside_finite(outputs: Mapping[str, Tensor]) -> str:
    """Which outputs hold numbers that are not finite, "" for none; the references of all trials are finite."""
    wrong = []
    for name, out in outputs.items():
        if out.is_floating_point() and not (good := out.float().isfinite()).all():
            wrong.append(f"{name} has {int((~good).sum())} of {out.numel()} values that are NaN or infinite")
    return "; ".join(wrong)


Outputs = Mapping[str, Tensor]
BF16 = torch.finfo(torch.bfloat16).eps
EPS = 1e-6
SAMPLED = 31
"""Every so manieth row is compared: less than the rows of any tile, so that each tile has one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a block's operands. ``slots`` are the tokens of the ring's blocks that attention reads."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    ffn: int
    slots: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SMALL = Sizes(name="small", tokens=33, heads=5, head_dim=16, ffn=216, slots=(40, 33, 7))
FULL = Sizes(name="14B", tokens=3168, heads=40, head_dim=128, ffn=13824, slots=(3168,) * 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One operation on operands that stand ready. ``judge`` gives the errors of a backend's outputs by name."""

    backends: Mapping[str, Callable[[], Outputs]]
    judge: Callable[[Outputs], Mapping[str, Measured]]


def sampled(rows: int) -> Tensor:
    """Indices of the rows to compare: evenly spread, and the last."""
    return torch.cat([torch.arange(0, rows - 1, SAMPLED), torch.tensor([rows - 1])])


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device)


def quantize_rows(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, most: int = 1, *, smooth: bool = False
) -> Trial:
    """``most``: channels to rotate together, where so many divide the width; ``smooth``: times factors before."""
    group = largest_group(sizes.ffn, most)
    x = random(device, sizes.tokens, sizes.ffn).bfloat16() * torch.logspace(-3, 3, sizes.tokens, device=device)[:, None]
    factors = torch.exp2(torch.arange(sizes.ffn, device=device) % 5 - 2.0).bfloat16() if smooth else None

    def triton() -> Outputs:
        from lowvram_kernels.triton_rows import quantize_rows_triton

        return dict(zip(("values", "scale"), quantize_rows_triton(x, dtype, group, factors), strict=True))

    def judge(out: Outputs) -> Mapping[str, Measured]:
        _, expected = reference_rows(x, dtype, group, factors)
        found = {"scale": Measured(error=relative_error(out["scale"], expected), bound=2e-6)}
        exact = rotated(x.double() if factors is None else x.double() * factors.double(), group)
        if dtype is torch.int8:
            return found | {"values": Measured(error=steps_off(out["values"], out["scale"], exact), bound=HALF_STEP)}
        # A value of fp8 e4m3 is within 2^-4 of what it stands for, or within half of the smallest step, 2^-9.
        off = (out["values"].double() * out["scale"].double() - exact).abs()
        allowed = exact.abs() * 2.0**-4 + out["scale"].double() * 2.0**-10
        return found | {"values": Measured(error=(off / allowed).max().item(), bound=1.001)}

    def plain() -> Outputs:
        return dict(zip(("values", "scale"), reference_rows(x, dtype, group, factors), strict=True))

    return Trial(backends={TRITON: triton, TORCH: plain}, judge=judge)


def linear(sizes: Sizes, device: torch.device, dtype: torch.dtype, *, gelu: bool) -> Trial:
    """The layer into the FFN with GELU, the one out of it without."""
    depth, columns = (sizes.width, sizes.ffn) if gelu else (sizes.ffn, sizes.width)
    x, bias = random(device, sizes.tokens, depth), random(device, columns).bfloat16()
    weight, scales = reference_rows(random(device, columns, depth), dtype)
    q, scale = reference_rows(x, dtype)
    weight_scale, int8 = scales[:, 0].contiguous(), dtype is torch.int8
    operands = (q, scale, weight, weight_scale, bias)

    def triton() -> Outputs:
        from lowvram_kernels.triton_linear import linear_triton

        return {"product": linear_triton(*operands, gelu=gelu, dtype=torch.bfloat16)}

    def library() -> Outputs:
        out = (int8_mm if int8 else fp8_mm)(*operands, torch.bfloat16)
        return {"product": torch.nn.functional.gelu(out, approximate="tanh") if gelu else out}

    def wide() -> Outputs:
        out = wide_mm(*operands, torch.bfloat16)
        return {"product": torch.nn.functional.gelu(out, approximate="tanh") if gelu else out}

    rows = sampled(sizes.tokens).to(device)
    # Tensor cores sum fp8 products in fewer bits than float32, and PyTorch's GELU reads what was rounded.
    bound = BF16 if int8 else BF16 + 2e-3

    def judge(out: Outputs) -> Mapping[str, Measured]:
        expected = reference_w8a8(x[rows], weight, weight_scale, bias, gelu=gelu)
        return {"product": Measured(error=relative_error(out["product"][rows], expected), bound=bound)}

    def other(name: str) -> Outputs:
        out = library_mm(name, *operands, torch.bfloat16)
        return {"product": torch.nn.functional.gelu(out, approximate="tanh") if gelu else out}

    rivals = {name: functools.partial(other, name) for name in RIVALS["linear_w8a8 int8"]} if int8 else {}
    own = {TRITON: triton, INT_MM if int8 else SCALED_MM: library, FLOAT32: wide}
    return Trial(backends=own | rivals, judge=judge)


def linears(sizes: Sizes, device: torch.device) -> Trial:
    """Queries of a block's tokens, keys and values of the text's, of which there are fewer."""
    rows = (sizes.tokens, -(-sizes.tokens // 6), 1 + sizes.tokens // 9)
    xs = [random(device, count, sizes.width) for count in rows]
    products: list[Operands] = []
    for x in xs:
        weight, scales = reference_rows(random(device, sizes.width, sizes.width), torch.int8)
        bias = random(device, sizes.width).bfloat16()
        products.append((*reference_rows(x, torch.int8), weight, scales[:, 0].contiguous(), bias))

    def named(outs: Sequence[Tensor]) -> Outputs:
        return dict(zip(("first", "second", "third"), outs, strict=True))

    def triton() -> Outputs:
        from lowvram_kernels.triton_linears import linears_triton

        return named(linears_triton(products, dtype=torch.bfloat16))

    def one_by_one() -> Outputs:
        return named([linear_q8(*product, dtype=torch.bfloat16) for product in products])

    def judge(out: Outputs) -> Mapping[str, Measured]:
        found = {}
        for (name, values), x, (_, _, weight, scale, bias) in zip(out.items(), xs, products, strict=True):
            some = sampled(len(x)).to(device)
            error = relative_error(values[some], reference_w8a8(x[some], weight, scale, bias))
            found[name] = Measured(error=error, bound=BF16)
        return found

    return Trial(backends={TRITON: triton, ONE_BY_ONE: one_by_one}, judge=judge)


def channel_norm_silu(sizes: Sizes, device: torch.device) -> Trial:
    """Pixels behind two frames that a convolution remembers, of the VAE's widest stage: 96 channels of four frames."""
    pixels, channels = sizes.tokens * (256 if sizes is FULL else 1), 96 if sizes is FULL else 24
    x = random(device, pixels, channels).bfloat16() * 3
    gamma, room = random(device, channels).bfloat16(), random(device, pixels + 2, channels).bfloat16()

    def run(compute: Callable[..., Tensor]) -> Outputs:
        out = room.clone()
        compute(x, gamma, out[2:])
        return {"behind": out[2:], "before": out[:2]}

    def triton() -> Outputs:
        from lowvram_kernels.triton_channel_norm import channel_norm_silu_triton

        return run(channel_norm_silu_triton)

    rows = sampled(pixels).to(device)

    def judge(out: Outputs) -> Mapping[str, Measured]:
        exact = reference_channel_norm_silu(x[rows].double(), gamma.double())
        return {
            "behind": Measured(error=relative_error(out["behind"][rows], exact), bound=BF16),
            "before": Measured(error=relative_error(out["before"], room[:2]), bound=0.0),
        }

    return Trial(backends={TRITON: triton, TORCH: lambda: run(reference_channel_norm_silu)}, judge=judge)


def fused_norm(
    sizes: Sizes, device: torch.device, dtype: torch.dtype | None, *, gated: bool = True, most: int = 1
) -> Trial:
    """Gate and residual, LayerNorm, modulation, rounding to ``dtype`` in rotated groups of ``most`` channels as far as
    they divide the width; without one, gate and residual alone; with ``gated`` False the norm alone."""
    group = largest_group(sizes.width, most)
    x, y = random(device, sizes.tokens, sizes.width) * 3 + 1, random(device, sizes.tokens, sizes.width).bfloat16()
    gate, gain, offset = (random(device, 3, sizes.width) for _ in range(3))
    added, gate_ = (y, gate) if gated else (None, None)
    gain_, offset_ = (gain, offset) if dtype is not None else (None, None)

    def named(residual: Tensor, values: Tensor | None, scale: Tensor | None) -> Outputs:
        every = {"residual": residual, "values": values, "scale": scale}
        kept = {name: value for name, value in every.items() if value is not None}
        return kept if dtype is not None else {"residual": residual}

    def triton() -> Outputs:
        from lowvram_kernels.triton_norm import fused_triton

        return named(*fused_triton(x, added, gate_, gain_, offset_, EPS, dtype, None, group))

    def plain() -> Outputs:
        residual = reference_add_gated(x, y, gate) if gated else x
        if dtype is None:
            return {"residual": residual}
        return named(residual, *reference_norm_rows(residual, gain, offset, eps=EPS, dtype=dtype, group=group))

    def judge(out: Outputs) -> Mapping[str, Measured]:
        expected = reference_add_gated(x.double(), y, gate) if gated else x.double()
        found = {"residual": Measured(error=relative_error(out["residual"], expected), bound=1e-6)}
        if dtype is None:
            return found
        exact, _ = reference_norm_rows(out["residual"].double(), gain, offset, eps=EPS, dtype=torch.float64)
        if dtype is torch.bfloat16:
            return found | {"values": Measured(error=relative_error(out["values"], exact), bound=BF16)}
        exact = rotated(exact, group)
        _, scale = reference_norm_rows(out["residual"], gain, offset, eps=EPS, dtype=dtype, group=group)
        assert scale is not None
        found["scale"] = Measured(error=relative_error(out["scale"], scale), bound=2e-6)
        if dtype is torch.int8:
            values = Measured(error=steps_off(out["values"], out["scale"], exact), bound=HALF_STEP)
        else:
            back = out["values"].double() * out["scale"].double()
            values = Measured(error=relative_error(back, exact), bound=0.03)
        return found | {"values": values}

    return Trial(backends={TRITON: triton, TORCH: plain}, judge=judge)
