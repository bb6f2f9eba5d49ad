"""Ranks on invented GPUs: all of them come to the same layout from what all of them tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lowvram.offload.placement import MemoryOptions
from lowvram.parallel import layout_agreement as settling
from lowvram.parallel.heartbeat import Peer
from lowvram.parallel.layout_agreement import LayoutAgreement
from lowvram.parallel.options import RankOptions
from lowvram.planning import CARDS, Card
from lowvram.planning.library_memory import OutsideAllocator
from lowvram.planning.members import Machines
from lowvram.planning.rank_layout import ParallelLayout, chosen_layout
from lowvram.request import Request
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact

GIB = 1 << 30
REQUEST = Request(image=Path("a"), audio=Path("b"), prompt="")
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("phantom") / "14b"))


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

    monkeypatch.setattr(settling, "card_at_hand", card_at_hand)
    monkeypatch.setattr(settling, "contended_rates", lambda rates, *_: dataclasses.replace(rates, h2d=5e9))
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

    monkeypatch.setattr(settling, "choose_team", choose_team)
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
