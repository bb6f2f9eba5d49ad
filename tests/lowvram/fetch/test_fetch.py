"""Fetching from a hub on this machine, through huggingface_hub: what is said, agreed to, resumed, checked, refused."""

from __future__ import annotations

import hashlib
import os
import socket
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.file_download
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from lowvram.cli import main
from lowvram.fetch import download
from lowvram.fetch.catalogue import CATALOGUE, LIVE_AVATAR, Source
from tests.lowvram.fetch.hub_server import COMMIT, HubServer

BASE, LORA = "Wan-AI/Wan2.2-S2V-14B", "Quark-Vision/Live-Avatar"
AUDIO = "wav2vec2-large-xlsr-53-english"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
FETCHED = (
    "LICENSE.txt", "README.md", "Wan2.1_VAE.pth", "config.json", SHARD,
    "diffusion_pytorch_model-00002-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json", "models_t5_umt5-xxl-enc-bf16.pth",
    f"{AUDIO}/config.json", f"{AUDIO}/model.safetensors",
)  # fmt: skip
LEFT = (
    "assets/demo.mp4",
    f"{AUDIO}/pytorch_model.bin",
    f"{AUDIO}/flax_model.msgpack",
    f"{AUDIO}/language_model/lm.bin",
)


def some(name: str, size: int = 3000) -> bytes:
    return (hashlib.sha256(name.encode()).digest() * (size // 32 + 1))[:size]


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """As the command line has it; other tests may have loaded the library before that."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    server = HubServer()
    server.repos[BASE] = {name: some(name) for name in (*FETCHED, *LEFT)}
    server.repos[LORA] = {name: some(name) for name in ("liveavatar.safetensors", "README.md", "demo.gif")}
    server.cards[BASE] = {"license": "apache-2.0"}
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what is written at once, of 10 MiB
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _seconds: None)
    yield server
    server.close()


def fetch(out: Path, *more: str, agree: str | None = "--yes") -> Result:
    words = ["fetch", "live-avatar", "--out", str(out), "-q", *([agree] if agree else []), *more]
    return CliRunner().invoke(main, words)


def one_line(result: Result, code: int, *parts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("lowvram: error: ")]
    assert result.exit_code == code, (result.output, result.exception)
    assert len(lines) == 1, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_convert_reads_comes_and_no_more(hub, tmp_path):
    out = tmp_path / "ckpt"
    done = fetch(out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.splitlines() == [str(out / "Wan2.2-S2V-14B"), str(out / "LiveAvatar")]
    assert files_of(out / "Wan2.2-S2V-14B") == sorted([*FETCHED, download.RECORD])
    assert files_of(out / "LiveAvatar") == sorted(["liveavatar.safetensors", "README.md", download.RECORD])
    assert (out / "Wan2.2-S2V-14B" / SHARD).read_bytes() == some(SHARD)
    assert f"{BASE} at {COMMIT[:12]}, licence: apache-2.0" in done.stderr
    assert f"{LORA} at {COMMIT[:12]}, licence: none stated" in done.stderr
    assert (
        f"lowvram convert --ckpt-dir {out}/Wan2.2-S2V-14B --lora {out}/LiveAvatar/liveavatar.safetensors" in done.stderr
    )
    assert sorted(path.name for path in out.iterdir()) == ["LiveAvatar", "Wan2.2-S2V-14B"]


def test_nothing_comes_twice_and_the_network_is_off_again(hub, tmp_path):
    fetch(tmp_path)
    asked = len(hub.asked)
    again = fetch(tmp_path)
    assert again.exit_code == 0
    assert len(hub.asked) == asked == len(FETCHED) + 2
    assert constants.HF_HUB_OFFLINE is True
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    one_file = tmp_path / "LiveAvatar" / "liveavatar.safetensors"
    one_file.unlink()
    assert fetch(tmp_path).exit_code == 0
    assert hub.asked[asked:] == [("liveavatar.safetensors", None)]


@pytest.mark.parametrize("answer", [None, "n\n", "y\n"])
def test_it_is_agreed_to_first(hub, tmp_path, monkeypatch, answer):
    if answer is not None:
        monkeypatch.setattr("lowvram.commands.fetch.terminal", lambda: True)
    words = ["fetch", "live-avatar", "--out", str(tmp_path / "ckpt"), "-q"]
    done = CliRunner().invoke(main, words, input=answer)
    assert "licence: apache-2.0" in done.stderr
    if answer == "y\n":
        assert done.exit_code == 0, done.output
        return
    one_line(done, 2, "--yes" if answer is None else "not agreed to")
    assert hub.asked == []
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("cuts", [[1000], [100, 100, 2000], [0, 1000, 0]])
def test_a_connection_that_breaks_is_taken_up(hub, tmp_path, cuts):
    hub.cut[SHARD] = list(cuts)
    assert fetch(tmp_path).exit_code == 0
    assert (tmp_path / "Wan2.2-S2V-14B" / SHARD).read_bytes() == some(SHARD)
    spans = [span for name, span in hub.asked if name == SHARD]
    assert len(spans) == len(cuts) + 1
    assert spans[-1] == f"bytes={sum(cuts)}-"


def test_one_that_breaks_for_good_goes_on_the_next_time(hub, tmp_path):
    hub.cut[SHARD] = [1000, *[0] * 20]
    one_line(fetch(tmp_path), 1, SHARD, "run again")
    (begun,) = (tmp_path / "Wan2.2-S2V-14B").glob("*.partial")
    assert begun.read_bytes() == some(SHARD)[:1000]
    hub.cut.clear()
    hub.asked.clear()
    done = fetch(tmp_path)
    assert done.exit_code == 0, done.output
    assert (SHARD, "bytes=1000-") in hub.asked
    assert (tmp_path / "Wan2.2-S2V-14B" / SHARD).read_bytes() == some(SHARD)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_a_killed_run_left(hub, tmp_path):
    """A part that is good, one that is too long, one of other bytes: each file is right in the end, or not there."""
    folder = tmp_path / "Wan2.2-S2V-14B"
    folder.mkdir()
    for name, left in (
        (SHARD, some(SHARD)[:10]),
        ("Wan2.1_VAE.pth", some("Wan2.1_VAE.pth") + b"more"),
        ("models_t5_umt5-xxl-enc-bf16.pth", b"other bytes"),
    ):
        checksum = hashlib.sha256(some(name)).hexdigest()
        (folder / f"{name}.{checksum[:12]}.partial").write_bytes(left)
    one_line(fetch(tmp_path), 1, "models_t5", "other bytes than were published", "removed")
    assert (folder / SHARD).read_bytes() == some(SHARD)
    assert (folder / "Wan2.1_VAE.pth").read_bytes() == some("Wan2.1_VAE.pth")
    assert fetch(tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        (SHARD, some("other")),
        ("config.json", some("other")),  # which git names by SHA-1
        (SHARD, some(SHARD)[:-1]),
        (SHARD, some(SHARD) + b"x"),
        ("google/umt5-xxl/tokenizer.json", b""),
    ],
)
def test_wrong_bytes_do_not_stay(hub, tmp_path, name, bytes_):
    hub.broken[name] = bytes_
    one_line(fetch(tmp_path), 1, name, "run again")
    assert not (tmp_path / "Wan2.2-S2V-14B" / name).exists()
    hub.broken.clear()
    again = fetch(tmp_path)
    if again.exit_code:  # what came of it was the beginning of something else, and has gone now
        again = fetch(tmp_path)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "Wan2.2-S2V-14B" / name).read_bytes() == some(name)


def test_no_room(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: usage(10**12, 10**12 - 9, 9))
    one_line(fetch(tmp_path), 2, "free", "are to come")
    assert hub.asked == []


def test_a_disk_that_is_full_meanwhile(hub, tmp_path, monkeypatch):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    one_line(fetch(tmp_path), 2, "No space left", "free some space")


def test_no_network(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    one_line(fetch(tmp_path / "ckpt"), 1, f"127.0.0.1:{port} cannot be reached", "check the network")
    assert not (tmp_path / "ckpt").exists()
    assert constants.HF_HUB_OFFLINE is True


def test_a_hub_that_fails(hub, tmp_path):
    hub.failing = True
    one_line(fetch(tmp_path), 1, "500")


def test_what_is_only_for_those_who_are_let_in(hub, tmp_path):
    hub.refused.add(LORA)
    done = fetch(tmp_path)
    one_line(done, 2, LORA, "let in", "HF_TOKEN")
    assert "wants to be asked for" in done.stderr
    assert (tmp_path / "Wan2.2-S2V-14B" / SHARD).is_file()


@pytest.mark.parametrize(
    ("revision", "parts"),
    [
        (f"{BASE}@{'d' * 40}", [BASE, "not to be had"]),
        ("someone/else@main", ["someone/else", BASE]),
        ("main", [BASE]),
    ],
)
def test_revisions_that_are_not_there(hub, tmp_path, revision, parts):
    one_line(fetch(tmp_path, "--revision", revision), 2, *parts)
    assert fetch(tmp_path, "--revision", f"{BASE}@{COMMIT}").exit_code == 0


def test_a_repository_that_is_not_as_its_readme_says(hub, tmp_path):
    del hub.repos[BASE]["Wan2.1_VAE.pth"]
    one_line(fetch(tmp_path), 1, BASE, "has no Wan2.1_VAE.pth")
    del hub.repos[BASE]
    one_line(fetch(tmp_path), 2, BASE, "not to be had")


@pytest.mark.parametrize(
    "name", ["../../escaped.safetensors", "/etc/escaped.safetensors", "a\\..\\escaped.safetensors"]
)
def test_names_that_lead_elsewhere(hub, tmp_path, monkeypatch, name):
    hub.repos[LORA][name] = b"x"
    source = Source(repo=LORA, folder="LiveAvatar", needed=("*.safetensors",))
    monkeypatch.setitem(CATALOGUE, LIVE_AVATAR, (source,))
    one_line(fetch(tmp_path / "ckpt"), 1, "safe name")
    assert not list(tmp_path.iterdir())


def test_files_that_were_there(hub, tmp_path):
    """Fetched by another program they are taken after a look; another file of the name stays, and is said."""
    folder = tmp_path / "Wan2.2-S2V-14B"
    folder.mkdir()
    (folder / SHARD).write_bytes(some(SHARD))
    (folder / "config.json").write_bytes(b"{}")
    one_line(fetch(tmp_path), 2, "config.json", "is not the published file")
    assert (folder / "config.json").read_bytes() == b"{}"
    (folder / "config.json").unlink()
    assert fetch(tmp_path).exit_code == 0
    assert SHARD not in [name for name, _ in hub.asked]


def test_a_place_that_cannot_be(hub, tmp_path):
    (tmp_path / "file").touch()
    one_line(fetch(tmp_path / "file"), 2, "--out")
    assert hub.asked == []


def test_what_is_fetched_converts(hub, tiny, tmp_path):
    """The tiny checkpoint from the hub, by the command that is said at the end."""
    base = tiny.checkpoint / "Wan2.2-S2V-14B"
    hub.repos[BASE] = {name: (base / name).read_bytes() for name in files_of(base)}
    hub.repos[LORA] = {"liveavatar.safetensors": tiny.lora.read_bytes()}
    done = fetch(tmp_path / "ckpt")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    words = line.removeprefix("next: lowvram ").split()
    words[words.index("--out") + 1] = str(tmp_path / "made")
    made = CliRunner().invoke(main, [*words, "--lora-alpha", "2.0"])
    assert made.exit_code == 0, made.output
    expected = tiny.artifact("int8")
    for file in expected.glob("*.safetensors"):
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes(), file.name
