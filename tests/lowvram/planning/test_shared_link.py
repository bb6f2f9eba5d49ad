"""Copies of several cards at once, beside the rates of one."""

from __future__ import annotations

import json

import pytest

from lowvram.planning import CARDS
from lowvram.planning.measure import COPY_BYTES, cache_file, rates_of
from lowvram.planning.shared_link import contended_rates
from tests.lowvram.planning.test_measure import FakeRunner

RATES = CARDS["rtx4090"].rates


class Contended(FakeRunner):
    """A few copies begin before the others' do, and are fast."""

    def seconds(self, what: str) -> float:
        self.calls.append(what)
        return {"h2d": 0.03, "d2h": 0.06}[what] / (3 if self.calls.count(what) < 6 else 1)


def test_the_usual_copy_counts_and_not_the_best(tmp_path):
    runner, met = Contended(), []
    rates = contended_rates(RATES, 4, runner, lambda known: met.append(known) or False, file=tmp_path / "c.json")
    assert met == [False]
    assert rates.h2d == pytest.approx(COPY_BYTES / 0.03)
    assert rates.d2h == pytest.approx(COPY_BYTES / 0.06)
    assert (rates.int8, rates.bf16) == (RATES.int8, RATES.bf16)


def test_it_is_known_the_next_time_for_as_many_cards(tmp_path):
    file, runner = tmp_path / "c.json", Contended()
    first = contended_rates(RATES, 4, runner, lambda known: known, file=file)
    again = Contended()
    assert contended_rates(RATES, 4, again, lambda known: known, file=file) == first
    assert not again.calls
    contended_rates(RATES, 2, again, lambda known: known, file=file)
    assert again.calls
    assert list(json.loads(file.read_text())) == [f"{runner.key} | {n} cards at once" for n in (4, 2)]


def test_who_knows_it_measures_all_the_same_where_another_rank_does_not(tmp_path):
    file = tmp_path / "c.json"
    contended_rates(RATES, 4, Contended(), lambda known: False, file=file)
    runner = Contended()
    contended_rates(RATES, 4, runner, lambda known: False, file=file)
    assert runner.calls


def test_a_single_runs_rates_stay_apart(tmp_path, monkeypatch):
    """Where nobody says where they are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    alone = rates_of(None, runner=FakeRunner())
    before = cache_file().read_text()
    contended_rates(alone, 4, Contended(), lambda known: False)
    assert cache_file().read_text() == before
    assert rates_of(None, runner=Contended()) == alone
