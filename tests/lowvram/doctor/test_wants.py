from __future__ import annotations

import pytest

from lowvram.doctor.wants import Room, wants_of
from lowvram.planning.memory import HOST_BASE_BYTES
from lowvram.planning.model_sizes import model_sizes
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.lowvram.doctor.invented import GIB

CARD = int(22.15 * GIB)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return model_sizes(Artifact.open(write_shape_artifact(tmp_path_factory.mktemp("wants") / "14b")))


def rooms(gib: float, ranks: int = 1, gpu: str = "NVIDIA GeForce RTX 4090") -> list[Room]:
    return [Room(gpu=gpu, vram_bytes=int(gib * GIB))] * ranks


def test_a_card_that_fits(sizes):
    wants = wants_of(sizes, rooms(22.15), ram_bytes=64 * GIB)
    (rank,) = wants.ranks
    assert rank.vram_bytes <= CARD
    assert 15 * GIB < wants.pinned_bytes < wants.host_bytes < 25 * GIB
    assert rank.bytes_in > rank.bytes_out > 0
    assert rank.name == ""
    assert "704*384" in wants.what


def test_several_ranks_are_planned_together(sizes):
    one, four = (wants_of(sizes, rooms(22.15, ranks), ram_bytes=64 * GIB) for ranks in (1, 4))
    assert [rank.name for rank in four.ranks][-1] == "rank 3 (VAE)"
    assert all(rank.vram_bytes <= CARD for rank in four.ranks)
    assert four.pinned_bytes < one.pinned_bytes  # each has its own part of the rings
    assert 4 * HOST_BASE_BYTES < four.host_bytes < one.host_bytes + 3 * HOST_BASE_BYTES


def test_what_does_not_fit_says_what_is_missing(sizes):
    assert wants_of(sizes, rooms(4), ram_bytes=64 * GIB).ranks[0].vram_bytes > 4 * GIB
    assert wants_of(sizes, rooms(22.15), ram_bytes=8 * GIB).host_bytes > 8 * GIB
    assert wants_of(sizes, rooms(22.15, 2), ram_bytes=8 * GIB).host_bytes > 8 * GIB


def test_one_card_of_several_that_is_too_small_is_the_one_that_is_named(sizes):
    wants = wants_of(sizes, [*rooms(22.15), *rooms(1)], ram_bytes=64 * GIB)
    assert [rank.vram_bytes > there * GIB for rank, there in zip(wants.ranks, (22.15, 1), strict=True)] == [False, True]


def test_a_processor_keeps_all_of_it_in_host_memory(sizes):
    wants = wants_of(sizes, [None], ram_bytes=GIB)
    assert wants.ranks[0].vram_bytes == wants.pinned_bytes == 0
    assert wants.host_bytes > sizes.weight_bytes + 20 * 10**9  # and the rings
    assert wants_of(sizes, [None, None], ram_bytes=GIB).host_bytes > wants.host_bytes + sizes.weight_bytes


def test_the_card_decides_how_long_computing_takes(sizes):
    def seconds(gpu):
        return wants_of(sizes, rooms(22.15, gpu=gpu), ram_bytes=64 * GIB).ranks[0].busy_s

    assert seconds("NVIDIA GeForce RTX 3090 Ti") > seconds("NVIDIA GeForce RTX 4090")
    assert seconds("NVIDIA Something") == seconds("NVIDIA GeForce RTX 4090")


def test_the_artifact_is_as_large_as_it_will_be(sizes, tmp_path):
    path = write_shape_artifact(tmp_path / "tiny", preset="tiny")
    tiny = model_sizes(Artifact.open(path))
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    wants = wants_of(tiny, [None], ram_bytes=GIB)
    assert 0.8 * on_disk < wants.artifact_bytes <= 1.2 * on_disk
