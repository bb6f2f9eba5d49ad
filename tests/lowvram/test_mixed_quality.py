"""What --precision auto makes of bytes: its single steps are never worse than uniform int8's, and better with more."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.compare.teacher_forcing import force, record
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.pipeline import AvatarPipeline, Request
from lowvram_quantize.convert import convert
from lowvram_quantize.trained import write_trained

SHARES = (0.1, 0.3, 0.6)
"""Of the bytes that bf16 takes beyond int8."""


def random_model(folder: Path, tiny) -> tuple[Path, Path, Request]:
    return tiny.checkpoint, tiny.lora, tiny.request(num_clip=1, sample_steps=2)


def trained_face(folder: Path, tiny) -> tuple[Path, Path, Request]:
    root = write_trained(folder / "ckpt")
    draw_portrait(128, 128).save(folder / "portrait.png")
    write_wav(folder / "voice.wav", synth_voice(1.0), 16000)
    request = Request(
        image=folder / "portrait.png",
        audio=folder / "voice.wav",
        prompt="A person with a hat reads a poem",
        size="128*128",
        infer_frames=12,
        num_clip=1,
        sample_steps=2,
    )
    return root, root / "LiveAvatar" / "liveavatar.safetensors", request


@pytest.mark.parametrize("model", [random_model, trained_face])
def test_more_bytes_than_uniform_int8_s_are_never_worse(tiny, tmp_path, model):
    checkpoint, lora, request = model(tmp_path, tiny)

    def pipeline(name: str, **options: object) -> tuple[AvatarPipeline, int]:
        artifact = convert(checkpoint, tmp_path / name, **{"precision": "bf16", "lora": lora} | options)
        loaded = AvatarPipeline.from_artifact(artifact, device="cpu")
        return loaded, (artifact / "dit.safetensors").stat().st_size

    def error(candidate: AvatarPipeline) -> float:
        return force(candidate, request, teacher, blocks=1, quiet=True).values["velocity_error"]

    bf16, most = pipeline("bf16")
    teacher = record(bf16, request, blocks=1)
    int8, least = pipeline("int8", dit="int8")
    found = [error(int8)]
    for share in SHARES:
        target = round(least + share * (most - least))
        candidate, nbytes = pipeline(f"auto{share}", dit="auto", target_bytes=target)
        assert 0.99 * target <= nbytes <= target
        found.append(error(candidate))
    assert all(each <= found[0] for each in found[1:]), found
    assert found[-1] < 0.7 * found[0], found
