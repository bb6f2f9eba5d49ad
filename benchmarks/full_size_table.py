"""What ``full_size.py`` measured, in Markdown: one result in full, and README's table from all results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lowvram.byte_sizes import gib

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
RUNS = ("run-capped-int8", "run-uncapped-int8", "run-capped-bf16", "run-uncapped-bf16")
# Cards that README speaks of whether or not somebody has measured them: title, name, run.
WANTED = (
    ("RTX 4090, 24 GB", r"RTX 4090", "run-capped-int8"),
    ("A100 / H100, 80 GB", r"\b[AH]100\b", "run-uncapped-bf16"),
)
# With fewer copies than this share left out, two runs do not tell what copies cost.
LEAST_DIFFERENCE = 0.1
DEFINITIONS = {
    "s a block": "median from one delivery of 12 frames to the next, from the second clip on, full waves only",
    "first clip": "seconds of denoising and decoding of all its blocks, over their number",
    "copy time": "bytes a block over the measured rate of pinned copies; in or out, whichever takes longer",
    "hidden": "of the copy time beyond that of the run without a budget, the share that does not lengthen a block",
    "a pass": "one denoising step of one block through all layers, every layer streamed, rings on the device",
    "in a wave": "a pass that takes one step of four blocks, a quarter of its time",
    "ratio": "diffusers' seconds (the faster of its two variants) over lowvram's",
}


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()


def derive(parts: dict[str, Any]) -> dict[str, Any]:
    """Figures that need two parts; ``DEFINITIONS`` says what they are."""
    found: dict[str, Any] = {}
    for precision in ("int8", "bf16"):
        capped, free = (measured(parts, f"run-{kind}-{precision}") for kind in ("capped", "uncapped"))
        if capped:
            found[f"run-{precision}"] = run_figures(capped, free)
        layers, rival = (measured(parts, f"{kind}-{precision}") for kind in ("layers", "diffusers"))
        if layers and rival and "diffusers" in rival:
            found[f"layers-{precision}"] = layer_figures(layers["lowvram"], rival["diffusers"])
    return found


def measured(parts: dict[str, Any], name: str) -> dict[str, Any] | None:
    return parts.get(name, {}).get("measured")


def run_figures(capped: dict[str, Any], free: dict[str, Any] | None) -> dict[str, Any]:
    budget, peak = capped["vram_budget_bytes"], capped["peak_reserved_bytes"]
    copy = copy_seconds(capped)
    seconds = capped["steady_s_per_block"]
    return {
        "copy_s": copy,
        "time_over_copy_time": seconds / copy if copy else None,
        "peak_under_budget": peak <= budget if peak and budget else None,
        "speed_of_uncapped": free["steady_s_per_block"] / seconds if free else None,
        "hidden_share": hidden_share(capped, free),
    }


def copy_seconds(run: dict[str, Any]) -> float | None:
    rates = run["rates"]
    return rates and max(run["bytes_in_per_block"] / rates["h2d"], run["bytes_out_per_block"] / rates["d2h"])


def hidden_share(capped: dict[str, Any], free: dict[str, Any] | None) -> float | None:
    if free is None or not (copy := copy_seconds(capped)):
        return None
    more = copy - (copy_seconds(free) or 0.0)
    if more < LEAST_DIFFERENCE * copy:
        return None
    shown = max(0.0, capped["steady_s_per_block"] - free["steady_s_per_block"])
    return max(0.0, 1.0 - shown / more)


def layer_figures(ours: dict[str, Any], variants: dict[str, Any]) -> dict[str, Any]:
    theirs = min(variants.values(), key=lambda variant: variant["s_per_pass"])
    return {
        "diffusers_s_per_step": theirs["s_per_pass"],
        "throughput_step_by_step": theirs["s_per_pass"] / ours["s_per_pass"],
        "throughput_in_a_wave": theirs["s_per_pass"] / ours["s_per_step_in_a_wave"],
        "same_latents": all(variant["latents"] == ours["latents"] for variant in variants.values()),
    }


def markdown(result: dict[str, Any]) -> str:
    """All parts of one result."""
    machine, parts, derived = result["machine"], result["parts"], result.get("derived", {})
    name = machine["gpu"] or "CPU"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "torch", "triton", "diffusers") if machine[key])
    sections = [f"{name}, preset {machine['preset']}; {versions}; {result['date']}: `{result['command']}`"]
    sections.append(rows(RUN_COLUMNS, [run_row(name, parts[name], derived) for name in RUNS if name in parts]))
    sections.append("\n".join(f"- {key}: {text}" for key, text in verdicts(derived)))
    for run in RUNS:
        if found := measured(parts, run):
            sections.append(f"{run}\n\n" + rows(STAGE_COLUMNS, [stage_row(stage) for stage in found["stages"]]))
    layers = [layer_row(precision, parts, derived) for precision in ("int8", "bf16") if f"layers-{precision}" in parts]
    sections += [rows(LAYER_COLUMNS, layers)] if layers else []
    reasons = [f"- {part}: {entry['not_measured']}" for part, entry in parts.items() if "not_measured" in entry]
    reasons += [f"- {n}: {e['measured']['streams']}" for n, e in parts.items() if "streams" in e.get("measured", {})]
    sections += [f"Not measured:\n\n{chr(10).join(reasons)}"] if reasons else []
    sections.append("\n".join(f"- {name}: {text}." for name, text in DEFINITIONS.items()))
    return "\n\n".join(filter(None, sections))


def verdicts(derived: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for precision in ("int8", "bf16"):
        for key, words in VERDICTS.items():
            value = derived.get(f"run-{precision}", {}).get(key)
            text = NOT_MEASURED if value is None else str(value) if isinstance(value, bool) else f"{value:.2f}"
            found += [(f"{precision}, {words}", text)] if f"run-{precision}" in derived else []
    return found


VERDICTS = {
    "peak_under_budget": "peak reserved under the budget",
    "speed_of_uncapped": "speed with the budget over speed without",
    "time_over_copy_time": "seconds a block over copy time",
}


RUN_COLUMNS = (
    "run",
    "budget",
    "peak reserved (allocated)",
    "s a block, first clip",
    "s a block",
    "frames/s",
    "PCIe in / out a block",
    "copy time",
    "hidden",
    "streamed layers, host rings, wave",
    "given up",
)
STAGE_COLUMNS = ("stage", "predicted", "allocated", "reserved", "seconds")
LAYER_COLUMNS = (
    "layers",
    "lowvram, s a pass",
    "in a wave, s a step",
    "diffusers, s a step",
    "ratio",
    "ratio in a wave",
)


def run_row(name: str, part: dict[str, Any], derived: dict[str, Any]) -> list[str]:
    if "measured" not in part:
        return [name, *[NOT_MEASURED] * (len(RUN_COLUMNS) - 1)]
    run = part["measured"]
    figures = derived.get(name.replace("capped-", ""), {}) if name.startswith("run-capped") else {}
    copy = copy_seconds(run)
    return [
        name,
        size(run["vram_budget_bytes"]) if run["vram_budget_bytes"] else "none",
        f"{size(run['peak_reserved_bytes'])} ({size(run['peak_allocated_bytes'])})",
        f"{run['first_clip_s_per_block']:.3f}",
        f"{run['steady_s_per_block']:.3f}",
        f"{run['steady_frames_per_second']:.1f}",
        f"{size(run['bytes_in_per_block'])} / {size(run['bytes_out_per_block'])}",
        f"{copy:.3f} s" if copy else NOT_MEASURED,
        f"{figures['hidden_share']:.0%}" if figures.get("hidden_share") is not None else NOT_MEASURED,
        ", ".join(str(run["placement"][key]) for key in ("streamed_layers", "host_rings", "wave")),
        "; ".join(run["given_up"]) or "nothing",
    ]


def stage_row(stage: dict[str, Any]) -> list[str]:
    found = [size(stage[f"{what}_bytes"]) for what in ("predicted", "allocated", "reserved")]
    return [stage["stage"], *found, f"{stage['seconds']:.2f}"]


def layer_row(precision: str, parts: dict[str, Any], derived: dict[str, Any]) -> list[str]:
    ours, figures = measured(parts, f"layers-{precision}"), derived.get(f"layers-{precision}")
    own = [ours["lowvram"][key] for key in ("s_per_pass", "s_per_step_in_a_wave")] if ours else [None, None]
    keys = ("diffusers_s_per_step", "throughput_step_by_step", "throughput_in_a_wave")
    beside = [figures[key] for key in keys] if figures else [None] * len(keys)
    return [precision, *(NOT_MEASURED if value is None else f"{value:.3f}" for value in (*own, *beside))]


def readme(folder: Path) -> str:
    """The cards that README names, then all others that somebody has measured."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("full_size_*.json"))]
    results = [r for r in results if r["machine"]["preset"] == "14b" and r["machine"]["gpu"]]
    lines, told = [], set()
    for title, pattern, run in WANTED:
        own = [r for r in results if re.search(pattern, r["machine"]["gpu"])]
        found = next((r for r in own if measured(r["parts"], run)), None)
        lines.append(readme_row(title, run, measured(found["parts"], run) if found else None))
        told |= {(found["machine"]["gpu"], run)} if found else set()
    for result in results:
        name = result["machine"]["gpu"]
        for run in (run for run in RUNS if run in result["parts"] and (name, run) not in told):
            lines.append(readme_row(name, run, measured(result["parts"], run)))
    return rows(("hardware", "what runs", "memory", "seconds a block (12 frames)"), lines)


def readme_row(hardware: str, run: str, found: dict[str, Any] | None) -> list[str]:
    _, kind, precision = run.split("-")
    if found is None:
        held = "" if kind == "uncapped" else ", with a budget"
        return [hardware, f"14B, {precision}, 704*384{held}", NOT_MEASURED, NOT_MEASURED]
    budget = found["vram_budget_bytes"]
    held = f", held to {size(budget)}" if budget else ""
    seconds = f"{found['steady_s_per_block']:.2f} ({found['steady_frames_per_second']:.1f} frames/s)"
    return [hardware, f"14B, {precision}, {found['size']}{held}", size(found["peak_reserved_bytes"]), seconds]


def size(nbytes: float | None) -> str:
    return NOT_MEASURED if nbytes is None else gib(nbytes)


def rows(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines])
