"""In how much memory does ``convert`` read each form of checkpoint? A synthetic DiT of about 1 GB or more to int8.

python benchmarks/convert_sources.py [--layers 1] [--only NAME ...] [--out benchmarks/results/convert_sources_cpu.json]

The same DiT of the published widths is written in each form that people have, one after the other, and converted in a
process of its own on one core. "beyond_imports_bytes" is its peak less what it holds once everything is imported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert import dit_config, filled, processor, shapes_of

# Tensors go through in pieces of some rows, so not even one has to be there as a whole; 0.3 GB in bf16 the largest.
BEYOND_IMPORTS_BYTES = 100_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "question": "in how much memory does convert read each form of checkpoint?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores_used": 1,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "safetensors", "gguf")},
        },
        "layers": options.layers,
        "largest_tensor_values": max(math.prod(shape) for shape in shapes_of(options.layers).values()),
        "allowed_beyond_imports_bytes": BEYOND_IMPORTS_BYTES,
    }
    runs = result["runs"] = {}
    for name in options.only:
        runs[name] = measure(name, options.layers)
        if options.out:  # what is measured is kept, whatever happens to the next
            options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps(result, indent=1, allow_nan=False))
    if missed := [name for name, row in runs.items() if not row["within_bound"]]:
        sys.exit(f"too large: {', '.join(missed)}")


def measure(name: str, layers: int) -> dict[str, Any]:
    print(name, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps(dit_config(layers)))
        file = FORMS[name](folder, tensors_of(layers))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, str(file), str(folder / "artifact")]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
        if child.returncode:
            sys.exit(f"{name}: the measured run failed with exit code {child.returncode}")
        row: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        row["input_bytes"] = sum(path.stat().st_size for path in folder.glob("dit*"))
    row["beyond_imports_bytes"] = row["peak_rss_bytes"] - row["imported_rss_bytes"]
    return row | {"within_bound": row["beyond_imports_bytes"] <= BEYOND_IMPORTS_BYTES}


def tensors_of(layers: int) -> dict[str, Any]:
    """The DiT in bf16, as ``convert.py`` fills it: with windows of one piece of noise."""
    import torch

    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    return {name: filled(noise, shape) for name, shape in shapes_of(layers).items()}


def safetensors(folder: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, folder / "dit.safetensors")
    return folder / "dit.safetensors"


def scaled(tensors: dict[str, Any], dtype: str, largest: float) -> dict[str, Any]:
    """Matrices as codes beside a scale a row, which names as ``X.weight_scale`` say."""
    import torch

    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        if tensor.dim() == 2 and name.endswith(".weight"):
            scale = tensor.abs().amax(1, keepdim=True).float() / largest
            codes = tensor.float().div_(scale)
            out[name] = (codes.round_() if dtype == "int8" else codes).to(getattr(torch, dtype))
            out[f"{name}_scale"] = scale
    return out


def scaled_fp8(folder: Path, tensors: dict[str, Any]) -> Path:
    return safetensors(folder, scaled(tensors, "float8_e4m3fn", 448.0))


def scaled_int8(folder: Path, tensors: dict[str, Any]) -> Path:
    return safetensors(folder, scaled(tensors, "int8", 127.0))


def pth(folder: Path, tensors: dict[str, Any], *, zipped: bool = True) -> Path:
    import torch

    torch.save(tensors, folder / "dit.pth", _use_new_zipfile_serialization=zipped)
    return folder / "dit.pth"


def older_pth(folder: Path, tensors: dict[str, Any]) -> Path:
    return pth(folder, tensors, zipped=False)


def gguf_q8(folder: Path, tensors: dict[str, Any], parts: int = 1) -> Path:
    import gguf
    import numpy as np

    each = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(folder / "dit.gguf", "wan", split_max_tensors=each)
    for name, tensor in tensors.items():
        values = (tensor.flatten(1) if tensor.dim() > 4 else tensor).float().numpy()
        if tensor.dim() == 2 and values.shape[1] % 32 == 0:
            codes = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("dit*.gguf"))


def gguf_parts(folder: Path, tensors: dict[str, Any]) -> Path:
    return gguf_q8(folder, tensors, parts=3)


FORMS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "safetensors, one file behind a prefix": safetensors,
    "fp8 with a scale a row": scaled_fp8,
    "int8 with a scale a row": scaled_int8,
    "GGUF Q8_0": gguf_q8,
    "GGUF Q8_0 in three parts": gguf_parts,
    ".pth": pth,
    ".pth of torch.save's older form": older_pth,
}

# VmHWM is of this program alone; ru_maxrss would begin with the peak of the process that started it.
CHILD = """
import json, os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import gguf, torch
torch.set_num_threads(1)
from pathlib import Path
from lowvram_quantize.convert import convert
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
imported = kib("VmRSS:")
begin = time.perf_counter()
convert(None, sys.argv[2], dit_file=sys.argv[1], precision="int8", components=("dit",))
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "imported_rss_bytes": imported, "peak_rss_bytes": kib("VmHWM:")}))
"""

if __name__ == "__main__":
    main()
