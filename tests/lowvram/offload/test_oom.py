"""Memory that runs out: the run goes on slower to the same video, or ends with a clear error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram.denoise import denoiser as denoiser_module
from lowvram.denoise import rollout as rollout_module
from lowvram.offload import oom as relief_module
from lowvram.offload.oom import MOST_TILES, Layout, Relief, next_rung, smaller_request
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
        (pipeline_module, "encode_text", (0,), ["encode_text: it runs on the host"]),
        (pipeline_module, "encode_audio", (0,), ["encode_audio: it runs on the host"]),
        (pipeline_module, "encode_image", (0,), ["encode_image: it runs on the host"]),
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
    assert [event.startswith(start) for event, start in zip(pipeline.runtime.relief.events, said, strict=True)]
    assert all(SAYS.rstrip(".") in record.getMessage() for record in caplog.records if "ran out" in record.message)
    assert sum("ran out" in record.getMessage() for record in caplog.records) == len(said)
    assert pipeline.memory_report()["given_up"] == pipeline.runtime.relief.events


@pytest.mark.parametrize("wave", [1, 2])
def test_a_pass_that_fails_over_and_over_moves_everything_to_the_host(tiny, plain, monkeypatch, wave):
    # Each repetition gets as far as its first layer; two steps and four layers make 2 * 4 rings.
    fail_at(monkeypatch, CausalDiT, "layer", *range(20, 28))
    frames, pipeline = frames_of(tiny, wave=wave)
    placement = pipeline.runtime.relief.layout.placement
    assert placement.streamed_layers == (0, 1, 2, 3)
    assert len(placement.host_rings) == 8
    assert np.array_equal(frames, plain)


def test_a_decoder_without_room_works_in_strips_at_last(tiny, plain, monkeypatch):
    fail_at(monkeypatch, StreamingDecoder, "decode", *range(1, 10))
    frames, pipeline = frames_of(tiny)
    assert pipeline.runtime.relief.layout.vae_tiles == 2
    # At 16 latents a side the margins reach nearly across.
    assert np.abs(frames.astype(int) - plain).mean() < 1


def test_no_fallback_fails_at_once_with_bytes(tiny, monkeypatch):
    fail_at(monkeypatch, CausalDiT, "layer", 6)
    with pytest.raises(OutOfMemoryError, match=r"denoise: .*2\.00 GiB.*0\.50 GiB is free; --no-fallback"):
        frames_of(tiny, fallback=False)
    fail_at(monkeypatch, pipeline_module, "encode_text", 0)
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
    layout, words = Layout(placement=Placement(wave=2), online_decode=False), []
    while rung := next_rung(layout, 8, range(2)):
        layout, said = rung
        words.append(said)
    kinds = [next(k for k in ("layers", "KV rings", "each block", "tiles") if k in said) for said in words]
    assert kinds == ["layers"] * 4 + ["KV rings"] * 4 + ["each block"] + ["tiles"] * 3
    assert len(layout.placement.streamed_layers) == 8
    assert len(layout.placement.host_rings) == 16
    assert (layout.placement.wave, layout.online_decode, layout.vae_tiles) == (2, True, MOST_TILES)


def test_quality_goes_clips_first_steps_last():
    request, seen = {"size": "704*384", "infer_frames": 48, "sample_steps": 4}, []
    while found := smaller_request(**request):
        change, _ = found
        seen += change
        request |= change
    order = ["infer_frames", "size", "sample_steps"]
    assert seen == sorted(seen, key=order.index)
    assert (request["infer_frames"], request["sample_steps"]) == (12, 1)


def test_a_layout_that_does_not_fit_itself_is_the_next_to_go():
    layout = Layout(placement=Placement(), online_decode=True)
    relief = Relief(layout, layers=4, steps=range(1), allowed=True)
    tried: list[Layout] = []

    def give_way(layout: Layout) -> None:
        tried.append(layout)
        if len(tried) < 3:
            raise full()

    def work() -> str:
        if not tried:
            raise full()
        return "done"

    assert relief.attempt("denoise", work, give_way) == "done"
    assert [len(layout.placement.streamed_layers) for layout in tried] == [1, 2, 3]


class Rank:
    """One of several that work in step. What happens in its attempts, here and ``elsewhere`` ("" nothing), and in
    keeping up and giving way; ``log`` has what it did."""

    def __init__(self, here: str, elsewhere: str, *, keeps_up: bool = True, gives_way: str = "+" * 9):
        self.here, self.elsewhere, self.keeps_up, self.gives_way = (
            iter(here),
            iter(elsewhere),
            keeps_up,
            iter(gives_way),
        )
        self.log: list[str] = []

    def work(self) -> str:
        self._do("work", next(self.here) == "+")
        return "done"

    def keep_up(self) -> None:
        self._do("keep up", self.keeps_up)

    def give_way(self, layout: Layout) -> None:
        self._do(f"{len(layout.placement.streamed_layers)} streamed", next(self.gives_way) == "+")

    def any_ran_out(self, here: bool) -> bool:
        self.log.append("tells" if here else "asks")
        return here | (next(self.elsewhere) == "-")

    def _do(self, what: str, fits: bool) -> None:
        self.log.append(what)
        if not fits:
            raise full()

    def attempt(self, *, allowed: bool = True) -> str:
        layout = Layout(placement=Placement(), online_decode=True)
        relief = Relief(layout, layers=4, steps=range(1), allowed=allowed)
        return relief.attempt_together(
            "denoise", self.work, self.give_way, keep_up=self.keep_up, any_ran_out=self.any_ran_out
        )


AGAIN = ["work", "asks"]


@pytest.fixture
def nothing_cached(monkeypatch) -> None:
    """There is nothing to look for between two attempts."""
    monkeypatch.setattr(relief_module, "free_cached", lambda: None)


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize(
    ("rank", "log"),
    [
        (Rank("+", "+"), AGAIN),
        (Rank("-+", "++"), ["work", "keep up", "tells", "1 streamed", *AGAIN]),
        (Rank("++", "-+"), [*AGAIN, *AGAIN]),
        (Rank("-+", "-+"), ["work", "keep up", "tells", "1 streamed", *AGAIN]),
        (
            Rank("-+", "++", gives_way="--+"),
            ["work", "keep up", "tells", *(f"{n} streamed" for n in (1, 2, 3)), *AGAIN],
        ),
        (
            Rank("--++", "++-+"),
            ["work", "keep up", "tells", "1 streamed", "work", "keep up", "tells", "2 streamed", *AGAIN, *AGAIN],
        ),
    ],
    ids=["nowhere", "here", "elsewhere", "everywhere", "in giving way", "again and again"],
)
def test_ranks_that_work_in_step_do_it_again_together(rank, log):
    assert rank.attempt() == "done"
    assert rank.log == log


@pytest.mark.usefixtures("nothing_cached")
def test_a_rank_that_may_not_give_way_lets_nobody_wait_for_nothing():
    rank = Rank("-", "")
    with pytest.raises(OutOfMemoryError, match=r"denoise: .*2\.00 GiB.*; --no-fallback"):
        rank.attempt(allowed=False)
    assert rank.log == ["work"]


@pytest.mark.usefixtures("nothing_cached")
def test_a_rank_without_room_to_keep_up_says_so():
    rank = Rank("-", "", keeps_up=False)
    with pytest.raises(OutOfMemoryError, match="no room either for what the other ranks wait for"):
        rank.attempt()
    assert rank.log == ["work", "keep up"]


@pytest.mark.usefixtures("nothing_cached")
def test_a_rank_with_nothing_left_says_so():
    rank = Rank("-", "+", gives_way="-" * 99)
    with pytest.raises(OutOfMemoryError, match="nothing is left"):
        rank.attempt()
