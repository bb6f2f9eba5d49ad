"""A run's card is examined once for each driver, torch and triton; what is kept is read, or ignored aloud."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading

import pytest
import torch

from lowvram.selftest import cache
from lowvram.selftest.cache import Identity, Known, identity_of, kernels_digest
from lowvram.selftest.first_run import get_ready
from lowvram.selftest.results import Result, Subject
from lowvram_kernels import choices
from lowvram_kernels.errors import ConfigError

CARD = torch.device("cuda", 0)
IDENTITY = Identity(
    device="Card", capability="8.9", driver="580", torch="2.13", triton="3.7.1", lowvram="0", kernels="ab"
)
RESULTS = tuple(
    Result(
        subject=Subject(name=f"norm_rope: {backend}, 14B", operation="norm_rope", backend=backend, size="14B"), **facts
    )
    for backend, facts in {
        "triton": {"status": "failed", "message": "values hold NaN"},
        "torch": {"status": "passed", "error": 0.001, "bound": 0.01, "seconds": 0.002},
    }.items()
)


@dataclasses.dataclass
class Card:
    """One whose examination takes no time; ``seen`` is what was known each time."""

    file: object
    identity: Identity = IDENTITY
    complete: bool = True
    seen: list = dataclasses.field(default_factory=list)

    def examine(self, device, known):
        self.seen.append(known)
        return [*known, *(result for result in RESULTS if result not in known)], self.complete

    def ready(self):
        with choices.restored():
            verdict = get_ready(CARD, file=self.file, identify=lambda device: self.identity, examine_card=self.examine)
            return verdict, tuple(note for note in choices.noted() if note.device == str(CARD))


@pytest.fixture
def card(tmp_path) -> Card:
    return Card(tmp_path / "new" / "selftest.json")


def test_a_card_is_examined_once_and_read_the_next_time(card):
    first, second = card.ready(), card.ready()
    assert first == second
    assert len(card.seen) == 1
    assert [(note.operation, note.backend, note.verdict) for note in first[1]] == [("norm_rope", "triton", "off")]
    assert sorted(path.name for path in card.file.parent.iterdir()) == ["selftest.json", "selftest.lock"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_results_hold_for_one_card_driver_version_and_kernels_alone(card, field):
    card.ready()
    card.identity = dataclasses.replace(IDENTITY, **{field: "another"})
    card.ready()
    assert [len(known) for known in card.seen] == [0, 0]
    assert len(json.loads(card.file.read_text())) == 2


def test_an_examination_that_was_cut_short_is_gone_on_with(card):
    card.complete = False
    card.ready()
    card.complete = True
    card.ready()
    card.ready()
    assert [len(known) for known in card.seen] == [0, 2]


DAMAGED = ["{", "[1]", "null", '{"key": 3}', "\x00" * 9, '{"key": {"complete": 1, "results": []}}', "[" * 100_000]


@pytest.mark.parametrize("text", [*DAMAGED, "status", "extra", "number"], ids=lambda text: text[:12])
def test_a_damaged_file_is_ignored_in_one_line_and_replaced(card, caplog, text):
    card.ready()
    stored = json.loads(card.file.read_text())
    one = stored[IDENTITY.key]["results"][1]
    one |= {"status": {"status": "splendid"}, "extra": {"run": "rm"}, "number": {"seconds": "fast"}}.get(text, {})
    card.file.write_text(json.dumps(stored) if text not in DAMAGED else text)
    with caplog.at_level(logging.WARNING):
        card.ready()
    assert len(card.seen) == 2
    assert sum("cannot be used" in record.message for record in caplog.records) == 1
    assert cache.read(card.file)[IDENTITY.key] == Known(results=RESULTS, complete=True)


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert Card(tmp_path / "file" / "selftest.json").ready()[0].off
    assert "cannot be written" in caplog.text


def test_ranks_that_come_at_once_examine_a_card_once(card):
    begun, go = threading.Event(), threading.Event()

    def slow(device, known):
        begun.set()
        go.wait(10)
        return card.examine(device, known)

    def run(examine):
        get_ready(CARD, file=card.file, identify=lambda device: IDENTITY, examine_card=examine)

    ranks = [threading.Thread(target=run, args=(examine,)) for examine in (slow, card.examine)]
    ranks[0].start()
    assert begun.wait(10)
    ranks[1].start()
    ranks[1].join(0.2)
    assert ranks[1].is_alive()
    go.set()
    for rank in ranks:
        rank.join(10)
    assert len(card.seen) == 1


def test_a_processor_and_a_run_that_does_not_want_it_are_left_alone(card, monkeypatch):
    assert get_ready(torch.device("cpu"), file=card.file) is None
    monkeypatch.setenv("LOWVRAM_SELFTEST", "0")
    assert card.ready()[0] is None
    assert not card.file.exists()
    monkeypatch.setenv("LOWVRAM_SELFTEST", "no")
    with pytest.raises(ConfigError, match="expected 0"):
        card.ready()


def test_it_lies_beside_the_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_file() == tmp_path / "lowvram" / "selftest.json"


def test_a_processor_has_an_identity_too():
    identity = identity_of(torch.device("cpu"))
    assert identity.torch == torch.__version__
    assert identity.kernels == kernels_digest()
    assert len(identity.kernels) == 12


def test_results_without_triton_say_nothing_of_runs_with_it(monkeypatch):
    pytest.importorskip("triton")
    here = identity_of(torch.device("cpu"))
    monkeypatch.setenv("LOWVRAM_TRITON", "0")
    assert identity_of(torch.device("cpu")).key != here.key
