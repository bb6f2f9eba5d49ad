"""Writing slab by slab: what is on the disk after a failure, and what a second run makes of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowvram_kernels.errors import OutputError
from lowvram_quantize.slabs import TensorSpec, plan_slabs
from lowvram_quantize.writer import SlabWriter, disk_errors
from tests.quantize.checkpoints import FullDisk, refusal

NAMES = ("a", "b", "c")
SLABS = plan_slabs(
    {
        name: [
            TensorSpec(name=f"{name}.w", dtype=torch.int8, shape=(50, 30)),
            TensorSpec(name=f"{name}.scale", dtype=torch.float32, shape=(50,)),
        ]
        for name in NAMES
    }
)


def values(spec: TensorSpec) -> torch.Tensor:
    seed = int.from_bytes(spec.name.encode(), "little") % 1000
    return torch.randint(-90, 90, spec.shape, generator=torch.Generator().manual_seed(seed)).to(spec.dtype)


def open_writer(path: Path, fingerprint: str = "same") -> SlabWriter:
    return SlabWriter(path, SLABS, {"made": "here"}, fingerprint)


def fill(writer: SlabWriter, names: tuple[str, ...] = NAMES) -> list[str]:
    """Write what is not finished, as far as ``names``; returns what was written."""
    written = []
    for slab in SLABS:
        if slab.name in names and slab.name not in writer.finished:
            for spec in (s for s in slab.tensors if not s.name.startswith("__pad__")):
                writer.write(slab.name, spec.offset, values(spec))
            writer.finish(slab.name, errors={slab.name: 0.5})
            written.append(slab.name)
    return written


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "dit.safetensors"


@pytest.fixture
def whole(tmp_path) -> bytes:
    (tmp_path / "whole").mkdir()
    with open_writer(tmp_path / "whole" / "dit.safetensors") as writer:
        fill(writer)
    return (tmp_path / "whole" / "dit.safetensors").read_bytes()


def journal(path: Path) -> Path:
    return path.with_name("dit.safetensors.journal")


def test_what_is_written_is_a_plain_safetensors_file(path):
    with open_writer(path) as writer:
        assert fill(writer) == list(NAMES)
        assert path.stat().st_size == writer.nbytes
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "here"}
        for slab in SLABS:
            for spec in slab.tensors:
                stored = file.get_tensor(spec.name)
                if spec.name.startswith("__pad__"):
                    assert not stored.any()
                else:
                    assert torch.equal(stored, values(spec))


def test_finished_slabs_have_their_checksum_and_facts(path):
    with open_writer(path) as writer:
        fill(writer)
        finished, header_nbytes = writer.finished, writer.header_nbytes
    raw = path.read_bytes()
    for slab in SLABS:
        begin = header_nbytes + slab.offset
        note = finished[slab.name]
        assert note["sha256"] == hashlib.sha256(raw[begin : begin + slab.nbytes]).hexdigest()
        assert note["errors"] == {slab.name: 0.5}


def test_an_interrupted_file_is_continued(path, whole):
    with open_writer(path) as writer:
        fill(writer, ("a",))
        writer.write("b", 0, torch.ones(20))
    with open_writer(path) as writer:
        assert list(writer.finished) == ["a"]
        assert writer.finished["a"]["errors"] == {"a": 0.5}
        assert fill(writer) == ["b", "c"]
    assert path.read_bytes() == whole


def test_other_options_or_sources_start_over(path, whole, caplog):
    with open_writer(path, "other") as writer:
        fill(writer, ("a", "b"))
    with open_writer(path) as writer:
        assert not writer.finished
        assert not any(path.read_bytes()[writer.header_nbytes :])
        fill(writer)
    assert path.read_bytes() == whole
    assert "starting over" in caplog.text
    assert "other" not in journal(path).read_text()


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_journal_cut_mid_line_loses_that_line_only(path, whole, cut):
    with open_writer(path) as writer:
        fill(writer, ("a", "b"))
    os.truncate(journal(path), journal(path).stat().st_size - cut)
    with open_writer(path) as writer:
        assert list(writer.finished) == ["a"]
        assert fill(writer, ("b",)) == ["b"]
    # Interrupted once more: what came behind the cut line counts.
    with open_writer(path) as writer:
        assert list(writer.finished) == ["a", "b"]
        fill(writer)
    assert path.read_bytes() == whole


def test_a_journal_of_rubbish_starts_over(path, whole):
    for rubbish in (b"", b"\xff\xfe\x00", b"sam", b"same", b"\n"):
        with open_writer(path) as writer:
            fill(writer, ("a",))
        journal(path).write_bytes(rubbish)
        with open_writer(path) as writer:
            assert not writer.finished
    with open_writer(path) as writer:
        fill(writer)
    assert path.read_bytes() == whole


def test_a_journal_with_a_damaged_line_counts_what_is_before_it(path):
    with open_writer(path) as writer:
        fill(writer)
    lines = journal(path).read_text().splitlines()
    journal(path).write_text("\n".join([*lines[:2], "{rubbish", *lines[3:]]) + "\n")
    with open_writer(path) as writer:
        assert list(writer.finished) == ["a"]


def test_a_slab_whose_bytes_changed_is_written_again(path, whole):
    with open_writer(path) as writer:
        fill(writer, ("a", "b"))
        place = writer.header_nbytes + SLABS[0].offset + 40
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\x55\x55")
    with open_writer(path) as writer:
        assert list(writer.finished) == ["b"]
        assert fill(writer) == ["a", "c"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_file_that_lost_its_end_starts_over(path, whole, size):
    with open_writer(path) as writer:
        fill(writer, ("a",))
    os.truncate(path, size % path.stat().st_size)
    with open_writer(path) as writer:
        assert not writer.finished
        fill(writer)
    assert path.read_bytes() == whole


def test_a_file_with_another_header_starts_over(path, whole):
    with open_writer(path) as writer:
        fill(writer)
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\0")
    with open_writer(path) as writer:
        assert not writer.finished
        fill(writer)
    assert path.read_bytes() == whole


def test_a_file_without_its_journal_starts_over(path, whole):
    with open_writer(path) as writer:
        fill(writer, ("a",))
    journal(path).unlink()
    with open_writer(path) as writer:
        assert not writer.finished
        fill(writer)
    assert path.read_bytes() == whole


def test_a_disk_that_fills_keeps_what_is_done(path, whole):
    with refusal(OutputError, str(path), "No space left", "bytes needed", "free", "run again"):
        with open_writer(path) as writer:
            fill(writer, ("a",))
            writer._file = FullDisk(writer._file, 700)
            fill(writer)
    with open_writer(path) as writer:
        assert list(writer.finished) == ["a"]
        # A short write is no failure.
        writer._file = FullDisk(writer._file, 10**6)
        writer._file.write = lambda raw, write=writer._file.write: write(raw[:7])
        fill(writer)
    assert path.read_bytes() == whole


def test_a_disk_that_cannot_hold_the_file_is_known_at_once(path, monkeypatch):
    def full(*_args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data_nbytes = sum(slab.nbytes for slab in SLABS)
    with refusal(OutputError, "No space left", f"{data_nbytes + 4096} bytes needed", "free some space"):
        open_writer(path)
    assert not journal(path).read_text()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_the_journal_and_the_last_flush_meet(path, monkeypatch, code):
    def fail(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    advice = "check the folder" if code == errno.EIO else "free some space"
    with refusal(OutputError, os.strerror(code), advice), open_writer(path) as writer:
        writer._journal = FailingJournal(writer._journal, fail)
        fill(writer, ("a",))
    with refusal(OutputError, os.strerror(code), advice), open_writer(path):
        monkeypatch.setattr(os, "fsync", fail)


class FailingJournal:
    def __init__(self, journal, fail):
        self._journal, self.flush = journal, fail

    def __getattr__(self, name: str):
        return getattr(self._journal, name)


def test_errors_that_are_not_the_disks_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path, 5):
        raise ZeroDivisionError
    with refusal(OutputError, "5 bytes needed", "0 free", "permissions"):
        with disk_errors(tmp_path / "no" / "file", 5):
            (tmp_path / "no" / "file").open("wb")


def test_the_journal_is_lines_of_json_behind_the_fingerprint(path):
    with open_writer(path) as writer:
        fill(writer, ("a",))
    first, *rest = journal(path).read_text().splitlines()
    assert first == "same"
    assert [json.loads(line)["slab"] for line in rest] == ["a"]
