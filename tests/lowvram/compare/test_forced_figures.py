"""Figures of a teacher-forced candidate, as the page and the console show them."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
import torch
from rich.console import Console

from lowvram.compare.comparison import compare
from lowvram.compare.page import render
from lowvram.compare.tables import print_comparison
from lowvram.compare.teacher_forcing import Forced, StepScore
from lowvram.compare.token_errors import Sample, statistics
from tests.lowvram.compare.test_page import latents_alone


def forced_of(*factors):
    """Teacher-forced, of one step: what the candidate's velocities are to those of the baseline, block by block; None
    of a baseline of zeros."""
    wanted = torch.ones(4, 1, 4, 4)
    pairs = [(wanted, 0 * wanted) if factor is None else (factor * wanted, wanted) for factor in factors]
    samples = [Sample.of(*pair) for pair in pairs]
    scores = tuple(one.sums.score("") for one in samples)
    return Forced(
        total=len(samples),
        each=tuple(StepScore(block=i, step=0, velocity=score) for i, score in enumerate(scores)),
        velocity=statistics([[one] for one in samples]),
        by_step=(statistics([[one] for one in samples]),),
        by_block=scores,
        latents=scores[0],
    )


ERRORS = {
    "one block": ((1.1,), {"velocity": "1.000e-01", "median": "1.000e-01"}, False),
    "two blocks": ((1.1, 1.3), {"velocity": "2.236e-01", "median": "1.000e-01"}, True),
    "two alike": ((1.1, 1.1), {"velocity": "1.000e-01", "99.9 %": "1.000e-01"}, True),
    "a baseline of zeros": ((None,), {"velocity": "infinite", "median": "infinite", "99.9 %": "infinite"}, False),
    "of zeros in a block": ((None, 1.1, 1.1), {"median": "1.000e-01", "99.9 %": "infinite"}, True),
    "no error": ((1.0,), {"velocity": "0.000e+00", "median": "0.000e+00"}, False),
}


FIGURE = r"teacher-forced: ([^<,]*?)(?:, relative error| of the tokens)?</span><b>([^< ]+)"


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_single_steps_and_their_uncertainty(tmp_path, kind):
    factors, figures, uncertain = ERRORS[kind]
    result = dataclasses.replace(compare(*latents_alone(tmp_path)), forced=forced_of(*factors))
    text = render(result)
    shown = dict(re.findall(FIGURE, text))
    assert {name: shown[name] for name in figures} == figures
    console = Console(file=io.StringIO(), width=200)
    print_comparison(result, console)
    told = console.file.getvalue()
    assert (" ±: " in text, "±: " in told) == (uncertain, uncertain)
    assert any(line.strip(" │┃").startswith("±") for line in told.splitlines()) == uncertain
