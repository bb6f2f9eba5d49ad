"""Ways to compute the second product of attention over 8-bit rings: their errors, and what they cost.

    python benchmarks/attention_variants.py --out benchmarks/results/attention_variants.json

Errors are simulated against exact attention over 15,312 keys of 128 channels, a full ring and the sink of the 14B at
704*384, by the standard deviation of the logits, which nobody knows of the published weights; means over some heads.
Instructions are those of the inner loop as compiled ahead of time for a chip. Seconds of a block are predicted from
both products' operations and the loop's instructions at data-sheet rates: between whichever takes longer, and both
after each other. No GPU is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowvram.planning.card_table import CARDS
from lowvram_kernels.aot import Case, compile_case
from lowvram_kernels.ring_attention import LEVELS, stepwise_attention
from lowvram_kernels.ring_codec import TILE_TOKENS, KVBlock, SlotLayout, encode_block
from lowvram_kernels.rows import quantize_rows
from lowvram_models.rope import Rope, apply_rope, block_rope, condition_rope

Tensor = torch.Tensor

GRID, FRAMES, HEAD_DIM, QUERIES = (24, 44), (3, 3, 3, 3), 128, 96
# Standard deviation of the logits in nats; how much of keys and queries has nothing to do with where a token stands.
SPREADS = {0.7: 1.0, 2.0: 1.0, 4.0: 0.7, 7.0: 0.5}
SEEDS = 16
HEADS, LAYERS, STEPS, BLOCK_TOKENS = 40, 40, 4, 3168
CARDS_HERE = ("rtx3090", "rtx4090", "rtx5090", "a100-80gb", "h100")
OURS, FORMER = "int8 P, 255 levels below a tile's largest (ours)", "bf16 P.V, a scale a token (before)"


@dataclasses.dataclass(frozen=True)
class Head:
    """Queries [L, H], keys and values [T, H] of one head, float64 of bfloat16's values, and tokens of the blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: tuple[int, ...]

    def exact(self) -> Tensor:
        return (self.q @ self.k.t() / HEAD_DIM**0.5).softmax(1) @ self.v


def _positions() -> list[Tensor]:
    """(t, y, x) of each block's tokens and of the sink's."""
    frames = [torch.arange(sum(FRAMES[:i]), sum(FRAMES[: i + 1])) for i in range(len(FRAMES))]
    grids = [torch.cartesian_prod(t, torch.arange(GRID[0]), torch.arange(GRID[1])) for t in frames]
    tokens = len(condition_rope(*GRID, HEAD_DIM).cos)
    sink = torch.cartesian_prod(torch.arange(30, 33), torch.arange(GRID[0]), torch.arange(GRID[1]))[:tokens]
    return [*grids, sink]


def _ropes() -> list[Rope]:
    """Of each block's tokens and of the sink's."""
    blocks = [block_rope(sum(FRAMES[:i]), FRAMES[i], *GRID, HEAD_DIM) for i in range(len(FRAMES))]
    return [*blocks, condition_rope(*GRID, HEAD_DIM)]


def head(spread: float, alone: float, seed: int) -> Head:
    """One head: what tokens hold varies smoothly with their place, keys and queries lie around common vectors, are
    normed and rotated, and a few channels of values are much larger than others."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    places = _positions()
    everywhere = torch.cat(places).double()

    def waves(count: int, *length: float) -> Tensor:
        phases = torch.rand(count, generator=make, dtype=torch.float64) * 2 * math.pi
        return (everywhere @ (random(3, count) / torch.tensor(length)[:, None]) + phases).cos() * 2**0.5

    content = torch.cat([waves(48, 6.0, 5.0, 5.0), waves(32, 3.0, 2.0, 2.0)], dim=1)
    mix = random(content.shape[1], HEAD_DIM) / content.shape[1] ** 0.5
    keys = (content @ mix + alone * random(len(everywhere), HEAD_DIM)) * (0.3 * random(HEAD_DIM)).exp()
    keys += 2 * random(HEAD_DIM) * (0.6 * random(HEAD_DIM)).exp()
    newest = torch.arange(len(places[0])) + sum(map(len, places[:3]))
    queries = content[newest] @ mix + alone * random(len(newest), HEAD_DIM) + random(HEAD_DIM)
    values = content @ (random(content.shape[1], HEAD_DIM) / content.shape[1] ** 0.5)
    values = (values + 0.7 * random(*values.shape)) * (0.4 * random(HEAD_DIM)).exp() + 0.5 * random(HEAD_DIM)
    values[:, torch.randperm(HEAD_DIM, generator=make)[:2]] *= 6
    values *= (0.25 * random(len(values), 1)).exp()
    tables = _ropes()
    parts = zip(_normed(keys).split([len(place) for place in places]), tables, strict=True)
    turned = [apply_rope(part[:, None], rope)[:, 0] for part, rope in parts]
    q, k = apply_rope(_normed(queries)[:, None], tables[3])[:, 0].double(), torch.cat(turned).double()
    q = q[torch.randperm(len(q), generator=make)[:QUERIES]]
    q *= spread / (q @ k.t() / HEAD_DIM**0.5).std(1).mean()
    q, k, v = (x.bfloat16().double() for x in (q, k, values))
    return Head(q, k, v, tuple(len(p) for p in places))


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(1, keepdim=True).sqrt()


def encoded(case: Head) -> list[KVBlock]:
    """As the rings hold it."""
    blocks = []
    for k, v in zip(case.k.split(case.blocks), case.v.split(case.blocks), strict=True):
        layout = SlotLayout(tokens=len(k), heads=1, head_dim=HEAD_DIM)
        blocks.append(layout.block(torch.empty(layout.nbytes, dtype=torch.uint8)))
        encode_block(k.float()[:, None], v.float()[:, None], blocks[-1])
    return blocks


def ours(case: Head, blocks: list[KVBlock]) -> Tensor:
    return stepwise_attention(case.q.float()[:, None], blocks)[:, 0].double()


Weigh = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(weights of a tile, its values, their scales) -> (weighted values, sum of weights)."""


