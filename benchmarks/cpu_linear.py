"""Which 8-bit product is the fastest right one on a processor, and what does the int8 demo cost beside the bf16 one?

python benchmarks/cpu_linear.py [--out benchmarks/results/cpu_linear.json] [--runs 3] [--only products]

Everything runs on this processor as it is, and held to what one without VNNI has, in processes of their own. Seconds
are a thread's own processor time in one thread, the least of a few runs, so that others on the machine do not lengthen
them. The demo's stage "denoise" is also given by the clock. Its bf16 artifact computes in float32 on a CPU, as
``infer`` does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lowvram.demo import PRECISIONS, make_artifact, prepare
from lowvram.pipeline import AvatarPipeline
from lowvram.runtime import Runtime
from lowvram_kernels import choices
from lowvram_kernels.cpu_products import PRODUCTS, random_operands

# oneDNN's and PyTorch's own variables; the first setting is the processor as it is.
SETTINGS = {
    "as it is": {},
    "AVX512 without VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
# Rows, depth, columns: the demo's with its 768 tokens a block, and the 14B model's with few rows.
SHAPES = [(768, 80, 80), (768, 80, 216), (768, 216, 80), (176, 5120, 5120), (176, 5120, 13824), (176, 13824, 5120)]
ENOUGH_MS = 2000.0
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("products", "demo"))
    parser.add_argument("--part", choices=("products", "demo"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        print(json.dumps({"products": products, "demo": demo}[options.part](options.runs)))
        return
    parts = [options.only] if options.only else ["products", "demo"]
    settings = {
        name: {part: in_process(part, options.runs, environ) for part in parts} for name, environ in SETTINGS.items()
    }
    print("\n".join(table(settings)))
    if options.out:
        result = {
            "question": __doc__.splitlines()[0],
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu": processor(), "threads": 1, "python": platform.python_version()},
            "versions": {"torch": version("torch")},
            "environment": SETTINGS,
            "settings": settings,
        }
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def in_process(part: str, runs: int, environ: dict[str, str]) -> Any:
    command = [sys.executable, __file__, "--part", part, "--runs", str(runs)]
    done = subprocess.run(command, env=os.environ | environ, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def products(runs: int) -> list[dict[str, Any]]:
    """Milliseconds of each product of 8-bit operands, and of float32 and bfloat16 ones of that size."""
    rows = []
    for shape in SHAPES:
        for dtype, name in NAMES.items():
            q, weight = random_operands(shape, dtype)
            exact = q.double() @ weight.double().t()
            calls = {
                kind: lambda product=product, q=q, w=weight: product(q, w) for kind, product in PRODUCTS[dtype].items()
            }
            errors = {kind: ((call().double() - exact).norm() / exact.norm()).item() for kind, call in calls.items()}
            del exact
            taken = least_ms(calls, runs)
            chosen = choices.choose(f"linear_w8a8 {name}", torch.device("cpu"))
            rows.append({"shape": shape, "dtype": name, "ms": taken, "relative_error": errors, "chosen": chosen})
        x, w = torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1])
        operands = {"float32": (x, w.t()), "bfloat16": (x.bfloat16(), w.bfloat16().t())}
        wide = {kind: lambda a=a, b=b: a @ b for kind, (a, b) in operands.items()}
        rows.append({"shape": shape, "dtype": "wide", "ms": least_ms(wide, runs)})
    return rows


def least_ms(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """In turn, after one of each to warm up; what takes seconds is not repeated."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 1):
        for name, call in calls.items():
            if sum(times[name]) > ENOUGH_MS:
                continue
            begin = time.thread_time()
            call()
            times[name].append((time.thread_time() - begin) * 1e3)
    return {name: min(found[1:] or found) for name, found in times.items()}


def demo(runs: int) -> dict[str, Any]:
    """Seconds of the demo's stage "denoise" for each artifact in turn: by its thread, and by the clock."""
    found: dict[str, dict[str, list[float]]] = {name: {"thread_s": [], "clock_s": []} for name in PRECISIONS}
    kernels: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        request = prepare(Path(folder), random=True)
        artifacts = {name: make_artifact(Path(folder), name, random=True) for name in PRECISIONS}
        for _ in range(runs):
            for name, artifact in artifacts.items():
                pipeline = AvatarPipeline.from_artifact(artifact, device="cpu")
                with thread_seconds("denoise") as seconds:
                    for _ in pipeline.stream(request):
                        pass
                found[name]["thread_s"].append(sum(seconds))
                found[name]["clock_s"].append(pipeline.runtime.stages.stages["denoise"].seconds)
                kernels[name] = sorted({f"{operation}: {kernel}" for operation, kernel in pipeline.runtime.kernels})
    least = {clock: {name: min(found[name][clock]) for name in PRECISIONS} for clock in ("thread_s", "clock_s")}
    ratios = {clock: times["int8"] / times["bf16"] for clock, times in least.items()}
    return {"runs": found, "least": least, "int8_to_bf16": ratios, "kernels": kernels}


@contextlib.contextmanager
def thread_seconds(stage: str) -> Iterator[list[float]]:
    """Processor seconds of this thread in each pass through ``stage``."""
    seconds: list[float] = []
    traced = Runtime.traced

    @contextlib.contextmanager
    def timed(self: Runtime, name: str) -> Iterator[None]:
        begin = time.thread_time()
        with traced(self, name):
            yield
        if name == stage:
            seconds.append(time.thread_time() - begin)

    Runtime.traced = timed
    try:
        yield seconds
    finally:
        Runtime.traced = traced


def table(settings: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| processor | product | int8 | fp8 | wide |"
    yield "| --- | --- | --- | --- | --- |"
    for setting, parts in settings.items():
        rows = parts.get("products", [])
        for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
            cells = {row["dtype"]: cell(row) for row in rows if tuple(row["shape"]) == shape}
            yield f"| {setting} | {' x '.join(map(str, shape))} | {cells['int8']} | {cells['fp8']} | {cells['wide']} |"
    for setting, parts in settings.items():
        if "demo" in parts:
            least, ratio = parts["demo"]["least"], parts["demo"]["int8_to_bf16"]
            yield (
                f"demo, {setting}: int8 denoises in {least['thread_s']['int8']:.2f} s, bf16 in "
                f"{least['thread_s']['bf16']:.2f} s: {ratio['thread_s']:.2f} ({ratio['clock_s']:.2f} by the clock)"
            )


def cell(row: dict[str, Any]) -> str:
    texts = []
    for name, taken in row["ms"].items():
        wrong = row.get("relative_error", {}).get(name, 0) > 1e-5
        text = f"{name} {taken:.3g} ms{' (wrong)' if wrong else ''}"
        texts.append(f"**{text}**" if row.get("chosen") == name else text)
    return ", ".join(texts)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
