"""A process that stays, and a take that goes on: what a second video costs, what fifty leave, ten minutes in segments.

python benchmarks/resident.py [--videos 50] [--minutes 10] [--out benchmarks/results/resident_cpu.json]

The model is the tiny one, of random weights. The videos of one process differ in their seeds. The long take is made in
segments, its process killed twice at some moment and resumed, and the segments are joined: then how far its sound is
from the voice that it was made of, in windows of 10 s, and whether each picture stands where it belongs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

SEGMENT_MINUTES = 2
KILLS = 2
WINDOW_S = 10
RATE_HZ = 16000
FARTHEST_S = 0.25
SETTLED = 5
"""So many videos are made before memory is looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.videos, options.minutes)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path, videos: int, minutes: int) -> dict[str, Any]:
    import torch

    from lowvram.infer import machine
    from lowvram.media.samples import draw_portrait
    from lowvram_quantize.convert import convert
    from lowvram_quantize.synthetic import write_checkpoint

    write_checkpoint(folder / "ckpt", vae_base_dim=2)  # the VAE is not what is asked about, and would take the time
    convert(folder / "ckpt", folder / "artifact", precision="int8")
    draw_portrait(128, 128).save(folder / "portrait.png")
    return {
        "question": "what does a second video cost, what do many leave, and does a take go on without a seam?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"cpu_count": psutil.cpu_count()},
        "videos_of_one_process": many_videos(folder, videos),
        "take_in_segments": long_take(folder, minutes),
    }


def many_videos(folder: Path, count: int) -> dict[str, Any]:
    """Seconds from a request to its first frames, weight bytes read by each video, and the process's memory."""
    from lowvram.pipeline import AvatarPipeline, Request

    write_voice(folder / "short.wav", 2)
    pipeline = AvatarPipeline.from_artifact(folder / "artifact", device="cpu", resident=True)
    first_frames, read, rss = [], [], []
    for seed in range(count):
        print(f"video {seed + 1} of {count}", file=sys.stderr)
        before, begin = pipeline.runtime.artifact.read_bytes, time.perf_counter()
        request = Request(
            image=folder / "portrait.png",
            audio=folder / "short.wav",
            prompt="A person speaks",
            size="128*128",
            base_seed=seed,
        )
        stream = pipeline.stream(request)
        next(stream)
        first_frames.append(time.perf_counter() - begin)
        for _ in stream:
            pass
        read.append(pipeline.runtime.artifact.read_bytes - before)
        gc.collect()
        rss.append(psutil.Process().memory_info().rss)
    settled = rss[min(SETTLED, count - 1)]
    return {
        "videos": count,
        "first_frames_s": {"first": first_frames[0], "median_of_others": statistics.median(first_frames[1:] or [0.0])},
        "weight_bytes_read": {"first": read[0], "all_others": sum(read[1:])},
        "rss_bytes": {f"after_{SETTLED + 1}": settled, "at_the_end": rss[-1], "highest": max(rss)},
        "rss_growth": max(rss[min(SETTLED, count - 1) :]) / settled - 1,
    }


def write_voice(path: Path, seconds: int) -> None:
    """Speech, and noise that is nowhere the same, so that a shift of sound shows."""
    from lowvram.media.samples import synth_voice, write_wav

    some = synth_voice(10)
    speech = np.tile(some, -(-seconds // 10))[: seconds * RATE_HZ]
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    write_wav(path, (0.7 * speech + 0.05 * noise).astype(np.float32), RATE_HZ)


def long_take(folder: Path, minutes: int) -> dict[str, Any]:
    from lowvram.media.join import join

    voice, video = folder / "long.wav", folder / "take.mp4"
    write_voice(voice, minutes * 60)
    command = [
        *(sys.executable, "-m", "lowvram", "infer", "--model", str(folder / "artifact"), "--device", "cpu"),
        *("--image", str(folder / "portrait.png"), "--audio", str(voice), "--prompt", "A person speaks"),
        *("--size", "128*128", "--sample-steps", "1", "--out", str(video), "-q"),
        *("--segment-minutes", str(SEGMENT_MINUTES), "--resume"),
    ]
    begin, killed = time.perf_counter(), 0
    for kill in range(KILLS):
        killed += killed_at(command, video, kill + 1)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    paths = [Path(line) for line in done.stdout.split()]
    seconds = time.perf_counter() - begin
    frames = join(paths, folder / "joined.mp4")
    return {
        "minutes": minutes,
        "segments": len(paths),
        "killed": killed,
        "seconds": seconds,
        "frames": frames,
        "pictures_out_of_place": out_of_place(folder / "joined.mp4"),
        "sound_off_by_ms": off_by_ms(folder / "joined.mp4", voice),
    }


def killed_at(command: list[str], video: Path, segments: int) -> int:
    """Run until so many segments are finished and the next one has begun, then SIGKILL; 1 where it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    following = video.with_name(f"{video.stem}-{segments:03d}.partial{video.suffix}")
    while process.poll() is None and not (following.exists() and following.stat().st_size > 2 << 10):
        time.sleep(0.2)
    process.kill()
    return int(process.wait() < 0)


def out_of_place(path: Path) -> int:
    """Pictures whose time is not their number times the seconds of one."""
    wrong = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for index, frame in enumerate(container.decode(stream)):
            there = Fraction(frame.pts or 0) * (frame.time_base or Fraction(1))
            wrong += abs(there - Fraction(index, 25)) > Fraction(1, 1000)
    return wrong


def off_by_ms(path: Path, voice: Path) -> dict[str, float]:
    """How far the sound is from the voice where they agree best, in windows: the middle one and the farthest."""
    heard, meant = samples(path), samples(voice)
    size, reach = WINDOW_S * RATE_HZ, int(FARTHEST_S * RATE_HZ)
    shifts = []
    for begin in range(reach, min(len(heard), len(meant)) - size - reach, size):
        window = heard[begin : begin + size]
        around = meant[begin - reach : begin + size + reach]
        spectrum = np.fft.rfft(around) * np.conj(np.fft.rfft(window, len(around)))
        likeness = np.fft.irfft(spectrum, len(around))[: 2 * reach + 1]
        shifts.append(abs(int(likeness.argmax()) - reach) / RATE_HZ * 1000)
    return {"windows": len(shifts), "median": statistics.median(shifts), "highest": max(shifts)}


def samples(path: Path) -> np.ndarray:
    """One channel at 16 kHz."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE_HZ)
    parts = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
