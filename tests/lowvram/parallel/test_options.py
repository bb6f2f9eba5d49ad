from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from lowvram.offload.placement import MemoryOptions
from lowvram.parallel.options import RankOptions, check_for_ranks, check_gpus
from lowvram.parallel.rank_env import RankEnv, rank_device
from lowvram.planning.rank_layout import ParallelLayout
from lowvram_kernels.errors import ConfigError, HardwareError

ARTIFACT: Any = types.SimpleNamespace(component=lambda name: types.SimpleNamespace(config={"num_heads": 40}))


def env(world: int, rank: int = 0) -> RankEnv:
    return RankEnv(rank=rank, world_size=world, local_rank=rank, address="127.0.0.1", port=29500)


def test_layout_of_ranks_that_were_started_or_are_to_be():
    three_and_vae = ParallelLayout(num_gpus_dit=3, ulysses_size=3, vae_rank=True)
    given = {"num_gpus_dit": 3, "ulysses_size": 3, "enable_vae_parallel": True}
    assert RankOptions(**given).layout(env(4), ARTIFACT, 4) == three_and_vae
    assert RankOptions(**given, gpus=4).layout(None, ARTIFACT, 4) == three_and_vae
    assert RankOptions(**given, gpus=4).layout(env(4), ARTIFACT, 4) == three_and_vae
    assert RankOptions().layout(None, ARTIFACT, 4) == ParallelLayout()
    assert RankOptions(num_gpus_dit=1, enable_vae_parallel=False).layout(None, ARTIFACT, 4) == ParallelLayout()


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"gpus": 3}, env(4), "--gpus is 3, but 4 ranks were started; leave --gpus out"),
        ({"gpus": 4, "port": 1}, env(4), "--port is 1, but the ranks were told [0-9]+; leave --port out"),
        ({"num_gpus_dit": 3}, None, "needs 3 ranks, and one was started; add --gpus 3, or .*nproc_per_node=3"),
        ({"num_gpus_dit": 3, "enable_vae_parallel": True}, None, "3 and one for the VAE needs 4 ranks"),
        ({"enable_vae_parallel": True}, None, "--num_gpus_dit 1 and one for the VAE needs 2 ranks"),
        ({"num_gpus_dit": 5, "ulysses_size": 5}, env(4), "4 ranks were started, but --num_gpus_dit 5"),
        ({"gpus": 2, "num_gpus_dit": 3}, None, "2 ranks were started, but --num_gpus_dit 3"),
        ({"enable_vae_parallel": True}, env(1), "0 GPUs for the DiT make no layout"),
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
    assert [rank_device("auto", env(4, rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert chosen == [0, 1]
    assert rank_device("cpu", env(4, 3)) == "cpu"
    with pytest.raises(HardwareError, match="rank 2 is number 2 of this machine, but 2 GPUs are here; start fewer"):
        rank_device("cuda", env(4, 2))
    with pytest.raises(ConfigError, match="'cuda:1'; expected auto, cuda or cpu where 4 ranks run"):
        rank_device("cuda:1", env(4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device("auto", env(4, 3)) == "cpu"


TOLD = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


def test_seat_from_what_the_starter_says():
    found = RankEnv.from_environ(TOLD)
    assert found == RankEnv(rank=2, world_size=4, local_rank=0, address="node", port=29500, by_hand=True)
    assert found.hint.endswith(
        "RANK=2 and WORLD_SIZE=4 in the environment say so: where nobody started ranks, unset RANK WORLD_SIZE"
    )
    for starter in ({"TORCHELASTIC_RUN_ID": "none"}, {"LOWVRAM_STARTED": "1"}):
        started = RankEnv.from_environ(TOLD | starter)
        assert started is not None
        assert not started.by_hand
        assert not started.hint


@pytest.mark.parametrize(
    "environ",
    [{}, {"MASTER_ADDR": "node"}, {"LOCAL_RANK": "0"}, {"RANK": "", "WORLD_SIZE": " "}, {"SLURM_PROCID": "1"}],
)
def test_nobody_started_ranks(environ):
    assert RankEnv.from_environ(environ) is None


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, r"RANK=0 is set in the environment.* WORLD_SIZE, LOCAL_RANK, .* unset RANK$"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 is set.* and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, r"RANK=0, WORLD_SIZE=1 are set.* unset RANK WORLD_SIZE$"),
        (
            TOLD | {"LOCAL_RANK": "", "MASTER_PORT": ""},
            r"LOCAL_RANK, MASTER_PORT is not set; expected torchrun or --gpus",
        ),
        (TOLD | {"RANK": "two"}, r"RANK=two, .*whole numbers.*'two'.*unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR"),
        (TOLD | {"WORLD_SIZE": "4.0"}, r"WORLD_SIZE=4.0.*whole numbers"),
        (TOLD | {"RANK": "4"}, r"RANK=4, WORLD_SIZE=4.* cannot be; expected RANK below WORLD_SIZE"),
        (TOLD | {"RANK": "-1"}, r"RANK=-1.* cannot be"),
        (TOLD | {"WORLD_SIZE": "0", "RANK": "0"}, r"WORLD_SIZE=0.* cannot be"),
        (TOLD | {"LOCAL_RANK": "-1"}, r"LOCAL_RANK=-1.* cannot be"),
        (TOLD | {"MASTER_PORT": "70000"}, r"MASTER_PORT=70000.* cannot be.* from 1 to 65535"),
    ],
)
def test_variables_that_were_left_over_are_named(environ, words):
    with pytest.raises(ConfigError, match=words):
        RankEnv.from_environ(environ)


@pytest.mark.parametrize(
    "options", [{"gpus": 3}, {"port": 1, "gpus": 4}, {"num_gpus_dit": 5}, {"num_gpus_dit": 1}, {"ulysses_size": 2}]
)
def test_options_that_contradict_left_over_variables_name_them(options):
    left_over = RankEnv.from_environ(TOLD | {"RANK": "0"})
    with pytest.raises(ConfigError, match=r"RANK=0 and WORLD_SIZE=4 in the environment.*unset RANK WORLD_SIZE"):
        RankOptions(**options).layout(left_over, ARTIFACT, 4)
