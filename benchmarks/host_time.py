"""How busy is the host with a block? Launches, dispatcher calls, synchronisations and Python time, without a GPU.

python benchmarks/host_time.py [--out benchmarks/results/host_time.json --name after]

The runtime's own code for CUDA runs on ``meta`` at 14B shapes, see ``host_counts``. Its seconds are those of this
machine's Python with nothing launched: what Triton's Python and the driver take for a launch, and everything on a GPU,
is not measured. PyTorch's attention is a call into C++ on a GPU and Python on ``meta``: seconds are with and without.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = {"14b": (48, 88), "tiny": (8, 8)}
KINDS = ("plain layer", "audio layer", "step", "block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(SIZES), default="14b")
    parser.add_argument("--out", type=Path, help="tables of other names in this file stay as they are")
    parser.add_argument("--name", default="after", help="what the table is called there")
    options = parser.parse_args()
    table = measure(options.preset)
    print(markdown(table))
    if options.out:
        tables = json.loads(options.out.read_text())["tables"] if options.out.exists() else {}
        tables[options.name] = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu": _cpu(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "triton", "diffusers")},
            "preset": options.preset,
            "latent_size": SIZES[options.preset],
            "rings": table,
        }
        result = {
            "question": "how busy is the host with a block?",
            "not_measured": "seconds on a GPU, and the driver's part of a launch",
            "tables": tables,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(preset: str) -> dict[str, Any]:
    """By rings and kind of stretch: launches, dispatcher calls, synchronisations; host seconds of a block."""
    from host_counts import Counting, Host, as_if_cuda

    from lowvram_quantize.shape_artifact import write_shape_artifact

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_shape_artifact(Path(folder) / preset, preset=preset, precision="int8")
        for kv in ("int8", "plain"):
            counting = Counting()
            with as_if_cuda(counting):
                host = Host(artifact, kv, SIZES[preset], counting)
                counts = host.count()
                rows[kv] = {
                    kind: {
                        "launches": counts[kind].launched,
                        "dispatcher_calls": counts[kind].dispatched,
                        "synchronisations": sum(counts[kind].syncs.values()),
                        "by_name": dict(counts[kind].launches.most_common()),
                        "synchronised_by": dict(counts[kind].syncs),
                    }
                    for kind in KINDS
                }
                rows[kv]["python_seconds_per_block"] = round(host.seconds(), 3)
                rows[kv]["without_meta_attention"] = round(host.seconds_without_attention(), 3)
    return rows


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def markdown(table: dict[str, Any]) -> str:
    lines = [
        "| rings | of a | launches | dispatcher calls | synchronisations | Python s | without meta's attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for kv, rows in table.items():
        for kind in KINDS:
            counts = [rows[kind][key] for key in ("launches", "dispatcher_calls", "synchronisations")]
            times = ["", ""]
            if kind == "block":
                times = [f"{rows[key]:.2f}" for key in ("python_seconds_per_block", "without_meta_attention")]
            lines.append(f"| {' | '.join(map(str, (kv, kind, *counts, *times)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
