"""How fast are the 8-bit kernels, and what do they take of a chip?

python benchmarks/kernels.py                 on a CUDA machine: writes benchmarks/results/kernels_<gpu>.json
python benchmarks/kernels.py --tune          there too: every tile of the product and of attention that fits
python benchmarks/kernels.py --cpu [--out F] int8 against float32 on one thread, and a small whole block
python benchmarks/kernels.py --aot [--out F] registers and shared memory on every chip, compiled without a GPU

Times are medians of single calls between CUDA events, the L2 cache overwritten before each; inputs are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_bars import bars_of
from kernel_block import PUBLISHED, SMALL, block_row, graph_row
from kernel_rivals import linear_rivals
from kernel_tiles import tuned
from torch.nn import functional as F

from lowvram.denoise.cuda_graphs import CudaCapture
from lowvram_kernels.chips import GENERATIONS, generation, has_fp8_units, has_triton
from lowvram_kernels.libraries import COMFY, SAGE, attend
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.norm import add_gated, add_gated_norm_rows, norm_rows
from lowvram_kernels.projected import Projected, Projection, TurnedSink
from lowvram_kernels.ring_attention import reference_ring_attention, ring_attention
from lowvram_kernels.ring_codec import KVBlock, SlotLayout, decode_block, encode_block, room_for_keys, rotate_block
from lowvram_kernels.rope import norm_rope
from lowvram_kernels.rotation import GROUP
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import trace_kernels

RESULTS = Path(__file__).parent / "results"
ROWS = (3168, 12672)
LAYERS = ((5120, 5120), (5120, 13824), (13824, 5120))  # (K, N) of a DiT layer's products
HEADS, HEAD_DIM = 40, 128
RING_TOKENS, SINK_TOKENS, QUERIES = (3168, 3168, 3168, 3168), 2640, 3168
LATENT_SIZE = (48, 88)
"""Of 704 x 384 pixels."""
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--aot", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.aot:
        write(aot_table(), options.out or RESULTS / "kernels_aot.json")
    elif options.cpu:
        write(cpu_table(), options.out)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device here; --cpu and --aot run without one")
    elif options.tune:
        write(tile_table(), options.out)
    else:
        gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
        write(cuda_table(), options.out or RESULTS / f"kernels_{gpu}.json")


def write(result: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")


# Without a GPU


def aot_table() -> dict[str, Any]:
    if not has_triton():
        sys.exit("triton is not installed; `pip install triton` brings the compiler")
    import triton

    from lowvram_kernels.aot import compile_all

    rows = compile_all(GENERATIONS)
    kernels = [dataclasses.asdict(row) | {"fits": row.fits()} for row in rows]
    return {"triton": triton.__version__, "all_fit": all(row.fits() for row in rows), "kernels": kernels}


def cpu_table() -> dict[str, Any]:
    """Large as in the 14B model's layers, and as small as in the tiny one, where the cost of a call counts."""
    torch.set_num_threads(1)
    table = []
    for rows, depth, columns in ((512, 2048, 2048), (192, 64, 64), (192, 64, 160), (192, 160, 64)):
        x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
        q, scale_N1 = quantize_rows(weight, torch.int8)
        scale = scale_N1[:, 0].contiguous()
        calls = {
            "float32": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
            "int8": lambda x=x, q=q, s=scale, b=bias: linear_w8a8(x, q, s, b),
        }
        with torch.inference_mode():
            times = {name: cpu_median_ms(call, 30 if depth > 1000 else 500) for name, call in calls.items()}
        table.append({"M": rows, "K": depth, "N": columns, "ms": times, "speedup": times["float32"] / times["int8"]})
    result = {"processor": processor(), "torch": torch.__version__, "threads": 1, "linear": table}
    graphs = "not measured: no CUDA device"
    return result | {"block": cpu_block(), "graphs": graphs, "date": time.strftime("%Y-%m-%d")}


@torch.inference_mode()
def cpu_block() -> dict[str, Any]:
    """The whole block at small sizes, against rates of products of 512 x 2048 x 2048."""
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    a8, b8 = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (a, b))
    calls = {"wide": lambda: a @ b.t(), "int8": lambda: torch._int_mm(a8, b8.t())}
    rates = {name: 2 * 512 * 2048**2 / cpu_median_ms(call, 20) * 1e3 for name, call in calls.items()}
    row = block_row(lambda call: cpu_median_ms(call, 10), SMALL, rates, torch.float32, torch.device("cpu"))
    return row | {"operations_per_second": rates}


def cpu_median_ms(call: Call, repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:]) * 1e3


def processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


# On a GPU


class Stopwatch:
    """Median milliseconds of a call on the device, with a cold L2 cache."""

    def __init__(self, repeats: int = 30):
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> float:
        for _ in range(3):  # compiles and fills caches
            call()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for begin, end in pairs:
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


