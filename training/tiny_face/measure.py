"""What the tiny trained model can do, on people and voices that training never saw: ``python -m
training.tiny_face.measure`` prints it as JSON. With ``--weights FOLDER`` of other weights than the package's.

It fails where the mouth of a video correlates with its voice by less than 0.6, the background is further from the
portrait than 25 dB, or mouths follow other voices by more than 0.2 on average.

Parts: ``lora`` videos with the LoRA and without; ``minutes`` a minute of each of several people, and ``long`` ten
minutes of one, window by window; ``seeds``, ``refresh`` and ``blocks`` what ``rollouts.py`` says.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.media.samples import synth_voice
from lowvram.media.talking import at_frames, correlation, envelope, mouth_opening
from lowvram.pipeline import AvatarPipeline
from lowvram_models.constants import FPS
from lowvram_quantize.convert import convert
from lowvram_quantize.trained import write_trained
from training.tiny_face import faces, rollouts
from training.tiny_face.case import Case

MINUTE_S, WINDOW_S, LONG_WINDOW_S = 60.0, 10.0, 60.0
LEAST = {"mouth_with_voice": 0.6, "background_psnr": 25.0}
OTHER_MOST = 0.2
CUT_S = 2 * 48 / FPS + 0.3  # two clips, and a few frames of a third, which is cut behind its first block


class Measure:
    """The checkpoint in ``folder``, its artifacts in bf16, and a method a part."""

    def __init__(self, folder: Path, weights: Path | None, *, people: int, seconds: float, long_s: float):
        self.folder, self.people, self.seconds, self.long_s = folder, people, seconds, long_s
        self.root = write_trained(folder / "ckpt", source=weights)

    @functools.cached_property
    def with_lora(self) -> AvatarPipeline:
        return self._pipeline("with_lora", lora=self.root / "LiveAvatar" / "liveavatar.safetensors")

    def _pipeline(self, name: str, **options: Any) -> AvatarPipeline:
        artifact = convert(self.root, self.folder / name, precision="bf16", overwrite=True, **options)
        return AvatarPipeline.from_artifact(artifact, device="cpu")

    def lora(self) -> dict[str, Any]:
        numbers: list[int | None] = [None, *(faces.HELD_OUT + index for index in range(self.people))]
        cases = [Case(self.folder, number, self.seconds) for number in numbers]
        strangers = [faces.speech(faces.HELD_OUT + 500 + index) for index in range(len(cases))]
        result = {}
        for name, pipeline in {"with_lora": self.with_lora, "without_lora": self._pipeline("without_lora")}.items():
            rows: dict[str, dict[str, float]] = {}
            for case, stranger in zip(cases, strangers, strict=True):
                begin = time.perf_counter()
                frames = case.whole(pipeline)
                rows[case.name] = row = {"took_s": time.perf_counter() - begin, **case.facts(frames)}
                other = at_frames(envelope(synth_voice(self.seconds, speech=stranger)), len(frames), FPS)
                row["mouth_with_other_voice"] = correlation(mouth_opening(frames), other)
                print(name, case.name, row, file=sys.stderr, flush=True)
            mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in next(iter(rows.values()))}
            result[name] = {"mean": mean, "each": rows}
        return result

    def minutes(self) -> dict[str, Any]:
        numbers = [faces.HELD_OUT + 900 + index for index in range(self.people)]
        cases = [Case(self.folder, number, MINUTE_S) for number in numbers]
        return {case.name: rollouts.over_time(case, self.with_lora, WINDOW_S) for case in cases}

    def long(self) -> dict[str, Any]:
        case = Case(self.folder, faces.HELD_OUT + 900, self.long_s)
        return rollouts.over_time(case, self.with_lora, min(LONG_WINDOW_S, self.long_s))

    def seeds(self) -> dict[str, Any]:
        return rollouts.seeds(Case(self.folder, faces.HELD_OUT + 910, self.seconds), self.with_lora)

    def refresh(self) -> dict[str, Any]:
        artifact = self.with_lora.runtime.artifact.path
        unrefreshed = AvatarPipeline.from_artifact(artifact, device="cpu", team=rollouts.Unrefreshed())
        cases = [Case(self.folder, faces.HELD_OUT + 920 + index, self.seconds) for index in range(self.people)]
        return {case.name: rollouts.refresh(case, self.with_lora, unrefreshed) for case in cases}

    def blocks(self) -> dict[str, Any]:
        return rollouts.short_blocks(Case(self.folder, faces.HELD_OUT + 930, CUT_S), self.with_lora)


PARTS: dict[str, Callable[[Measure], dict[str, Any]]] = {
    part.__name__: part
    for part in (Measure.lora, Measure.minutes, Measure.long, Measure.seeds, Measure.refresh, Measure.blocks)
}


def parts(text: str) -> list[str]:
    """Raises: ArgumentTypeError for a part that is not known."""
    found = text.split(",")
    if unknown := [name for name in found if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} was given; expected some of {','.join(PARTS)}")
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """What is promised of the model and not held: of every video and window its mouth and its background, and on
    average that it follows no other voice."""
    shown = dict(result.get("lora", {}).get("with_lora", {}).get("each", {}))
    longer = result.get("minutes", {}) | ({"long": result["long"]} if "long" in result else {})
    rows = [*shown.items(), *((name, window) for name, found in longer.items() for window in found["windows"])]
    found = [
        f"{figure} of {name} is {row[figure]:g}, expected {least:g} or more"
        for name, row in rows
        for figure, least in LEAST.items()
        if row[figure] < least
    ]
    if shown and (other := result["lora"]["with_lora"]["mean"]["mouth_with_other_voice"]) > OTHER_MOST:
        found.append(f"mouth_with_other_voice on average is {other:g}, expected {OTHER_MOST:g} or less")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--parts", type=parts, default=list(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--people", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a video that is not a minute or ten")
    parser.add_argument("--long", type=float, default=600.0, help="seconds of the long video")
    parser.add_argument("--keep", type=Path, help="a folder for checkpoint and artifacts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure = Measure(folder, given.weights, people=given.people, seconds=given.seconds, long_s=given.long)
        result = {"people": given.people, "seconds": given.seconds}
        result |= {name: PARTS[name](measure) for name in given.parts}
    print(json.dumps(result, indent=1, default=float))
    if said := missed(result):
        sys.exit("; ".join(said))


if __name__ == "__main__":
    main()
