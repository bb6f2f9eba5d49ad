from __future__ import annotations

import pytest

from lowvram.doctor.wants import wants_of
from lowvram.planning.facts import facts_of
from lowvram.planning.layout import HOST_BASE_BYTES
from lowvram_quantize.format import Artifact
from lowvram_quantize.phantom import write_phantom
from tests.lowvram.doctor.invented import GIB

CARD = int(22.15 * GIB)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return facts_of(Artifact.open(write_phantom(tmp_path_factory.mktemp("wants") / "14b")))


def test_a_card_that_fits(facts):
    wants = wants_of(facts, vram_bytes=CARD, ram_bytes=64 * GIB, ranks=1)
    assert wants.vram_bytes <= CARD
    assert 15 * GIB < wants.pinned_bytes < wants.host_bytes < 25 * GIB
    assert wants.bytes_in > wants.bytes_out > 0
    assert "704*384" in wants.what


def test_several_ranks_add_their_processes_and_no_weights(facts):
    one, four = (wants_of(facts, vram_bytes=CARD, ram_bytes=64 * GIB, ranks=ranks) for ranks in (1, 4))
    assert four.host_bytes - one.host_bytes == 3 * HOST_BASE_BYTES
    assert four.pinned_bytes == one.pinned_bytes


def test_what_does_not_fit_says_what_is_missing(facts):
    assert wants_of(facts, vram_bytes=4 * GIB, ram_bytes=64 * GIB, ranks=1).vram_bytes > 4 * GIB
    assert wants_of(facts, vram_bytes=CARD, ram_bytes=8 * GIB, ranks=1).host_bytes > 8 * GIB


def test_a_processor_keeps_all_of_it_in_host_memory(facts):
    wants = wants_of(facts, vram_bytes=None, ram_bytes=GIB, ranks=1)
    assert wants.vram_bytes == wants.pinned_bytes == wants.shared_bytes == 0
    assert wants.host_bytes > facts.weight_bytes + 20 * 10**9  # and the rings


def test_the_card_decides_how_long_computing_takes(facts):
    def seconds(gpu):
        return wants_of(facts, vram_bytes=CARD, ram_bytes=64 * GIB, ranks=1, gpu=gpu).arithmetic_s

    assert seconds("NVIDIA GeForce RTX 3090 Ti") > seconds("NVIDIA GeForce RTX 4090")
    assert seconds("NVIDIA Something") == seconds("NVIDIA GeForce RTX 4090")


def test_the_artifact_is_as_large_as_it_will_be(facts, tmp_path):
    path = write_phantom(tmp_path / "tiny", preset="tiny")
    tiny = facts_of(Artifact.open(path))
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    wants = wants_of(tiny, vram_bytes=None, ram_bytes=GIB, ranks=1)
    assert 0.8 * on_disk < wants.artifact_bytes <= 1.2 * on_disk