@torch.inference_mode()
def cuda_table() -> dict[str, Any]:
    # Here, and nothing of diffusers above: transformers looks for a module called kernels, and beside these scripts
    # this file is it.
    from kernel_vae import vae_row

    torch.manual_seed(0)
    watch = Stopwatch()
    ceilings = measured_ceilings(watch)
    with trace_kernels() as kernels:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "generation": generation(torch.device("cuda")),
            "torch": torch.__version__,
            "ceilings": ceilings,
            "linear": [linear_row(watch, rows, *layer) for rows in ROWS for layer in LAYERS],
            "attention": attention_row(watch),
            "passes": passes(watch, ceilings["copy_bytes_per_second"]),
            "block": cuda_block(watch, ceilings),
            "graphs": graph_rows(watch),
            "vae": vae_row(watch, LATENT_SIZE, torch.bfloat16, torch.device("cuda")),
        }
    names = sorted({f"{operation}: {kernel}" for operation, kernel in kernels})
    return result | {"bars": bars_of(result), "kernels": names}


def measured_ceilings(watch: Stopwatch) -> dict[str, float]:
    """Copy counts bytes read plus bytes written; products are 8192 cubed on random data."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda") for _ in range(2))
    work = 2 * 8192**3
    return {
        "copy_bytes_per_second": 2 * source.nbytes / watch(lambda: target.copy_(source)) * 1e3,
        "bf16_flop_per_second": work / watch(lambda: a @ b.t()) * 1e3,
        "int8_op_per_second": work / watch(lambda: torch._int_mm(a8, b8.t())) * 1e3,
    }


def linear_row(watch: Stopwatch, rows: int, depth: int, columns: int) -> dict[str, Any]:
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16) / math.sqrt(depth)
    bias = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Call] = {"cublas bf16": lambda: F.linear(x, weight, bias)}
    kinds = (("int8", torch.int8, 1), ("int8 rotated", torch.int8, GROUP), ("fp8", torch.float8_e4m3fn, 1))
    for name, dtype, group in kinds:
        if dtype is torch.int8 or has_fp8_units(x.device):
            q, scale = quantize_rows(weight, dtype, group=group)
            scale, options = scale[:, 0].contiguous(), {"group": group}
            calls[name] = lambda q=q, s=scale, o=options: linear_w8a8(x, q, s, bias, **o)
            calls[f"{name} with gelu"] = lambda q=q, s=scale, o=options: linear_w8a8(x, q, s, bias, gelu=True, **o)
    rivals, absent = linear_rivals(weight, bias)
    calls |= {name: (lambda rival=rival: rival(x)) for name, rival in rivals.items()}
    exact = F.linear(x.float(), weight.float(), bias.float())
    errors = {n: ((c().float() - exact).norm() / exact.norm()).item() for n, c in calls.items() if "gelu" not in n}
    times = {name: watch(call) for name, call in calls.items()}
    speedup = {name: times["cublas bf16"] / ms for name, ms in times.items()}
    return {"M": rows, "K": depth, "N": columns, "ms": times, "speedup": speedup, "error": errors, "absent": absent}


def cuda_block(watch: Stopwatch, ceilings: dict[str, float]) -> dict[str, Any]:
    rates = {"int8": ceilings["int8_op_per_second"], "wide": ceilings["bf16_flop_per_second"]}
    return block_row(watch, PUBLISHED, rates, torch.bfloat16, torch.device("cuda"))


def graph_rows(watch: Stopwatch) -> list[dict[str, Any]]:
    """At published sizes, and at small ones where the host may be slower than the device."""
    device, rows = torch.device("cuda"), []
    for sizes, scheme in ((PUBLISHED, "int8"), (PUBLISHED, "plain"), (SMALL, "int8")):
        capture = CudaCapture(device)  # its pool goes with the row
        rows.append(graph_row(watch, sizes, scheme, torch.bfloat16, device, capture, torch.cuda.synchronize))
    return rows


def random_block(tokens: int) -> KVBlock:
    layout = SlotLayout(tokens=tokens, heads=HEADS, head_dim=HEAD_DIM)
    block = layout.block(torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda"))
    k, v = (torch.randn(tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    encode_block(k, v, block)
    return block


def attention_row(watch: Stopwatch) -> dict[str, Any]:
    """Queries of a block over a whole ring and the sink, 8-bit and bf16 in the same run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    blocks = [random_block(tokens) for tokens in (*RING_TOKENS, SINK_TOKENS)]
    q = torch.randn(QUERIES, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    pairs = [decode_block(block, torch.bfloat16) for block in blocks]
    k, v = (torch.cat(part).transpose(0, 1)[None].contiguous() for part in zip(*pairs, strict=True))
    q_1NLH = q.transpose(0, 1)[None].contiguous()
    times, absent = {"int8 rings": watch(lambda: ring_attention(q, blocks))}, {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"bf16 {backend.name.lower()}"
        try:
            with sdpa_kernel(backend):
                times[name] = watch(lambda: F.scaled_dot_product_attention(q_1NLH, k, v))
        except RuntimeError as error:
            absent[name] = str(error).splitlines()[0]
    # Of other libraries, in whatever they compute; the bf16 backend to beat is PyTorch's.
    for rival in (SAGE, COMFY):
        try:
            times[rival] = watch(lambda rival=rival: attend(rival, q[None], *(t.transpose(1, 2) for t in (k, v))))
        except Exception as error:  # whatever a library that is not ours raises: its row stays empty and says why
            absent[rival] = f"{type(error).__name__}: {error}".splitlines()[0]
    few = slice(0, 64)
    exact = reference_ring_attention(q[few], blocks)
    error = (ring_attention(q[few], blocks).double() - exact).norm() / exact.norm()
    fastest = min(ms for name, ms in times.items() if name.startswith("bf16"))
    keys = sum(block.tokens for block in blocks)
    result = {"queries": QUERIES, "keys": keys, "heads": HEADS, "head_dim": HEAD_DIM, "ms": times}
    return result | {"speedup": fastest / times["int8 rings"], "error": error.item(), "absent": absent}


def passes(watch: Stopwatch, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """Passes between the products; bytes are those that have to move: every input read, every output written, once.
    Rotating groups moves no more: its time is that of a row beside the one without."""
    from lowvram_kernels.triton_projected import prepared

    width, tokens = HEADS * HEAD_DIM, ROWS[1]
    x, y = torch.randn(tokens, width, device="cuda"), torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(tokens, 13824, device="cuda", dtype=torch.bfloat16)
    gate, gain, offset = (torch.randn(width, device="cuda") for _ in range(3))
    angle = torch.rand(tokens, HEAD_DIM // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    block, heads, line = random_block(tokens), y.view(tokens, HEADS, HEAD_DIM), Projection(y, gain, 1e-6)
    kept = TurnedSink(block, cos, sin, room_for_keys(block))
    norm = {"eps": 1e-6, "dtype": torch.int8}
    count = tokens * width
    table: dict[str, tuple[int, Call]] = {
        "quantize_rows 5120": (3 * count, lambda: quantize_rows(y, torch.int8)),
        "quantize_rows 13824": (3 * wide.numel(), lambda: quantize_rows(wide, torch.int8)),
        "quantize_rows 5120 rotated": (3 * count, lambda: quantize_rows(y, torch.int8, group=GROUP)),
        "quantize_rows 13824 rotated": (3 * wide.numel(), lambda: quantize_rows(wide, torch.int8, group=GROUP)),
        "norm_rows": (5 * count, lambda: norm_rows(x, gain, offset, **norm)),
        "norm_rows rotated": (5 * count, lambda: norm_rows(x, gain, offset, group=GROUP, **norm)),
        "add_gated": (10 * count, lambda: add_gated(x, y, gate)),
        "add_gated_norm_rows": (11 * count, lambda: add_gated_norm_rows(x, y, gate, gain, offset, **norm)),
        "add_gated_norm_rows rotated": (
            11 * count,
            lambda: add_gated_norm_rows(x, y, gate, gain, offset, group=GROUP, **norm),
        ),
        "norm_rope": (4 * count + cos.nbytes + sin.nbytes, lambda: norm_rope(y, gain, 1e-6, HEADS, cos, sin)),
        "encode_block": (6 * count, lambda: encode_block(heads, heads, block)),
        "projections to attention": (
            # Keys are read twice, because their mean comes first: the block's in bfloat16, the sink's in 8 bits.
            (3 + 5 + 3 + 3) * count + 2 * (cos.nbytes + sin.nbytes),
            lambda: prepared(Projected(line, line, heads, cos, sin), 0, [block], kept),
        ),
        "rotate_block": (2 * count, lambda: rotate_block(block, cos, sin)),
    }
    rows = []
    for name, (nbytes, call) in table.items():
        ms = watch(call)
        of_copy = nbytes / ms * 1e3 / copy_bytes_per_second
        rows.append({"pass": name, "tokens": tokens, "bytes": nbytes, "ms": ms, "of_copy_bandwidth": of_copy})
    return rows


@torch.inference_mode()
def tile_table() -> dict[str, Any]:
    blocks = [random_block(tokens) for tokens in (*RING_TOKENS, SINK_TOKENS)]
    queries = torch.randn(1, QUERIES, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return tuned(Stopwatch(10), ROWS[0], queries, blocks)


if __name__ == "__main__":
    main()
