"""The page of a comparison: it holds everything in itself, and its figures are the JSON's."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from lowvram.cli import main
from lowvram.compare import pictures
from lowvram.compare.charts import HEIGHT, WIDTH, over_count, over_time
from lowvram.compare.comparison import compare
from lowvram.compare.page import render, write_page
from lowvram.compare.pictures import make_clip, make_stills
from lowvram.media.samples import synth_voice, write_wav
from lowvram.media.video import VideoWriter, probe, read_frames
from lowvram_kernels.errors import OutputError

PROMPT = 'She says </script><b>"so & so"</b>'


def pixels(count, height=32, width=48, seed=0):
    return np.random.default_rng(seed).integers(40, 200, (count, height, width, 3), dtype=np.uint8)


def run_of(folder, name, frames, latents, *, seconds=1.0, audio=None):
    """What an inference leaves: report, dump and video."""
    tensors = {"latents": latents, "context": torch.ones(3)}
    tensors["frames"] = torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2).contiguous()
    save_file(tensors, folder / f"{name}.safetensors", {"prompt": PROMPT})
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with VideoWriter(folder / f"{name}.mp4", height, width, audio_path=audio) as writer:
        writer.write(np.ascontiguousarray(frames[:, :height, :width]))
    report = {
        "dump_tensors": f"{name}.safetensors",
        "video": f"{name}.mp4",
        "settings": {"prompt": PROMPT, "size": "48*32"},
        "stages": [{"name": "denoise", "seconds": seconds, "peak_bytes": 3 * 2**20}],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report))
    return path


@pytest.fixture
def runs(tmp_path):
    base, latents = pixels(40), torch.randn(3, 16, 3, 4, 6)
    changed = base.copy()
    changed[5:30] += 9
    changed[17] += 20
    voice = tmp_path / "voice.wav"
    write_wav(voice, synth_voice(2.0), 16000)
    a = run_of(tmp_path, "int8", changed, latents * 1.01, seconds=2.5, audio=voice)
    return a, run_of(tmp_path, "bf16", base, latents, audio=voice)


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def handle_endtag(self, tag):
        self._open = None if tag == "script" else self._open


def test_everything_is_in_the_page(runs):
    page = Reader(render(compare(*runs)))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    addresses = [a[name] for _, a in page.tags for name in ("src", "href", "action", "poster") if a.get(name)]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not any(tag in ("link", "iframe", "object", "form") for tag, _ in page.tags)


def test_its_figures_are_those_of_the_json(runs):
    comparison = compare(*runs)
    text = render(comparison, {"psnr": 20.0, "flicker": 0.0})
    facts = json.loads(Reader(text).scripts["comparison"])
    assert facts == json.loads(json.dumps(comparison.to_json({"psnr": 20.0, "flicker": 0.0})))
    assert facts["settings"]["a"]["prompt"] == PROMPT
    assert f">{comparison.values['psnr']:.2f} <" in text
    assert f">{comparison.values['latent_error']:.3e}" in text
    assert [t["met"] for t in facts["thresholds"]] == [True, False]
    assert re.findall(r'class="(met|missed)">', text) == ["met", "missed"]
    assert '<td class="n">2.50</td><td class="n">1.00</td><td class="n">3</td>' in text
    for side, name in (("a", "int8"), ("b", "bf16")):
        files = facts["files"][side]
        assert [file["path"].rsplit("/")[-1] for file in files] == [
            f"{name}.{e}" for e in ("json", "safetensors", "mp4")
        ]
        assert all(len(file["sha256"]) == 64 and file["sha256"] in text for file in files)


def test_the_clip_is_both_and_their_difference_with_sound(runs, tmp_path):
    clip = make_clip(compare(*runs))
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(clip.data))
    facts = probe(path)
    assert (facts["frames"], facts["width"], facts["height"], facts["has_audio"]) == (40, 3 * 48, 32, True)
    strip = np.stack(list(read_frames(path)))[2].astype(int)  # here the two are alike
    assert np.abs(strip[:, 96:] - 128).mean() < 6
    strip = np.stack(list(read_frames(path)))[10].astype(int)
    assert np.abs(strip[:, 96:] - (128 + 8 * 9)).mean() < 12


def test_of_a_long_video_what_surrounds_the_worst_frame_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LONGEST_S", 2)
    frames = np.repeat(pixels(1, 16, 16), 150, axis=0)
    changed = frames.copy()
    changed[100] += 30
    clip = make_clip(
        compare(*(run_of(tmp_path, n, f, torch.ones(1, 16, 3, 2, 2)) for n, f in (("a", changed), ("b", frames))))
    )
    assert (clip.start_s, clip.seconds, clip.total_s) == (3, 2, 6)


def test_the_worst_frames_are_shown_a_second_apart(runs):
    stills = make_stills(compare(*runs))
    assert stills[0].index == 17
    assert all(abs(one.index - other.index) >= 25 for one in stills for other in stills if one is not other)
    difference = np.asarray(Image.open(io.BytesIO(base64.b64decode(stills[0].difference.split(",")[1]))))
    assert difference.max() == 255  # 8 times 20 above grey is beyond what a pixel holds


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (32, 47), (17, 21)])
def test_frames_of_any_size(tmp_path, height, width):
    frames = pixels(3, height, width)
    path = tmp_path / "a.safetensors"
    save_file(
        {"frames": torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2).contiguous()}, path
    )
    text = render(compare(path, path))
    assert "identical" in text
    assert len(Reader(text).scripts["data"]) > 100


def latents_alone(folder):
    for name, factor in (("a", 1.1), ("b", 1.0)):
        save_file({"latents": factor * torch.ones(4, 16, 3, 2, 2)}, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def stages_alone(folder):
    for name in "ab":
        (folder / f"{name}.json").write_text(json.dumps({"stages": [{"name": "denoise", "seconds": None}]}))
    return folder / "a.json", folder / "b.json"


def a_baseline_of_zeros(folder):
    for name, value in (("a", 1.0), ("b", 0.0)):
        save_file(
            {"latents": torch.full((2, 16, 3, 2, 2), value), "x": torch.full((2,), value)},
            folder / f"{name}.safetensors",
        )
    return folder / "a.safetensors", folder / "b.safetensors"


@pytest.mark.parametrize("make", [latents_alone, stages_alone, a_baseline_of_zeros])
def test_what_is_not_there_is_left_out(tmp_path, make):
    text = render(compare(*make(tmp_path)))
    page = Reader(text)
    assert not any(tag in ("video", "img") for tag, _ in page.tags)
    assert "data" not in page.scripts
    assert json.loads(page.scripts["comparison"])["frames"] == []


RINGS = {
    "as it ran": ({"options": {"kv": "auto"}, "layout": {"placement": {"kv": "int8"}}}, "int8"),
    "in a format": ({"options": {}, "layout": {"placement": {"kv": "int8"}}, "kv_format": 2}, "int8, format 2"),
    "in the dtype": ({"options": {"kv": "auto"}, "layout": {"placement": {"kv": "plain"}}}, "bfloat16"),
    "otherwise than asked": ({"options": {"kv": "bf16"}, "layout": {"placement": {"kv": "int8"}}}, "int8"),
    "nothing ran": ({"options": {"kv": "auto"}, "layout": None}, "auto"),
    "of an earlier version": ({"options": {"kv": "int8"}}, "int8"),
}


@pytest.mark.parametrize("kind", RINGS)
def test_the_rings_are_those_that_ran(tmp_path, kind):
    memory, kv = RINGS[kind]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"stages": [{"name": "denoise", "seconds": 1}], "memory": memory, "dtype": "bfloat16"}))
    assert f"<tr><td>kv</td><td>{kv}</td><td>{kv}</td></tr>" in render(compare(path, path))


def test_a_full_disk_or_a_folder_without_rights_is_said(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match=r"page\.html cannot be written"):
        write_page(compare(*runs), tmp_path / "page.html")


def call(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_writes_it_and_still_holds_its_bounds(runs, tmp_path):
    page = tmp_path / "page.html"
    found = call(*runs, "--html", page, "--fail-under", "psnr=99")
    assert found.exit_code == 1
    assert page.is_file()
    assert str(page) in found.output
    assert call(*runs, "--html", page).exit_code == 2  # it is there already
    assert call(*runs, "--html", page, "--overwrite").exit_code == 0
    told = call(*runs, "--html", page, "--overwrite", "--json")
    assert json.loads(told.output) == json.loads(Reader(page.read_text()).scripts["comparison"])


PLACES = {
    "a report": "int8.json",
    "a report's dump": "int8.safetensors",
    "the baseline's video": "bf16.mp4",
    "a folder": ".",
    "no folder": "no/page.html",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_place_that_it_must_not_have_is_refused_at_the_start(runs, tmp_path, place):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = call(*runs, "--html", tmp_path / place, "--overwrite")
    assert found.exit_code == 2
    assert "Latents" not in found.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.json", "baseline.json", "model.mp4", "baseline.mp4", "baseline.safetensors"])
def test_it_is_none_of_the_files_that_runs_make(tmp_path, name):
    """Refused before the artifacts, which are none, are looked at."""
    options = {"--model": "m", "--baseline": "b", "--image": "i.png", "--audio": "v.wav", "--prompt": "x"}
    arguments = [word for pair in options.items() for word in pair]
    found = call(*arguments, "--out-dir", tmp_path, "--html", tmp_path / name)
    assert found.exit_code == 2
    assert "--html" in found.output
    assert name in found.output


def test_curves():
    chart = over_time("PSNR", "dB", [30.0, float("inf"), 40.0, 35.0], 25.0, min)
    assert chart.lines == (f"0.0,{HEIGHT:.1f}", f"{WIDTH * 2 / 3:.1f},0.0 {WIDTH:.1f},{HEIGHT / 2:.1f}")
    assert (chart.low, chart.high, chart.last, chart.span) == ("30", "40", "0.1 s", 3 / 25)
    many = [1.0] * 9000
    many[4567] = 0.0
    drawn = over_time("SSIM", "", many, 25.0, min)
    assert len(drawn.lines[0].split()) == 1500
    assert f",{HEIGHT:.1f}" in drawn.lines[0]
    assert over_time("same", "", [2.0], 25.0, min).lines == (f"0.0,{HEIGHT / 2:.1f}",)
    bars = over_count("error", "", [0.5, 1.0, float("inf")], "block").bars
    assert [bar[3] for bar in bars] == [HEIGHT / 2, HEIGHT, HEIGHT]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to open the page in")
def test_a_browser_opens_it(runs, tmp_path):
    page = tmp_path / "page.html"
    write_page(compare(*runs), page)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}", f"file://{page}#t=0.4"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in found.stderr
    assert '<span id="time" class="faint">0.40 s</span>' in found.stdout  # the clip was decoded and stands there
