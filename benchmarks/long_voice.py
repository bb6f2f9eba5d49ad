"""Does a long voice cost more than a short one? Peak RSS and seconds to the first frames of one clip, by length.

python benchmarks/long_voice.py [--out benchmarks/results/long_voice_cpu.json]

The model is the tiny one; each run is a process of its own. Also: RSS of a run over several windows, and how far the
features of one clip are from those that a voice gives that is read to its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import psutil

LENGTHS_S = (10, 60, 600, 3600)
WINDOWS_S = 100
"""Four windows of 25 s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(folder: Path) -> dict[str, Any]:
    import torch

    from lowvram.infer import machine

    prepare(folder)
    clip = {f"{seconds} s": one_run(folder, seconds) for seconds in LENGTHS_S}
    return {
        "question": "does a long voice cost more than a short one?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"cpu_count": psutil.cpu_count()},
        "one_clip": clip,
        "several_windows": {f"{WINDOWS_S} s": one_run(folder, WINDOWS_S, num_clip=None)},
        "feature_difference": feature_difference(folder),
    }


def prepare(folder: Path) -> None:
    """An artifact of the tiny model, and a portrait."""
    from lowvram.media.samples import draw_portrait
    from lowvram_quantize.convert import convert
    from lowvram_quantize.synthetic import write_checkpoint

    write_checkpoint(folder / "ckpt")
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
        for _ in range(seconds // 10):
            file.writeframesraw(some)


def one_run(folder: Path, seconds: int, num_clip: int | None = 1) -> dict[str, Any]:
    """Seconds from the request to its first frames, with everything imported; peak and last RSS of the process."""
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
from lowvram.stages import peak_rss_bytes
import transformers.models.wav2vec2.modeling_wav2vec2, transformers.models.umt5.modeling_umt5

folder, voice, num_clip = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
begin = time.perf_counter()
request = Request(image=folder / "portrait.png", audio=voice, prompt="A person speaks", size="128*128",
                  sample_steps=1, num_clip=num_clip)
pipeline = AvatarPipeline.from_artifact(folder / "artifact", device="cpu")
peak, frames, first_s, first_rss = 0, 0, None, None
for block in pipeline.stream(request):
    first_s = first_s or time.perf_counter() - begin
    frames += len(block)
    stages = pipeline.runtime.stages.stages.values()
    peak = max(peak, peak_rss_bytes(), *(stage.peak_rss_bytes for stage in stages))
    first_rss = first_rss or peak
print(json.dumps({
    "frames": frames, "first_frames_s": first_s, "peak_rss_bytes": peak, "peak_rss_at_first_frames_bytes": first_rss,
    "rss_at_end_bytes": psutil.Process().memory_info().rss,
}))
"""


def feature_difference(folder: Path, seconds: int = 600, frames: int = 48) -> dict[str, Any]:
    """Relative (norm of the difference to norm) of the first clip's features: read as ``--num_clip 1`` reads them, and
    with the whole voice known."""
    import torch

    from lowvram.conditions import encode_audio
    from lowvram.media.voice import load_voice
    from lowvram.request import Request
    from lowvram_quantize.format import Artifact

    voice = folder / "difference.wav"
    write_voice(voice, seconds)
    request = Request(image=folder / "portrait.png", audio=voice, prompt="", num_clip=1)
    artifact, found = Artifact.open(folder / "artifact"), []
    for limit in (request.voice_limit_s, None):
        read = load_voice(voice, limit_s=limit)
        heard = encode_audio(
            artifact, read.samples, frames, lambda clips: frames, torch.device("cpu"), nothing, goes_on=read.goes_on
        )
        found.append(heard.frames(0, frames))
        heard.close()
    mine, whole = found
    return {"seconds": seconds, "frames": frames, "relative": float((mine - whole).norm() / whole.norm())}


def nothing(features: object) -> None:
    """Nobody looks at the features on their way."""


if __name__ == "__main__":
    main()
