"""README's tour names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = (ROOT / "README.md").read_text().split("## Tour of the files\n", 1)[1].split("\n\n", 1)[0]
STOPS = re.split(r"\n- ", TOUR.removeprefix("- "))


def places(stop: str) -> list[str]:
    """What is named; a bare name lies in the folder that was named last."""
    folder, found = "", []
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", stop):
        whole = (
            name if name.split("/")[0] in ("lowvram", "kernels", "models", "quantize", "benchmarks") else folder + name
        )
        found.append(whole)
        if whole == name:
            folder = name if name.endswith("/") else name.rpartition("/")[0] + "/"
    return found


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop[:30])
def test_what_is_named_is_there(stop):
    named = places(stop)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
