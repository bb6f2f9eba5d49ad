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
# What goes into the second picture; all else there is a file.
INPUTS = "portrait, voice, prompt"


def below(room: str) -> set[str]:
    asked = ROOMS.get(room, set())
    return asked.union(*(below(each) for each in asked))


def least(room: str) -> set[str]:
    """What a room imports and could not reach by way of others that it imports."""
    return {each for each in ROOMS[room] if not any(each in below(other) for other in ROOMS[room])}


def drawn(picture: str) -> dict[str, set[str]]:
    """Who imports whom. Raises: ValueError where a line says it in another spelling, which would be drawn unread."""
    kind, *lines = picture.splitlines()
    if kind != "flowchart TD":
        raise ValueError(f"the picture begins with {kind!r}; expected flowchart TD")
    found: dict[str, set[str]] = {}
    for line in lines:
        arrow = re.fullmatch(r" {4}(\w+) --> (\w+(?: & \w+)*)", line)
        if arrow is None:
            raise ValueError(f"{line!r} is in the picture; expected '    room --> other & other' alone")
        found.setdefault(arrow[1], set()).update(arrow[2].split(" & "))
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


def boxes(picture: str) -> set[str]:
    """What stands in a box: a file, or what goes in."""
    return set(re.findall(r"\[(.*?)\]", picture))


@pytest.mark.parametrize("name", sorted(boxes(PICTURES[1]) - {INPUTS}))
def test_a_frames_way_goes_through_files_that_are_there(name: str):
    assert re.fullmatch(r"lowvram/[\w/]+\.py", name)
    assert Path(ROOT / name).is_file()


LINES = PICTURES[0].splitlines()[1:]


@pytest.mark.parametrize("line", LINES)
def test_a_line_less_is_noticed(line: str):
    less = drawn(PICTURES[0].replace(f"{line}\n", ""))
    room, _, others = line.strip().partition(" --> ")
    assert drawn(PICTURES[0])[room] - less.get(room, set()) == set(others.split(" & "))


@pytest.mark.parametrize(("room", "other"), [("offload", "pipeline"), ("cli", "planning"), ("precision", "devices")])
def test_an_arrow_more_is_noticed(room: str, other: str):
    arrows, more = drawn(PICTURES[0]), drawn(f"{PICTURES[0]}    {room} --> {other}\n")
    assert more[room] - arrows.get(room, set()) == {other}


@pytest.mark.parametrize(
    "line",
    [
        "    offload -->|copies| pipeline",
        "    offload --- pipeline",
        "    offload -.-> pipeline",
        "    offload ==> pipeline",
        "    offload <--> pipeline",
        "    offload --> decode --> pipeline",
        "    offload & decode --> pipeline",
        "    offload-->pipeline",
        "    offload --> pipeline;",
        "    offload[copies] --> pipeline",
        "    offload --> pipeline %% one day",
        "    offload",
        "    subgraph below",
        "",
    ],
)
def test_a_line_in_another_spelling_is_refused(line: str):
    with pytest.raises(ValueError, match="is in the picture; expected '    room --> other & other' alone"):
        drawn(f"{PICTURES[0]}{line}\n")
