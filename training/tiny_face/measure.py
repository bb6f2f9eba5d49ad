"""What the tiny trained model can do, on people and voices that training never saw: ``python -m
training.tiny_face.measure`` prints it as JSON. With ``--weights FOLDER`` of other weights than the package's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowvram.media.samples import Person, Speech, synth_voice, write_wav
from lowvram.media.talking import RATE_HZ, at_frames, correlation, envelope, mouth_opening
from lowvram.pipeline import FPS, AvatarPipeline, Request
from lowvram_quantize.convert import convert
from lowvram_quantize.trained import write_trained
from training.tiny_face import faces, motion

PROMPT = "A person with a hat reads a poem"
Frames = NDArray[np.uint8]


class Case:
    """A portrait and a voice; number None is the default face and voice of ``lowvram.media.samples``."""

    def __init__(self, folder: Path, number: int | None, seconds: float):
        self.name = "default" if number is None else str(number)
        self.who = Person() if number is None else faces.person(number)
        self.voice = synth_voice(seconds, speech=Speech() if number is None else faces.speech(number))
        at_rest = faces.Expression() if number is None else faces.at_rest(number)
        self.portrait = faces.picture(self.who, at_rest)
        self.frames = math.floor(seconds * FPS)
        self.image, self.audio = folder / f"{self.name}.png", folder / f"{self.name}.wav"
        Image.fromarray(self.portrait).save(self.image)
        write_wav(self.audio, self.voice, RATE_HZ)

    def video(self, pipeline: AvatarPipeline) -> Iterator[Frames]:
        size = f"{faces.SIZE}*{faces.SIZE}"
        return pipeline.stream(Request(image=self.image, audio=self.audio, prompt=PROMPT, size=size))

    def whole(self, pipeline: AvatarPipeline) -> Frames:
        return np.concatenate(list(self.video(pipeline)))[: self.frames]

    def drawn(self, frames: range) -> Frames:
        """What the rule says that the face does."""
        curves = motion.controls(self.voice)
        shown = [motion.expressions(curves, frame, 1)[0] for frame in frames]
        return np.stack([faces.picture(self.who, expression) for expression in shown])

    def background(self) -> NDArray[np.bool_]:
        """[H, W]: where neither head nor shoulders ever are."""
        height, width = self.portrait.shape[:2]
        y, x = np.mgrid[:height, :width] / (height, width)[0]
        reach = (self.who.hair_width + 6 + abs(self.who.shift_x)) / 100
        return np.asarray((np.abs(x - 0.5) > reach) & (y < 0.75) | (y < 0.1))


def psnr(one: Frames, other: Frames, where: NDArray[np.bool_] | None = None) -> float:
    """Of 8-bit pictures [..., H, W, 3], within ``where`` [H, W]."""
    error = np.square(one.astype(np.float64) - other.astype(np.float64))
    mean = error.mean() if where is None else error[..., where, :].mean()
    return 10 * math.log10(255**2 / max(mean, 1e-9))


def facts(case: Case, frames: Frames, other: NDArray[np.float32]) -> dict[str, float]:
    """Of one video: ``other`` is a voice that it was not made of."""
    opening, count = mouth_opening(frames), len(frames)
    some = range(0, count, 7)
    return {
        "mouth_with_voice": correlation(opening, at_frames(envelope(case.voice), count, FPS)),
        "mouth_with_other_voice": correlation(opening, at_frames(envelope(other), count, FPS)),
        "background_psnr": psnr(frames, case.portrait[None], case.background()),
        "drawn_psnr": psnr(frames[::7], case.drawn(some)),
    }


def over_time(case: Case, pipeline: AvatarPipeline, window_s: float = 10.0) -> list[dict[str, float]]:
    """Window by window of a long video, against the portrait and the drawn face."""
    found: list[dict[str, float]] = []
    size, kept, done = round(window_s * FPS), np.zeros((0, *case.portrait.shape), np.uint8), 0
    loud = at_frames(envelope(case.voice), case.frames, FPS)
    for frames in case.video(pipeline):
        kept = np.concatenate([kept, frames])[: case.frames - done]
        if len(kept) < size and done + len(kept) < case.frames:
            continue
        part, kept = kept[:size], kept[size:]
        if not len(part):
            break
        found.append(
            {
                "from_s": done / FPS,
                "background_psnr": psnr(part, case.portrait[None], case.background()),
                "portrait_psnr": psnr(part, case.portrait[None]),
                "drawn_psnr": psnr(part[::25], case.drawn(range(done, done + len(part), 25))),
                "mouth_with_voice": correlation(mouth_opening(part), loud[done : done + len(part)]),
            }
        )
        done += len(part)
        print(f"{case.name}: {done / FPS:.0f} s", found[-1], file=sys.stderr, flush=True)
    return found


def measure(folder: Path, weights: Path | None, *, people: int, seconds: float, long_s: float) -> dict[str, Any]:
    """Everything, in ``folder``."""
    root = write_trained(folder / "ckpt", source=weights)
    lora = root / "LiveAvatar" / "liveavatar.safetensors"
    numbers: list[int | None] = [None, *(faces.HELD_OUT + index for index in range(people))]
    cases = [Case(folder, number, seconds) for number in numbers]
    strangers = [synth_voice(seconds, speech=faces.speech(faces.HELD_OUT + 500 + i)) for i in range(len(cases))]
    result: dict[str, Any] = {"people": people, "seconds": seconds}
    pipelines = {}
    for name, options in {"with_lora": {"lora": lora}, "without_lora": {}}.items():
        artifact = convert(root, folder / name, precision="bf16", overwrite=True, **options)
        pipelines[name] = pipeline = AvatarPipeline.from_artifact(artifact, device="cpu")
        rows = {}
        for case, other in zip(cases, strangers, strict=True):
            begin = time.perf_counter()
            frames = case.whole(pipeline)
            rows[case.name] = facts(case, frames, other) | {"took_s": time.perf_counter() - begin}
            np.save(folder / f"{case.name}-{name}.npy", frames)
            print(name, case.name, rows[case.name], file=sys.stderr, flush=True)
        mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in next(iter(rows.values()))}
        result[name] = {"mean": mean, "each": rows}
    if long_s:
        result["over_time"] = over_time(Case(folder, faces.HELD_OUT + 900, long_s), pipelines["with_lora"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--long", type=float, default=60.0, help="seconds of the long video; 0 for none")
    parser.add_argument("--keep", type=Path, help="a folder for checkpoint, artifacts and frames")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, given.weights, people=given.people, seconds=given.seconds, long_s=given.long)
    print(json.dumps(result, indent=1, default=float))


if __name__ == "__main__":
    main()
