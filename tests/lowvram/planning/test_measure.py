"""Measuring against a card that takes as long as it is told to."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

from lowvram.planning import CARDS, measure
from lowvram.planning.measure import COPY_BYTES, PRODUCT_SIZE, cache_file, card_at_hand, contended_rates, rates_of

DEVICE = torch.device("cuda")


@dataclasses.dataclass
class FakeRunner:
    key: str = "Card | driver 1 | torch 2"
    name: str = "Card"
    memory: tuple[int, int] = (20, 24)
    generation: int = 89
    calls: list[str] = dataclasses.field(default_factory=list)

    def seconds(self, what: str) -> float:
        self.calls.append(what)
        first = self.calls.count(what) == 1
        # The first run is slow, as a cold one is; the others differ a little.
        slower = 50 if first else 1 + 0.1 * (self.calls.count(what) % 3)
        seconds = {"h2d": 0.01, "d2h": 0.02, "memory": 0.001, "bf16": 0.5, "int8": 0.25, "fp8": 0.125, "fp32": 2.0}
        return seconds[what] * slower


def test_rates_are_the_best_of_the_warm_runs(tmp_path):
    rates = rates_of(DEVICE, runner=FakeRunner(), file=tmp_path / "cards.json")
    operations = 2 * PRODUCT_SIZE**3
    assert rates.h2d == pytest.approx(COPY_BYTES / 0.01)
    assert rates.d2h == pytest.approx(COPY_BYTES / 0.02)
    assert rates.bf16 == pytest.approx(operations / 0.5)
    assert rates.int8 == pytest.approx(operations / 0.25)
    assert rates.fp8 == pytest.approx(operations / 0.125)
    assert rates.fp32 == pytest.approx(operations / 2.0)
    assert rates.memory == pytest.approx(2 * COPY_BYTES / 0.001)
    assert rates.generation == 89
    assert rates.measured


def test_what_was_measured_is_read_the_next_time(tmp_path):
    file = tmp_path / "new" / "cards.json"
    first, second = FakeRunner(), FakeRunner()
    measured = rates_of(DEVICE, runner=first, file=file)
    assert rates_of(DEVICE, runner=second, file=file) == measured
    assert first.calls
    assert not second.calls


def test_another_driver_is_measured_anew_and_both_are_kept(tmp_path):
    file = tmp_path / "cards.json"
    rates_of(DEVICE, runner=FakeRunner(), file=file)
    newer = FakeRunner(key="Card | driver 2 | torch 2", generation=86)
    assert rates_of(DEVICE, runner=newer, file=file).fp8 is None
    assert "fp8" not in newer.calls
    assert set(json.loads(file.read_text())) == {FakeRunner().key, newer.key}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1]", '{"a": {"int8": 1}}', '{"a": {"int8": 1, "fp8": null, "bf16": 1, "h2d": 1, "d2h": 1}}',
        '{"a": {"int8": 0, "fp8": null, "bf16": 1, "fp32": 1, "h2d": 1, "d2h": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_and_replaced(tmp_path, caplog, text):
    file = tmp_path / "cards.json"
    file.write_text(text)
    runner = FakeRunner()
    with caplog.at_level(logging.WARNING):
        rates_of(DEVICE, runner=runner, file=file)
    assert runner.calls
    assert "cannot be used" in caplog.text
    assert list(json.loads(file.read_text())) == [runner.key]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        rates = rates_of(DEVICE, runner=FakeRunner(), file=tmp_path / "file" / "cards.json")
    assert rates.measured
    assert "cannot be" in caplog.text


def test_a_card_at_hand_has_what_is_free_on_it(tmp_path):
    card = card_at_hand(DEVICE, runner=FakeRunner(), file=tmp_path / "cards.json")
    assert (card.name, card.usable_bytes, card.vram_bytes) == ("Card", 20, 24)
    assert card.rates.measured


def test_rates_lie_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure.cache_file() == tmp_path / "lowvram" / "cards.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(measure.cache_file()) == "/home/someone/.cache/lowvram/cards.json"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_card_has_plausible_rates(tmp_path):
    rates = rates_of(DEVICE, file=tmp_path / "cards.json")
    assert 1e9 < rates.h2d < 1e12
    assert 1e9 < rates.d2h < 1e12
    assert 1e12 < rates.bf16 < 1e16
    assert 1e12 < rates.int8 < 1e16


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
