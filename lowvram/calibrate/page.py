"""An artifact as one HTML page that holds everything in itself: what lies where, and what storing it so costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram.compare.charts import Chart, HeatMap, heat_map, over_count
from lowvram.pages.document import for_script, rendered, write_text

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_WORST = 10
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")
_AUDIO = re.compile(r"audio_injector\.injector(_adain_layers)?\.(\d+)\.(.+)\.weight")


def write_page(facts: dict[str, Any], path: Path) -> None:
    """Write the page to ``path``, which may be replaced. ``facts``: of ``lowvram_quantize.inspect.describe``, with
    ``words`` for what it was calibrated on, or for how to have that.

    Raises:
        OutputError: a full disk, or no right to write there.
    """
    write_text(render(facts), path)


def render(facts: dict[str, Any]) -> str:
    """The page as text."""
    dit, calibration = facts["components"].get("dit"), facts["calibration"]
    values = {
        "facts": facts,
        "json": for_script(facts),
        "name": Path(facts["path"]).name,
        "figures": _figures(facts),
        "parts": _parts(facts),
        "layers": _layers(dit) if dit else [],
        "charts": _charts(dit) if dit else [],
        "maps": _maps(dit["config"], calibration) if dit and calibration else [],
        "worst": _worst(dit, calibration) if dit and calibration else [],
    }
    return rendered(_TEMPLATE, values, {"mib": _mib, "percent": _percent, "short": _short})


def _figures(facts: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("bytes", f"{_mib(facts['bytes'])} MiB")]
    for name, component in facts["components"].items():
        error = component["relative_error"]
        found.append((f"{name}, {component['precision']}", f"{_mib(component['bytes'])} MiB"))
        if error is not None:
            found.append((f"{name}: weight error, mean", _percent(error["mean"])))
    if facts["output_error"] is not None:
        found.append(("dit: output error, mean", _percent(facts["output_error"]["mean"])))
        found.append(("dit: output error, worst", _percent(facts["output_error"]["worst"])))
    return found


def _parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Components and copied folders with their bytes and their share of all."""
    parts = [
        {"name": name, "precision": each["precision"], "bytes": each["bytes"], "schemes": each["schemes"]}
        for name, each in facts["components"].items()
    ]
    folders: dict[str, int] = {}
    for file, nbytes in facts["files"].items():
        folder = file.split("/")[0]
        folders[folder] = folders.get(folder, 0) + nbytes
    parts += [{"name": name, "precision": "", "bytes": nbytes, "schemes": {}} for name, nbytes in folders.items()]
    total = sum(part["bytes"] for part in parts) or 1
    return [part | {"share": part["bytes"] / total} for part in parts]


def _layers(dit: dict[str, Any]) -> list[dict[str, Any]]:
    """Slabs of the DiT: what is in them in which precision, and the error of the weights."""
    return [
        {
            "name": slab["name"],
            "bytes": slab["bytes"],
            "schemes": ", ".join(f"{count} {scheme}" for scheme, count in slab["schemes"].items()),
            "error": slab["relative_error"],
        }
        for slab in dit["slabs"]
    ]


def _charts(dit: dict[str, Any]) -> list[Chart]:
    layers = [slab for slab in dit["slabs"] if slab["name"].startswith("layer.")]
    charts = [over_count("Bytes", "MiB", [slab["bytes"] / 2**20 for slab in layers], "layer")]
    if any(slab["relative_error"] for slab in layers):
        worst = [(slab["relative_error"] or {"worst": 0.0})["worst"] for slab in layers]
        charts.append(over_count("Weight error, worst of each layer", "relative", worst, "layer"))
    return charts


def _maps(config: Mapping[str, Any], calibration: dict[str, Any]) -> list[HeatMap]:
    linears, places = calibration["linears"], {}
    for name in calibration["linears"]:
        if (place := place_of(name, config["audio_inject_layers"])) is not None:
            places[name] = place
    places = dict(sorted(places.items(), key=lambda item: (_row_order(item[1][0]), item[1][1])))
    errors = {place: linears[name]["output_error"] for name, place in places.items()}
    ratios = {place: _ratio(linears[name]) for name, place in places.items()}
    shown = {place: error for place, error in errors.items() if error is not None}
    columns = int(config["num_layers"])
    return [
        heat_map("Output error", columns, shown, _percent, "of the stored form against the full-precision weight"),
        heat_map("Outliers", columns, ratios, _short, "largest input channel over the median channel"),
    ]


def place_of(name: str, audio_layers: Sequence[int]) -> tuple[str, int] | None:
    """A Linear's kind and the layer that it belongs to, by its weight's name; None of what is in no layer."""
    if match := _BLOCK.fullmatch(name):
        return match[2], int(match[1])
    match = _AUDIO.fullmatch(name)
    if match is None or int(match[2]) >= len(audio_layers):
        return None
    return f"audio.{'adain' if match[1] else match[3]}", audio_layers[int(match[2])]


def _row_order(kind: str) -> tuple[int, str]:
    """In the order of the computation."""
    part, _, leaf = kind.partition(".")
    known = ("self_attn", "cross_attn", "ffn", "audio")
    return (known.index(part) if part in known else len(known)) * 10 + "qkvo".find(leaf) + 1, kind


def _ratio(linear: dict[str, Any]) -> float:
    ratio = linear["activations"]["channel_ratio"]
    return math.inf if ratio is None else float(ratio)


def _worst(dit: dict[str, Any], calibration: dict[str, Any]) -> list[dict[str, Any]]:
    linears = {name: each for name, each in calibration["linears"].items() if each["output_error"] is not None}
    names = sorted(linears, key=lambda name: linears[name]["output_error"], reverse=True)[:_WORST]
    return [
        {"name": name.removesuffix(".weight"), "weight_error": dit["relative_errors"].get(name), **linears[name]}
        for name in names
    ]


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _short(value: float | None) -> str:
    return "" if value is None else "infinite" if math.isinf(value) else f"{value:.3g}"
