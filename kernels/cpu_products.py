"""8-bit products on a processor, and which of them is right and fastest on this one: tried out once a process.

A name does not tell. Without VNNI oneDNN's int8 product adds pairs in 16 bits, which saturate where activations and
weights are both large, and PyTorch's own loop, taken on some processors instead, is right and far slower than float32.
So each is compared with the exact product first, then timed in one thread by that thread's own processor time, which
other processes on the machine do not lengthen: some 20 ms in all, so that nothing of it has to be kept.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from lowvram_kernels.wide_product import wide_product

Tensor = torch.Tensor
Product = Callable[[Tensor, Tensor], Tensor]

INT_MM, SCALED_MM, FLOAT32 = "torch._int_mm", "torch._scaled_mm", "torch float32"

# Rows, depth, columns. Few and odd ones take other paths than many; depths up to 1040, where float32 is exact in int8.
TRIED = ((1, 64, 16), (9, 81, 7), (64, 256, 64))
TIMED = (64, 512, 512)
ROUNDS, SECONDS = 5, 0.1
# What is first in the order stays unless another one is so much faster: near a tie, runs keep giving the same bits.
MARGIN = 1.25


def int_product(q_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """int8 q @ weight.T, summed in int32; as float32 [M, N]."""
    return torch._int_mm(q_MK, weight_NK.t()).float()


def scaled_product(q_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """fp8 q @ weight.T in float32 [M, N]."""
    one = torch.ones((), device=q_MK.device)
    return torch._scaled_mm(q_MK, weight_NK.t(), one, one, out_dtype=torch.float32)


# The preferred one first. Both widen fp8 to float32, PyTorch by the tile and oneDNN inside; a processor that multiplies
# fp8 itself would show in the time.
PRODUCTS: dict[torch.dtype, dict[str, Product]] = {
    torch.int8: {INT_MM: int_product, FLOAT32: wide_product},
    torch.float8_e4m3fn: {FLOAT32: wide_product, SCALED_MM: scaled_product},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """``wrong``: why, by name, for what must not run here. ``preferred``: what comes first; ``reason``: the times."""

    wrong: dict[str, str]
    preferred: str
    reason: str


@functools.cache
def findings(dtype: torch.dtype) -> Findings:
    """What this processor makes of the products of int8 or float8_e4m3fn operands."""
    # A thread of its own: modes that watch or redirect operations do not reach it, nor does its number of threads last.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(examine, PRODUCTS[dtype], dtype, torch.get_num_threads()).result()


def examine(products: dict[str, Product], dtype: torch.dtype, threads: int) -> Findings:
    """Try and time ``products``, in their order of preference; ``threads``: what to set PyTorch's back to."""
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            wrong = {name: why for name, product in products.items() if (why := fault(product, dtype))}
            able = {name: product for name, product in products.items() if name not in wrong}
            times = milliseconds(able, dtype)
    finally:
        torch.set_num_threads(threads)
    first, fastest = next(iter(able)), min(times, key=times.__getitem__)
    preferred = fastest if times[first] > MARGIN * times[fastest] else first
    size = " x ".join(str(n) for n in TIMED)
    taken = ", ".join(f"{name} {times[name]:.2f} ms" for name in times)
    return Findings(wrong=wrong, preferred=preferred, reason=f"{size} in one thread: {taken}")


def fault(product: Product, dtype: torch.dtype) -> str:
    """Why ``product`` cannot be taken here; empty where nothing is wrong with it."""
    for shape in TRIED:
        for q, weight in (random_operands(shape, dtype), largest_operands(shape, dtype)):
            exact = q.double() @ weight.double().t()
            # Sums of int8 are exact up to such depths; those of fp8 may round at each of K additions.
            bound = 0.0 if dtype is torch.int8 else shape[1] * 2.0**-24
            bounds = bound * (q.double().abs() @ weight.double().abs().t())
            try:
                error = (product(q, weight).double() - exact).abs()
            except (RuntimeError, AttributeError) as refused:  # not built for this processor, or not in this PyTorch
                return f"it does not run on this processor: {str(refused).splitlines()[0]}"
            if not (error <= bounds).all():
                return f"its products are wrong on this processor, by up to {error.max().item():.0f} for {shape}"
    return ""


def milliseconds(products: dict[str, Product], dtype: torch.dtype) -> dict[str, float]:
    """The least of a few runs each, in turn; fewer where they take long."""
    q, weight = random_operands(TIMED, dtype)
    times: dict[str, float] = {}
    begin = time.thread_time()
    for turn in range(ROUNDS + 1):
        for name, product in products.items():
            started = time.thread_time()
            product(q, weight)
            taken = (time.thread_time() - started) * 1e3
            if turn:  # the first one is to warm up
                times[name] = min(taken, times.get(name, taken))
        if turn and time.thread_time() - begin > SECONDS:
            break
    return times


def random_operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Over the whole range of values; from a generator of their own, so that no other random number changes."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(depth)
    q, weight = (torch.randint(-127, 128, (n, depth), generator=generator) for n in (rows, columns))
    return q.to(dtype), weight.to(dtype)


def largest_operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All sums as large as they can be, with both signs."""
    rows, depth, columns = shape
    q, weight = torch.full((rows, depth), 127), torch.full((columns, depth), 127)
    weight[1::2] = -127
    return q.to(dtype), weight.to(dtype)
