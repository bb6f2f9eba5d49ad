"""What fits where? Plans of the 14B for usual cards, each also run on a simulated GPU of that size.

python benchmarks/plans.py [--out benchmarks/results/plans.json]

Nothing here is measured on a GPU: bytes are planned and simulated, seconds predicted from data-sheet rates.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 1 << 30
RAM_GIB = 64
# card, GiB that a process of ours can have there, precision of DiT and VAE, size
CASES = [
    ("rtx3060", 11.0, "int8", "384*256"),
    ("rtx4080", 14.5, "int8", "704*384"),
    ("rtx4090", 22.15, "int8", "704*384"),
    ("rtx4090", 22.15, "int8", "720*400"),
    ("rtx4090", 22.15, "bf16", "704*384"),
    ("rtx5090", 30.0, "int8", "704*384"),
    ("a100-80gb", 78.0, "int8", "704*384"),
    ("a100-80gb", 78.0, "bf16", "704*384"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), *case) for case in CASES]
    print(markdown(rows))
    result = {
        "question": "what fits where?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "host_gib": RAM_GIB,
        "plans": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if over := [f"{row['card']} {row['precision']} {row['size']}" for row in rows if row["given_up"]]:
        sys.exit(f"did not fit as planned: {', '.join(over)}")


def measure(folder: Path, card: str, gib: float, precision: str, size: str) -> dict[str, Any]:
    from lowvram.dry_run import dry_run
    from lowvram.planning import CARDS, Workload, plan
    from lowvram_quantize.format import Artifact
    from lowvram_quantize.phantom import write_phantom

    path = folder / precision
    if not path.exists():
        write_phantom(path, precision=precision)
    artifact = Artifact.open(path)
    found = plan(
        artifact,
        Workload.of_size(size),
        vram_bytes=int(gib * GIB),
        ram_bytes=RAM_GIB * GIB,
        card=CARDS[card],
    )
    run = dry_run(artifact, found)
    return {
        "card": card,
        "precision": precision,
        "size": size,
        "budget_gib": gib,
        "layers_streamed": len(found.placement.streamed_layers),
        "rings_on_host": len(found.placement.host_rings),
        "wave": found.placement.wave,
        "planned_device_gib": found.peak_vram_bytes / GIB,
        "simulated_device_gib": run.peak_reserved / GIB,
        "host_gib": found.peak_host_bytes / GIB,
        "predicted_seconds_per_block": found.seconds_per_block,
        "limited_by": found.limited_by,
        "given_up": list(run.given_up),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| card | weights | size | budget | planned | simulated | host | streamed layers, rings | seconds a block |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['card']} | {row['precision']} | {row['size']} | {row['budget_gib']:g} GiB "
            f"| {row['planned_device_gib']:.1f} GiB | {row['simulated_device_gib']:.1f} GiB "
            f"| {row['host_gib']:.0f} GiB "
            f"| {row['layers_streamed']} of 40, {row['rings_on_host']} of 160 "
            f"| {row['predicted_seconds_per_block']:.1f} ({row['limited_by']}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