def others(case: Head, blocks: list[KVBlock]) -> dict[str, Tensor]:
    """What the other variants give from the same int8 scores."""
    channel = [block.v_scale.double() for block in blocks]
    by_channel = [v.div(s).round().clamp(-127, 127) for v, s in zip(case.v.split(case.blocks), channel, strict=True)]
    token = case.v.abs().amax(1, keepdim=True).div(127)
    by_token = case.v.div(token).round()
    fp8_scale = case.v.abs().amax(0) / 448
    widths = {
        "token": [*zip(by_token.split(case.blocks), token.split(case.blocks), strict=True)],
        "channel": [*zip(by_channel, channel, strict=True)],
        "fp8": [(_fp8(v / fp8_scale), fp8_scale) for v in case.v.split(case.blocks)],
    }

    def bf16(p: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return (p * s.t()).bfloat16().double() @ v, p.sum(1)

    def fp16(p: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        weight, total = (p * s.t()).half().double(), torch.zeros(len(p), HEAD_DIM, dtype=torch.float64)
        for first in range(0, len(v), 16):  # a product instruction's keys
            total = (total + weight[:, first : first + 16] @ v[first : first + 16]).half().double()
        return total, p.sum(1)

    def fp8(p: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return _fp8(p * 448) @ v * s / 448, p.sum(1)

    def levels(count: int) -> Weigh:
        def rounded(p: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            weight = (p * count).round() / count
            return weight @ v * s, weight.sum(1)

        return rounded

    kinds = {
        FORMER: (bf16, "token", 64, False),
        "fp16 P.V, accumulated in fp16 over 64 keys": (fp16, "token", 64, False),
        "fp8 P.V": (fp8, "fp8", 64, False),
        "int8 P, 127 levels below the largest so far": (levels(127), "channel", 64, False),
        "int8 P, 127 levels below a tile's largest": (levels(127), "channel", 64, True),
        "int8 P, 254 levels below that of 64 keys": (levels(254), "channel", 64, True),
    }
    scores = _scores(case, blocks)
    return {
        name: _online(scores, widths[values], weigh, keys, below_tile)
        for name, (weigh, values, keys, below_tile) in kinds.items()
    }


def _fp8(x: Tensor) -> Tensor:
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def _scores(case: Head, blocks: list[KVBlock]) -> list[Tensor]:
    """Of each block, in powers of 2, from queries and keys in 8 bits."""
    q8, scale = quantize_rows(case.q.float(), torch.int8)
    each = []
    for block in blocks:
        product = (q8.double() @ block.k[:, 0].double().t()) * scale.double() * block.k_scale[:, 0].double()
        each.append((product + (case.q @ block.k_mean[0].double())[:, None]) * math.log2(math.e) / HEAD_DIM**0.5)
    return each


def _online(
    scores: list[Tensor],
    values: list[tuple[Tensor, Tensor]],
    weigh: Weigh,
    keys: int,
    below_tile: bool,
) -> Tensor:
    """Softmax tile by tile, weights below the largest score of a tile or of all tiles so far."""
    top = torch.full((len(scores[0]),), -math.inf, dtype=torch.float64)
    result, total = torch.zeros(len(top), HEAD_DIM, dtype=torch.float64), torch.zeros_like(top)
    for score, (value, step) in zip(scores, values, strict=True):
        for first in range(0, score.shape[1], keys):
            part = score[:, first : first + keys]
            here = part.amax(1)
            higher = torch.maximum(top, here)
            base = here if below_tile else higher
            weight = torch.exp2(part - base[:, None]).float().double()
            inner = step[first : first + keys] if step.ndim == 2 and len(step) == len(value) else step
            weighted, sums = weigh(weight, value[first : first + keys], inner)
            keep, up = torch.exp2(top - higher), torch.exp2(base - higher)
            result = result * keep[:, None] + weighted * up[:, None]
            total, top = total * keep + sums * up, higher
    return result / total[:, None]


def errors(spreads: dict[float, float], seeds: int) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for spread, alone in spreads.items():
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            case = head(spread, alone, seed)
            blocks, exact = encoded(case), case.exact()
            for name, out in ({OURS: ours(case, blocks)} | others(case, blocks)).items():
                found.setdefault(name, []).append(((out - exact).norm() / exact.norm()).item())
        for name, each in found.items():
            rows.setdefault(name, {"variant": name})[f"{spread:g} nats"] = sum(each) / len(each)
        print(f"{spread:g} nats: done", file=sys.stderr, flush=True)
    return list(rows.values())


def costs() -> list[dict[str, Any]]:
    """Of our kernel and the former one, each on the five cards."""
    from former_attention import STEPS as FORMER_STEPS
    from former_attention import aot_case as former

    from lowvram_kernels.triton_attention import aot_cases

    rows = []
    for name in CARDS_HERE:
        card = CARDS[name]
        chip = card.generation
        assert chip is not None
        rows.append(cost(card, OURS, aot_cases(chip)[0], TILE_TOKENS, card.rates.int8))
        rows.append(cost(card, FORMER, former(chip), FORMER_STEPS[chip][0], card.rates.bf16))
        print(f"{name}: done", file=sys.stderr, flush=True)
    return rows


def cost(card: Any, variant: str, case: Case, keys: int, second_rate: float) -> dict[str, Any]:
    usage = compile_case(case, card.generation)
    assert usage.loop is not None
    blocks = [sum(FRAMES[:1]) * math.prod(GRID)] * len(FRAMES) + [len(condition_rope(*GRID, HEAD_DIM).cos)]
    programs = -(-BLOCK_TOKENS // 128) * HEADS * LAYERS * STEPS
    steps = programs * sum(-(-tokens // keys) for tokens in blocks)
    # An SM issues 4 instructions of 32 lanes a clock; its float32 rate is one multiply-add a lane and clock, two on
    # sm_86 and later.
    lanes = 2 * 16 if card.generation == 80 else 2 * 32
    issued = steps * usage.num_warps * usage.loop.instructions / (card.rates.fp32 / lanes)
    product = 2 * BLOCK_TOKENS * sum(blocks) * HEAD_DIM * HEADS * LAYERS * STEPS
    products = product / card.rates.int8 + product / second_rate
    return {
        "card": card.name,
        "chip": card.generation,
        "variant": variant,
        "keys_a_step": keys,
        "instructions_a_step": usage.loop.instructions,
        "instructions_a_score": usage.loop.instructions * usage.num_warps * 32 / (128 * keys),
        "stack_bytes": usage.stack_bytes,
        "opcodes": usage.matrix_instructions,
        "products_s": products,
        "instructions_s": issued,
        "least_s": max(products, issued),
        "most_s": products + issued,
    }


def markdown(result: dict[str, Any]) -> str:
    names = [f"{spread:g} nats" for spread in SPREADS]
    lines = ["| second product | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {row['variant']} | " + " | ".join(f"{row[n]:.2%}" for n in names) + " |" for row in result["errors"]]
    lines += ["", "| card | second product | instructions a step | a score | predicted s a block |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['card']} | {row['variant']} | {row['instructions_a_step']} of {row['keys_a_step']} keys "
        f"| {row['instructions_a_score']:.1f} | {row['least_s']:.2f} to {row['most_s']:.2f} |"
        for row in result["costs"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "question": "in what numbers should attention over 8-bit rings weigh its values?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "keys": sum(head(2.0, 1.0, 0).blocks),
        "heads": SEEDS,
        "levels": LEVELS,
        "errors": errors(SPREADS, SEEDS),
        "costs": costs(),
    }
    print(markdown(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
