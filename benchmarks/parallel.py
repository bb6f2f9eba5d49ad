"""What do several ranks send each other, and what do they hold? Ulysses, a timestep pipeline and FSDP side by side.

python benchmarks/parallel.py --out benchmarks/results/parallel_cpu.json   counts on the tiny model over gloo, 2 minutes
python benchmarks/parallel.py --only "ulysses-*" --only fsdp-2             some layouts: names or patterns of them

Bytes that each rank sends for a block and of the parameters that it holds are counted, on the CPU, in bfloat16, and
compared with formulas; the formulas then give the same figures for the published 14B. With two or more CUDA devices
full-size artifacts of random values (--dir, about 70 GB) are timed as well: nothing else here needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDE = 16  # latents of 128 * 128 px
LIMIT_S = 540.0
POLL_S = 0.1
GIB = 1 << 30

DEFINITIONS = {
    "sent_bytes": "to other ranks for one block of the steady state, counted at torch's c10d operations: exchange "
    "(all-to-all around attention), latents (to the next stage or the VAE's rank), parameters (all-gathers, to which a "
    "rank's own shard counts once for each other rank)",
    "parameter_bytes": "memory behind the DiT's parameters whenever a block of the DiT begins, at the most: shared, "
    "resident and staged ones with us; shards and what is gathered with FSDP, whose buffers for a gather, and the next "
    "block that it gathers ahead on CUDA, are not counted",
    "fsdp": "torch's fully_shard: each block of the DiT is a unit, all else the root's, which stays gathered after its "
    "first use; tokens and heads are shared among the ranks as with Ulysses",
    "formula": "the same from shapes alone",
    "seconds_a_block": "denoising alone, in the steady state, of the slowest rank; rings lie where our plan puts them",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a layout, or a pattern of some")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-full-size")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Behind everything else, so that kernels.py here does not stand for a library of that name.
    sys.path.append(sys.path.pop(0))
    if options.rank is not None:
        from parallel_ranks import be_rank

        be_rank(options.rank, options.jobs, options.out)
        return
    result = measure(options.only, options.dir)
    print(markdown(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if wrong := [row["name"] for row in result["tiny"]["rows"] if not row["as_expected"]]:
        sys.exit(f"counted is something else than the formulas say: {', '.join(wrong)}")
    if not all(result["tiny"]["same_latents"].values()):
        sys.exit(f"FSDP computed something else than Ulysses: {result['tiny']['same_latents']}")


def measure(only: list[str] | None, folder: Path) -> dict[str, Any]:
    import torch
    from parallel_formulas import published

    from lowvram.infer import machine

    begin = time.perf_counter()
    tiny = count(only)
    return {
        "question": "what do ranks send each other for a block, and what do they hold of the parameters?",
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "definitions": DEFINITIONS,
        "tiny": tiny,
        "published_14b": published(),
        "seconds_a_block": time_on_gpus(only, folder),
        "run_seconds": time.perf_counter() - begin,
    }


def count(only: list[str] | None) -> dict[str, Any]:
    """Every layout on the tiny model, all of them in one set of processes."""
    from parallel_formulas import compared, same_latents

    from lowvram_quantize.shape_artifact import RandomFill, write_shape_artifact

    with tempfile.TemporaryDirectory() as folder:
        artifacts = {name: Path(folder) / name for name in ("bf16", "int8")}
        for name, path in artifacts.items():
            write_shape_artifact(path, precision=name, preset="tiny", fill=RandomFill())
        jobs = chosen(all_jobs(artifacts), only)
        found = run_jobs(jobs)
        rows = [compared(job, found[job.name]) for job in jobs]
    return {
        "preset": "tiny",
        "size": f"{SIDE * 8}*{SIDE * 8}",
        "sample_steps": jobs[0].work.sample_steps,
        "rows": rows,
        "same_latents": same_latents(rows, found),
    }


def all_jobs(artifacts: dict[str, Path]) -> Iterator[Any]:
    from parallel_formulas import RANKS, layouts
    from parallel_ranks import Job

    from lowvram.planning.rank_layout import ParallelLayout

    plain = {"artifact": str(artifacts["bf16"]), "latent_size": (SIDE, SIDE)}
    for name, layout in layouts():
        yield Job(name=name, layout=layout, **plain)
    for ranks in RANKS:
        layout = ParallelLayout(num_gpus_dit=ranks, ulysses_size=ranks)
        yield Job(name=f"fsdp-{ranks}", layout=layout, fsdp=True, **plain)
    two = ParallelLayout(num_gpus_dit=2, ulysses_size=2)
    int8 = plain | {"artifact": str(artifacts["int8"])}
    yield Job(name="ulysses-2-int8", layout=two, **int8)
    yield Job(name="ulysses-2-int8-streamed", layout=two, offload=True, **int8)


def chosen(jobs: Iterator[Any], only: list[str] | None) -> list[Any]:
    found = list(jobs)
    for name in only or ():
        if not any(fnmatch.fnmatchcase(job.name, name) for job in found):
            sys.exit(f"--only {name} names no layout; there are {', '.join(job.name for job in found)}")
    return [job for job in found if not only or any(fnmatch.fnmatchcase(job.name, name) for name in only)]


def run_jobs(jobs: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Each job's ranks' reports, by its name. A process takes seconds to import everything, so one process is a rank
    of each layout in turn; the largest layouts come first, so that no rank waits long for the others.

    Raises:
        RuntimeError: a rank failed.
    """
    import torch.distributed as dist

    patience = datetime.timedelta(seconds=60)
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, patience, wait_for_workers=False) for _ in jobs]
    jobs = [dataclasses.replace(job, port=store.port) for job, store in zip(jobs, stores, strict=True)]
    jobs.sort(key=lambda job: -job.layout.world_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        answers = [Path(folder) / f"{rank}.json" for rank in range(jobs[0].layout.world_size)]
        await_all([start(file, rank, answer) for rank, answer in enumerate(answers)])
        found = [json.loads(answer.read_text()) for answer in answers]
    return {job.name: [found[rank][job.name] for rank in range(job.layout.world_size)] for job in jobs}


def start(jobs: Path, rank: int, answer: Path) -> subprocess.Popen[bytes]:
    script = [sys.executable, str(Path(__file__).resolve())]
    # As torchrun says it: the stores are kept by the starter.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [*script, "--rank", str(rank), "--jobs", str(jobs), "--out", str(answer)]
    return subprocess.Popen(command, env=environ)


def await_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + LIMIT_S
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                break
            if time.monotonic() > until:
                raise RuntimeError(f"ranks took longer than {LIMIT_S:.0f} s")
            time.sleep(POLL_S)
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}; what they say is above")
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


