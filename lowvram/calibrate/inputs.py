"""What a calibration runs on: somebody's own portrait and voice, or drawn and synthesized ones."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.request import Inputs, Request, read_inputs
from lowvram_kernels.errors import OutputError
from lowvram_models.constants import SPEECH_RATE_HZ
from lowvram_quantize.slabs import sha256_file

PROMPT = "A person speaks to the camera"
SIZE = "256*256"
STEPS, FRAMES = 4, 24
"""Two blocks, the second of which sees the first one's keys and values."""
_SIDE_PX, _VOICE_S = 512, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationInputs:
    """``inputs``, read and checked; ``facts`` say for a manifest what they are."""

    inputs: Inputs
    facts: dict[str, Any]


def calibration_inputs(
    *, image: Path | None = None, audio: Path | None = None, prompt: str | None = None, size: str | None = None
) -> CalibrationInputs:
    """Two blocks of a video, all steps, as small as is usual; what is None is drawn, synthesized, or as it stands here.

    Raises:
        InputError: a file that is missing or is not what it should be, a silent or short voice, an unknown size.
        OutputError: no temporary file can be made.
    """
    with contextlib.ExitStack() as stack:
        request = Request(
            image=image or _drawn(stack),
            audio=audio or _spoken(stack),
            prompt=PROMPT if prompt is None else prompt,
            size=SIZE if size is None else size,
            infer_frames=FRAMES,
            num_clip=1,
            sample_steps=STEPS,
            upscale=True,
        )
        inputs = read_inputs(request, cut_said=False)  # nobody asked for more
    height, width = inputs.portrait.shape[1:]
    facts = {
        "image": _file(image),
        "audio": _file(audio),
        "prompt": request.prompt,
        "size": [width, height],
        "frames": FRAMES,
        "steps": STEPS,
        "seed": request.base_seed,
    }
    return CalibrationInputs(inputs=inputs, facts=facts)


def _drawn(stack: contextlib.ExitStack) -> Path:
    with _temporary(stack) as folder:
        draw_portrait(_SIDE_PX, _SIDE_PX).save(folder / "portrait.png")
        return folder / "portrait.png"


def _spoken(stack: contextlib.ExitStack) -> Path:
    with _temporary(stack) as folder:
        write_wav(folder / "voice.wav", synth_voice(_VOICE_S), SPEECH_RATE_HZ)
        return folder / "voice.wav"


@contextlib.contextmanager
def _temporary(stack: contextlib.ExitStack) -> Iterator[Path]:
    """A folder to write one file in now, which is there until the stack is left."""
    try:
        yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowvram-calibrate-")))
    except OSError as error:
        raise OutputError(
            f"no temporary file can be made ({error.strerror or error}); set TMPDIR to a folder with room"
        ) from error


def _file(path: Path | None) -> dict[str, Any] | None:
    """None of what was made here."""
    return None if path is None else {"file": path.name, "sha256": sha256_file(path)}
