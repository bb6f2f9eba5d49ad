"""How fast does ``convert`` run on one core, and in how much memory? A synthetic DiT of 2.4 GB to int8.

python benchmarks/convert.py [--layers 2] [--runs 2] [--out benchmarks/results/convert_cpu.json]

The DiT has the published widths and layout but fewer layers; the LoRA's tensors are random. Each run is a process of
its own that is tied to one core, so hashing beside the conversion costs what it costs. Input is in the page cache, as
it was just written. Where the processor has more than AVX2, rows held to AVX2 stand beside the others; each row says
what it had.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTHS = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "freq_dim": 256, "text_dim": 4096, "audio_dim": 1024}
LORA_RANK = 128
BYTES_PER_S_PER_CORE = 0.3e9
FIXED_BYTES = 2_000_000_000
LARGEST_TENSORS = 4
# What holds PyTorch's own loops, oneDNN and MKL to it.
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2, help="runs of each kind; the fastest counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.layers, options.runs)
    text = json.dumps(result, indent=1, allow_nan=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if missed := [name for name, row in result["runs"].items() if not (row["fast_enough"] and row["within_bound"])]:
        sys.exit(f"too slow or too large: {', '.join(missed)}")


def measure(folder: Path, layers: int, runs: int) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    facts = write_dit(folder / "ckpt", layers)
    write_lora(folder / "lora.safetensors", layers)
    os.sync()  # else a run waits for its input to be written out
    kinds = {"int8": False, f"int8 with a random LoRA of rank {LORA_RANK}": True}
    held = {"": {}} | ({", AVX2 only": AVX2_ONLY} if torch.backends.cpu.get_cpu_capability() != "AVX2" else {})
    rows = {
        name + only: [convert(folder, facts, "int8", lora=lora, environment=environment) for _ in range(runs)]
        for only, environment in held.items()
        for name, lora in kinds.items()
    }
    return {
        "question": "how fast does convert run on one core, and in how much memory?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores_used": 1,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "safetensors")},
        },
        "dit": facts,
        "required_GB_per_s_per_core": BYTES_PER_S_PER_CORE / 1e9,
        "runs": {name: min(found, key=lambda row: row["seconds"]) for name, found in rows.items()},
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def dit_config(layers: int) -> dict[str, Any]:
    return {"model_type": "s2v", "num_layers": layers, "audio_inject_layers": [0], "text_len": 512, **WIDTHS}


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    import torch

    from lowvram_models.config import DiTConfig
    from lowvram_models.dit import CausalDiT

    with torch.device("meta"):
        model = CausalDiT(DiTConfig.from_dict(dit_config(layers)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_dit(base: Path, layers: int) -> dict[str, Any]:
    """A shard for each layer and one for the rest. Values are windows of one piece of noise: making them is quick, and
    what they are does not change how long they take."""
    import torch
    from safetensors.torch import save_file

    base.mkdir()
    (base / "config.json").write_text(json.dumps(dit_config(layers)))
    shapes = shapes_of(layers)
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[1] if name.startswith("blocks.") else "rest", []).append(name)
    weight_map = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: filled(noise, shapes[name]) for name in names}, base / file)
        weight_map |= dict.fromkeys(names, file)
    (base / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    largest = max(sizes, key=sizes.__getitem__)
    return {
        "layers": layers,
        "tensors": len(sizes),
        "input_bytes": sum(sizes.values()),
        "largest_tensor": largest,
        "largest_tensor_bytes": sizes[largest],
        "peak_rss_bound_bytes": FIXED_BYTES + LARGEST_TENSORS * sizes[largest],
    }


def filled(noise: Any, shape: tuple[int, ...]) -> Any:
    count = math.prod(shape)
    return noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()


def write_lora(path: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    tensors, draw = {}, torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.01).bfloat16()

    for name, shape in shapes_of(layers).items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and layer.endswith((".q", ".k", ".v", ".o", "ffn.0", "ffn.2")):
            tensors[f"{layer}.lora_A.weight"] = random(LORA_RANK, shape[1])
            tensors[f"{layer}.lora_B.weight"] = random(shape[0], LORA_RANK)
    save_file(tensors, path)


def convert(
    folder: Path, facts: dict[str, Any], precision: str, *, lora: bool, environment: Mapping[str, str]
) -> dict[str, Any]:
    """One run in a child; its own figures and what they are held against."""
    arguments = [str(folder), precision, str(folder / "lora.safetensors") if lora else ""]
    there = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | environment
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, cwd=folder, env=there
    )
    if child.returncode:
        sys.exit(f"the measured run failed with exit code {child.returncode}")
    row = json.loads(child.stdout.splitlines()[-1])
    read = facts["input_bytes"] + ((folder / "lora.safetensors").stat().st_size if lora else 0)
    speed = read / row["seconds"]
    return row | {
        "input_bytes": read,
        "GB_per_s_per_core": speed / 1e9,
        "fast_enough": speed >= BYTES_PER_S_PER_CORE,
        "within_bound": row["peak_rss_bytes"] <= facts["peak_rss_bound_bytes"],
    }


# VmHWM is the high-water mark of this program, imports included; ru_maxrss would begin with that of the process that
# started it.
CHILD = """
import json, os, shutil, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
torch.set_num_threads(1)
from pathlib import Path
from lowvram_quantize.convert import convert
folder, precision, lora = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
begin = time.perf_counter()
out = convert(folder / "ckpt", folder / "artifact", precision=precision, lora=lora, components=("dit",))
seconds = time.perf_counter() - begin
size = (out / "dit.safetensors").stat().st_size
shutil.rmtree(out)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) * 1024
has = torch.backends.cpu.get_cpu_capability()
print(json.dumps({"instructions": has, "seconds": seconds, "output_bytes": size, "peak_rss_bytes": peak}))
"""

if __name__ == "__main__":
    main()
