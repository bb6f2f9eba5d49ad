"""What a teacher-forced candidate did, as rows of text: for a console and for a page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.compare.teacher_forcing import Forced
    from lowvram.compare.token_errors import Statistics

COLUMNS = ("", "together", "mean", "median", "99 %", "99.9 %", "maximum", "cosine")
"""Of all velocities as one tensor, and of the tokens' own errors from the mean on."""


def rows(forced: Forced) -> list[tuple[str, ...]]:
    """Of all steps, then of each, the ``COLUMNS``: relative errors of velocities in percent, with their uncertainty."""
    return [(name, *(_with_uncertainty(*pair) for pair in _texts(of))) for name, of in _named(forced)]


def narrow_rows(forced: Forced) -> list[tuple[str, ...]]:
    """The same without percent signs, and with the uncertainty of all steps alone: in a row of its own, where one is
    known."""
    found = [(name, *(value for value, _ in _texts(of))) for name, of in _named(forced)]
    if is_uncertain(forced):
        found.insert(1, ("±", *(uncertainty for _, uncertainty in _texts(forced.velocity))))
    return [tuple(cell.removesuffix(" %") for cell in row) for row in found]


def layer_rows(forced: Forced) -> list[tuple[str, ...]]:
    """Behind each layer: the relative error of all steps, what the layer adds to it, and the error of each step."""
    layers = forced.layers
    if layers is None:
        return []
    columns = [layers.relative_errors, layers.increments, *(each.relative_errors for each in forced.layers_by_step)]
    return [(name, *(percent(value) for value in of)) for name, *of in zip(layers.names, *columns, strict=True)]


def summary(forced: Forced) -> str:
    """How far it was teacher-forced, in a line."""
    of = "all" if len(forced.by_block) == forced.total else f"the first {len(forced.by_block)} of"
    return (
        f"{of} {forced.total} blocks, {len(forced.by_step)} steps each, {forced.velocity.tokens} tokens, "
        f"{forced.seconds:.1f} s; first block {percent(forced.by_block[0].relative_error)}"
    )


def is_uncertain(forced: Forced) -> bool:
    """Whether an uncertainty of anything is known, which of one block it is not."""
    return any(uncertainty for _, of in _named(forced) for _, uncertainty in _texts(of))


def percent(value: float) -> str:
    if not math.isfinite(value):
        return "infinite"
    return "0" if value == 0 else f"{value * 100:.3g} %"


def _named(forced: Forced) -> list[tuple[str, Statistics]]:
    return [("all steps", forced.velocity), *((f"step {step}", each) for step, each in enumerate(forced.by_step))]


def _texts(of: Statistics) -> list[tuple[str, str]]:
    """Each of the ``COLUMNS`` and its uncertainty, which is empty where it is not known."""
    errors = [
        (percent(figure.value), "" if figure.uncertainty is None else f"{figure.uncertainty * 100:.2g} %")
        for figure in (of.relative_error, of.mean, of.median, of.p99, of.p999, of.maximum)
    ]
    cosine = of.cosine
    return [*errors, (f"{cosine.value:.6f}", "" if cosine.uncertainty is None else f"{cosine.uncertainty:.1g}")]


def _with_uncertainty(value: str, uncertainty: str) -> str:
    if not uncertainty or value == "0":
        return value
    return f"{value.removesuffix(' %')} ± {uncertainty}"
