"""Does memory grow with the length of the video? RSS and its peak after 10 s and at the end of 60 s.

python benchmarks/memory.py [--seconds 60] [--out benchmarks/results/memory_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

MARK_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.seconds)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    grown = max(result["peak_growth"], result["rss_growth"])
    if grown > 0.05:
        sys.exit(f"RSS grew by {grown:.1%} after the first {MARK_S:.0f} s; at most 5 % is allowed")


def measure(folder: Path, seconds: float) -> dict:
    """Run ``python -m lowvram infer`` and read the child's high-water mark when 10 s of video are written."""
    import torch

    from lowvram.infer import machine
    from lowvram.media.samples import draw_portrait, synth_voice, write_wav
    from lowvram_quantize.convert import convert
    from lowvram_quantize.synthetic import write_checkpoint

    write_checkpoint(folder / "ckpt")
    lora = folder / "ckpt" / "LiveAvatar" / "liveavatar.safetensors"
    convert(folder / "ckpt", folder / "artifact", precision="int8", lora=lora, lora_alpha=2.0)
    draw_portrait(256, 256).save(folder / "portrait.png")
    write_wav(folder / "voice.wav", synth_voice(seconds), 16000)
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=folder)
    out, _ = child.communicate()
    if child.returncode:
        sys.exit(f"the measured run failed with exit code {child.returncode}")
    marks = json.loads(out.splitlines()[-1])
    return {
        "question": "does RSS grow with the length of the video?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"cpu_count": psutil.cpu_count()},
        "audio_seconds": seconds,
        "run_seconds": time.perf_counter() - begin,
        **marks,
        "peak_growth": marks["peak_rss_end_bytes"] / marks["peak_rss_10s_bytes"] - 1,
        "rss_growth": marks["rss_end_bytes"] / marks["rss_10s_bytes"] - 1,
    }


# A process of its own, so that the peak is the run's and nothing else's. Stage peaks reset the mark, so it is read
# after each block and the highest is kept.
CHILD = """
import json, sys, psutil
from pathlib import Path
from lowvram.media.video import VideoWriter
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.runtime import peak_rss_bytes

folder = Path(sys.argv[1])
request = Request(image=folder / "portrait.png", audio=folder / "voice.wav", prompt="A person speaks",
                  size="128*128", infer_frames=48)
pipeline = AvatarPipeline.from_artifact(folder / "artifact", device="cpu")
peak, mark, frames = 0, None, 0
with VideoWriter(folder / "out.mp4", height=128, width=128, fps=25, audio_path=request.audio) as writer:
    for block in pipeline.stream(request):
        writer.write(block)
        frames += len(block)
        peak = max(peak, peak_rss_bytes(), *(s.peak_rss_bytes for s in pipeline.runtime.stages.stages.values()))
        rss = psutil.Process().memory_info().rss
        if mark is None and frames >= 250:
            mark = {"peak_rss_10s_bytes": peak, "rss_10s_bytes": rss}
print(json.dumps({"frames": frames, **mark, "peak_rss_end_bytes": peak, "rss_end_bytes": rss}))
"""

if __name__ == "__main__":
    main()
