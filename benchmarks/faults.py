"""What becomes of a run of several ranks when one of them dies or stops? Tiny model, gloo on the CPU, real processes.

python benchmarks/faults.py [--kills 20] [--early 3] [--stops 3] [--seed 0] [--out benchmarks/results/faults_cpu.json]

Each run is ``lowvram infer --gpus N`` in a session of its own. At a random moment while blocks are made, one rank, each
in turn, is sent SIGKILL; in further runs that happens while processes start, or it is SIGSTOP, after which the rank is
there but does nothing. Then the run has to end within 30 s, with an exit code that is not 0 and a line that names the
rank and what it did last; no process of it may be left; and the frames that were in the file have to play.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

LIMIT_S = 30.0
PATIENCE_S = 300.0
# Behind what is on the disk: ten frames of look-ahead, one a thread of the encoder, half a second of an open fragment.
HELD_BACK_FRAMES = 10 + 4 + 12
LAYOUTS = {
    "3 stages and the VAE": ["--gpus=4", "--num_gpus_dit=3", "--ulysses_size=1", "--enable_vae_parallel"],
    "2 Ulysses ranks and the VAE": ["--gpus=3", "--num_gpus_dit=2", "--ulysses_size=2", "--enable_vae_parallel"],
    "2 Ulysses ranks": ["--gpus=2", "--num_gpus_dit=2", "--ulysses_size=2", "--enable_vae_parallel=False"],
    "2 stages": ["--gpus=2", "--num_gpus_dit=2", "--ulysses_size=1", "--enable_vae_parallel=False"],
}
DRAWN = list(LAYOUTS)[:3]
MARK = "LOWVRAM_FAULTS_RUN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Rank ``victim`` is sent ``signal``: ``after_s`` behind the first frames in the file where ``running``, else
    behind the start."""

    layout: str
    victim: int
    signal: str
    running: bool
    after_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--early", type=int, default=3)
    parser.add_argument("--stops", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # no run stays behind
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder)
        faults = drawn_faults(options.kills, options.early, options.stops, options.seed)
        rows = [told(one(fault, model, folder)) for fault in faults]
    result = report(rows, options.seed)
    text = json.dumps(result, indent=1, allow_nan=False)
    if options.out:
        options.out.write_text(text + "\n")
    print(json.dumps(result["summary"], indent=1))
    if result["summary"]["wrong"]:
        sys.exit(f"{result['summary']['wrong']} of {len(rows)} runs did not end as they should")


def drawn_faults(kills: int, early: int, stops: int, seed: int) -> Iterator[Fault]:
    """Kills while blocks are made, of every rank of every layout in turn; then early ones, then stops."""
    draw = random.Random(seed)
    every = itertools.cycle([(layout, rank) for layout in DRAWN for rank in range(ranks_of(layout))])
    for number in range(kills + early + stops):
        layout, victim = next(every)
        running = not kills <= number < kills + early
        yield Fault(
            layout=layout,
            victim=victim,
            signal="SIGSTOP" if number >= kills + early else "SIGKILL",
            running=running,
            after_s=draw.uniform(0, 4 if running else 15),
        )


def ranks_of(layout: str) -> int:
    return int(LAYOUTS[layout][0].removeprefix("--gpus="))


def write_model(folder: Path, voice_s: float = 60.0, **widths: int) -> list[str]:
    """A tiny artifact, a portrait and a voice; the arguments of ``infer`` that name them. ``widths`` are those of
    ``write_checkpoint`` that are to be others."""
    from lowvram.media.samples import draw_portrait, synth_voice, write_wav
    from lowvram_quantize.convert import convert
    from lowvram_quantize.synthetic import write_checkpoint

    write_checkpoint(folder / "ckpt", **widths)
    convert(folder / "ckpt", folder / "artifact", precision="int8")
    draw_portrait(128, 128).save(folder / "portrait.png")
    write_wav(folder / "voice.wav", synth_voice(voice_s), 16000)
    files = {"model": "artifact", "image": "portrait.png", "audio": "voice.wav"}
    named = [f"--{option}={folder / file}" for option, file in files.items()]
    return [*named, "--prompt=A person speaks", "--size=128*128", "--infer-frames=48", "--device=cpu", "-q"]


def one(fault: Fault, model: list[str], folder: Path) -> dict[str, Any]:
    """Start a run, let the fault happen, and see what becomes of it."""
    video = folder / "out.mp4"
    partial = folder / "out.partial.mp4"
    for path in (video, partial):
        path.unlink(missing_ok=True)
    with started(fault, [*model, f"--out={video}"], folder) as (run, store):
        wait_for_moment(fault, run, partial)
        ranks = rank_processes(run)
        doing = {rank: last_words(store, rank) for rank in range(ranks_of(fault.layout))}
        before = partial_frames(partial, folder)
        if run.poll() is not None or fault.victim not in ranks:
            raise RuntimeError(f"the run was not there at the moment of {fault}: {(folder / 'stderr').read_text()}")
        begin = time.monotonic()
        ranks[fault.victim].send_signal(signal.Signals[fault.signal])
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(PATIENCE_S)
        seconds = time.monotonic() - begin
        left = left_processes(run)
    after = partial_frames(partial, folder)
    found = {
        "exit_code": run.returncode,
        "seconds": seconds,
        "processes_left": len(left),
        "doing": doing,
        "frames_before": before,
        "frames_after": after,
        "said": (folder / "stderr").read_text(),
    }
    found["said"] = last_line(found["said"])
    return dataclasses.asdict(fault) | found | {"wrong": wrong(fault, found)}


