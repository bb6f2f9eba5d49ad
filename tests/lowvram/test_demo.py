"""The demo as a new user meets it: a face that talks, in both precisions."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import lowvram_models
from lowvram import demo
from lowvram.cli import main
from lowvram.compare.metrics import psnr
from lowvram.media.contact_sheet import follows
from lowvram.media.samples import Speech, draw_portrait, synth_voice, write_wav
from lowvram.media.video import probe, read_frames
from lowvram_kernels.errors import ConfigError
from lowvram_quantize import trained
from lowvram_quantize.convert import convert
from tests.lowvram.media.sounds import write_sound


@dataclasses.dataclass(frozen=True)
class Done:
    """A demo of one clip: its folder and what was printed."""

    folder: Path
    stdout: str

    def frames(self, name: str) -> np.ndarray:
        return np.stack(list(read_frames(self.folder / f"{name}.mp4")))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VOICE_S", 1.8)
        ran = CliRunner().invoke(main, ["demo", "--out-dir", str(folder), "--device", "cpu"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return Done(folder, ran.stdout)


@pytest.mark.slow
def test_a_face_talks(done):
    said = next(line for line in done.stdout.splitlines() if line.startswith("The mouth's opening"))
    found = dict(part.split() for part in said.removesuffix(".").split(": ")[1].split(", "))
    assert set(found) == {"int8", "bf16"}
    assert all(float(value) > 0.6 for value in found.values()), found
    shown = (demo.SHEET, demo.PAGE, "int8.mp4")
    assert done.stdout.splitlines()[-3:] == [str(done.folder / name) for name in shown]
    page = (done.folder / demo.PAGE).read_text()
    assert "<video" in page
    forced = json.loads(page.split('<script type="application/json" id="comparison">')[1].split("</script>")[0])[
        "teacher_forced"
    ]
    assert (forced["blocks"], len(forced["by_step"])) == (2, 4)
    assert 0.002 < forced["velocity"]["mean"]["value"] < 0.05
    assert Image.open(done.folder / demo.SHEET).width > 9 * 128
    for name in demo.PRECISIONS:
        assert probe(done.folder / f"{name}.mp4")["frames"] == 45
        assert json.loads((done.folder / f"{name}.json").read_text())["frames"] == 45


def background_psnr(frames: np.ndarray) -> float:
    """Of the drawn portrait's left and right edges."""
    edges = np.zeros((128, 128), bool)
    edges[:90, :16] = edges[:90, -16:] = True
    return psnr(frames, np.asarray(draw_portrait(128, 128))[None], edges)


@pytest.mark.slow
@pytest.mark.parametrize("name", demo.PRECISIONS)
def test_it_follows_its_own_voice_only_and_keeps_the_background(done, name):
    frames = done.frames(name)
    others = [
        follows(frames, synth_voice(1.8, speech=Speech(seed=seed, syllables_a_second=speed, unevenness=0.5)), 25)
        for seed, speed in enumerate((2.3, 2.7, 3.1, 3.5, 4.4, 4.9))
    ]
    assert np.mean(others) < 0.2, others
    assert max(others) < follows(frames, synth_voice(1.8), 25) - 0.2, others
    assert background_psnr(frames) > 25


@pytest.mark.slow
def test_without_the_lora_it_is_visibly_worse(done, tmp_path):
    artifact = convert(done.folder / "ckpt", tmp_path / "without", precision="bf16")
    request = demo.Request(
        image=done.folder / "portrait.png", audio=done.folder / "voice.wav", prompt="A person speaks", size="128*128"
    )
    frames = np.concatenate(list(demo.AvatarPipeline.from_artifact(artifact, device="cpu").stream(request)))[:45]
    whole = done.frames("bf16")
    assert background_psnr(frames) < background_psnr(whole) - 10
    assert follows(frames, synth_voice(1.8), 25) < follows(whole, synth_voice(1.8), 25) - 0.2


VOICES = {
    "wav": ("pcm_s16le", "wav"),
    "mp3": ("libmp3lame", "mp3"),
    "flac": ("flac", "flac"),
    "opus": ("libopus", "ogg"),
    "m4a": ("aac", "mp4"),
    "mkv": ("pcm_f32le", "matroska"),
}


def voice_file(folder, kind: str, seconds: float):
    codec, form = VOICES[kind]
    return write_sound(folder / f"voice.{kind}", synth_voice(seconds, rate=48000), 48000, codec, form)


