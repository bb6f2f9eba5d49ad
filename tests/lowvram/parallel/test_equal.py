"""However ranks share the work, they make the video that one process makes.

A timestep pipeline computes the same numbers in the same order: bit for bit the same. Ulysses adds up in another order
(other shapes of products): last bits of float32 differ, by 2e-7 in the latents here, and the VAE makes them 30 times
larger. H.264 decides by such bits how it codes a block, so frames are compared before it, and the file with them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import VideoWriter, read_frames
from lowvram.pipeline import to_pixels
from lowvram_models.constants import FPS
from tests.golden_cases import relative_error
from tests.lowvram.parallel.conftest import Made, Maker, layout_options

LAYOUTS = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)]
FP32 = 1e-5


@pytest.fixture(scope="module")
def alone(maker: Maker, tmp_path_factory):
    """What one process makes, by precision and rings; made once."""
    found: dict[tuple[str, str], Made] = {}

    def get(precision: str = "fp32", kv: str = "auto") -> Made:
        if (precision, kv) not in found:
            folder = tmp_path_factory.mktemp("alone")
            found[precision, kv] = maker.make(folder, 0, f"--kv={kv}", precision=precision)
        return found[precision, kv]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("vae", [False, True], ids=["", "and-vae"])
@pytest.mark.parametrize(("stages", "ulysses"), LAYOUTS, ids=[f"{s}x{u}" for s, u in LAYOUTS])
def test_every_layout(maker, alone, tmp_path, stages, ulysses, vae):
    made = maker.make(tmp_path, stages * ulysses + vae, *layout_options(stages, ulysses, vae))
    assert made.report["layout"] == {"num_gpus_dit": stages * ulysses, "ulysses_size": ulysses, "vae_rank": vae}
    same_video(made, alone(), exactly=ulysses == 1)
    file_has_the_frames(made, maker, tmp_path)


@pytest.mark.parametrize(
    ("stages", "ulysses", "vae", "options"),
    [
        (1, 3, True, ["--offload-model", "--offload-kv-cache"]),
        (2, 2, False, ["--offload-kv-cache"]),
        (2, 1, False, ["--offload-model"]),
        (2, 1, False, ["--wave=2"]),
        (2, 2, True, ["--wave=2", "--offload-model"]),
        (2, 2, True, ["--enable-online-decode=False"]),
        (2, 1, False, ["--enable-online-decode=False"]),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else str(value),
)
def test_what_changes_no_number(maker, alone, tmp_path, stages, ulysses, vae, options):
    made = maker.make(tmp_path, stages * ulysses + vae, *layout_options(stages, ulysses, vae), *options)
    same_video(made, alone(), exactly=ulysses == 1)


@pytest.mark.parametrize(("stages", "ulysses", "vae"), [(2, 1, False), (1, 2, True)])
def test_a_single_clip_which_refreshes_no_sink(maker, alone, tmp_path, stages, ulysses, vae):
    made = maker.make(tmp_path, stages * ulysses + vae, *layout_options(stages, ulysses, vae), num_clip=1)
    assert len(made.latents) == 2
    errors = [relative_error(a, b) for a, b in zip(made.latents, alone().latents[:2], strict=True)]
    assert max(errors) <= (0 if ulysses == 1 else FP32), errors
    frames = made.tensors["frames"]
    assert relative_error(frames, alone().tensors["frames"][:, : frames.shape[1]]) <= (0 if ulysses == 1 else FP32)


def test_a_voice_that_ends_in_a_clip_s_last_frames(maker, tmp_path):
    """All ranks hear that a block of a second clip follows, which refreshes the sink."""
    write_wav(tmp_path / "voice.wav", synth_voice(16 / FPS), 16000)
    (tmp_path / "alone").mkdir()
    one = maker.make(tmp_path / "alone", 0, audio=tmp_path / "voice.wav")
    made = maker.make(tmp_path, 3, *layout_options(2, 1, True), audio=tmp_path / "voice.wav")
    assert len(made.latents) == len(one.latents) == 3
    assert all(torch.equal(mine, its) for mine, its in zip(made.latents, one.latents, strict=True))
    assert len(made.video) == len(one.video) == 16


@pytest.mark.parametrize(
    ("stages", "ulysses", "vae", "options"),
    [(3, 1, True, []), (1, 3, False, []), (2, 2, True, ["--offload-model", "--offload-kv-cache"])],
)
def test_int8_rings(maker, alone, tmp_path, stages, ulysses, vae, options):
    """A last bit that differs moves a few of the rings' codes by one: latents keep to the limit of float32 all the
    same, frames to ten times of it."""
    layout = layout_options(stages, ulysses, vae)
    made = maker.make(tmp_path, stages * ulysses + vae, *layout, "--kv=int8", *options)
    same_video(made, alone(kv="int8"), exactly=ulysses == 1, frames=10 * FP32)
    assert not torch.equal(made.latents[0], alone().latents[0])


def test_stages_of_an_int8_artifact(maker, alone, tmp_path):
    made = maker.make(tmp_path, 3, *layout_options(3, 1, False), precision="int8")
    same_video(made, alone("int8"), exactly=True)


@pytest.mark.parametrize(("stages", "ulysses", "vae", "kv"), [(1, 3, False, "auto"), (2, 2, True, "int8")])
def test_ulysses_of_an_int8_artifact(maker, alone, tmp_path, stages, ulysses, vae, kv):
    """Every layer rounds its inputs to 8 bit. A last bit that differs makes one of them the next code, 1/127 of its
    token's largest value away: what then differs is rounding, and has to stay within the error that rounding has."""
    made = maker.make(
        tmp_path, stages * ulysses + vae, *layout_options(stages, ulysses, vae), f"--kv={kv}", precision="int8"
    )
    one, exact = alone("int8", kv), alone("fp32", kv)
    for mine, its, true in zip(made.latents, one.latents, exact.latents, strict=True):
        rounding = relative_error(its, true)
        assert relative_error(mine, its) < rounding < 0.02
        # No further from the truth than one process is.
        assert relative_error(mine, true) < 1.2 * rounding


def same_video(made: Made, one: Made, *, exactly: bool, frames: float = FP32) -> None:
    """Latents of every block, decoded frames, and frames as they go to the file."""
    assert len(made.latents) == len(one.latents) == 4
    errors = [relative_error(mine, its) for mine, its in zip(made.latents, one.latents, strict=True)]
    assert max(errors) <= (0 if exactly else FP32), errors
    mine, its = made.tensors["frames"], one.tensors["frames"]
    assert relative_error(mine, its) <= (0 if exactly else frames)
    levels = to_pixels(mine).astype(int) - to_pixels(its)
    assert np.abs(levels).max() <= (0 if exactly else 1)
    assert made.video.shape == one.video.shape
    if exactly:
        assert np.array_equal(made.video, one.video)


def file_has_the_frames(made: Made, maker: Maker, folder) -> None:
    """The file is that of the frames that were dumped: none is missing, doubled or out of its order."""
    pixels = to_pixels(made.tensors["frames"])
    _, height, width, _ = pixels.shape
    with VideoWriter(folder / "again.mp4", height=height, width=width, fps=FPS, audio_path=maker.voice) as writer:
        writer.write(pixels)
    assert np.array_equal(np.stack(list(read_frames(folder / "again.mp4"))), made.video)
