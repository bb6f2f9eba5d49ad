"""What becomes of two runs that meet in one place? Tiny model on the CPU, real processes of the command line.

python benchmarks/collisions.py [--times 20] [--seed 0] [--out benchmarks/results/collisions_cpu.json]

Two runs of ``convert`` into one folder, with other options and with the same; two of ``infer`` into one file; and
``convert`` over an artifact from which ``infer`` reads. The second starts at a random moment of the first. A run that
ends with exit code 0 has to have made what it makes alone, or to have been followed by one that did; a refused one says
who is there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
PRELOADED = [
    "lowvram.cli",
    "lowvram.infer",
    "lowvram_quantize.convert",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.wav2vec2.modeling_wav2vec2",
]
KINDS = ("two converts", "two equal converts", "two infers", "infer beside convert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = meetings(Path(folder), options.times, options.seed)
    summary = {kind: outcomes([row for row in rows if row["kind"] == kind]) for kind in KINDS}
    wrong = sum(bool(row["wrong"]) for row in rows)
    result = {
        "question": __doc__.splitlines()[0],
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {"torch": version("torch")},
        "summary": summary | {"wrong": wrong},
        "meetings": rows,
    }
    print(json.dumps(result["summary"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if wrong:
        sys.exit(f"{wrong} of {len(rows)} meetings left something wrong behind")


def outcomes(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How often each pair of exit codes came: first run, second run."""
    return dict(sorted(Counter(f"exit codes {first} and {second}" for first, second in map(codes, rows)).items()))


def codes(row: dict[str, Any]) -> tuple[int, int]:
    return tuple(run["exit_code"] for run in row["runs"])  # type: ignore[return-value]


def meetings(folder: Path, times: int, seed: int) -> list[dict[str, Any]]:
    """``times`` meetings of each kind; each as a row with the two runs' exit codes and what is wrong about it."""
    house = House(folder)
    draw = random.Random(seed)
    rows = []
    for kind in KINDS:
        for number in range(times):
            row = house.meet(kind, folder / f"{KINDS.index(kind)}-{number}", draw.random())
            print(
                f"{kind}: {row['after_s']:.2f} s, exit codes {codes(row)} {row['wrong']}", file=sys.stderr, flush=True
            )
            rows.append(row)
    return rows