def portrait_file(folder, kind: str, size: tuple[int, int], orientation: int = 1):
    """Left of the middle it is red, right of it blue, above one eighth of the height green, as it is to be seen."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = (250, 10, 10), (10, 10, 250)
    pixels[: height // 8] = (10, 250, 10)
    image, exif = Image.fromarray(pixels), Image.Exif()
    if orientation == 6:  # stored lying on its left side
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    path = folder / f"portrait.{kind}"
    image.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    return path


@pytest.mark.parametrize(
    ("kind", "size", "orientation"),
    [
        ("png", (128, 128), 1),
        ("png", (300, 200), 1),
        ("jpg", (200, 330), 6),
        ("jpg", (400, 240), 6),
        ("webp", (64, 64), 1),
        ("tiff", (333, 555), 1),
        ("gif", (160, 128), 1),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_any_portrait_becomes_an_upright_square(tmp_path, caplog, kind, size, orientation, random):
    caplog.set_level(logging.INFO, "lowvram.plan")
    path = portrait_file(tmp_path, kind, size, orientation)
    found = demo.subject(tmp_path / "out", demo.Own(image=path), random=random)
    side = demo.RANDOM_SIDE_PX if random else demo.SIDE_PX
    assert found.portrait.size == (side, side)
    assert found.request.size == f"{side}*{side}"
    pixels = np.asarray(found.portrait).astype(int)
    assert (pixels[side // 2, side // 4] - pixels[side // 2, -side // 4])[0] > 200
    width, height = size
    green = height / 8 - max(height - width, 0) * demo.HEADROOM  # what is left of it above the square
    at = (pixels[:, side // 4, 1] > 128).sum() / side
    assert at == pytest.approx(max(green, 0) / min(size), abs=0.03)
    assert ("a photograph will look like a drawn face" in caplog.text) is not random
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", VOICES)
@pytest.mark.parametrize(("seconds", "asked", "taken"), [(2.0, None, None), (2.0, 1.5, 1.5), (4.5, None, 4.0)])
def test_any_voice_is_taken_and_a_long_one_in_part(tmp_path, caplog, monkeypatch, kind, seconds, asked, taken):
    caplog.set_level(logging.INFO, "lowvram.plan")
    monkeypatch.setattr(demo, "OWN_VOICE_S", 4.0)
    path = voice_file(tmp_path, kind, seconds)
    found = demo.subject(tmp_path / "out", demo.Own(audio=path, audio_duration=asked))
    assert (found.request.audio, found.request.audio_duration) == (path, taken)
    assert found.voice is None
    assert ("4 s of it are taken; --audio-duration takes more" in caplog.text) is (taken == 4.0)
    assert found.portrait.tobytes() == draw_portrait(128, 128).tobytes()


@pytest.mark.parametrize("name", ["audio_track", "audio_start", "audio_duration"])
def test_a_part_of_no_voice(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: of which voice"):
        demo.Own(**{name: 1})


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs the demo with what cannot be used: one line, and nothing is made or changed."""

    def never(*_args: object, **_more: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(demo, "write_trained", never)
    monkeypatch.setattr(demo, "write_checkpoint", never)

    def run(out, *arguments: object) -> str:
        before = contents(tmp_path)
        done = CliRunner().invoke(main, ["demo", "--out-dir", str(out), *map(str, arguments)])
        assert done.exit_code == 2, (done.output, done.exception)
        assert done.stdout == ""
        assert contents(tmp_path) == before
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowvram: error: ")]
        return line

    return run


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--random"]])
@pytest.mark.parametrize(
    ("option", "what", "said"),
    [
        ("--image", None, "is not a file"),
        ("--image", b"", "portrait"),
        ("--image", b"hello", "portrait"),
        ("--image", "small", "expected at least 32 px"),
        ("--image", "cut", "cannot be read"),
        ("--audio", None, "audio"),
        ("--audio", b"", "audio"),
        ("--audio", b"hello", "audio"),
        ("--audio", "silent", "is silent"),
        ("--audio", "silent at first", "is silent for 20 s, and no more of it is asked for"),
        ("--audio", "short", "expected at least 0.4800 s"),
        ("--audio", "nan", "NaN"),
    ],
)
def test_what_cannot_be_used_is_told_before_the_work(refused, tmp_path, option, what, said, more):
    path = tmp_path / "given.wav"
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "small":
        draw_portrait(64, 64).resize((31, 90)).save(path, "png")
    elif what == "cut":
        draw_portrait(64, 64).save(path, "png")
        path.write_bytes(path.read_bytes()[:900])
    elif what == "nan":
        write_sound(path, np.full(16000, np.nan, np.float32), 16000, "pcm_f32le", "wav")
    elif what is not None:
        seconds = {"silent": 1.0, "silent at first": 21.0, "short": 0.4}[what]
        samples = synth_voice(seconds) if what == "short" else np.zeros(round(seconds * 16000), np.float32)
        write_wav(path, samples, 16000)
    assert said in refused(tmp_path / "out", option, path, *more)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--audio-start", "9", "is 1.000 s long"),
        ("--audio-start", "x", "expected seconds"),
        ("--audio-start", "-1", "expected seconds"),
        ("--audio-duration", "0", "expected more than 0"),
        ("--audio-duration", "0.1", "expected at least 0.4800 s"),
        ("--audio-track", "2", "track"),
        ("--audio-track", "0", "expected 1, the first, or more"),
    ],
)
def test_a_part_of_the_voice_that_is_not_there(refused, tmp_path, option, value, said):
    write_wav(tmp_path / "voice.wav", synth_voice(1.0), 16000)
    assert said in refused(tmp_path / "out", "--audio", tmp_path / "voice.wav", option, value)


