"""A voice above a minute comes window by window: the same features, one window ahead, and nothing stays behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import time

import numpy as np
import pytest
import torch

from lowvram.encode import conditions as conditions_module
from lowvram.encode.voice import BackgroundPieces, VoiceInWindows, WholeVoice, listening
from lowvram.media.samples import synth_voice, write_wav
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_models.long_voice import LongVoice, Windowing
from tests.models.test_audio_encoder import noise, small_model
from tests.models.test_long_voice import SHORT, pieces

SECONDS, FRAMES = 5, 128


def long_voice() -> LongVoice:
    return LongVoice(small_model().config, noise(SECONDS * 16000), FRAMES, do_normalize=True, windowing=SHORT)


def a_model():
    """Of its own: the thread's can be stopped."""
    return copy.deepcopy(small_model())


def in_windows(load=a_model, note=lambda piece: None) -> VoiceInWindows:
    voice = long_voice()
    first = voice.encode(small_model(), voice.windows[0], None)
    return VoiceInWindows([window.last for window in voice.windows], BackgroundPieces(voice, first, load, note))


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lowvram-voice"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert ours() == []


@pytest.mark.parametrize("count", [1, 4, 12, 25, 60, 128])
def test_frames_over_the_windows_borders(count):
    """Blocks of any length, also those that reach over more than two windows, are parts of the whole."""
    noted = []
    expected, voice = torch.cat(pieces(long_voice()), dim=-1), in_windows(note=noted.append)
    with listening(voice):
        for first in range(0, FRAMES, count):
            some = min(count, FRAMES - first)
            assert torch.equal(voice.frames(first, some), expected[..., first : first + some])
    assert torch.equal(torch.cat(noted, dim=-1), expected)


def test_what_is_asked_for_again_and_what_is_gone():
    voice = in_windows()
    with listening(voice):
        assert torch.equal(voice.frames(20, 12), voice.frames(20, 12))
        voice.frames(60, 12)
        with pytest.raises(ValueError, match="frames 0 to 12 were asked for; expected some of 49 to 128"):
            voice.frames(0, 12)
        with pytest.raises(ValueError, match="frames 120 to 132 were asked for"):
            voice.frames(120, 12)


def test_one_window_ahead_and_no_more():
    noted = []
    voice = in_windows(note=noted.append)
    with listening(voice):
        for taken in (1, 2, 3):
            voice.frames(voice.ends[taken - 1] - 1, 1)
            until(lambda taken=taken: len(noted) == taken + 1)
            time.sleep(0.05)
            assert len(noted) == taken + 1


def test_one_window_needs_no_thread():
    voice = LongVoice(small_model().config, noise(80000), 16, do_normalize=True, windowing=SHORT)
    first = voice.encode(small_model(), voice.windows[0], None)
    alone = VoiceInWindows([16], BackgroundPieces(voice, first, a_model))
    assert torch.equal(alone.frames(0, 16), first[0])
    assert ours() == []


def test_closed_in_the_middle_of_a_window():
    """The thread ends in front of the next layer, not behind the window."""
    begun, go_on = threading.Event(), threading.Event()

    def load():
        begun.set()
        assert go_on.wait(10)
        return a_model()

    noted = []
    voice = in_windows(load, noted.append)
    voice.frames(0, 4)
    assert begun.wait(10)
    closing = threading.Thread(target=voice.close)
    closing.start()
    go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert len(noted) == 1
    voice.close()


@pytest.mark.parametrize("error", [ValueError("no such model"), RuntimeError("broken"), MemoryError("none left")])
def test_an_error_of_the_thread_comes_out(error):
    def load():
        raise error

    voice = in_windows(load)
    with pytest.raises(type(error), match=str(error)):
        hear(voice)


def test_an_error_of_the_thread_goes_before_what_follows_from_it():
    def load():
        raise ValueError("the cause")

    voice = in_windows(load)
    with pytest.raises(ValueError, match="the cause"):
        fail_later(voice)


def test_a_whole_voice_is_its_features():
    voice = WholeVoice(torch.arange(24.0).view(1, 1, 1, 24))
    assert voice.num_frames == 24
    assert voice.frames(8, 4).flatten().tolist() == [8, 9, 10, 11]


def hear(voice) -> None:
    with listening(voice):
        for first in range(0, FRAMES, 16):
            voice.frames(first, 16)


def fail_later(voice) -> None:
    with listening(voice):
        voice.frames(0, 4)
        until(lambda: voice.failure is not None)
        raise RuntimeError("what follows")


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- whole runs


@pytest.fixture(scope="module")
def speech(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "voice.wav"
    write_wav(path, synth_voice(1.75), 16000)
    return dataclasses.replace(tiny.request(num_clip=2, sample_steps=1), audio=path)


def run(tiny, request) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    pipeline, recorder = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu"), TensorRecorder()
    return np.concatenate(list(pipeline.stream(request, recorder=recorder))), recorder.tensors()


def test_a_run_uses_and_records_the_windows(tiny, speech, monkeypatch):
    """Near the run that encodes all at once, whose features see all of the voice; one with context as long is it."""
    whole, tensors = run(tiny, speech)
    monkeypatch.setattr(conditions_module, "WINDOWING", Windowing(whole_s=1, window_s=1, context_s=3))
    same, same_tensors = run(tiny, speech)
    heard = same_tensors["audio_emb"]
    assert heard.shape[-1] == 32
    assert torch.allclose(heard, tensors["audio_emb"][..., :32], atol=1e-4)
    assert np.abs(same.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_run_that_is_closed_early_leaves_no_thread(tiny, speech, monkeypatch, blocks):
    monkeypatch.setattr(conditions_module, "WINDOWING", Windowing(whole_s=1, window_s=0.5, context_s=0.1))
    frames = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu").stream(speech)
    for _ in range(blocks):
        next(frames)
    frames.close()
    assert ours() == []


def test_a_run_that_is_forgotten_leaves_no_thread(tiny, speech, monkeypatch):
    monkeypatch.setattr(conditions_module, "WINDOWING", Windowing(whole_s=1, window_s=0.5, context_s=0.1))
    frames = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu").stream(speech)
    next(frames)
    del frames
    gc.collect()
    assert ours() == []


def test_a_run_fails_with_what_its_thread_fails_with(tiny, speech, monkeypatch):
    monkeypatch.setattr(conditions_module, "WINDOWING", Windowing(whole_s=1, window_s=0.5, context_s=0.1))
    load, calls = conditions_module.load_audio_encoder, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError("the disk is gone")
        return load(*arguments)

    monkeypatch.setattr(conditions_module, "load_audio_encoder", once)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tiny, speech)
