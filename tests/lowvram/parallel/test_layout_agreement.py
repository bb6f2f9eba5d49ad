"""Ranks on invented GPUs: all of them come to the same layout from what all of them tell; and what a
rank knows of itself, from options and the environment."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.offload.placement import MemoryOptions
from lowvram.parallel import layout_agreement
from lowvram.parallel.heartbeat import Peer
from lowvram.parallel.layout_agreement import LayoutAgreement, RankOptions, check_for_ranks, check_gpus
from lowvram.parallel.rank_env import RankEnv, rank_device
from lowvram.planning import CARDS, Card
from lowvram.planning.library_memory import OutsideAllocator
from lowvram.planning.members import Machines
from lowvram.planning.rank_layout import ParallelLayout, chosen_layout
from lowvram.request import Request
from lowvram_kernels.errors import ConfigError, HardwareError
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

GIB = 1 << 30
REQUEST = Request(image=Path("a"), audio=Path("b"), prompt="")
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("shapes") / "14b"))


class Ranks:
    """Rank 0 of several, the others of which have the cards given; ``said`` is all that it told them."""

    def __init__(self, others: list[dict], machines: list[str]):
        world = len(machines)
        self.said: list[tuple[str, object]] = []
        self.found: Machines | None = None
        self.layout = chosen_layout(world, sample_steps=4, heads=40)
        self.role = self.layout.role(0)
        self.others = others
        self.peers = [Peer(name=f"rank {i}", host="h", machine=name, pid=1) for i, name in enumerate(machines)]

    def share(self, what: str, value: object) -> list:
        self.said.append((what, value))
        told = self.others if what == "cards" else [value] * len(self.others)
        return json.loads(json.dumps([value, *told]))

    def settle(self, layout: ParallelLayout) -> None:
        self.layout = layout


def facts(card: str, vram_gib: float, ram_gib: float) -> dict:
    return {"card": dataclasses.asdict(CARDS[card]), "vram": int(vram_gib * GIB), "ram": int(ram_gib * GIB)}


def settled(artifact: Artifact, ranks: Ranks, monkeypatch, *, memory=None, dtype="auto", **options: int) -> Ranks:
    def card_at_hand(device: torch.device) -> Card:
        ranks.said.append(("measures", None))
        return CARDS["rtx4090"]

    monkeypatch.setattr(layout_agreement, "card_at_hand", card_at_hand)
    monkeypatch.setattr(layout_agreement, "contended_rates", lambda rates, *_: dataclasses.replace(rates, h2d=5e9))
    agreement = LayoutAgreement(
        options=RankOptions(**options),
        artifact=artifact,
        request=REQUEST,
        memory=memory or MemoryOptions(ram_budget=60 * GIB),
        dtype=dtype,
    )
    ranks.found = agreement.settle(ranks, GPU)
    return ranks


def test_every_rank_is_told_all_cards_and_machines(artifact, monkeypatch):
    ranks = Ranks([facts("rtx3090", 20, 50), facts("rtx4090", 22, 96)], ["here", "here", "there"])
    memory = MemoryOptions(vram_budget=21 * GIB, ram_budget=60 * GIB)
    there = settled(artifact, ranks, monkeypatch, memory=memory).found
    assert [card.name for card in there.cards] == ["rtx4090", "rtx3090", "rtx4090"]
    assert there.cards[1].rates == CARDS["rtx3090"].rates
    assert there.cards[0].rates == dataclasses.replace(CARDS["rtx4090"].rates, h2d=5e9)
    assert list(there.vram_bytes) == [21 * GIB, 20 * GIB, 22 * GIB]
    assert list(there.machines) == [0, 0, 1]
    assert list(there.ram_bytes) == [50 * GIB, 96 * GIB]  # the least that a rank of the machine may take


def test_the_layout_is_the_one_that_the_plan_takes(artifact, monkeypatch):
    ranks = Ranks([facts("rtx4090", 22.15, 60)] * 3, ["here"] * 4)
    layout = settled(artifact, ranks, monkeypatch).layout
    assert (layout.num_gpus_dit, layout.vae_rank) == (3, True)
    assert layout.ulysses_size in (1, 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_of_a_machine_measure_their_cards_one_after_the_other(artifact, monkeypatch, rank):
    ranks = Ranks([facts("rtx4090", 22.15, 60)] * 2, ["here", "there", "here"])
    ranks.role = ranks.layout.role(rank)
    settled(artifact, ranks, monkeypatch)
    turn = [0, 0, 1][rank]
    before = ranks.said.index(("measures", None))
    assert [value for what, value in ranks.said[:before] if what == "turn"] == list(range(turn))
    assert [value for what, value in ranks.said if what == "turn"] == [0, 1]


def test_a_card_alone_on_its_machine_copies_at_its_own_rate(artifact, monkeypatch):
    ranks = Ranks([facts("rtx4090", 22.15, 60)], ["here", "there"])
    assert settled(artifact, ranks, monkeypatch).found.cards[0].rates == CARDS["rtx4090"].rates


def test_what_was_measured_beside_tensors_is_told_too(artifact, monkeypatch):
    outside = OutsideAllocator(context=1, cublas=2, modules=3, vae=((4, 5),))
    told = facts("rtx4090", 22.15, 60)
    # As JSON leaves pairs.
    told["card"] |= {"outside": dataclasses.asdict(outside), "nccl": [[2, 300], [4, 700]]}
    there = settled(artifact, Ranks([told], ["here", "there"]), monkeypatch).found
    assert (there.cards[0].outside, there.cards[1].outside) == (None, outside)
    assert (there.cards[0].nccl, there.cards[1].nccl) == ((), ((2, 300), (4, 700)))


def test_what_was_asked_for_stays(artifact, monkeypatch):
    ranks = Ranks([facts("rtx4090", 22.15, 60)] * 3, ["here"] * 4)
    before = ranks.layout = ParallelLayout(num_gpus_dit=3, ulysses_size=1, vae_rank=True)
    assert settled(artifact, ranks, monkeypatch, num_gpus_dit=3, ulysses_size=1).layout == before


@pytest.mark.parametrize(
    ("given", "dtype"), [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_the_layout_is_planned_for_what_ranks_compute_in(artifact, monkeypatch, given, dtype):
    asked: list[torch.dtype] = []

    def choose_team(artifact, work, *_):
        asked.append(work.dtype)
        raise ConfigError("that is enough")

    monkeypatch.setattr(layout_agreement, "choose_team", choose_team)
    with pytest.raises(ConfigError, match="enough"):
        settled(artifact, Ranks([facts("rtx4090", 22.15, 60)], ["here"] * 2), monkeypatch, dtype=given)
    assert asked == [dtype]


def test_on_the_cpu_nothing_is_told(artifact):
    ranks = Ranks([], ["here"])
    agreement = LayoutAgreement(
        options=RankOptions(), artifact=artifact, request=REQUEST, memory=MemoryOptions(), dtype="auto"
    )
    assert agreement.settle(ranks, torch.device("cpu")) is None
    assert not ranks.said


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


def test_rank_env_from_what_the_starter_says():
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