@pytest.mark.parametrize("file", trained.FILES)
@pytest.mark.parametrize("how", ["a bit of it", "its end", "all of it"])
def test_damaged_weights_are_found_by_their_checksum(tmp_path, monkeypatch, file, how):
    copy = shutil.copytree(Path(lowvram_models.__file__).parent / trained.FOLDER, tmp_path / "weights")
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / file).write_bytes({"a bit of it": data, "its end": data[:-9], "all of it": b""}[how])
    monkeypatch.setattr(trained, "FOLDER", str(copy))
    done = CliRunner().invoke(main, ["demo", "--out-dir", str(tmp_path / "out")])
    assert done.exit_code == 2, (done.output, done.exception)
    assert f"{file} is damaged: its sha256 is" in " ".join(done.stderr.split())
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


REPLACED = (
    "portrait.png", "voice.wav", "contact-sheet.png", "int8.mp4", "bf16.json", "bf16.partial.mp4",
    "int8.safetensors.partial", "ckpt/mine.png", "artifact-int8/mine.png",
)  # fmt: skip


@pytest.mark.parametrize("option", ["--image", "--audio"])
@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("how", ["itself", "a link", "a hard link"])
def test_what_the_demo_replaces_is_no_input(refused, tmp_path, option, name, how):
    out, mine = tmp_path / "out", tmp_path / "mine.bin"
    place = out / name
    place.parent.mkdir(parents=True)
    if option == "--image":
        draw_portrait(64, 64).save(mine, "png")
    else:
        write_wav(mine, synth_voice(1.0), 16000)
    if how == "a hard link" and "/" not in name:
        os.link(mine, place)
    elif how == "a link" and "/" not in name:
        place.symlink_to(mine)
    else:
        mine.rename(place)
        mine = place
    said = refused(out, option, mine, "--overwrite")
    assert f"{option} is {mine}, and the demo replaces" in said


def test_an_input_beside_what_the_demo_makes_stays(tmp_path, monkeypatch):
    draw_portrait(64, 64).save(tmp_path / "me.png")
    monkeypatch.setattr(demo, "write_trained", lambda path: path.mkdir())
    own = demo.Own(image=tmp_path / "me.png")
    demo.check_places(tmp_path, own, overwrite=False)
    request = demo.prepare(tmp_path, given=demo.subject(tmp_path, own))
    assert request.image == tmp_path / "portrait.png"
    assert Image.open(request.image).size == (128, 128)
    assert Image.open(tmp_path / "me.png").size == (64, 64)


@pytest.mark.slow
def test_somebodys_own_face_talks(tmp_path):
    portrait = portrait_file(tmp_path, "jpg", (400, 240), 6)
    voice = voice_file(tmp_path, "mp3", 0.8)
    out = tmp_path / "demo"
    out.mkdir()
    (out / "voice.wav").write_bytes(b"of an earlier demo")
    given = ["--image", portrait, "--audio", voice, "--out-dir", out, "--overwrite"]
    done = CliRunner().invoke(main, ["demo", "--device", "cpu", *map(str, given)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "looked for where drawn faces have their mouth" in done.stdout
    assert not (out / "voice.wav").exists()
    assert Image.open(out / demo.SHEET).width > 9 * 128
    for name in demo.PRECISIONS:
        report = json.loads((out / f"{name}.json").read_text())
        assert report["settings"]["audio"] == str(voice)
        assert 20 <= probe(out / f"{name}.mp4")["frames"] <= 22
