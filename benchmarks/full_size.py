"""The whole 14B model on a GPU: does it stay inside a stated budget, how fast is it, how much copying does it hide?

python benchmarks/full_size.py                          every part; writes benchmarks/results/full_size_<gpu>.json
python benchmarks/full_size.py --only run-int8 --resume some parts (names or their beginnings), only what is missing
python benchmarks/full_size.py --preset tiny --device cpu  what a machine without a GPU can try of the script
python benchmarks/full_size.py --table                  README's table from the result files that are there

Parts, each a process of its own: random artifacts (no trained values: times and bytes do not depend on them), three
clips with a budget and without, five with CUDA graphs of the layers that stay on the card, and one pass over all layers
streamed by lowvram and by diffusers' group offloading.
A part that cannot run says why in the file and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_size_table as tables
from full_size_artifacts import PRECISIONS, artifact_path, say

KINDS = ("artifact", "run-capped", "run-uncapped", "graphs", "layers", "diffusers")
PARTS = [f"{kind}-{precision}" for precision in PRECISIONS for kind in KINDS]
STAMP = ("preset", "gpu", "driver", "torch", "triton", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("14b", "tiny"), default="14b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-full-size")
    parser.add_argument("--only", action="append", metavar="PART", help=f"of {', '.join(PARTS)}; a beginning will do")
    parser.add_argument("--resume", action="store_true", help="leave out parts that the result file has measured")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds that one part may take")
    parser.add_argument("--vram-budget", default="22.15GiB")
    parser.add_argument("--ram-budget", help="where the machine's own figure is not what this process may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print README's table and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(tables.readme(tables.RESULTS))
    elif options.child:
        # Behind everything else, so that kernels.py here does not stand for a library of that name.
        sys.path.append(sys.path.pop(0))
        answer(options)
    else:
        measure(options)


def measure(
    options: argparse.Namespace, run: Callable[[str, argparse.Namespace], dict[str, Any]] | None = None
) -> None:
    """Do the chosen parts with ``run`` (each in a process of its own, if none is given); write and print the result."""
    run = run or run_part
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("no CUDA device here; --preset tiny --device cpu tries the script without one")
    chosen = chosen_parts(options.only)
    options.dir.mkdir(parents=True, exist_ok=True)
    stamp = run("machine", options)["measured"]
    path = options.out or (tables.RESULTS / f"full_size_{tables.slug(stamp['gpu'])}.json" if stamp["gpu"] else None)
    result = earlier(path, stamp)
    done = set()
    for part in (p for p in chosen if not (options.resume and "measured" in result["parts"].get(p, {}))):
        for step in (artifact_for(part, options, done), part):
            if step is None or step in done:
                continue
            done.add(step)
            result["parts"][step] = run(step, options)
            result["derived"] = tables.derive(result["parts"])
            if path:
                write(path, result)
    print(tables.markdown(result))
    say(f"artifacts are kept in {options.dir} for the next run")


def chosen_parts(only: list[str] | None) -> list[str]:
    for name in only or ():
        if not any(part.startswith(name) for part in PARTS):
            sys.exit(f"--only {name} names no part; there are {', '.join(PARTS)}")
    return [part for part in PARTS if not only or part.startswith(tuple(only))]


def artifact_for(part: str, options: argparse.Namespace, done: set[str]) -> str | None:
    """The part that writes the artifact which this one needs, where it is not there and was not tried for."""
    precision = part.rpartition("-")[2]
    name = f"artifact-{precision}"
    there = artifact_path(options.dir, options.preset, precision).exists()
    return None if there or name in done else name


def earlier(path: Path | None, stamp: dict[str, Any]) -> dict[str, Any]:
    """What the file holds already, where machine and versions are the same; else a new result."""
    new = {
        "question": "does the full-size model stay inside a budget on this card, how fast, and what is hidden?",
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": stamp,
        "definitions": tables.DEFINITIONS,
        "parts": {},
    }
    if path is None or not path.exists():
        return new
    found = json.loads(path.read_text())
    if any(found["machine"].get(key) != stamp.get(key) for key in STAMP):
        say(f"{path} is of another machine, preset or version: it is replaced")
        return new
    return found | {key: new[key] for key in ("command", "date", "machine", "definitions")}


def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """A part in a process of its own: {"measured": ...} or {"not_measured": why}, with date, command and seconds."""
    begin = time.perf_counter()
    if part != "machine":
        say(f"{part}: starts, at most {options.limit_s:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", part, "--answer", str(file)]
        try:
            code = subprocess.run(command, timeout=options.limit_s).returncode
            found = json.loads(file.read_text()) if file.exists() else {"not_measured": f"ended with exit code {code}"}
        except subprocess.TimeoutExpired:
            found = {"not_measured": f"took longer than {options.limit_s:.0f} s"}
    if part == "machine":
        return found if "measured" in found else sys.exit(f"the machine could not be asked: {found['not_measured']}")
    seconds = time.perf_counter() - begin
    say(f"{part}: {found.get('not_measured') or 'measured'}, {seconds:.0f} s")
    about = {"command": shlex.join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "seconds": seconds}
    return found | about


def answer(options: argparse.Namespace) -> None:
    """In the child: do the part and write what came of it."""
    import full_size_parts as parts

    try:
        found = parts.do(options.child, options)
    except parts.Skipped as reason:
        found = {"not_measured": str(reason)}
    except Exception as error:  # whatever goes wrong in a part is its result; the trace goes to the terminal
        import traceback

        traceback.print_exc()
        found = {"not_measured": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    else:
        found = {"measured": found}
    write(options.answer, found)


def write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
