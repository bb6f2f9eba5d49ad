from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

from lowvram.parallel.layout import ParallelLayout
from lowvram.parallel.options import RankOptions, check_for_ranks, check_gpus
from lowvram.parallel.seat import Seat, rank_device
from lowvram.placement import MemoryOptions
from lowvram_kernels.errors import ConfigError, HardwareError

ARTIFACT: Any = types.SimpleNamespace(component=lambda name: types.SimpleNamespace(config={"num_heads": 40}))


def seat(world: int, rank: int = 0) -> Seat:
    return Seat(rank=rank, world_size=world, local_rank=rank, address="127.0.0.1", port=29500)


def test_layout_of_ranks_that_were_started_or_are_to_be():
    three_and_vae = ParallelLayout(num_gpus_dit=3, ulysses_size=3, vae_rank=True)
    given = {"num_gpus_dit": 3, "ulysses_size": 3, "enable_vae_parallel": True}
    assert RankOptions(**given).layout(seat(4), ARTIFACT, 4) == three_and_vae
    assert RankOptions(**given, gpus=4).layout(None, ARTIFACT, 4) == three_and_vae
    assert RankOptions(**given, gpus=4).layout(seat(4), ARTIFACT, 4) == three_and_vae
    assert RankOptions().layout(None, ARTIFACT, 4) == ParallelLayout()
    assert RankOptions(num_gpus_dit=1, enable_vae_parallel=False).layout(None, ARTIFACT, 4) == ParallelLayout()


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"gpus": 3}, seat(4), "--gpus is 3, but 4 ranks were started; leave --gpus out"),
        ({"gpus": 4, "port": 1}, seat(4), "--port is 1, but the ranks were told [0-9]+; leave --port out"),
        ({"num_gpus_dit": 3}, None, "needs 3 ranks, and one was started; add --gpus 3, or .*nproc_per_node=3"),
        ({"num_gpus_dit": 3, "enable_vae_parallel": True}, None, "3 and one for the VAE needs 4 ranks"),
        ({"enable_vae_parallel": True}, None, "--num_gpus_dit 1 and one for the VAE needs 2 ranks"),
        ({"num_gpus_dit": 5, "ulysses_size": 5}, seat(4), "4 ranks were started, but --num_gpus_dit 5"),
        ({"gpus": 2, "num_gpus_dit": 3}, None, "2 ranks were started, but --num_gpus_dit 3"),
        ({"enable_vae_parallel": True}, seat(1), "0 GPUs for the DiT make no layout"),
    ],
)
def test_options_that_do_not_fit_the_ranks(options, where, words):
    with pytest.raises(ConfigError, match=words):
        RankOptions(**options).layout(where, ARTIFACT, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, "--gpus is 0; expected 1 or more"),
        ({"num_gpus_dit": -1}, "--num_gpus_dit is -1"),
        ({"ulysses_size": 0}, "--ulysses_size is 0"),
        ({"port": 29500}, "--port has an effect with --gpus 2 or more only"),
        ({"port": 29500, "gpus": 1}, "--port has an effect"),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(ConfigError, match=words):
        RankOptions(**options)


def test_several_ranks_lose_no_quality():
    lossy = MemoryOptions(allow_quality_loss=True)
    check_for_ranks(ParallelLayout(), lossy)
    check_for_ranks(ParallelLayout(num_gpus_dit=2), MemoryOptions())
    with pytest.raises(ConfigError, match=r"--allow-quality-loss .* leave it out"):
        check_for_ranks(ParallelLayout(num_gpus_dit=2), lossy)


def test_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda"):
        check_gpus(device, 2)
        with pytest.raises(ConfigError, match="--gpus is 3, but 2 GPUs are here; give --gpus 2 or --device cpu"):
            check_gpus(device, 3)
    check_gpus("cpu", 9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_gpus("auto", 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="0 GPUs are here; give --gpus 1 or"):
        check_gpus("cuda", 2)


def test_device_of_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [rank_device("auto", seat(4, rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert chosen == [0, 1]
    assert rank_device("cpu", seat(4, 3)) == "cpu"
    with pytest.raises(HardwareError, match="rank 2 is number 2 of this machine, but 2 GPUs are here; start fewer"):
        rank_device("cuda", seat(4, 2))
    with pytest.raises(ConfigError, match="'cuda:1'; expected auto, cuda or cpu where 4 ranks run"):
        rank_device("cuda:1", seat(4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device("auto", seat(4, 3)) == "cpu"


def test_seat_from_what_the_starter_says():
    told = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    found = Seat.from_environ(told)
    assert found is not None
    assert dataclasses.asdict(found) == {"rank": 2, "world_size": 4, "local_rank": 0, "address": "node", "port": 29500}
    assert Seat.from_environ({"MASTER_ADDR": "node"}) is None
    with pytest.raises(ConfigError, match=r"LOCAL_RANK, MASTER_PORT is not; expected torchrun or --gpus.*unset RANK"):
        Seat.from_environ({name: told[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")})
    with pytest.raises(ConfigError, match=r"whole numbers.*'two'"):
        Seat.from_environ(told | {"RANK": "two"})
