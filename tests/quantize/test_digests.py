"""A source is read once, its checksum made of what is read, and that of a next run of what it did not read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lowvram_quantize.digests as digests_module
import lowvram_quantize.source as source_module
from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.convert import COMPONENTS, convert
from lowvram_quantize.digests import NOTES, SourceDigests
from lowvram_quantize.format import MANIFEST
from lowvram_quantize.source import open_safetensors
from lowvram_quantize.synthetic import write_checkpoint
from tests.quantize.checkpoints import Stop, base_of, contents, lora_of, replace_tensors, run, stop_at


@pytest.fixture
def read(monkeypatch) -> Counter[str]:
    """Bytes that are read of each file from here on, headers apart: of tensors, and for checksums."""
    found: Counter[str] = Counter()
    fromfile, pieces_of = np.fromfile, digests_module.pieces_of

    def counted(file, dtype, count, *, offset):
        raw = fromfile(file, dtype, count, offset=offset)
        found[Path(file.name).name] += raw.size
        return raw

    def counted_pieces(path, offset, nbytes):
        found[path.name] += nbytes
        return pieces_of(path, offset, nbytes)

    monkeypatch.setattr(source_module.np, "fromfile", counted)
    monkeypatch.setattr(digests_module, "pieces_of", counted_pieces)
    return found


def sources_of(artifact: Path) -> dict[str, dict]:
    return {Path(each["file"]).name: each for each in json.loads((artifact / MANIFEST).read_text())["sources"]}


def assert_right(artifact: Path, files: dict[str, Path]) -> None:
    for name, facts in sources_of(artifact).items():
        raw = files[name].read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest()), name


def files_of(checkpoint: Path) -> dict[str, Path]:
    return {path.name: path for path in checkpoint.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint whose Linears have more rows than smoothing looks at."""
    return write_checkpoint(
        tmp_path_factory.mktemp("large"), dim=1024, ffn_dim=4096, num_heads=8, num_layers=2, audio_inject_layers=(1,)
    )


PRECISIONS = [
    {"precision": "int8"},
    {"precision": "int8", "smooth": False},
    {"precision": "fp8"},
    {"precision": "bf16"},
    {"precision": "fp8", "text_encoder": "nf4"},
]


@pytest.mark.parametrize("asked", PRECISIONS, ids=lambda asked: "-".join(map(str, asked.values())))
def test_a_fresh_conversion_reads_its_source_once(tiny, tmp_path, read, asked):
    artifact = convert(tiny.checkpoint, tmp_path / "out", components=COMPONENTS, **asked)
    sources = sources_of(artifact)
    assert_right(artifact, files_of(tiny.checkpoint))
    for name, facts in sources.items():
        smoothed = asked == PRECISIONS[0] and name.startswith("diffusion")  # narrow Linears, of which it sees all rows
        assert facts["bytes"] <= read[name] <= facts["bytes"] * (2.0 if smoothed else 1.02), name


def test_smoothing_reads_some_rows_more(large, tmp_path, read):
    artifact = convert(large, tmp_path / "out", components=("dit",), precision="int8")
    sources = sources_of(artifact)
    assert_right(artifact, files_of(large))
    total = sum(facts["bytes"] for facts in sources.values())
    # 320 of 1024 and of 4096 rows of what is behind norms; of the published shapes, 320 of 5120 and of 13824.
    assert total < sum(read[name] for name in sources) < 1.25 * total
    read.clear()
    artifact = convert(large, tmp_path / "plain", components=("dit",), precision="int8", smooth=False)
    assert total <= sum(read[name] for name in sources) <= 1.05 * total


def test_a_lora_that_lies_in_another_order_is_read_twice_at_the_most(large, tmp_path, read):
    lora = lora_of(large)
    artifact = convert(large, tmp_path / "out", components=("dit",), precision="fp8", lora=lora, lora_alpha=2.0)
    facts = sources_of(artifact)[lora.name]
    assert_right(artifact, files_of(large))
    assert facts["bytes"] <= read[lora.name] <= 2 * facts["bytes"]


@pytest.mark.parametrize("count", [1, 30, 90, 140])
def test_a_continued_conversion_has_the_same_checksums(tiny, out, reference, read, count):
    with pytest.raises(Stop):
        run(tiny.checkpoint, out, progress=stop_at(count))
    read.clear()
    run(tiny.checkpoint, out)
    assert contents(out) == reference
    for name, facts in sources_of(out).items():
        assert read[name] <= facts["bytes"] * 2, name


def test_files_that_are_known_are_not_read_again(tiny, out, read, monkeypatch):
    """Everything was converted when the run was stopped."""

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lowvram_quantize.convert.copy_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny.checkpoint, out)
    read.clear()
    run(tiny.checkpoint, out)
    assert_right(out, files_of(tiny.checkpoint))
    assert not sum(read[name] for name in sources_of(out) if name.startswith("diffusion"))
    assert not (out / NOTES).exists()


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "shard.safetensors"
    save_file({f"t{i}": torch.full((100, 30), float(i)) for i in range(5)}, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ORDERS = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 0, 1, 4, 2], [3], [], [2, 4, 2]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_whatever_is_read_in_which_order_the_checksum_is_that_of_the_file(shard, tmp_path, order):
    table = open_safetensors(shard)
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        for index in order:
            with digests.following():
                found = table[f"t{index}"].read()
            found.zero_()  # it is the reader's
        assert digests.finish() == {shard: sha256(shard)}


def test_what_is_read_apart_is_not_followed(shard, tmp_path):
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        open_safetensors(shard)["t4"].read()
        with digests.following():
            open_safetensors(shard)["t0"].read_rows(50, 50)
        assert digests.finish() == {shard: sha256(shard)}


def test_a_file_that_changes_meanwhile_is_refused(shard, tmp_path):
    table = open_safetensors(shard)
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        with digests.following():
            table["t0"].read()
        os.utime(shard, ns=(1, 1))
        with pytest.raises(CheckpointError, match=r"shard\.safetensors was changed while it was converted"):
            digests.finish()
    assert not (tmp_path / NOTES).exists()


def test_a_source_that_changes_while_it_is_converted_is_refused(checkpoint, out):
    shard = sorted(base_of(checkpoint).glob("*.safetensors"))[0]

    def touch(*_state: object) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        run(checkpoint, out, progress=touch)
    assert not out.exists()


def test_a_note_counts_for_that_very_file_alone(shard, tmp_path):
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        digests.finish()
    replace_tensors(shard, {"t0": torch.ones(3000)})
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        assert digests.finish() == {shard: sha256(shard)}
    assert len((tmp_path / NOTES).read_text().splitlines()) == 2


@pytest.mark.parametrize("torn", ["", "[", '["shard', "[1]\n", "nothing\n", '{"a": 1}\n', "[[], 1, 2, 3]\n"])
def test_notes_that_were_cut_short_do_no_harm(shard, tmp_path, torn):
    notes = tmp_path / NOTES
    with SourceDigests([shard], notes) as digests:
        digests.finish()
    sound = notes.read_text()
    notes.write_text(sound + torn)
    with SourceDigests([shard], notes) as digests:
        assert digests.finish() == {shard: sha256(shard)}
    assert notes.read_text() == sound


def test_a_file_that_ends_too_early_is_said(shard, tmp_path):
    whole = shard.read_bytes()
    table = open_safetensors(shard)
    with SourceDigests([shard], tmp_path / NOTES) as digests:
        shard.write_bytes(whole[:-400])
        with pytest.raises(CheckpointError, match="ends"):
            digests.finish()
        with digests.following(), pytest.raises(CheckpointError, match="truncated"):
            table["t4"].read()
