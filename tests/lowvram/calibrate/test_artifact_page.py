"""The page of an artifact: everything in itself, figures as in the JSON, with and without a calibration."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lowvram.calibrate.page import place_of, render
from lowvram.cli import main
from lowvram.compare.charts import WIDTH, heat_map
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, in_words, output_errors, summary
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.quantize.checkpoints import clone, replace_json

PROMPT = 'She says </script><b>"so & so"</b>'


def inspect(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def invented(path: Path) -> dict:
    """A calibration as ``convert`` writes it, whose figures are easily told apart."""
    component = Artifact.open(path).component("dit")
    names = [name for name in component.facts["tensors"] if component.tensor_scheme(name) == "int8"]
    linears = {}
    for place, name in enumerate(names):
        activations = {"tokens": 100 + place, "amax": 5.0, "rms": 1.0, "channel_ratio": 2.0 + place, "kurtosis": 3.0}
        error = None if place == 3 else 0.001 * (place + 1)
        linears[name] = {
            "scheme": "int8",
            "rows": 9,
            "output_error": error,
            "activations": {**activations, "dead": 0.5},
        }
    linears[names[4]]["activations"] |= {"channel_ratio": None, "kurtosis": None}
    own = {"file": "<me>.png", "sha256": "ab" * 32}
    made = {"image": own, "audio": None, "prompt": PROMPT, "size": [128, 128], "frames": 24, "steps": 4, "seed": 420}
    return made | {"device": "cpu", "dtype": "float32", "linears": linears}


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory) -> Path:
    path = clone(tiny.artifact("int8"), tmp_path_factory.mktemp("calibrated") / "a&b <i>")
    replace_json(path / MANIFEST, lambda manifest: manifest.update(calibration=invented(path)))
    return path


def page_of(path: Path) -> str:
    facts = describe(path)
    return render(facts | {"words": in_words(facts)})


class Reader(html.parser.HTMLParser):
    """Tables by their id, the text of scripts, and all that could ask for something from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []
        self.scripts: dict[str, str] = {}
        self.titles: list[str] = []
        self._table, self._inside, self._cell = "", "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.asked += [f"{tag} {name}" for name in ("src", "href", "action", "data", "srcset") if name in given]
        if tag == "table":
            self._table = given["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        if tag in ("td", "th", "script", "title"):
            self._inside, self._id = tag, given.get("id", "")
            if tag == "title":
                self.titles.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data):
        if self._inside in ("td", "th"):
            self.tables[self._table][-1][-1] += data
        elif self._inside == "script":
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
        elif self._inside == "title":
            self.titles[-1] += data


def test_the_page_asks_for_nothing(calibrated):
    text = page_of(calibrated)
    page = Reader(text)
    assert page.asked == []
    assert list(page.scripts) == ["artifact"]
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_what_is_in_it_is_no_markup(calibrated):
    text = page_of(calibrated)
    assert '<b>"so' not in text
    assert text.count("</script>") == 1
    assert "<i>" not in text
    assert "<me>" not in text
    assert PROMPT in [row[1] for row in Reader(text).tables["inputs"]]


def test_figures_are_those_of_the_json(calibrated):
    facts, page = json.loads(inspect(calibrated, "--json").stdout), Reader(page_of(calibrated))
    inside = json.loads(page.scripts["artifact"])
    assert inside.pop("words") == in_words(facts)
    assert inside == facts
    linears = facts["calibration"]["linears"]
    worst = sorted(output_errors(facts["calibration"]).items(), key=lambda item: -item[1])[:10]
    rows = page.tables["worst"][1:]
    assert len(rows) == 10
    for row, (name, error) in zip(rows, worst, strict=True):
        assert row[0] == name.removesuffix(".weight")
        assert row[2] == f"{error:.2%}"
        assert row[3] == f"{facts['components']['dit']['relative_errors'][name]:.2%}"
        assert row[9] == str(linears[name]["activations"]["tokens"])
    for row, (name, component) in zip(page.tables["parts"][1:], facts["components"].items(), strict=False):
        assert row[:3] == [name, component["precision"], f"{component['bytes'] / 2**20:.1f}"]
    layers = {row[0]: row for row in page.tables["layers"][1:]}
    for slab in facts["components"]["dit"]["slabs"]:
        assert layers[slab["name"]][2] == ", ".join(f"{count} {scheme}" for scheme, count in slab["schemes"].items())
    assert len(page.tables["sources"]) == 1 + len(facts["sources"])


def test_every_linear_has_its_cell(calibrated):
    facts, page = describe(calibrated), Reader(page_of(calibrated))
    config = facts["components"]["dit"]["config"]
    errors = output_errors(facts["calibration"])
    cells = page.titles[1:]
    assert len(cells) == len(errors) + len(facts["calibration"]["linears"])
    for name, error in errors.items():
        kind, layer = place_of(name, config["audio_inject_layers"])
        assert f"{kind}, {layer}: {error:.2%}" in cells
    assert any(cell.endswith(": infinite") for cell in cells)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.0.self_attn.q.weight", ("self_attn.q", 0)),
        ("blocks.39.ffn.2.weight", ("ffn.2", 39)),
        ("blocks.7.cross_attn.o.weight", ("cross_attn.o", 7)),
        ("audio_injector.injector.1.k.weight", ("audio.k", 4)),
        ("audio_injector.injector_adain_layers.0.linear.weight", ("audio.adain", 0)),
        ("audio_injector.injector.2.k.weight", None),
        ("head.head.weight", None),
    ],
)
def test_the_place_of_a_linear(name, place):
    assert place_of(name, (0, 4)) == place


