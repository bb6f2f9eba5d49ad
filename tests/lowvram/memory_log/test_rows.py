"""Memory logs are read as they were written, and as nvidia-smi writes; what is neither is refused in one line."""

from __future__ import annotations

import csv

import pytest

from lowvram.memory_log.rows import COLUMNS, Row, read_rows
from lowvram_kernels.errors import InputError

MIB = 2**20
ROWS = [
    Row(time_s=0.0),
    Row(time_s=0.5, rank=3, stage="denoise", block=7, event="begin", allocated=1, reserved=2, free=3, rss=4, pinned=5),
    Row(time_s=1.25, stage="decode", event="end", rss=2**34, pinned=0),
]


def write(path, rows):
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        out.writerows(row.cells() for row in rows)
    return path


def test_rows_come_back_as_they_were(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", ROWS)) == ROWS


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_last_row_that_a_kill_has_cut_is_left_out(tmp_path, lost):
    path = write(tmp_path / "a.csv", ROWS)
    text = path.read_bytes()
    last = text.rstrip().rfind(b"\n") + 1
    path.write_bytes(text[: max(last, len(text) - lost)])
    assert read_rows(path) == ROWS[:2]


@pytest.mark.parametrize(
    ("head", "lines", "expected"),
    [
        (
            "timestamp, memory.used [MiB]",
            ["2026/11/30 17:01:58.250, 1200 MiB", "2026/11/30 17:02:00.000, 21000 MiB"],
            [(0.0, 1200 * MIB), (1.75, 21000 * MIB)],
        ),
        (
            "timestamp,memory.used [MiB]",
            ["2026/11/30 23:59:59.000,7", "2026/12/01 00:00:01.500,8"],
            [(0.0, 7 * MIB), (2.5, 8 * MIB)],
        ),
        ("timestamp, memory.used [MiB]", ["2026/11/30 17:01:58.250, 1 MiB"], [(0.0, MIB)]),
        ("timestamp, memory.used", ["2026/11/30 17:01:58.250, 3 GiB"], [(0.0, 3 * 2**30)]),
        ("timestamp, memory.used [MiB], name", ["2026/11/30 17:01:58.250, 5 MiB, RTX 4090"], [(0.0, 5 * MIB)]),
    ],
)  # fmt: skip
def test_nvidia_smi_is_read_too(tmp_path, head, lines, expected):
    path = tmp_path / "smi.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    assert [(row.time_s, row.reserved) for row in read_rows(path)] == expected


@pytest.mark.parametrize("column", ["index", "uuid", "pci.bus_id"])
def test_rows_of_several_cards_are_no_curve(tmp_path, column):
    path = tmp_path / "smi.csv"
    lines = [f"2026/11/30 17:01:5{second}.000, {7 * card} MiB, {card}" for second in range(3) for card in range(2)]
    path.write_text("\n".join([f"timestamp, memory.used [MiB], {column}", *lines]) + "\n")
    with pytest.raises(InputError, match=f"rows of 2 cards by its column {column}; expected one"):
        read_rows(path)
    path.write_text("\n".join([f"timestamp, memory.used [MiB], {column}", *lines[::2]]) + "\n")
    assert len(read_rows(path)) == 3


HEAD = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1,2\n", "begins with a,b; expected time_s,rank"),
        (HEAD + "\n", "no row behind its first line"),
        (f"{HEAD}\n0.1,0,,,nonsense,,,,,\n0.2,0,,,sample,,,,,\n", "line 2: event 'nonsense'"),
        (f"{HEAD}\nsoon,0,,,sample,,,,,\n0.2,0,,,sample,,,,,\n", "line 2: could not convert"),
        (f"{HEAD}\n0.1,0\n0.2,0,,,sample,,,,,\n", "line 2: "),
        ("timestamp, memory.used [MiB]\nyesterday, 5 MiB\n2026/11/30 17:01:58.250, 5 MiB\n", "expected a time as"),
        ("\x00\x01\x02\n", "expected time_s"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, said):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said.replace("(", r"\(")) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path)
