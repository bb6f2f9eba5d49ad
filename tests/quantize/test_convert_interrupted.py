"""A conversion that is stopped is continued: what is done stays, and nothing of another one is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import lowvram_quantize.convert as module
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.synthetic import write_checkpoint
from tests.quantize.checkpoints import (
    Stop,
    base_of,
    change_dit,
    contents,
    journaled,
    lora_of,
    replace_tensors,
    run,
    stop_at,
    tensors_left,
)


@pytest.mark.parametrize("count", [1, 70, 140])
def test_an_interrupted_run_is_continued(tiny, out, reference, written, count):
    with pytest.raises(Stop):
        run(tiny.checkpoint, out, progress=stop_at(count))
    assert not out.exists()
    finished = journaled(out.with_name("out.partial"))
    assert len(written) == count
    written.clear()
    run(tiny.checkpoint, out)
    assert contents(out) == reference
    assert len(written) == tensors_left(out, finished)
    assert count < 70 or len(written) < len(tensors_of(out, "dit"))


def test_a_run_interrupted_again_and_again(tiny, out, reference, written):
    while True:
        try:
            run(tiny.checkpoint, out, progress=stop_at(len(written) % 40 + 70))
        except Stop:
            continue
        break
    assert contents(out) == reference


def test_a_run_interrupted_while_it_copies(tiny, out, reference, written, monkeypatch):
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "copy_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny.checkpoint, out)
    assert not out.exists()
    written.clear()
    run(tiny.checkpoint, out)
    assert written == []
    assert contents(out) == reference


TWO = ("dit", "text_encoder")


def interrupt_late(checkpoint: Path, out: Path, **options: object) -> None:
    """End a run in the text encoder: the DiT is done."""

    def progress(_done: int, _total: int, what: str) -> None:
        if what.startswith("text_encoder"):
            raise Stop

    with pytest.raises(Stop):
        run(checkpoint, out, progress=progress, components=TWO, **options)


def tensors_of(artifact: Path, component: str) -> set[str]:
    return set(Artifact.open(artifact).component(component).facts["tensors"])


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 3.0}, {"lora": None}, {"dit": "fp8"}, {"rotate": False}, {"smooth": False}]
)
def test_other_options_do_not_reuse_what_they_change(tiny, out, written, tmp_path, change):
    interrupt_late(tiny.checkpoint, out)
    written.clear()
    run(tiny.checkpoint, out, components=TWO, **change)
    assert set(written) >= tensors_of(out, "dit")
    run(tiny.checkpoint, tmp_path / "fresh", components=TWO, **change)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, 16), (16, 64), (64, 16), (64, 32)])
def test_an_interrupted_rotation_is_not_continued_by_another(out, written, tmp_path, first, then):
    checkpoint = write_checkpoint(
        tmp_path / "small", dim=320, ffn_dim=384, num_heads=5, num_layers=1, audio_inject_layers=(0,)
    )
    interrupt_late(checkpoint, out, rotate=first)
    written.clear()
    run(checkpoint, out, components=TWO, rotate=then)
    assert set(written) >= tensors_of(out, "dit")
    run(checkpoint, tmp_path / "fresh", components=TWO, rotate=then)
    assert contents(out) == contents(tmp_path / "fresh")


def test_options_of_one_component_let_the_others_be(tiny, out, written):
    interrupt_late(tiny.checkpoint, out)
    written.clear()
    run(tiny.checkpoint, out, components=TWO, text_encoder="bf16")
    assert set(written) == tensors_of(out, "text_encoder")


def test_another_source_is_not_taken_for_the_old_one(checkpoint, out, written, tmp_path):
    interrupt_late(checkpoint, out)
    # The same size, names and shapes: only the time of the file tells.
    change_dit(base_of(checkpoint), "blocks.0.self_attn.q.weight", lambda t: t * 2)
    written.clear()
    run(checkpoint, out, components=TWO)
    assert set(written) >= tensors_of(out, "dit")
    run(checkpoint, tmp_path / "fresh", components=TWO)
    assert contents(out) == contents(tmp_path / "fresh")


def test_another_lora_is_not_taken_for_the_old_one(checkpoint, out, tmp_path):
    interrupt_late(checkpoint, out)
    replace_tensors(lora_of(checkpoint), {n: t * 2 for n, t in load_file(lora_of(checkpoint)).items()})
    run(checkpoint, out, components=TWO)
    run(checkpoint, tmp_path / "fresh", components=TWO)
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_an_interrupted_run_left_is_no_part_of_the_artifact(tiny, out, tmp_path):
    interrupt_late(tiny.checkpoint, out)
    partial = out.with_name("out.partial")
    (partial / "audio_encoder").mkdir(exist_ok=True)
    (partial / "audio_encoder" / ".tmpAbCdEf").write_bytes(b"half of a file")
    run(tiny.checkpoint, out, components=("dit",))
    assert set(contents(out)) == {"dit.safetensors", MANIFEST}
    assert sorted(p.name for p in out.iterdir()) == ["dit.safetensors", MANIFEST]
