"""The pictures of docs/architecture.md are those of the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_directions import ROOMS, ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
PICTURES = re.findall(r"```mermaid\n(.*?)```", TEXT, re.DOTALL)
# Those that are entered by their folder's name, not by a room's.
ENTRANCES = {"__init__", "__main__"}


def below(room: str) -> set[str]:
    asked = ROOMS.get(room, set())
    return asked.union(*(below(each) for each in asked))


def least(room: str) -> set[str]:
    """What a room imports and could not reach by way of others that it imports."""
    return {each for each in ROOMS[room] if not any(each in below(other) for other in ROOMS[room])}


def drawn(picture: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for room, others in re.findall(r"^ +(\w+) --> ([\w &]+)$", picture, re.MULTILINE):
        found.setdefault(room, set()).update(others.split(" & "))
    return found


def rooms_of_the_tree() -> set[str]:
    return {
        path.stem
        for path in (ROOT / "lowvram").iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    } - ENTRANCES


def test_arrows_are_those_of_the_code():
    arrows = drawn(PICTURES[0])
    assert arrows == {room: least(room) for room in ROOMS if room not in ENTRANCES}
    assert set(arrows).union(*arrows.values()) == rooms_of_the_tree()


def test_every_room_is_described_and_no_other():
    described = TEXT.split("## Rooms")[1].split("## A frame's way")[0].rpartition("```")[2]
    assert set(re.findall(r"`(\w+)`", described)) == rooms_of_the_tree()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"lowvram/[\w/]+\.py", PICTURES[1]))))
def test_a_frames_way_goes_through_files_that_are_there(name: str):
    assert Path(ROOT / name).is_file()


def test_the_pictures_differ_from_others():
    """A picture with an arrow more, or less, is noticed."""
    arrows = drawn(PICTURES[0])
    more = drawn(PICTURES[0] + "    offload --> pipeline\n")
    assert more != arrows
    assert more["offload"] - arrows["offload"] == {"pipeline"}
