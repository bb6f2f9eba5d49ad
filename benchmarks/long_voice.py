"""Does a long voice cost more than a short one? Peak RSS and seconds to the first frames of one clip, by length.

python benchmarks/long_voice.py [--lengths 10,60,600,3600] [--out benchmarks/results/long_voice_cpu.json]

The model is the tiny one, of random weights; each run is a process of its own. Also: RSS of a run over several windows,
and two differences of features: of one clip from those that a voice gives that is read to its end, and of every frame
of a voice that is encoded window by window from those of the whole file at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LENGTHS_S = (10, 60, 600, 3600)
WINDOWS_S = 100
"""Four windows of 25 s."""
CUT_S = 600
"""A voice of which one clip needs little."""
CLIP_FRAMES = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=lengths, default=LENGTHS_S, help="seconds, as 10,60; the first is the measure"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.lengths)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def lengths(text: str) -> tuple[int, ...]:
    """Raises: ArgumentTypeError for anything but whole seconds, of which a clip can be made."""
    found = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(found) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected whole seconds from 3 on, as 10,60,600")
    return found


def measure(folder: Path, lengths_s: Sequence[int]) -> dict[str, Any]:
    import torch

    from lowvram.infer import machine

    prepare(folder)
    clip = {f"{seconds} s": one_run(folder, seconds) for seconds in lengths_s}
    several = {f"{WINDOWS_S} s": one_run(folder, WINDOWS_S, num_clip=None)}
    return {
        "question": "does a long voice cost more than a short one?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"cpu_count": psutil.cpu_count()},
        "one_clip": clip,
        "times_the_first": times_the_first(clip),
        "several_windows": several,
        "feature_difference": {"cut_voice": cut_difference(folder), "window_by_window": window_difference(folder)},
    }


def times_the_first(clip: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each length's peak and seconds as multiples of those of the first."""
    names = ("peak_rss_bytes", "first_frames_s")
    first = next(iter(clip.values()))
    return {length: {name: run[name] / first[name] for name in names} for length, run in clip.items()}


def prepare(folder: Path) -> None:
    """An artifact of the tiny model, and a portrait."""
    from lowvram.media.samples import draw_portrait
    from lowvram_quantize.convert import convert
    from lowvram_quantize.synthetic import write_checkpoint

    write_checkpoint(folder / "ckpt", vae_base_dim=2)  # the VAE is not what is asked about, and would take the time
    convert(folder / "ckpt", folder / "artifact", precision="fp32")
    draw_portrait(128, 128).save(folder / "portrait.png")


def write_voice(path: Path, seconds: int) -> None:
    """Some speech again and again, in 8 bits, so that an hour is 58 MB."""
    from lowvram.media.samples import synth_voice

    some = np.clip(synth_voice(10) * 127 + 128, 0, 255).astype(np.uint8).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(16000)
        for begin in range(0, seconds, 10):
            file.writeframesraw(some[: 16000 * min(10, seconds - begin)])


