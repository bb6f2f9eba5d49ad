"""From voice to features: golden embedding and buckets, checkpoints' names, and windows over long audio."""

import json
import wave
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowvram_models import audio_encoder
from lowvram_models.audio_encoder import audio_embedding, build_wav2vec2, extract_features, num_clips, wav2vec2_state
from tests.golden_cases import ROOT, cases, relative_error

FOLDER = "ckpt/Wan2.2-S2V-14B/wav2vec2-large-xlsr-53-english"
POSITION = "encoder.pos_conv_embed.conv."

each_case = pytest.mark.parametrize("case", cases("pipeline"), ids=lambda case: case.folder.name)


def read_wave(path):
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16).astype(np.float32) / 32768


def golden_wav2vec2(case):
    with torch.device("meta"):
        model = build_wav2vec2(json.loads((case.folder / FOLDER / "config.json").read_text()))
    model.load_state_dict(wav2vec2_state(load_file(case.folder / FOLDER / "model.safetensors")), assign=True)
    return model


@cache
def small_config():
    return {
        "model_type": "wav2vec2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": [8] * 7,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.05,
    }


@cache
def small_model():
    torch.manual_seed(0)
    return build_wav2vec2(small_config())


def noise(num_samples, seed=0):
    """A voice-like signal: noise whose loudness changes slowly, with an offset."""
    rng = np.random.default_rng(seed)
    loudness = 0.2 + 0.1 * np.sin(np.arange(num_samples) / 9000)
    return (rng.standard_normal(num_samples) * loudness + 0.05).astype(np.float32)


# --- golden cases


@pytest.mark.golden
@each_case
def test_audio_embedding_meets_the_golden_one(case):
    settings, expected = case.settings, case.tensors("outputs")["audio_emb"]
    do_normalize = json.loads((case.folder / FOLDER / "preprocessor_config.json").read_text())["do_normalize"]
    samples = read_wave(case.folder / "inputs/speech.wav")
    hidden = extract_features(golden_wav2vec2(case), samples, do_normalize=do_normalize)
    assert num_clips(hidden.shape[2], settings["infer_frames"]) == settings["clips_in_audio"]
    assert relative_error(audio_embedding(hidden, settings["infer_frames"]), expected) < 1e-6


def bucket_cases():
    file = ROOT / "audio_buckets.json"
    return json.loads(file.read_text()) if file.is_file() else []


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", bucket_cases(), ids=lambda case: f"{case['feature_frames_50hz']}-{case['infer_frames']}"
)
def test_buckets_meet_the_golden_table(case):
    ramp = torch.arange(1, case["feature_frames_50hz"] + 1).float().expand(3, 2, -1)
    embedding = audio_embedding(ramp, case["infer_frames"])
    assert num_clips(case["feature_frames_50hz"], case["infer_frames"]) == case["clips"]
    assert embedding.shape == (1, 3, 2, case["clips"] * case["infer_frames"])
    assert [round(value, 4) for value in embedding[0, 0, 0].tolist()] == case["values"]
    assert (embedding == embedding[:, :1, :1]).all()


# --- the network


def test_ctc_names_old_and_new_give_the_same_model():
    state = small_model().state_dict()
    old = {
        "wav2vec2."
        + name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }
    old |= {"wav2vec2.masked_spec_embed": torch.zeros(16), "lm_head.weight": torch.zeros(3, 16)}
    assert {"wav2vec2." + POSITION + "weight_g", "wav2vec2." + POSITION + "weight_v"} <= set(old)
    new = {f"wav2vec2.{name}": tensor for name, tensor in state.items()}
    expected = extract_features(small_model(), noise(4000))
    for tensors in (old, new, dict(state)):
        with torch.device("meta"):
            model = build_wav2vec2(small_config())
        model.load_state_dict(wav2vec2_state(tensors), assign=True)
        assert torch.equal(extract_features(model, noise(4000)), expected)


def test_an_absent_tensor_is_named():
    tensors = {f"wav2vec2.{name}": tensor for name, tensor in small_model().state_dict().items()}
    del tensors["wav2vec2.encoder.layer_norm.bias"]
    with pytest.raises(RuntimeError, match=r"encoder\.layer_norm\.bias"):
        build_wav2vec2(small_config()).load_state_dict(wav2vec2_state(tensors))


def test_another_kind_of_config_is_refused():
    with pytest.raises(ValueError, match="model_type is 'hubert'"):
        build_wav2vec2({"model_type": "hubert"})


# --- features at 50 Hz


def test_features_hold_every_layer_and_do_not_depend_on_loudness():
    samples = noise(16000)
    hidden = extract_features(small_model(), samples)
    assert hidden.shape == (3, 16, 49)
    assert hidden.dtype == torch.float32
    assert relative_error(extract_features(small_model(), torch.from_numpy(samples) * 3 + 1), hidden) < 1e-4
    assert relative_error(extract_features(small_model(), samples * 3 + 1, do_normalize=False), hidden) > 1e-3


def test_sixty_seconds_are_encoded_at_once_and_more_in_windows(monkeypatch):
    lengths = []
    encode = audio_encoder.hidden_states

    def record(model, samples):
        lengths.append(len(samples))
        return encode(model, samples)

    monkeypatch.setattr(audio_encoder, "hidden_states", record)
    extract_features(small_model(), noise(60 * 16000))
    assert lengths == [60 * 16000]
    extract_features(small_model(), noise(60 * 16000 + 1))
    assert len(lengths) == 3
    assert max(lengths[1:]) <= 40 * 16000


@pytest.mark.parametrize("num_samples", [16000, 16319, 16320, 20000, 23456])
def test_windows_give_as_many_features_and_nearly_the_same(num_samples):
    samples = torch.from_numpy(noise(num_samples))
    whole = extract_features(small_model(), samples, do_normalize=False)
    windowed = audio_encoder._in_windows(small_model(), samples, window=20, context=10)
    assert windowed.shape == whole.shape
    assert 0 < relative_error(windowed, whole) < 0.02
    without_context = audio_encoder._in_windows(small_model(), samples, window=20, context=0)
    assert relative_error(without_context, whole) > 1.5 * relative_error(windowed, whole)


@each_case
def test_windows_are_near_the_whole_file_with_the_golden_encoder(case):
    samples = np.tile(read_wave(case.folder / "inputs/speech.wav"), 100)[: 62 * 16000 + 77]
    model = golden_wav2vec2(case)
    windowed, whole = extract_features(model, samples), extract_features(model, samples, whole_s=100)
    assert windowed.shape == whole.shape == (25, model.config.hidden_size, 3099)
    assert 0 < relative_error(windowed, whole) < 2e-3


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 800), np.float32), r"shape \[2, 800\]"),
        (np.zeros(399, np.float32), "399 samples; expected at least 400"),
        (np.zeros(0, np.float32), "0 samples"),
        (np.full(800, np.nan, np.float32), "NaN"),
    ],
)
def test_unusable_audio_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        extract_features(small_model(), samples)


# --- features at 25 fps


def test_audio_is_followed_by_zeros():
    embedding = audio_embedding(torch.ones(2, 3, 50), 24)
    assert embedding.shape == (1, 2, 3, 48)
    assert (embedding[..., :25] == 1).all()
    assert (embedding[..., 25:] == 0).all()


@pytest.mark.parametrize(("num_features", "infer_frames"), [(1, 24), (50, 0)])
def test_too_little_to_embed_is_refused(num_features, infer_frames):
    with pytest.raises(ValueError, match="expected"):
        audio_embedding(torch.ones(2, 3, num_features), infer_frames)
