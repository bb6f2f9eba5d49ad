"""The drawing shows every curve, every stage, and no peak is lost on the way."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.memory_log.drawing import HEIGHT, WIDTH, draw
from lowvram.memory_log.rows import Row
from tests.lowvram.memory_log.test_rows import write

GIB = 2**30
SVG = "{http://www.w3.org/2000/svg}"


def run_of(count: int, high: int, at: int) -> list[Row]:
    """``count`` rows of 1 GiB a half second apart, one of them ``high`` bytes; stages that alternate."""
    rows = []
    for index in range(count):
        size = high if index == at else GIB
        stage, event = ("denoise", "decode")[index // 2 % 2], ("begin", "end")[index % 2]
        rows.append(Row(time_s=index / 2, stage=stage, event=event, reserved=size, allocated=size // 2, rss=GIB // 4))
    return rows


@pytest.mark.parametrize("count", [1, 2, 3, 900, 20000])
def test_every_curve_is_there_with_its_peak(count):
    at = count // 2
    tree = ET.fromstring(draw([("cuda:0", run_of(count, 7 * GIB, at))], title="A & B <run>", budgets=[8 * GIB]))
    curves = {line.get("class"): line.get("points") for line in tree.iter(f"{SVG}polyline")}
    assert set(curves) == {"reserved", "allocated", "rss"}  # nothing was pinned
    points = [tuple(map(float, point.split(","))) for point in curves["reserved"].split()]
    assert len(points) <= 901
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    top = min(points, key=lambda point: point[1])
    assert top[1] == pytest.approx(HEIGHT * (1 - 7 / 10), abs=0.1)  # the axis ends at 10 GiB
    assert top[0] == pytest.approx(WIDTH * at / max(count - 1, 1), abs=1)
    text = " ".join(tree.itertext())
    assert "A & B <run>" in text
    assert "reserved on the device, at most 7.00 GiB" in text
    assert "allowed: 8.00 GiB" in text


def test_stages_are_bars_and_thousands_of_them_few():
    tree = ET.fromstring(draw([("cuda:0", run_of(40000, 2 * GIB, 5))], title="long"))
    bars = [bar for bar in tree.iter(f"{SVG}rect") if bar.get("class") == "lane"]
    assert 2 <= len(bars) < 2000
    assert {"denoise", "decode"} <= set(tree.itertext())


def test_a_stage_that_never_ended_goes_to_the_end():
    rows = [Row(time_s=0, stage="load_dit", event="begin", rss=GIB), Row(time_s=10, rss=2 * GIB)]
    tree = ET.fromstring(draw([("cpu", rows)], title="killed"))
    (bar,) = (bar for bar in tree.iter(f"{SVG}rect") if bar.get("class") == "lane")
    assert (float(bar.get("x")), float(bar.get("width"))) == (0.0, WIDTH)


def test_every_rank_has_a_panel_below_the_other():
    logs = [(f"rank {rank}", run_of(10, (rank + 2) * GIB, 3)) for rank in range(5)]
    text = draw(logs, title="five", budgets=[None, 22 * GIB])
    tops = [float(y) for y in re.findall(r"translate\(150 ([\d.]+)\)", text)]
    assert len(tops) == 5
    assert all(later - earlier > HEIGHT for earlier, later in itertools.pairwise(tops))
    assert float(ET.fromstring(text).get("viewBox").split()[3]) > tops[-1] + HEIGHT
    assert text.count("allowed: ") == 1


def command(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def report_of(tmp_path, **more):
    log = write(tmp_path / "log.csv", run_of(20, 3 * GIB, 4))
    facts = {
        "stages": [], "device": "cuda:0", "memory_log": str(log),
        "memory": {"plan": {"vram_budget_bytes": 22 * GIB}},
    }  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(facts | more))
    return path


def test_a_report_is_drawn_with_what_it_was_allowed(tmp_path):
    done = command(report_of(tmp_path))
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert "allowed: 22.00 GiB" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    again = command(tmp_path / "run.json")
    assert (again.exit_code, "there already" in again.output) == (2, True)
    assert command(tmp_path / "run.json", "--overwrite").exit_code == 0


def test_the_logs_of_all_ranks_are_found_where_they_were_taken_to(tmp_path):
    ranks = []
    for rank in range(3):
        write(tmp_path / f"log.rank{rank}.csv", run_of(8, GIB, 0))
        ranks.append(
            {"role": f"DiT, stage {rank}", "device": f"cuda:{rank}", "memory_log": f"/gone/log.rank{rank}.csv"}
        )
    done = command(report_of(tmp_path, ranks=ranks))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "run.svg").read_text()
    assert all(f"DiT, stage {rank}, cuda:{rank}" in text for rank in range(3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no run's report"),
        ('{"a": 1}', "is no run's report"),
        ('{"stages": []}', "of a run without a memory log"),
        ('{"stages": [], "memory_log": "/gone/away.csv"}', "away.csv cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    done = command(tmp_path / "run.json")
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert said in done.output
    assert not (tmp_path / "run.svg").exists()


def test_a_log_is_not_drawn_over(tmp_path):
    log = write(tmp_path / "log.csv", run_of(4, GIB, 0))
    done = command(log, "--out", log, "--overwrite")
    assert (done.exit_code, "are both" in done.output) == (2, True)
