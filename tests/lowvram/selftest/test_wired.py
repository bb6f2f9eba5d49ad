"""Where runs begin, their card is examined before anything loads, unless that is not wanted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.commands import infer
from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.layout_agreement import RankOptions
from lowvram.parallel.rank_env import RankEnv
from lowvram.selftest import first_run
from lowvram_kernels.errors import HardwareError


class Asked(list):
    """Stands for the examination: notes the device and ends the run there."""

    def __call__(self, device: torch.device) -> None:
        self.append(device)
        raise HardwareError("examined")


@pytest.fixture
def asked(monkeypatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(first_run, "get_ready", asked)
    monkeypatch.setattr(infer, "get_ready", asked)
    return asked


def run(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def files(tiny) -> list:
    return ["--image", tiny.portrait, "--audio", tiny.voice, "--prompt", "A", "--size", "128*128", "--device", "cpu"]


def test_infer_examines_before_it_loads(tiny, tmp_path, asked):
    done = run("infer", "--model", tiny.root / "none", "--out", tmp_path / "a.mp4", *files(tiny))
    assert done.exit_code == 2
    asked.clear()
    done = run("infer", "--model", tiny.artifact("int8"), "--out", tmp_path / "a.mp4", *files(tiny))
    assert (done.exit_code, asked) == (2, [torch.device("cpu")])
    assert "examined" in done.stderr


def test_compare_does_too(tiny, asked):
    artifact = tiny.artifact("int8")
    done = run("compare", "--model", artifact, "--baseline", artifact, *files(tiny))
    assert "examined" in done.stderr
    assert asked


def test_no_selftest_goes_without(tiny, tmp_path, asked):
    missing = ["--model", tiny.root / "none", "--out", tmp_path / "a.mp4"]
    done = run("infer", *missing, *files(tiny), "--no-selftest")
    assert done.exit_code == 2
    assert not asked


@pytest.mark.parametrize("examine", [True, False])
def test_a_rank_examines_its_own_card_before_the_others_wait_for_it(tiny, monkeypatch, asked, examine):
    monkeypatch.setattr(infer, "rank_device", lambda name, env: f"cuda:{env.local_rank}")

    def joined(*given: object) -> None:
        raise HardwareError("joined")

    monkeypatch.setattr(infer, "joined", joined)
    options = RankOptions(num_gpus_dit=2, ulysses_size=1)
    rank = infer.RankRun(
        model=tiny.artifact("int8"), request=tiny.request(), outputs=None, memory=MemoryOptions(), options=options,
        device="auto", dtype="auto", verify=False, quiet=True, examine=examine,
    )  # fmt: skip
    env = RankEnv(rank=3, world_size=4, local_rank=1, address="127.0.0.1", port=1)
    layout = options.layout(dataclasses.replace(env, rank=1, world_size=2), infer.Artifact.open(rank.model), 2)
    with pytest.raises(HardwareError, match="examined" if examine else "joined"):
        rank.take_part(env, layout)
    assert asked == ([torch.device("cuda", 1)] if examine else [])