class House:
    """What all meetings begin with: a checkpoint, its artifacts, a video of each, and how long each run takes alone."""

    def __init__(self, folder: Path):
        from lowvram.media.samples import draw_portrait, synth_voice, write_wav
        from lowvram_quantize.synthetic import write_checkpoint

        # Processes that have imported everything and computed nothing: what is random is when they meet, not an import.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)
        self._ckpt, self._portrait, self._voice = folder / "ckpt", folder / "portrait.png", folder / "voice.wav"
        write_checkpoint(self._ckpt, vae_base_dim=2)
        draw_portrait(128, 128).save(self._portrait)
        write_wav(self._voice, synth_voice(0.7), 16000)
        self._artifacts = {name: folder / name for name in ("int8", "fp8")}
        commands = {name: self.convert(path, name) for name, path in self._artifacts.items()}
        videos = {
            f"{name} {seed}": self.infer(self._artifacts[name], folder / f"{name} {seed}.mp4", seed)
            for name, seed in (("int8", 7), ("int8", 420), ("fp8", 7))
        }
        commands |= videos
        self._alone(["--help"])  # the first process waits for the imports
        self._seconds = {name: self._alone(command) for name, command in commands.items()}
        self._made = {artifact_hash(path): name for name, path in self._artifacts.items()}
        self._made |= {video_hash(folder / f"{name}.mp4"): name for name in videos}
        if len(self._made) != len(commands):
            raise RuntimeError(f"{len(commands)} commands alone made {len(self._made)} different things: {self._made}")

    def convert(self, out: Path, precision: str, *more: str) -> list[str]:
        return ["convert", f"--ckpt-dir={self._ckpt}", f"--out={out}", f"--precision={precision}", *more]

    def infer(self, model: Path, out: Path, seed: int, *more: str) -> list[str]:
        named = [f"--model={model}", f"--image={self._portrait}", f"--audio={self._voice}", f"--out={out}"]
        settings = [
            "--prompt=A person speaks",
            "--size=128*128",
            "--infer-frames=12",
            "--sample-steps=2",
            "--device=cpu",
        ]
        return ["infer", *named, *settings, f"--base-seed={seed}", *more]

    def meet(self, kind: str, folder: Path, share: float) -> dict[str, Any]:
        """The second run starts when that share of the first one's time alone has passed."""
        folder.mkdir()
        artifact, video = folder / "artifact", folder / "video.mp4"
        first, second, taken = {
            "two converts": ("int8", "fp8", "int8"),
            "two equal converts": ("int8", "int8", "int8"),
            "two infers": ("int8 7", "int8 420", "int8 7"),
            "infer beside convert": ("int8 7", "fp8", "int8 7"),
        }[kind]
        if kind == "two infers":
            artifact = self._artifacts["int8"]
            runs = [self.infer(artifact, video, seed, "--overwrite") for seed in (7, 420)]
        elif kind == "infer beside convert":
            shutil.copytree(self._artifacts["int8"], artifact)
            runs = [self.infer(artifact, video, 7), self.convert(artifact, "fp8", "--overwrite")]
        else:
            runs = [self.convert(artifact, name, "--overwrite") for name in (first, second)]
        after_s = share * self._seconds[taken]
        told = self._together(runs, after_s, folder)
        found = {"artifact": self._named(artifact, artifact_hash), "video": self._named(video, video_hash)}
        return {"kind": kind, "after_s": after_s, "runs": told, "found": found, "wrong": wrong(kind, told, found)}

    def _alone(self, command: list[str]) -> float:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (run,) = self._together([command], 0.0, Path(folder))
        if run["exit_code"]:
            raise RuntimeError(f"{command} ended with exit code {run['exit_code']}: {run['said']}")
        return time.monotonic() - begin

    def _together(self, commands: list[list[str]], after_s: float, folder: Path) -> list[dict[str, Any]]:
        files = [folder / f"stderr-{number}" for number in range(len(commands))]
        processes = []
        for number, (command, file) in enumerate(zip(commands, files, strict=True)):
            if number:
                time.sleep(after_s)
            processes.append(self._processes.Process(target=command_line, args=(command, str(file))))
            processes[-1].start()
        for process in processes:
            process.join(PATIENCE_S)
            if process.exitcode is None:
                process.kill()
                raise RuntimeError(f"{commands} did not end within {PATIENCE_S:.0f} s")
        return [
            {"exit_code": process.exitcode, "said": last_line(file)}
            for process, file in zip(processes, files, strict=True)
        ]

    def _named(self, path: Path, content: Callable[[Path], str]) -> str | None:
        """Which run alone makes what lies at ``path``; None where nothing does."""
        return self._made.get(content(path), "something else") if path.exists() else None


def command_line(arguments: list[str], stderr: str) -> None:
    """What the console script does, in this process."""
    with open(stderr, "w") as said:
        os.dup2(said.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from lowvram.cli import main as lowvram

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        lowvram(arguments)


def wrong(kind: str, runs: list[dict[str, Any]], found: dict[str, str | None]) -> list[str]:
    """Everything about a meeting that is not as it should be."""
    made = {
        "two converts": [("artifact", {"int8"}), ("artifact", {"fp8"})],
        "two equal converts": [("artifact", {"int8"}), ("artifact", {"int8"})],
        "two infers": [("video", {"int8 7"}), ("video", {"int8 420"})],
        # The video is of the artifact that was there when it was opened, whole.
        "infer beside convert": [("video", {"int8 7", "fp8 7"}), ("artifact", {"fp8"})],
    }[kind]
    right: dict[str, set[str]] = {}
    for run, (thing, names) in zip(runs, made, strict=True):
        if run["exit_code"] == 0:
            right.setdefault(thing, set()).update(names)
    words = [
        f"the {thing} is of {found[thing]}, not {right[thing]}" for thing in right if found[thing] not in right[thing]
    ]
    words += [f"a run was refused without a word: {run['said']!r}" for run in runs if not refused_aloud(run)]
    words += ["no run succeeded"] if all(run["exit_code"] for run in runs) else []
    return words


def refused_aloud(run: dict[str, Any]) -> bool:
    """Whether it succeeded, or says as input that has to change who is there."""
    reasons = ("is being written by", "is in use by", "is being replaced", "there already", "finished artifact")
    return run["exit_code"] == 0 or (run["exit_code"] == 2 and any(reason in run["said"] for reason in reasons))


def last_line(file: Path) -> str:
    return " ".join(file.read_text().split())[-600:]


def artifact_hash(folder: Path) -> str:
    """Over all tensors; the manifest's dates and paths are not what counts."""
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        whole.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def video_hash(file: Path) -> str:
    """Over all its frames, as they are shown."""
    import av

    whole = hashlib.sha256()
    with av.open(str(file)) as video:
        for frame in video.decode(video=0):
            whole.update(frame.to_ndarray(format="rgb24").tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
