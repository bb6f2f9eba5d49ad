"""What fits where? Plans of the 14B for usual cards, one or several, each also run on simulated GPUs of that size.

python benchmarks/plans.py [--out benchmarks/results/plans.json] [--simulated benchmarks/results/plans.json] [--planned]

Nothing here is measured on a GPU: bytes are planned and simulated, seconds predicted from data-sheet rates and the
shares of them in ``lowvram.planning.operation_rates``. Simulating takes five minutes: with ``--simulated`` what an
earlier run found is taken over wherever the same is placed in the same way, and only the others are simulated anew;
with ``--planned`` those are left out of that column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
# Number of cards, each with so many GiB for a process of ours; size. All int8, on one host.
TEAM_CARD, TEAM_GIB = "rtx4090", 22.15
TEAMS = [(gpus, size) for size in ("704*384", "720*400") for gpus in (2, 3, 4, 5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--simulated", type=Path, help="results of an earlier run, whose simulations are taken over")
    parser.add_argument("--planned", action="store_true", help="simulate nothing: a minute instead of five")
    options = parser.parse_args()
    if options.planned and options.out:
        parser.error("--planned leaves results out: what it prints is no result to keep with --out")
    before = json.loads(options.simulated.read_text()) if options.simulated else {"plans": [], "teams": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), *case, before=before["plans"], dry=not options.planned) for case in CASES]
        teams = [measure_team(Path(folder), *case, before=before["teams"], dry=not options.planned) for case in TEAMS]
    print(markdown(rows), team_markdown(teams), sep="\n\n")
    result = {
        "question": "what fits where?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "host_gib": RAM_GIB,
        "plans": rows,
        "teams": teams,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    over = [f"{row['card']} {row['precision']} {row['size']}" for row in rows if row["given_up"]]
    over += [f"{row['gpus']} x {row['card']} {row['size']}" for row in teams if row["given_up"]]
    if over:
        sys.exit(f"did not fit as planned: {', '.join(over)}")


def measure(
    folder: Path,
    card: str,
    gib: float,
    precision: str,
    size: str,
    *,
    before: Sequence[Mapping[str, Any]] = (),
    dry: bool = True,
) -> dict[str, Any]:
    """``before``: rows of an earlier run, one of which may be of the same placement. ``dry``: simulate the others."""
    from lowvram.planning import CARDS, Workload, plan

    artifact = published(folder, precision)
    found = plan(
        artifact,
        Workload.of_size(size),
        vram_bytes=int(gib * GIB),
        ram_bytes=RAM_GIB * GIB,
        card=CARDS[card],
    )
    row = {
        "card": card,
        "precision": precision,
        "size": size,
        "budget_gib": gib,
        "layers_streamed": len(found.placement.streamed_layers),
        "rings_on_host": len(found.placement.host_rings),
        "wave": found.placement.wave,
        "planned_device_gib": found.peak_vram_bytes / GIB,
        "host_gib": found.peak_host_bytes / GIB,
        "predicted_seconds_per_block": found.seconds_per_block,
        "predicted_range": list(found.seconds_range),
        "limited_by": found.limited_by,
    }
    return row | (earlier(row, before) or (simulate(artifact, found) if dry else NOT_SIMULATED))


def simulate(artifact: Any, found: Any) -> dict[str, Any]:
    from lowvram.simulate.dry_run import dry_run

    run = dry_run(artifact, found)
    return {"simulated_device_gib": run.peak_reserved / GIB, "given_up": list(run.given_up)}


# What decides of a row how much its simulation takes.
_SAME = ("card", "gpus", "precision", "size", "budget_gib", "layers_streamed", "rings_on_host", "wave", "layout")
_PLANNED = "planned_device_gib"
NOT_SIMULATED: dict[str, Any] = {"simulated_device_gib": None, "given_up": []}


def earlier(row: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What was simulated of the same placement, None where nothing was."""
    for old in before:
        same = all(old.get(name) == row.get(name) for name in _SAME) and abs(old[_PLANNED] - row[_PLANNED]) < 1e-6
        if same and _of_ranks(old) == _of_ranks(row):
            return {name: old[name] for name in ("simulated_device_gib", "given_up")}
    return None


