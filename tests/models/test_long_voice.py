"""Features of a long voice, window by window: what ``extract_features`` and ``audio_embedding`` make of all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram_models import audio_encoder
from lowvram_models.audio_encoder import audio_embedding, cut_evenly, extract_features, num_clips
from lowvram_models.long_voice import LongVoice, Windowing, count_features, frame_positions
from tests.golden_cases import relative_error
from tests.models.test_audio_encoder import noise, small_model

SHORT = Windowing(whole_s=2, window_s=1, context_s=0.25)
SECOND = 16000


def pieces(voice: LongVoice) -> list[torch.Tensor]:
    found, before = [], None
    for window in voice.windows:
        piece, before = voice.encode(small_model(), window, before)
        assert piece.shape == (1, 3, 16, window.last - window.first)
        found.append(piece)
    return found


@pytest.fixture
def whole(monkeypatch):
    """What the windowed ``extract_features`` gives, with windows as short."""
    monkeypatch.setattr(audio_encoder, "WINDOW_S", 1)
    monkeypatch.setattr(audio_encoder, "CONTEXT_S", 0.25)
    window, context = 50, 12
    in_windows = audio_encoder._in_windows

    def with_whole_numbers(model, wave, **ignored):
        return in_windows(model, wave, window=window, context=context)

    monkeypatch.setattr(audio_encoder, "_in_windows", with_whole_numbers)

    def make(samples, infer_frames=16):
        return audio_embedding(extract_features(small_model(), samples, whole_s=2), infer_frames)

    return make


@pytest.mark.parametrize(
    "num_samples", [2 * SECOND + 1, 2 * SECOND + 320, 33333, 40000, 3 * SECOND, 51234, 5 * SECOND + 79]
)
def test_windows_are_the_whole(whole, num_samples):
    """Frames whose two features lie in two windows included; the last window is a partial one of no length of note."""
    samples = noise(num_samples)
    expected = whole(samples)
    voice = LongVoice(small_model().config, samples, expected.shape[-1], do_normalize=True, windowing=SHORT)
    assert len(voice.windows) == -(-voice.num_features // 50)
    assert num_clips(voice.num_features, 16) * 16 == expected.shape[-1] == voice.windows[-1].last
    found = torch.cat(pieces(voice), dim=-1)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-6
    behind = 25 * num_samples // SECOND + 1
    assert (found[..., behind:] == 0).all()
    assert (found[..., : behind - 2] != 0).all()


def test_fewer_frames_need_fewer_windows_of_the_same_features(whole):
    samples = noise(6 * SECOND)
    expected = whole(samples)
    voice = LongVoice(small_model().config, samples, 40, do_normalize=True, windowing=SHORT)
    assert [window.last for window in voice.windows] == [24, 40]
    assert relative_error(torch.cat(pieces(voice), dim=-1), expected[..., :40]) < 1e-6


def test_frames_behind_the_voice_are_zeros():
    voice = LongVoice(small_model().config, noise(3 * SECOND), 130, do_normalize=True, windowing=SHORT)
    last = pieces(voice)[-1]
    assert voice.windows[-1].last == 130
    assert (last[..., 75 - voice.windows[-1].first :] == 0).all()


def test_the_beginning_of_a_voice_that_goes_on(whole):
    """The frames are those of a voice that ends where the samples end; what lies behind them is context only."""
    samples = noise(3 * SECOND)
    voice = LongVoice(small_model().config, samples, 20, do_normalize=True, windowing=SHORT, goes_on=True)
    (window,) = voice.windows
    (piece,) = pieces(voice)
    assert (window.first, window.last, window.end) == (0, 20, 40)
    assert 0 < relative_error(piece, whole(samples)[..., :20]) < 0.02


def test_loudness_does_not_matter_where_it_is_normalised():
    def of(samples, do_normalize):
        config = small_model().config
        return pieces(LongVoice(config, samples, 50, do_normalize=do_normalize, windowing=SHORT))[0]

    samples = noise(3 * SECOND)
    assert relative_error(of(samples * 3 + 1, True), of(samples, True)) < 1e-4
    assert relative_error(of(samples * 3 + 1, False), of(samples, False)) > 1e-3


@pytest.mark.parametrize("num_features", [2, 49, 50, 2998, 2999, 3000, 179999])
def test_positions_are_those_of_interpolate(num_features):
    """Also where float32 does not hold a position exactly any more."""
    ramp = torch.linspace(-1, 1, num_features)[None, None]
    frames = num_features // 2 + 2
    expected = audio_embedding(ramp, frames)[0, 0, 0, :frames].numpy()
    lower, upper, weight = frame_positions(frames, num_features)
    values = ramp[0, 0].numpy()
    assert np.abs(values[lower] * (1 - weight) + values[upper] * weight - expected[: len(lower)]).max() < 1e-6
    assert (expected[len(lower) :] == 0).all()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 800), np.float32), r"shape \[2, 800\]"),
        (np.zeros(719, np.float32), r"shape \[719\]; expected one channel of more than two features"),
        (np.zeros(0, np.float32), r"shape \[0\]"),
        (np.full(80000, np.nan, np.float32), "NaN"),
        (np.full(80000, -np.inf, np.float32), "infinity"),
    ],
)
def test_unusable_voices_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        LongVoice(small_model().config, samples, 16, do_normalize=True, windowing=SHORT)


@pytest.mark.parametrize("seconds", [0.5, 59.99, 60])
def test_voices_up_to_a_minute_are_whole(seconds):
    assert not Windowing().is_long(int(seconds * SECOND))
    assert Windowing().is_long(60 * SECOND + 1)


def test_an_hour_has_windows_of_nearly_equal_length():
    features = count_features(small_model().config, 3600 * SECOND)
    lengths = {end - start for start, end in cut_evenly(features, 1500)}
    assert lengths <= {1499, 1500}
