"""Memory that runs out: the run goes on slower to the same video, or ends with a clear error."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch

from lowvram.denoise import denoiser as denoiser_module
from lowvram.denoise import rollout as rollout_module
from lowvram.encode import conditions
from lowvram.offload.oom import MOST_TILES, Ladder, Rung, next_rung, smaller_request
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import OutOfMemoryError
from lowvram_models.dit import CausalDiT
from lowvram_models.vae import StreamingDecoder

SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 22.15 GiB of which 0.50 GiB is free."


def full() -> torch.cuda.OutOfMemoryError:
    return torch.cuda.OutOfMemoryError(SAYS + " If reserved but unallocated memory is large try setting X.")


def frames_of(tiny, **memory) -> tuple[np.ndarray, AvatarPipeline]:
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu", memory=MemoryOptions(**memory))
    return np.concatenate(list(pipeline.stream(tiny.request()))), pipeline


def fail_at(monkeypatch, owner, name: str, *calls: int) -> None:
    """Let the given calls of ``owner.name`` run out of memory, counted from 0."""
    real, count = getattr(owner, name), itertools.count()

    def wrapped(*args, **kwargs):
        if next(count) in calls:
            raise full()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.fixture(scope="module")
def plain(tiny) -> np.ndarray:
    return frames_of(tiny)[0]


@pytest.mark.parametrize(
    ("owner", "name", "calls", "said"),
    [
        (conditions, "encode_text", (0,), ["encode_text: it runs on the host"]),
        (conditions, "encode_audio", (0,), ["encode_audio: it runs on the host"]),
        (conditions, "encode_image", (0,), ["encode_image: it runs on the host"]),
        (denoiser_module, "load_shared", (0,), ["load_dit: 1 of 4 layers"]),
        (rollout_module.Rollout, "prefill", (0, 1), ["prefill_sink: 1 of 4", "prefill_sink: 2 of 4"]),
        (CausalDiT, "layer", (2,), ["prefill_sink: 1 of 4 layers"]),
        # Four layers fill the sink; the second step of the first block stops in the middle, and so does a place of
        # the next clip.
        (CausalDiT, "layer", (4 + 4 + 2, 4 + 4 + 4 + 17), ["denoise: 1 of 4 layers", "denoise: 2 of 4 layers"]),
        (StreamingDecoder, "decode", (0, 2), ["decode: 1 of 4 layers", "decode: 2 of 4 layers"]),
    ],
)
def test_memory_that_runs_out_once_changes_nothing_but_the_speed(
    tiny, plain, monkeypatch, caplog, owner, name, calls, said
):
    fail_at(monkeypatch, owner, name, *calls)
    frames, pipeline = frames_of(tiny)
    assert np.array_equal(frames, plain)
    assert [event.startswith(start) for event, start in zip(pipeline.run.ladder.events, said, strict=True)]
    assert all(SAYS.rstrip(".") in record.getMessage() for record in caplog.records if "ran out" in record.message)
    assert sum("ran out" in record.getMessage() for record in caplog.records) == len(said)
    assert pipeline.memory_report()["given_up"] == pipeline.run.ladder.events


@pytest.mark.parametrize("wave", [1, 2])
def test_a_pass_that_fails_over_and_over_moves_everything_to_the_host(tiny, plain, monkeypatch, wave):
    # Each repetition gets as far as its first layer; two steps and four layers make 2 * 4 rings.
    fail_at(monkeypatch, CausalDiT, "layer", *range(20, 28))
    frames, pipeline = frames_of(tiny, wave=wave)
    placement = pipeline.run.rung.placement
    assert placement.streamed_layers == (0, 1, 2, 3)
    assert len(placement.host_rings) == 8
    assert np.array_equal(frames, plain)


def test_a_decoder_without_room_works_in_strips_at_last(tiny, plain, monkeypatch):
    fail_at(monkeypatch, StreamingDecoder, "decode", *range(1, 10))
    frames, pipeline = frames_of(tiny)
    assert pipeline.run.rung.vae_tiles == 2
    # At 16 latents a side the margins reach nearly across.
    assert np.abs(frames.astype(int) - plain).mean() < 1


def test_no_fallback_fails_at_once_with_bytes(tiny, monkeypatch):
    fail_at(monkeypatch, CausalDiT, "layer", 6)
    with pytest.raises(OutOfMemoryError, match=r"denoise: .*2\.00 GiB.*0\.50 GiB is free; --no-fallback"):
        frames_of(tiny, fallback=False)
    fail_at(monkeypatch, conditions, "encode_text", 0)
    with pytest.raises(OutOfMemoryError, match=r"encode_text.*--no-fallback"):
        frames_of(tiny, fallback=False)


def test_blocks_that_were_made_have_come_before_the_error(tiny, plain, monkeypatch):
    fail_at(monkeypatch, CausalDiT, "layer", *range(30, 1000))
    pipeline = AvatarPipeline.from_artifact(tiny.artifact("fp32"), device="cpu")
    frames = []
    with pytest.raises(OutOfMemoryError, match="nothing is left"):
        frames.extend(pipeline.stream(tiny.request()))
    made = np.concatenate(frames)
    assert 0 < len(made) < len(plain)
    assert np.array_equal(made, plain[: len(made)])


def test_rungs_come_in_order_and_end():
    rung, words = Rung(placement=Placement(wave=2), online_decode=False), []
    while found := next_rung(rung, 8, range(2)):
        rung, said = found
        words.append(said)
    kinds = [next(k for k in ("layers", "KV rings", "each block", "tiles") if k in said) for said in words]
    assert kinds == ["layers"] * 4 + ["KV rings"] * 4 + ["each block"] + ["tiles"] * 3
    assert len(rung.placement.streamed_layers) == 8
    assert len(rung.placement.host_rings) == 16
    assert (rung.placement.wave, rung.online_decode, rung.vae_tiles) == (2, True, MOST_TILES)


def test_quality_goes_clips_first_steps_last():
    request, seen = {"size": "704*384", "infer_frames": 48, "sample_steps": 4}, []
    while found := smaller_request(**request):
        change, _ = found
        seen += change
        request |= change
    order = ["infer_frames", "size", "sample_steps"]
    assert seen == sorted(seen, key=order.index)
    assert (request["infer_frames"], request["sample_steps"]) == (12, 1)


def test_a_rung_that_does_not_fit_itself_is_the_next_to_go():
    ladder = Ladder(Rung(placement=Placement(), online_decode=True), layers=4, steps=range(1), allowed=True)
    tried: list[Rung] = []
    done = []

    def degrade(rung: Rung) -> None:
        tried.append(rung)
        if len(tried) < 3:
            raise full()

    for attempt in ladder.attempts("denoise", degrade):
        with attempt:
            if not tried:
                raise full()
            done.append(1)
    assert done == [1]
    assert [len(rung.placement.streamed_layers) for rung in tried] == [1, 2, 3]


def test_what_failed_holds_nothing_when_it_is_tried_again():
    """What an attempt made is gone before the next begins, so that its memory is there again."""

    class Big:
        pass

    def work(seen: list[weakref.ref[Big]]) -> None:
        big = Big()
        assert all(each() is None for each in seen)
        seen.append(weakref.ref(big))
        if len(seen) < 3:
            raise full()

    ladder = Ladder(
        Rung(placement=Placement(), online_decode=True),
        layers=4,
        steps=range(1),
        allowed=True,
        empty_cache=lambda: None,
    )
    seen: list[weakref.ref[Big]] = []
    for attempt in ladder.attempts("denoise"):
        with attempt:
            work(seen)
    assert len(seen) == 3


class Rank:
    """One of several that work in step. What happens in its attempts, here and ``elsewhere`` ("" nothing), and in
    keeping up and degrading; ``log`` has what it did."""

    def __init__(self, here: str, elsewhere: str, *, keeps_up: bool = True, degrades: str = "+" * 9):
        self.here, self.elsewhere, self.keeps_up, self.degrades = (
            iter(here),
            iter(elsewhere),
            keeps_up,
            iter(degrades),
        )
        self.log: list[str] = []

    def work(self) -> None:
        self._do("work", next(self.here) == "+")

    def keep_up(self) -> None:
        self._do("keep up", self.keeps_up)

    def degrade(self, rung: Rung) -> None:
        self._do(f"{len(rung.placement.streamed_layers)} streamed", next(self.degrades) == "+")

    def any_ran_out(self, here: bool) -> bool:
        self.log.append("tells" if here else "asks")
        return here | (next(self.elsewhere) == "-")

    def _do(self, what: str, fits: bool) -> None:
        self.log.append(what)
        if not fits:
            raise full()

    def attempt(self, *, allowed: bool = True) -> None:
        ladder = Ladder(
            Rung(placement=Placement(), online_decode=True),
            layers=4,
            steps=range(1),
            allowed=allowed,
            empty_cache=lambda: None,  # there is nothing to look for between two attempts
        )
        for attempt in ladder.attempts_together(
            "denoise", self.degrade, keep_up=self.keep_up, any_ran_out=self.any_ran_out
        ):
            with attempt:
                self.work()


AGAIN = ["work", "asks"]


@pytest.mark.parametrize(
    ("rank", "log"),
    [
        (Rank("+", "+"), AGAIN),
        (Rank("-+", "++"), ["work", "keep up", "tells", "1 streamed", *AGAIN]),
        (Rank("++", "-+"), [*AGAIN, *AGAIN]),
        (Rank("-+", "-+"), ["work", "keep up", "tells", "1 streamed", *AGAIN]),
        (
            Rank("-+", "++", degrades="--+"),
            ["work", "keep up", "tells", *(f"{n} streamed" for n in (1, 2, 3)), *AGAIN],
        ),
        (
            Rank("--++", "++-+"),
            ["work", "keep up", "tells", "1 streamed", "work", "keep up", "tells", "2 streamed", *AGAIN, *AGAIN],
        ),
    ],
    ids=["nowhere", "here", "elsewhere", "everywhere", "in degrading", "again and again"],
)
def test_ranks_that_work_in_step_do_it_again_together(rank, log):
    rank.attempt()
    assert rank.log == log


def test_a_rank_that_may_not_give_way_lets_nobody_wait_for_nothing():
    rank = Rank("-", "")
    with pytest.raises(OutOfMemoryError, match=r"denoise: .*2\.00 GiB.*; --no-fallback"):
        rank.attempt(allowed=False)
    assert rank.log == ["work"]


def test_a_rank_without_room_to_keep_up_says_so():
    rank = Rank("-", "", keeps_up=False)
    with pytest.raises(OutOfMemoryError, match="no room either for what the other ranks wait for"):
        rank.attempt()
    assert rank.log == ["work", "keep up"]


def test_a_rank_with_nothing_left_says_so():
    rank = Rank("-", "+", degrades="-" * 99)
    with pytest.raises(OutOfMemoryError, match="nothing is left"):
        rank.attempt()
