"""How ranks meet, agree and part: with real ranks, which end with the exit codes of the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.errors import DistributedError, OutOfMemoryError
from tests.lowvram.parallel.conftest import Maker
from tests.lowvram.parallel.ranks import Ended


@contextlib.contextmanager
def signals() -> Iterator[list]:
    """Whether SIGTERM does after a run what it did before."""
    before, kept = signal.getsignal(signal.SIGTERM), []
    try:
        yield kept
    finally:
        kept.append(signal.getsignal(signal.SIGTERM) == before)


def test_joined_and_left_again_and_again_in_one_process(maker: Maker, ranks, tmp_path):
    made = [maker.make(tmp_path, 2, num_clip=1, options={"around": signals}) for _ in range(3)]
    workers = [process.pid for process, _ in ranks._workers[:2]]
    again = maker.make(tmp_path, 2, num_clip=1, options={"around": signals})
    assert [process.pid for process, _ in ranks._workers[:2]] == workers
    for run in (*made, again):
        assert [end.seen for end in run.ended] == [[True], [True]]
    threads = [[end.threads for end in run.ended] for run in (*made, again)]
    assert threads == [[1, 1]] * 4
    descriptors = [[end.descriptors for end in run.ended] for run in (*made, again)]
    assert descriptors[-1] == descriptors[-2]


def test_one_rank_writes_and_prints(maker, tmp_path):
    made = maker.make(tmp_path, 3, "--enable-vae-parallel", num_clip=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4", "out.safetensors"]
    report = made.report
    assert report["layout"] == {"num_gpus_dit": 2, "ulysses_size": 1, "vae_rank": True}
    assert [rank["role"] for rank in report["ranks"]] == [
        "rank 0 (stage 0, part 0)", "rank 1 (stage 1, part 0)", "rank 2 (VAE)",
    ]  # fmt: skip
    ran = [{stage["name"] for stage in rank["stages"]} for rank in report["ranks"]]
    assert ["denoise" in stages for stages in ran] == [True, True, False]
    assert ["decode" in stages for stages in ran] == [False, False, True]
    assert ["encode_text" in stages for stages in ran] == [False, False, True]


def test_another_artifact_is_refused_by_all(maker, ranks, tmp_path):
    one, other = (maker.arguments(tmp_path / "out.mp4", precision=precision) for precision in ("fp32", "int8"))
    ended = ranks.run(3, {0: one, 1: other, 2: one})
    assert [end.code for end in ended] == [2, 2, 2], ended
    for end in ended:
        assert "rank 1 (stage 0, part 1) on" in end.stderr
        assert "has artifact" in end.stderr
        assert "expected the same on all ranks" in end.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("base-seed", 7, "has base_seed 7, rank 0 has 420"), ("kv", "int8", "has kv 'int8', rank 0 has 'auto'")],
)
def test_other_settings_are_refused_by_all(maker, ranks, tmp_path, name, value, words):
    usual, other = maker.arguments(tmp_path / "out.mp4"), maker.arguments(tmp_path / "out.mp4", **{name: value})
    ended = ranks.run(2, {0: usual, 1: other})
    assert [end.code for end in ended] == [2, 2], ended
    assert all(words in unwrapped(end) for end in ended)


def test_portrait_and_voice_are_read_by_one_rank(maker, ranks, tmp_path):
    """As on several machines: the others need no copy of them."""
    usual = maker.arguments(tmp_path / "out.mp4", num_clip=1)
    elsewhere = [a.replace(str(maker.portrait), "none.png").replace(str(maker.voice), "none.wav") for a in usual]
    # Of two stages the last one reads.
    assert [end.code for end in ranks.run(2, {0: elsewhere, 1: usual})] == [0, 0]


def test_a_layout_that_does_not_fit_the_request_is_refused_by_all(maker, ranks, tmp_path):
    ended = ranks.run(3, maker.arguments(tmp_path / "out.mp4", "--ulysses_size=1", sample_steps=2))
    assert [end.code for end in ended] == [2, 2, 2], ended
    assert all("are 3 stages for 2 denoising steps" in unwrapped(end) for end in ended)


def test_a_bad_portrait_ends_all_ranks(maker, ranks, tmp_path):
    arguments = [a.replace(str(maker.portrait), "none.png") for a in maker.arguments(tmp_path / "out.mp4")]
    first, last = ranks.run(2, arguments)
    assert (first.code, last.code) == (1, 2)
    assert "none.png" in last.stderr
    assert "rank 1 (stage 1, part 0) on" in first.stderr
    assert "failed: InputError:" in first.stderr


def test_a_device_that_one_rank_lacks_ends_all_ranks(maker, ranks, tmp_path):
    usual = maker.arguments(tmp_path / "out.mp4")
    first, last = ranks.run(2, {0: usual, 1: [*usual, "--device=cuda:1"]})
    assert (first.code, last.code) == (1, 2)
    assert "failed: ConfigError: --device is 'cuda:1'; expected auto, cuda or cpu" in unwrapped(first)


@contextlib.contextmanager
def rank_1_runs_out_of_memory() -> Iterator[None]:
    """While it denoises, with nothing left to give up."""
    if os.environ["RANK"] == "1":
        from lowvram.denoise.rollout import Rollout

        def advance(self: Rollout, items: object) -> None:
            raise OutOfMemoryError("1 byte is needed, 0 are there")

        Rollout.advance = advance
    yield


def test_a_rank_that_fails_ends_all_and_is_named(maker, ranks, tmp_path):
    arguments = maker.arguments(tmp_path / "out.mp4", "--num_gpus_dit=3", "--ulysses_size=3")
    ended = ranks.run(4, arguments, around=rank_1_runs_out_of_memory)
    assert [end.code for end in ended] == [1, 1, 1, 1], ended
    assert "1 byte is needed, 0 are there" in ended[1].stderr
    for rank in (0, 2, 3):
        assert "rank 1 (stage 0, part 1) on" in ended[rank].stderr
        assert "failed: OutOfMemoryError: 1 byte is needed" in unwrapped(ended[rank])


@contextlib.contextmanager
def rank_1_receives_other_bytes() -> Iterator[None]:
    import lowvram.parallel.rank_team as team

    team._CAUSE_S = 2.0
    if os.environ["RANK"] == "1":
        check = team._try_exchange

        def try_exchange(sequence: object, device: object) -> None:
            check(sequence, device)
            raise DistributedError("ranks received other bytes than were sent; export NCCL_P2P_DISABLE=1")

        team._try_exchange = try_exchange
    yield


def test_what_goes_wrong_while_ranks_meet_is_told_to_all(maker, ranks, tmp_path):
    arguments = maker.arguments(tmp_path / "out.mp4", "--ulysses_size=2")
    ended = ranks.run(2, arguments, around=rank_1_receives_other_bytes)
    assert [end.code for end in ended] == [1, 1]
    assert all("ranks received other bytes than were sent; export NCCL_P2P_DISABLE=1" in unwrapped(e) for e in ended)
    assert "rank 1 (stage 0, part 1) on" in ended[0].stderr


@contextlib.contextmanager
def rank_0_is_ended() -> Iterator[None]:
    """By SIGTERM, as soon as there is a first block."""
    if os.environ["RANK"] == "0":
        real = AvatarPipeline._denoised

        def denoised(*arguments: object) -> Iterator[object]:
            for item in real(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(5)
                yield item

        AvatarPipeline._denoised = denoised
    yield


def test_sigterm_ends_all_in_order(maker, ranks, tmp_path):
    ended = ranks.run(2, maker.arguments(tmp_path / "out.mp4"), around=rank_0_is_ended)
    assert [end.code for end in ended] == [1, 1]
    assert "ended from outside (SIGTERM)" in ended[0].stderr
    assert "rank 0 (stage 0, part 0) on" in ended[1].stderr
    assert "ended from outside (SIGTERM)" in unwrapped(ended[1])


def test_a_rank_that_ended_before_all_have_met(maker, ranks, tmp_path):
    ended = ranks.run(1, maker.arguments(tmp_path / "out.mp4"), around=one_is_gone, environ={"WORLD_SIZE": "2"})
    assert [end.code for end in ended] == [1]
    assert "the run ended: rank 1 of 2 on this machine was killed by SIGKILL" in unwrapped(ended[0])


@contextlib.contextmanager
def one_is_gone() -> Iterator[None]:
    """The starter's part of it."""
    from torch.distributed import PrefixStore, TCPStore

    from lowvram.parallel.rendezvous import GONE, prefix

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    PrefixStore(prefix("0"), store).set(GONE, "rank 1 of 2 on this machine was killed by SIGKILL")
    yield


