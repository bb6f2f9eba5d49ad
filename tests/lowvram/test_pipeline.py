from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram.denoise.rollout import Rollout
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline, Request, to_pixels
from lowvram.recorder import TensorRecorder
from lowvram_kernels.choices import choose
from lowvram_kernels.errors import ConfigError, HardwareError, InputError


def run(artifact, request, **options) -> tuple[np.ndarray, dict[str, torch.Tensor], AvatarPipeline]:
    pipeline = AvatarPipeline.from_artifact(artifact, device="cpu", **options)
    recorder = TensorRecorder()
    frames = list(pipeline.stream(request, recorder=recorder))
    assert recorder.total_frames == sum(len(f) for f in frames)
    return np.concatenate(frames), recorder.tensors(), pipeline


@pytest.fixture(scope="module")
def plain(tiny):
    return run(tiny.artifact("fp32"), tiny.request())


def test_stream_yields_blocks_of_pixels(tiny):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    shapes = [frames.shape for frames in pipeline.stream(tiny.request())]
    # 16 frames a clip are 4 latent frames: blocks of 3 and 1; the first block loses 3 frames.
    assert shapes == [(n, 128, 128, 3) for n in (9, 4, 12, 4)]


def test_frames_are_not_constant_and_not_saturated(plain):
    assert plain[0].dtype == np.uint8
    frames = plain[0].astype(float)
    assert 5 < frames.std() < 120
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.5


def test_dumped_blocks_of_unequal_length(plain):
    _, tensors, _ = plain
    assert [tensors[f"latents.block{i}"].shape[1] for i in range(4)] == [3, 1, 3, 1]
    assert tensors["frames"].shape == (3, 29, 128, 128)
    assert {"audio_emb", "context", "ref_latents", "motion_latents", "input_ids"} <= set(tensors)


@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16"])
def test_offloaded_layers_give_the_same_latents_bit_for_bit(tiny, precision):
    resident = run(tiny.artifact(precision), tiny.request())[1]
    streamed = run(tiny.artifact(precision), tiny.request(), memory=MemoryOptions(offload_model=True))[1]
    assert all(torch.equal(resident[name], streamed[name]) for name in resident)


def test_decoding_a_clip_at_a_time_gives_the_same_frames(tiny, plain):
    frames, _, _ = run(tiny.artifact("fp32"), tiny.request(online_decode=False))
    assert np.array_equal(frames, plain[0])


def test_the_seed_decides(tiny, plain):
    same, other = (run(tiny.artifact("fp32"), tiny.request(base_seed=seed))[0] for seed in (420, 1))
    assert np.array_equal(same, plain[0])
    assert not np.array_equal(other, plain[0])


def test_the_second_clip_follows_what_the_first_one_made(tiny, plain, monkeypatch):
    """The sink is filled from the portrait first, and before the second clip from the first frame that was generated:
    with the portrait's latent once more, the second clip would be another."""
    real, filled = Rollout.prefill, []

    def prefill(self: Rollout, reference: torch.Tensor, motion: torch.Tensor) -> None:
        filled.append(reference.clone())
        real(self, filled[0], motion)

    monkeypatch.setattr(Rollout, "prefill", prefill)
    _, portrait_again, pipeline = run(tiny.artifact("fp32"), tiny.request())
    expected = plain[1]["ref_latents"][0], plain[1]["latents.block0"][:, :1]
    assert len(filled) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(filled, expected, strict=True))
    for block, same in enumerate((True, True, False, False)):
        name = f"latents.block{block}"
        assert torch.equal(portrait_again[name], plain[1][name]) == same
    stages = pipeline.runtime.stages.stages
    assert (stages["prefill_sink"].calls, stages["denoise"].calls) == (2, 4 * 2)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_artifacts_compute_in_8_bit_and_say_so(tiny, precision):
    *_, pipeline = run(tiny.artifact(precision), tiny.request(num_clip=1))
    linears = {
        name: calls for (operation, name), calls in pipeline.runtime.kernels.items() if operation == "linear_w8a8"
    }
    # 4 layers: 10 products a block and 4 + 1 an injection in 2 of them; 2 blocks, 2 steps. What an injection makes
    # of the voice alone, 3 of its 5, is kept from a block's first step.
    chosen = choose(f"linear_w8a8 {precision}", torch.device("cpu"))
    assert linears == {f"{precision}: {chosen}": ((4 * 10 + 2 * 5) * 2 - 2 * 3) * 2}


def test_random_distance_differs_from_a_fixed_one_and_repeats(tiny):
    fixed = run(tiny.artifact("fp32"), tiny.request())[1]["latents.block3"]
    drawn = [run(tiny.artifact("fp32"), tiny.request(cond_rope_distance="random"))[1]["latents.block3"] for _ in "ab"]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], fixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"infer_frames": 13}, "multiple of 4"),
        ({"num_clip": 0}, "1 or more"),
        ({"sample_steps": 0}, "1 to 1000"),
        ({"base_seed": -1}, "base_seed"),
        ({"cond_rope_distance": 31}, "0 to 30, or random"),
        ({"cond_rope_distance": "far"}, "0 to 30, or random"),
    ],
)
def test_settings_that_cannot_work(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        Request(image=tmp_path, audio=tmp_path, prompt="", **change)


def test_bad_files_are_told_before_anything_loads(tiny, tmp_path):
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    with pytest.raises(InputError, match="missing\\.wav"):
        next(pipeline.stream(tiny.request().__class__(image=tiny.portrait, audio=tmp_path / "missing.wav", prompt="")))
    assert not pipeline.runtime.stages.stages


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "nonsense"])
def test_devices_that_are_not_there(tiny, name):
    with pytest.raises(HardwareError, match="--device"):
        AvatarPipeline.from_artifact(tiny.artifact("fp32"), device=name)


def test_pixels_round_and_clamp():
    frames = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_pixels(frames)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
