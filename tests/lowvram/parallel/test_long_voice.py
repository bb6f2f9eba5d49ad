"""A long voice goes to the ranks that denoise window by window, and is the one that one process hears."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lowvram.media.samples import synth_voice, write_wav
from tests.lowvram.parallel.conftest import Made, Maker, layout_options
from tests.lowvram.parallel.test_rank_team import unwrapped

SECONDS, CLIPS = 2, 3


@contextlib.contextmanager
def short_windows() -> Iterator[None]:
    from lowvram.encode import conditions
    from lowvram_models.long_voice import Windowing

    before, conditions.WINDOWING = conditions.WINDOWING, Windowing(whole_s=1, window_s=0.75, context_s=0.25)
    try:
        yield
    finally:
        conditions.WINDOWING = before


@contextlib.contextmanager
def the_thread_fails() -> Iterator[None]:
    """Of the rank that encodes, while it has nothing to do but to wait for latents."""
    from lowvram.encode import conditions

    with short_windows():
        load, calls = conditions.load_audio_encoder, []

        def once(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) > 1:
                raise OSError("the disk is gone")
            return load(*arguments)

        conditions.load_audio_encoder = once
        try:
            yield
        finally:
            conditions.load_audio_encoder = load


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "voice.wav"
    write_wav(path, synth_voice(SECONDS), 16000)
    return {"audio": path, "num_clip": CLIPS, "sample_steps": 2}


@pytest.fixture(scope="module")
def alone(maker: Maker, voice, tmp_path_factory) -> Made:
    return maker.make(tmp_path_factory.mktemp("alone"), 0, options={"around": short_windows}, **voice)


@pytest.mark.parametrize(
    ("stages", "ulysses", "vae"), [(2, 1, True), (2, 1, False), (1, 2, True)], ids=["2x1-and-vae", "2x1", "1x2-and-vae"]
)
def test_ranks_hear_what_one_process_hears(maker, alone, voice, tmp_path, stages, ulysses, vae):
    world = stages * ulysses + vae
    given = layout_options(stages, ulysses, vae)
    made = maker.make(tmp_path, world, *given, options={"around": short_windows}, **voice)
    heard = alone.tensors["audio_emb"]
    assert heard.shape[-1] == 16 * CLIPS
    assert torch.equal(made.tensors["audio_emb"], heard)
    assert len(made.latents) == len(alone.latents) == 2 * CLIPS
    pairs = list(zip(made.latents, alone.latents, strict=True))
    assert all(torch.allclose(mine, its, atol=0 if ulysses == 1 else 1e-4) for mine, its in pairs)
    sent = [rank["sent_bytes"]["voice"] for rank in made.report["ranks"]]
    media = world - 1 if vae else stages * ulysses - ulysses
    others = stages * ulysses - (not vae)
    assert sent == [heard.nbytes * others if rank == media else 0 for rank in range(world)]
    assert [end.threads for end in made.ended] == [1] * world


@pytest.mark.parametrize("vae", [True, False], ids=["by-the-vae's-rank", "by-one-that-denoises"])
def test_a_voice_that_cannot_be_encoded_further_ends_all_ranks(maker, ranks, voice, tmp_path, vae):
    arguments = maker.arguments(tmp_path / "out.mp4", *layout_options(2, 1, vae), **voice)
    ended = ranks.run(2 + vae, arguments, around=the_thread_fails)
    assert all(end.code == 1 for end in ended), ended
    media = 2 if vae else 1
    assert "the disk is gone" in ended[media].stderr
    first = unwrapped(ended[0])
    assert f"rank {media} (" in first
    assert "failed: OSError: the disk is gone" in first