def _of_ranks(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    names = ("role", "layers_streamed", "rings_on_host", "wave")
    return [tuple(rank[name] for name in names) for rank in row.get("ranks", ())]


def measure_team(
    folder: Path, gpus: int, size: str, *, before: Sequence[Mapping[str, Any]] = (), dry: bool = True
) -> dict[str, Any]:
    """The layout that is taken by itself; ``before`` and ``dry`` as for one card."""
    from lowvram.planning import CARDS, Machines, Workload, alternatives, choose_team

    artifact, work = published(folder, "int8"), Workload.of_size(size)
    there = Machines(
        cards=[CARDS[TEAM_CARD]] * gpus,
        vram_bytes=[int(TEAM_GIB * GIB)] * gpus,
        machines=[0] * gpus,
        ram_bytes=[RAM_GIB * GIB],
    )
    team = choose_team(artifact, work, there)
    row = {
        "gpus": gpus,
        "card": TEAM_CARD,
        "size": size,
        "budget_gib": TEAM_GIB,
        "layout": team.layout.words(),
        "ranks": [
            {
                "role": plan.share.role.name,
                "planned_device_gib": plan.peak_vram_bytes / GIB,
                "layers_streamed": len(plan.placement.streamed_layers),
                "rings_on_host": len(plan.placement.host_rings),
                "rings": plan.rings,
                "wave": plan.placement.wave,
                "predicted_seconds_per_block": plan.seconds_per_block,
            }
            for plan in team.ranks
        ],
        "planned_device_gib": max(plan.peak_vram_bytes for plan in team.ranks) / GIB,
        "host_gib": team.host[0].peak / GIB,
        "predicted_seconds_per_block": team.seconds_per_block,
        "predicted_range": list(team.seconds_range),
        "predicted_frames_per_second": team.frames_per_s,
        "predicted_first_block_seconds": team.first_block_s,
        "limited_by": team.limited_by,
        "alternatives": {
            each.layout.words(): each.plan.seconds_per_block if each.plan else None
            for each in alternatives(artifact, work, there)
        },
    }
    return row | (earlier(row, before) or (simulate_team(artifact, team) if dry else NOT_SIMULATED))


def simulate_team(artifact: Any, team: Any) -> dict[str, Any]:
    from lowvram.simulate.dry_run import dry_run_team

    runs = dry_run_team(artifact, team)
    return {
        "simulated_device_gib": max(run.peak_reserved for run in runs) / GIB,
        "given_up": [words for run in runs for words in run.given_up],
    }


def published(folder: Path, precision: str) -> Any:
    from lowvram_quantize.format import Artifact
    from lowvram_quantize.shape_artifact import write_shape_artifact

    path = folder / precision
    if not path.exists():
        write_shape_artifact(path, precision=precision)
    return Artifact.open(path)


def simulated(row: Mapping[str, Any]) -> str:
    found = row["simulated_device_gib"]
    return "not simulated" if found is None else f"{found:.1f} GiB"


def ranged(row: Mapping[str, Any], digits: int = 1) -> str:
    low, high = row["predicted_range"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| card | weights | size | budget | planned | simulated | host | streamed layers, rings | seconds a block |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['card']} | {row['precision']} | {row['size']} | {row['budget_gib']:g} GiB "
            f"| {row['planned_device_gib']:.1f} GiB | {simulated(row)} "
            f"| {row['host_gib']:.0f} GiB "
            f"| {row['layers_streamed']} of 40, {row['rings_on_host']} of 160 "
            f"| {row['predicted_seconds_per_block']:.1f} ({ranged(row)}; {row['limited_by']}) |"
        )
    return "\n".join(lines)


def team_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cards | size | layout | planned | simulated | host | rings on host | seconds a block | frames/s | first |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        hosted = ", ".join(f"{rank['rings_on_host']} of {rank['rings']}" for rank in row["ranks"] if rank["rings"])
        lines.append(
            f"| {row['gpus']} x {row['card']} | {row['size']} | {row['layout']} "
            f"| {row['planned_device_gib']:.1f} GiB | {simulated(row)} "
            f"| {row['host_gib']:.0f} GiB | {hosted} "
            f"| {row['predicted_seconds_per_block']:.2f} ({ranged(row, 2)}; {row['limited_by']}) "
            f"| {row['predicted_frames_per_second']:.1f} | {row['predicted_first_block_seconds']:.1f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