def wrong(fault: Fault, found: dict[str, Any]) -> list[str]:
    """Everything about a run that is not as it should be."""
    writes = 0 if fault.layout == "2 Ulysses ranks" else ranks_of(fault.layout) - 1
    made = frames_made(found["doing"][writes])
    # A writer that is killed loses what was on its way to the disk.
    sure = max(made - HELD_BACK_FRAMES if fault.victim == writes else made, found["frames_before"], 0)
    checks = {
        f"took {found['seconds']:.1f} s, more than {LIMIT_S:.0f}": found["seconds"] > LIMIT_S,
        f"ended with exit code {found['exit_code']}": found["exit_code"] in (0, None),
        f"{found['processes_left']} processes are left": found["processes_left"] > 0,
        f"rank {fault.victim} is not named": not re.search(rf"\brank {fault.victim} ", found["said"]),
        "no last words": "last it was " not in found["said"],
        f"{found['frames_after']} frames play, {sure} were written": found["frames_after"] < sure,
    }
    return [words for words, holds in checks.items() if holds]


def frames_made(doing: str) -> int:
    """Video frames of the blocks before the one that the writing rank speaks of; the first lacks three."""
    block = re.search(r"block (\d+)", doing)
    return max(0, int(block[1]) * 12 - 3) if block else 0


@contextlib.contextmanager
def started(fault: Fault, arguments: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The starter's process, and the store of its ranks, where they say what they do."""
    from torch.distributed import PrefixStore, TCPStore

    from lowvram.parallel.launch import ADDRESS
    from lowvram.parallel.rendezvous import prefix

    port = free_port()
    command = [sys.executable, "-m", "lowvram", "infer", *arguments, *LAYOUTS[fault.layout], f"--port={port}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", MARK: str(port)}
    with (folder / "stderr").open("wb") as said:
        run = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env=environ, cwd=folder, start_new_session=True
        )
    try:
        wait_until(lambda: rank_processes(run) or run.poll() is not None)
        store = TCPStore(ADDRESS, port, wait_for_workers=False, timeout=datetime.timedelta(seconds=10))
        yield run, PrefixStore(prefix("0"), store)
    finally:
        for process in left_processes(run):
            process.kill()
        run.wait()


def wait_for_moment(fault: Fault, run: subprocess.Popen[bytes], partial: Path) -> None:
    if fault.running:
        wait_until(lambda: (partial.exists() and partial.stat().st_size > 10_000) or run.poll() is not None)
    else:
        wait_until(lambda: len(rank_processes(run)) == ranks_of(fault.layout) or run.poll() is not None)
    time.sleep(fault.after_s)


def wait_until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(f"not there after {PATIENCE_S:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_processes(run: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """By rank."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(run.pid).children():
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(child.environ()["RANK"])] = child
    return found


def left_processes(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What lives of a run: of its session, or with its mark in the environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.status() != psutil.STATUS_ZOMBIE and (os.getsid(process.pid) == run.pid or marked(process, run)):
                found.append(process)
    return found


def marked(process: psutil.Process, run: subprocess.Popen[bytes]) -> bool:
    port = next((word.split("=")[1] for word in map(str, run.args) if word.startswith("--port=")), None)
    return process.environ().get(MARK) == port


def last_words(store: Any, rank: int) -> str:
    return json.loads(store.get(f"beat/{rank}"))[1] if store.check([f"beat/{rank}"]) else "starting"


def partial_frames(partial: Path, folder: Path) -> int:
    """Frames that play of the file as it is now; 0 where nothing was written yet."""
    from lowvram.media.video import read_frames
    from lowvram_kernels.errors import InputError

    if not partial.exists():
        return 0
    copy = shutil.copy(partial, folder / "copy.mp4")
    try:
        return sum(1 for _ in read_frames(copy))
    except InputError:
        return 0


def last_line(said: str) -> str:
    """The starter's own line, the one that a person reads."""
    lines = [line for line in said.splitlines() if line.startswith("lowvram: error: ")]
    return lines[-1] if lines else said[-500:]


def told(row: dict[str, Any]) -> dict[str, Any]:
    words = f"{row['layout']}: {row['signal']} for rank {row['victim']}, {row['doing'][row['victim']]}: "
    print(words + (f"{row['seconds']:.1f} s" if not row["wrong"] else f"wrong: {row['wrong']}"), flush=True)
    return row


def report(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    from importlib.metadata import version

    seconds = sorted(row["seconds"] for row in rows)
    stages = Counter(re.sub(r"\d+.*", "", row["doing"][row["victim"]]).strip() for row in rows)
    return {
        "question": "what becomes of a run of several ranks when one of them dies or stops?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "av", "psutil")},
        },
        "limit_s": LIMIT_S,
        "seed": seed,
        "summary": {
            "runs": len(rows),
            "wrong": sum(bool(row["wrong"]) for row in rows),
            "seconds_median": seconds[len(seconds) // 2],
            "seconds_worst": seconds[-1],
            "signals": dict(Counter(row["signal"] for row in rows)),
            "victim_was": dict(stages),
            "files_that_play": sum(row["frames_after"] > 0 for row in rows),
        },
        "runs": rows,
    }


if __name__ == "__main__":
    main()