def time_on_gpus(only: list[str] | None, folder: Path) -> dict[str, Any]:
    import torch

    if (devices := torch.cuda.device_count()) < 2:
        return {"not_measured": f"{devices} CUDA devices here; expected 2 or more"}
    return time_jobs(only, folder, preset="14b", device="cuda", ranks=devices)


def time_jobs(only: list[str] | None, folder: Path, *, preset: str, device: str, ranks: int) -> dict[str, Any]:
    """Seconds of denoising a block in the steady state, of every layout for up to so many ranks: nothing is encoded or
    decoded. A layout that cannot run says why and does not stop the others."""
    from full_size_artifacts import artifact_path
    from full_size_parts import SIZES, Skipped, write_artifact

    folder.mkdir(parents=True, exist_ok=True)
    _, height, width = SIZES[preset]
    found: dict[str, Any] = {}
    for precision in ("int8", "bf16"):
        try:
            write_artifact(argparse.Namespace(preset=preset, dir=folder, seed=0), precision)
        except Skipped as reason:
            found[precision] = {"not_measured": str(reason)}
            continue
        path = artifact_path(folder, preset, precision)
        for job in chosen(all_jobs({name: path for name in ("bf16", "int8")}), only):
            if is_timed(job, precision, ranks):
                size = (height // 8, width // 8)
                job = dataclasses.replace(job, device=device, counts=False, latent_size=size)
                found[f"{job.name}-{precision}"] = timed(job)
    return {"preset": preset, "size": f"{width}*{height}", "sample_steps": 4, "found": found}


def is_timed(job: Any, precision: str, ranks: int) -> bool:
    """As nothing is decoded, a rank for the VAE would change nothing; ``fully_shard`` has no 8-bit layers."""
    counted_only = job.layout.vae_rank or "int8" in job.name or (job.fsdp and precision == "int8")
    return job.layout.world_size <= ranks and not counted_only


def timed(job: Any) -> float | dict[str, str]:
    try:
        return max(report["seconds_per_block"] for report in run_jobs([job])[job.name])
    except RuntimeError as error:
        return {"not_measured": str(error)}


def markdown(result: dict[str, Any]) -> str:
    tiny, published, times = (result[key] for key in ("tiny", "published_14b", "seconds_a_block"))
    title = f"Tiny model, {tiny['size']}, counted over gloo on the CPU (busiest rank, fullest rank):"
    lines = [title, "", *table(tiny["rows"], (1e3, "kB"), (1e3, "kB")), ""]
    lines += [f"{pair}: {'the same' if same else 'OTHER'} latents" for pair, same in tiny["same_latents"].items()]
    lines += ["", f"14B, {published['size']}, {published['label']}; {published['placements']}:", ""]
    least = published["all_layers_streamed_parameter_bytes"] / GIB
    lines += [*table(published["rows"], (1e6, "MB"), (GIB, "GiB")), ""]
    lines += [f"with all layers streamed {least:.2f} GiB of int8 parameters are held, whatever the layout", ""]
    if "found" in times:
        lines += [f"{name}: {told(value)}" for name, value in times["found"].items()]
    else:
        lines.append(f"seconds a block on several GPUs: not measured ({times['not_measured']})")
    return "\n".join(lines)


def told(value: float | dict[str, str]) -> str:
    return f"not measured ({value['not_measured']})" if isinstance(value, dict) else f"{value:.2f} s a block"


def table(rows: list[dict[str, Any]], sent: tuple[float, str], held: tuple[float, str]) -> list[str]:
    """Rows of both tables; units as their size in bytes and their name."""
    lines = [
        f"| layout | ranks | weights | exchange, {sent[1]} a block | latents | parameters | parameters held, {held[1]} "
        "| formulas agree |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        each = " | ".join(f"{row['sent_bytes'][key] / sent[0]:,.1f}" for key in ("exchange", "latents", "parameters"))
        agree = {True: "yes", False: "NO", None: "computed"}[row.get("as_expected")]
        lines.append(
            f"| {row['name']} | {row['ranks']} | {row['weights']} | {each} | {row['parameter_bytes'] / held[0]:,.2f} "
            f"| {agree} |"
        )
    return lines


if __name__ == "__main__":
    main()
