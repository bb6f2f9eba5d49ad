"""Would decoding a block beside the denoising of the next pay, on one card? By the plan's own counts; nothing runs.

python benchmarks/vae_overlap.py [--out benchmarks/results/vae_overlap.json]

Beside each other, denoising and decoding share the card's arithmetic, which both fill: their products add up as before.
What can hide is what waits for something else: passes of the VAE that only move memory, behind products, and products
of the VAE behind copies over PCIe, where those take longer than denoising. Both are taken as hidden as a whole, which
no card does (assumed in favour of it). What it costs is room: the decoder's workspace then stands beside denoising's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plans import GIB, published
from vae_counts import decoder_counts

from lowvram.offload.placement import Placement
from lowvram.planning import CARDS, Workload
from lowvram.planning.cards import Card
from lowvram.planning.model_sizes import ModelSizes, model_sizes
from lowvram.planning.rank_plan import place_text_encoder, reserve_of
from lowvram.planning.search import Job, candidates, fastest
from lowvram.planning.timing import Seconds
from lowvram.planning.workspace import decode_workspace

# card, GiB that a process of ours can have there, sizes; as of benchmarks/plans.py
CASES = [
    ("rtx3060", 11.0, ("384*256", "704*384")),
    ("rtx3090", 22.15, ("704*384", "720*400")),
    ("rtx4080", 14.5, ("704*384",)),
    ("rtx4090", 22.15, ("384*256", "704*384", "720*400")),
    ("rtx5090", 30.0, ("704*384", "1280*720")),
    ("h100", 76.0, ("704*384", "1280*720")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = model_sizes(published(Path(folder), "int8"))
        rows = [row(sizes, name, gib, size) for name, gib, every in CASES for size in every]
    print(markdown(rows))
    if given.out:
        given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def row(sizes: ModelSizes, name: str, gib: float, size: str) -> dict[str, Any]:
    card, work = CARDS[name], Workload.of_size(size)
    job = Job(sizes=sizes, work=work, kv="int8")
    usable = int(gib * GIB) - reserve_of(card, work, job.share, grouped=False).total
    job = place_text_encoder(job, usable)
    beside = decode_workspace(sizes.vae_base_dim, work)
    found: dict[str, Any] = {"card": name, "gib": gib, "size": size, "beside_gib": beside / GIB}
    after = best(job, card, usable)
    if after is None:
        return found | {"after": None}
    placement, seconds = after
    hidden = passes_s(card, work)
    found |= {
        "after": _facts(placement, seconds, seconds.block),
        "decode_passes_s": hidden,
        "same_placement_s": together(seconds, hidden),  # if it cost no room
    }
    # Denoising has so much less: what streams and is hosted then, and its seconds, are of the fastest such placement.
    smaller = best(job, card, usable - beside, hidden)
    if smaller is not None:
        found["beside"] = _facts(*smaller, together(smaller[1], hidden))
        found["gain"] = 1 - found["beside"]["block_s"] / seconds.block
    return found


def best(job: Job, card: Card, usable: int, hidden: float | None = None) -> tuple[Placement, Seconds] | None:
    """The fastest placement that fits, one after the other or, with ``hidden`` seconds of passes, beside each other."""
    placements = list(candidates(job, usable))
    if not placements:
        return None
    if hidden is None:
        chosen = fastest(job, card.rates, placements)
    else:
        chosen = min(placements, key=lambda p: together(job.seconds(p, card.rates), hidden))
    return chosen, job.seconds(chosen, card.rates)


def together(seconds: Seconds, hidden: float) -> float:
    """Seconds a block beside each other, at the very best."""
    products = max(seconds.decode - hidden, 0.0)
    return max(seconds.arithmetic + seconds.exchange + products, seconds.pcie, seconds.host) + seconds.exposed


def passes_s(card: Card, work: Workload) -> float:
    """What passes of the decoder take that only move memory, over a block."""
    height, width = work.size_px
    moved = decoder_counts(height, width).pass_bytes * work.frames_per_block
    return moved / (card.rates.memory or float("inf"))


def _facts(placement: Placement, seconds: Seconds, block_s: float) -> dict[str, Any]:
    return {
        "streamed_layers": len(placement.streamed_layers),
        "host_rings": len(placement.host_rings),
        "wave": placement.wave,
        **{key: getattr(seconds, key) for key in ("arithmetic", "pcie", "exposed", "decode")},
        "block_s": block_s,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| card | size | denoising | PCIe | decoding | of it passes | one after the other | beside, at the best "
        "| at the same placement | room |",
        "| --- | --- " + "| ---: " * 8 + "|",
    ]
    for found in rows:
        after, beside = found["after"], found.get("beside")
        if after is None:
            lines.append(f"| {found['card']} | {found['size']} | does not fit " + "| " * 7 + "|")
            continue
        cells = [after["arithmetic"], after["pcie"], after["decode"], found["decode_passes_s"], after["block_s"]]
        said = "does not fit" if beside is None else f"{beside['block_s']:.2f} s ({found['gain']:+.1%})"
        lines.append(
            f"| {found['card']} | {found['size']} | {' | '.join(f'{cell:.2f} s' for cell in cells)} | {said} "
            f"| {found['same_placement_s']:.2f} s | {found['beside_gib']:.2f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