def test_without_a_calibration_it_says_how_to_have_one(tiny):
    path = tiny.artifact("int8")
    text, said = page_of(path), "lowvram convert --calibrate"
    assert said in text
    assert said in summary(describe(path))
    assert set(Reader(text).tables) == {"parts", "layers", "sources"}
    facts = describe(path)
    assert (facts["calibration"], facts["output_error"]) == (None, None)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "shapes", "vae alone"])
def test_artifacts_of_other_kinds(tiny, tmp_path, kind):
    if kind == "shapes":
        path = write_shape_artifact(tmp_path / "shapes", preset="tiny", precision="int8")
    elif kind == "vae alone":
        path = clone(tiny.artifact("int8"), tmp_path / "out")
        replace_json(path / MANIFEST, lambda m: [m["components"].pop(name) for name in ("dit", "text_encoder")])
    else:
        path = tiny.artifact(kind)
    text = page_of(path)
    assert ("Shape artifact of preset tiny" in text) == (kind == "shapes")
    assert ("lowvram convert --calibrate" in text) == (kind != "shapes")
    assert ("Layers of the DiT" in text) == (kind != "vae alone")


def test_the_text_says_what_a_calibration_found(calibrated):
    facts, text = describe(calibrated), summary(describe(calibrated))
    assert (
        "calibrated on <me>.png and a synthesized voice: 24 frames of 128x128 px in 4 steps, on cpu in float32" in text
    )
    errors = output_errors(facts["calibration"])
    assert facts["output_error"]["worst_tensor"] == max(errors, key=errors.__getitem__)
    assert facts["output_error"]["mean"] == pytest.approx(sum(errors.values()) / len(errors))
    assert f"{len(errors)} Linears {facts['output_error']['mean']:.2%} mean" in text
    assert f"{facts['output_error']['worst_tensor']:<52}{facts['output_error']['worst']:>8.2%}" in text


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert all(part in result.stderr for part in parts), result.stderr


def test_the_command_line_writes_it(calibrated, tmp_path):
    page = tmp_path / "page.html"
    result = inspect(calibrated, "--html", page)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{summary(describe(calibrated))}\n{page}\n"
    assert page.read_text() == page_of(calibrated)
    assert json.loads(inspect(calibrated, "--json", "--html", tmp_path / "b.html").stdout) == describe(calibrated)
    refused(inspect(calibrated, "--html", page), "is there already", "--overwrite")
    page.write_text("")
    assert inspect(calibrated, "--html", page, "--overwrite").exit_code == 0
    assert page.read_text() == page_of(calibrated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.html", "page.html"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere/page.html", "does not exist"),
        (".", "a folder"),
        ("artifact/page.html", "inside the artifact"),
        ("artifact", "both"),
        ("file/page.html", "is no folder"),
    ],
)
def test_a_place_that_cannot_be_written(tiny, tmp_path, monkeypatch, place, said):
    clone(tiny.artifact("int8"), tmp_path / "artifact")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    refused(inspect("artifact", "--html", place), said)


def test_overwrite_alone(tiny):
    refused(inspect(tiny.artifact("int8"), "--overwrite"), "--html only")


def percent(value: float) -> str:
    return f"{value:.1%}"


@pytest.mark.parametrize(
    ("values", "strengths"),
    [
        ({("a", 0): 0.01, ("a", 1): 0.1, ("b", 0): 1.0}, [0.0, 0.5, 1.0]),
        ({("a", 0): 0.5}, [1.0]),
        ({("a", 0): 0.5, ("a", 1): 0.5}, [1.0, 1.0]),
        ({("a", 0): 0.0, ("a", 1): 0.1, ("b", 1): 0.2}, [0.0, 0.0, 1.0]),
        ({("a", 0): math.inf, ("a", 1): 0.1, ("b", 1): 0.2}, [1.0, 0.0, 1.0]),
        ({("a", 0): 0.0, ("a", 1): 0.0}, [0.0, 0.0]),
        ({}, []),
    ],
)
def test_cells_of_a_heat_map(values, strengths):
    found = heat_map("title", 2, values, percent)
    assert [cell.strength for cell in found.cells] == pytest.approx(strengths)
    assert len(found.rows) == len({row for row, _ in values})
    for cell, (row, column) in zip(found.cells, values, strict=True):
        assert cell.x == pytest.approx(column * WIDTH / 2)
        assert 0 < cell.x + cell.width <= WIDTH
        assert cell.y == found.rows.index(row) * found.height / len(found.rows)
        assert cell.said == f"{row}, {column}: {percent(values[row, column])}"


def test_a_map_of_forty_layers_fits():
    found = heat_map("title", 40, {("ffn.2", i): 0.01 * (i + 1) for i in range(40)}, percent)
    ends = [cell.x + cell.width for cell in found.cells]
    assert ends == sorted(ends)
    assert all(end <= cell.x for end, cell in zip(ends, found.cells[1:], strict=False))
    assert re.fullmatch(r"1\.0% 40\.0%", f"{found.low} {found.high}")