def one_run(folder: Path, seconds: int, num_clip: int | None = 1) -> dict[str, Any]:
    """Seconds from the request to its first frames, with everything imported, by the clock and of processor time; peak
    and last RSS of the process."""
    print(f"{seconds} s of voice, {num_clip or 'all'} of its clips", file=sys.stderr)
    voice = folder / f"{seconds}.wav"
    write_voice(voice, seconds)
    command = [sys.executable, "-c", CHILD, str(folder), str(voice), json.dumps(num_clip)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    voice.unlink()
    if child.returncode:
        sys.exit(f"the measured run failed with exit code {child.returncode}")
    return dict(json.loads(child.stdout.splitlines()[-1]))


# A process of its own, so that the peak is the run's and nothing else's. Stage peaks reset the mark, so it is read
# after each block and the highest is kept.
CHILD = """
import json, sys, time, psutil
from pathlib import Path
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.runtime import peak_rss_bytes
import transformers.models.wav2vec2.modeling_wav2vec2, transformers.models.umt5.modeling_umt5

folder, voice, num_clip = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
begin, begin_cpu = time.perf_counter(), time.process_time()
request = Request(image=folder / "portrait.png", audio=voice, prompt="A person speaks", size="128*128",
                  sample_steps=1, num_clip=num_clip)
pipeline = AvatarPipeline.from_artifact(folder / "artifact", device="cpu")
peak, frames, first_s, first_cpu_s, first_rss = 0, 0, None, None, None
for block in pipeline.stream(request):
    first_s = first_s or time.perf_counter() - begin
    first_cpu_s = first_cpu_s or time.process_time() - begin_cpu
    frames += len(block)
    stages = pipeline.runtime.stages.stages.values()
    peak = max(peak, peak_rss_bytes(), *(stage.peak_rss_bytes for stage in stages))
    first_rss = first_rss or peak
print(json.dumps({
    "frames": frames, "first_frames_s": first_s, "first_frames_cpu_s": first_cpu_s, "peak_rss_bytes": peak,
    "peak_rss_at_first_frames_bytes": first_rss, "rss_at_end_bytes": psutil.Process().memory_info().rss,
}))
"""


def cut_difference(folder: Path, seconds: int = CUT_S) -> dict[str, Any]:
    """Of the first clip's features: read as ``--num_clip 1`` reads them, and with the whole voice known."""
    import torch

    from lowvram.encode.conditions import encode_audio
    from lowvram.media.voice import load_voice
    from lowvram.request import Request
    from lowvram_quantize.format import Artifact

    voice = folder / "difference.wav"
    write_voice(voice, seconds)
    request = Request(image=folder / "portrait.png", audio=voice, prompt="", num_clip=1)
    artifact, found, frames = Artifact.open(folder / "artifact"), [], CLIP_FRAMES
    for limit in (request.voice_limit_s, None):
        read = load_voice(voice, limit_s=limit)
        heard = encode_audio(
            artifact, read.samples, frames, lambda clips: frames, torch.device("cpu"), nothing, goes_on=read.goes_on
        )
        found.append(heard.frames(0, frames))
        heard.close()
    return {"seconds": seconds, **relative(*found)}


def window_difference(folder: Path, seconds: int = WINDOWS_S) -> dict[str, Any]:
    """Of all features of a voice: encoded window by window as a run does it, and from the whole file at once."""
    import torch

    from lowvram.encode.conditions import encode_audio
    from lowvram.loading.encoders import load_audio_encoder
    from lowvram.media.voice import load_voice
    from lowvram_models.audio_encoder import audio_embedding, extract_features
    from lowvram_quantize.format import Artifact

    voice = folder / "windows.wav"
    write_voice(voice, seconds)
    samples, artifact = load_voice(voice).samples, Artifact.open(folder / "artifact")
    frames, host = seconds * 25 // CLIP_FRAMES * CLIP_FRAMES, torch.device("cpu")
    heard = encode_audio(artifact, samples, CLIP_FRAMES, lambda clips: frames, host, nothing)
    mine = torch.cat([heard.frames(first, CLIP_FRAMES) for first in range(0, frames, CLIP_FRAMES)], dim=-1)
    heard.close()
    model, do_normalize = load_audio_encoder(artifact, host)
    hidden = extract_features(model, samples, do_normalize=do_normalize, whole_s=seconds + 1)
    return {"seconds": seconds, **relative(mine, audio_embedding(hidden, CLIP_FRAMES)[..., :frames])}


def relative(mine: Any, whole: Any) -> dict[str, Any]:
    """Of features [1, layers, dim, frames]: norm of the difference to norm, of all, and of each frame the mean and the
    largest."""
    each = (mine - whole).flatten(0, 2).norm(dim=0) / whole.flatten(0, 2).norm(dim=0)
    return {
        "frames": len(each),
        "relative": float((mine - whole).norm() / whole.norm()),
        "relative_by_frame": {"mean": float(each.mean()), "largest": float(each.max()), "frame": int(each.argmax())},
    }


def nothing(features: object) -> None:
    """Nobody looks at the features on their way."""


if __name__ == "__main__":
    main()