def test_ranks_that_do_not_come(maker, ranks, tmp_path, monkeypatch):
    ended = ranks.run(1, maker.arguments(tmp_path / "out.mp4"), around=impatient, environ={"WORLD_SIZE": "3"})
    assert [end.code for end in ended] == [1]
    assert "ranks [1, 2] of 3 did not come within 1 s; start as many as the layout has" in unwrapped(ended[0])
    assert "RANK=0 and WORLD_SIZE=3 in the environment say so" in unwrapped(ended[0])
    assert "where nobody started ranks, unset RANK WORLD_SIZE" in unwrapped(ended[0])
    assert "this is rank 0 of 3, and waits for the others" in unwrapped(ended[0])


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    import lowvram.parallel.rank_team as team

    team.RENDEZVOUS_S = 1
    yield


def test_nobody_keeps_the_store(maker, ranks, tmp_path):
    """The port that is named is not the store's: rank 1 finds nobody there."""
    free = {"MASTER_PORT": "1"}
    ended = ranks.run(
        1, maker.arguments(tmp_path / "out.mp4"), environ={"WORLD_SIZE": "2", "RANK": "1", **free}, around=no_patience
    )
    assert [end.code for end in ended] == [1]
    assert "rank 1 cannot meet the others at 127.0.0.1 port 1" in unwrapped(ended[0])
    assert "check that rank 0 runs there" in unwrapped(ended[0])


@contextlib.contextmanager
def no_patience() -> Iterator[None]:
    from lowvram.parallel import rendezvous

    rendezvous.RENDEZVOUS_S = 1
    yield


def unwrapped(end: Ended) -> str:
    return " ".join(end.stderr.split())
