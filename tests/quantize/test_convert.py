"""A checkpoint to an artifact: refused when something is wrong, never half there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowvram.cli import main
from lowvram_kernels.errors import CheckpointError, ConfigError, InputError, LowvramError, OutputError
from lowvram_quantize import copied
from lowvram_quantize.asked import COMPONENTS
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.source import TEXT_ENCODER_FILE, VAE_FILE
from lowvram_quantize.writer import SlabWriter
from tests.quantize.checkpoints import (
    INDEX,
    SHARDS,
    FullDisk,
    Payload,
    Stop,
    base_of,
    change_dit,
    change_pth,
    contents,
    lora_of,
    refusal,
    replace,
    replace_json,
    replace_pth,
    replace_tensors,
    run,
    spoil,
    stop_at,
)

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def whole(tiny) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    return contents(tiny.artifact("int8"))


def refused(checkpoint: Path, out: Path, *parts: str, kind: type[LowvramError] = CheckpointError, **options) -> None:
    with refusal(kind, *parts, exit_code=kind.exit_code):
        run(checkpoint, out, **options)
    assert not out.exists()
    assert not (out.with_name(out.name + ".partial") / MANIFEST).exists()


def command(checkpoint: Path, out: Path, *options: object) -> Result:
    args = ["convert", "--ckpt-dir", checkpoint, "--out", out, "--lora", lora_of(checkpoint), "--lora-alpha", 2.0]
    return CliRunner().invoke(main, [str(a) for a in (*args, *options)])


def one_line(result: Result, code: int, *parts: str) -> None:
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert last.startswith("lowvram: error: ")
    assert all(part in last for part in parts), last
    assert "Traceback" not in result.output


def test_two_runs_write_the_same_bytes(tiny, out, whole):
    assert run(tiny.checkpoint, out, components=COMPONENTS) == out
    assert contents(out) == whole
    assert not out.with_name("out.partial").exists()


def test_the_command_line_prints_the_folder_alone(tiny, out, whole):
    result = command(tiny.checkpoint, out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert contents(out) == whole


def test_each_component_may_have_its_own_precision(tiny, out):
    run(tiny.checkpoint, out, precision="bf16", dit="int8", vae="fp32", text_encoder="nf4", components=COMPONENTS)
    assert Artifact.open(out).precisions() == {"dit": "int8", "vae": "fp32", "text_encoder": "nf4"}


def test_progress_reaches_what_it_promised(tiny, out):
    seen = []
    run(tiny.checkpoint, out, progress=lambda *state: seen.append(state), components=COMPONENTS)
    done, total, _ = zip(*seen, strict=True)
    base = base_of(tiny.checkpoint)
    table = sum(t.nbytes for shard in SHARDS for t in load_file(base / shard).values())
    table += sum(t.nbytes for f in (VAE_FILE, TEXT_ENCODER_FILE) for t in torch.load(base / f).values())
    assert set(total) == {done[-1]} == {table}
    assert list(done) == sorted(done)


def missing_shard(base: Path) -> None:
    replace(base / SHARDS[1], None)


def truncated_shard(base: Path) -> None:
    replace(base / SHARDS[0], (base / SHARDS[0]).read_bytes()[:-1])


def absent_tensor(base: Path) -> None:
    replace_json(base / INDEX, lambda index: index["weight_map"].update({"blocks.0.absent": SHARDS[0]}))


def absent_shard(base: Path) -> None:
    replace_json(base / INDEX, lambda index: index["weight_map"].update({"head.head.bias": "model-00009.safetensors"}))


def lost_tensor(base: Path) -> None:
    replace_json(base / INDEX, lambda index: index["weight_map"].pop("head.head.bias"))


def wrong_shape(base: Path) -> None:
    change_dit(base, "blocks.2.self_attn.k.weight", lambda t: t[:-1])


def no_config(base: Path) -> None:
    replace(base / "config.json", None)


def broken_config(base: Path) -> None:
    replace_json(base / "config.json", lambda config: config.update(num_layers="many"))


def truncated_pth(base: Path) -> None:
    replace(base / VAE_FILE, (base / VAE_FILE).read_bytes()[:-100])


def list_pth(base: Path) -> None:
    replace_pth(base / VAE_FILE, [torch.ones(2)])


def nested_pth(base: Path) -> None:
    replace_pth(base / TEXT_ENCODER_FILE, {"weights": torch.load(base / TEXT_ENCODER_FILE)})


def vae_shape(base: Path) -> None:
    change_pth(base / VAE_FILE, "conv1.weight", lambda t: t[:-1])


def no_tokenizer(base: Path) -> None:
    replace(base / "google" / "umt5-xxl" / "tokenizer.json", None)


def no_audio_weights(base: Path) -> None:
    replace(base / "wav2vec2-large-xlsr-53-english" / "model.safetensors", None)


@pytest.mark.parametrize(
    ("component", "damage", "parts"),
    [
        ("dit", missing_shard, [SHARDS[1], "missing", "fetch"]),
        ("dit", truncated_shard, [SHARDS[0], "truncated", "fetch"]),
        ("dit", absent_tensor, [INDEX, "blocks.0.absent", SHARDS[0], "fetch"]),
        ("dit", absent_shard, ["model-00009.safetensors", "missing", "fetch"]),
        ("dit", lost_tensor, ["lacks 1 tensors", "head.head.bias", "check"]),
        ("dit", wrong_shape, ["blocks.2.self_attn.k.weight", "[79, 80]", "[80, 80]", "check"]),
        ("dit", no_config, ["config.json", "expected the folder of the published checkpoint"]),
        ("dit", broken_config, ["config.json", "num_layers", "many"]),
        ("vae", truncated_pth, [VAE_FILE, "truncated", "fetch"]),
        ("vae", list_pth, [VAE_FILE, "list", "expected a dictionary", "fetch"]),
        ("vae", vae_shape, [VAE_FILE, "quant_conv.weight", "shape", "check"]),
        ("text_encoder", nested_pth, [TEXT_ENCODER_FILE, "dict of dict", "expected a dictionary", "fetch"]),
        ("tokenizer", no_tokenizer, ["tokenizer.json", "copy the published folder"]),
        ("audio_encoder", no_audio_weights, ["model.safetensors", "missing", "fetch"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint(checkpoint, out, component, damage, parts):
    damage(base_of(checkpoint))
    refused(checkpoint, out, *parts, components=("tokenizer", component))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["blocks.1.ffn.2.weight", "blocks.3.norm3.bias", "frame_packer.proj_4x.weight"])
def test_a_dit_weight_that_is_not_finite(checkpoint, out, name, value):
    change_dit(base_of(checkpoint), name, spoil(value))
    refused(checkpoint, out, name, "NaN or infinity", "expected finite", "fetch")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("component", "name", "ours"),
    [
        ("vae", "decoder.conv1.weight", "decoder.conv_in.weight"),
        ("vae", "decoder.conv1.bias", "decoder.conv_in.bias"),
        ("text_encoder", "blocks.1.attn.v.weight", "encoder.block.1.layer.0.SelfAttention.v.weight"),
        ("text_encoder", "token_embedding.weight", "shared.weight"),
    ],
)
def test_an_encoders_weight_that_is_not_finite(checkpoint, out, component, name, ours, value):
    file = VAE_FILE if component == "vae" else TEXT_ENCODER_FILE
    change_pth(base_of(checkpoint) / file, name, spoil(value))
    refused(checkpoint, out, ours, "NaN or infinity", "expected finite", "fetch", components=(component,))


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_no_precision_lets_nan_through(checkpoint, out, precision):
    change_dit(base_of(checkpoint), "blocks.1.ffn.2.weight", spoil(NAN))
    refused(checkpoint, out, "blocks.1.ffn.2.weight", "NaN", precision=precision)


def test_a_lora_that_does_not_fit(checkpoint, out):
    lora = load_file(lora_of(checkpoint))
    first = next(name for name in lora if ".lora_A" in name)
    for tensors, parts in (
        ({f"other.{name}": t for name, t in lora.items()}, ["match nothing", "expected", "use the LoRA"]),
        (lora | {first: lora[first][:, :-1]}, ["lora_A", "do not fit", "expected [r, in]"]),
        ({n: t for n, t in lora.items() if ".lora_B" not in n}, ["only lora_A", "expected lora_A and lora_B"]),
        (lora | {first: spoil(NAN)(lora[first].clone())}, ["NaN or infinity"]),
    ):
        replace_tensors(lora_of(checkpoint), tensors)
        refused(checkpoint, out, *parts)
    replace(lora_of(checkpoint), None)
    refused(checkpoint, out, "liveavatar.safetensors", "missing")


@pytest.mark.parametrize("file", [VAE_FILE, TEXT_ENCODER_FILE])
def test_nothing_in_a_pth_is_run(checkpoint, out, file, tmp_path):
    mark, path = tmp_path / "was-run", base_of(checkpoint) / file
    replace_pth(path, torch.load(path) | {"extra": Payload(mark)})
    one_line(command(checkpoint, out), 2, file, "nothing in a file is run", "fetch the published")
    assert not mark.exists()
    assert not out.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was a live one


def test_a_missing_shard_on_the_command_line(checkpoint, out):
    missing_shard(base_of(checkpoint))
    one_line(command(checkpoint, out), 2, SHARDS[1], "missing", "fetch the checkpoint again")
    assert not out.exists()


def full(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_at_all(monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)


def no_room_for_all_slabs(monkeypatch) -> None:
    start = SlabWriter.__init__

    def started(self, *args) -> None:
        start(self, *args)
        self._file = FullDisk(self._file, 700_000)

    monkeypatch.setattr(SlabWriter, "__init__", started)


def no_room_for_the_tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "copyfile", full)


def no_room_for_the_audio_encoder(monkeypatch) -> None:
    def save(*_args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(copied, "save_file", save)


def no_room_for_the_manifest(monkeypatch) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(MANIFEST):
            full()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "disk",
    [
        no_room_at_all,
        no_room_for_all_slabs,
        no_room_for_the_audio_encoder,
        no_room_for_the_tokenizer,
        no_room_for_the_manifest,
    ],
)
def test_a_disk_that_fills(tiny, out, monkeypatch, disk, reference):
    with monkeypatch.context() as patched:
        disk(patched)
        with refusal(OutputError, "No space left", "bytes needed", "free", "run again"):
            run(tiny.checkpoint, out)
        assert not out.exists()
    run(tiny.checkpoint, out)
    assert contents(out) == reference


@pytest.mark.parametrize("disk", [no_room_for_all_slabs, no_room_for_the_audio_encoder])
def test_a_disk_that_fills_on_the_command_line(tiny, out, monkeypatch, disk):
    disk(monkeypatch)
    one_line(command(tiny.checkpoint, out), 2, "No space left", "bytes needed", "run again")
    assert not out.exists()
    assert not (out.with_name("out.partial") / MANIFEST).exists()


def test_a_parent_folder_that_does_not_exist(tiny, tmp_path):
    out = tmp_path / "no" / "out"
    refused(tiny.checkpoint, out, str(out), str(out.parent), "does not exist", "create it first", kind=InputError)
    one_line(command(tiny.checkpoint, out), 2, str(out.parent), "create it first")
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_that_does_not_exist(tmp_path, out):
    refused(tmp_path / "none", out, "none", "expected the folder of the published checkpoint", lora=None)


def test_what_is_there_already_is_left_alone(tiny, out, tmp_path):
    (out / "photos").mkdir(parents=True)
    with refusal(ConfigError, str(out), "no artifact", "choose another name"):
        run(tiny.checkpoint, out, overwrite=True)
    assert contents(tmp_path) == {}
    (tmp_path / "file").write_text("mine")
    with refusal(ConfigError, "file", "choose another name"):
        run(tiny.checkpoint, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_without_a_name_of_its_own(tiny, tmp_path, monkeypatch, name):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    with refusal(ConfigError, name, "expected"):
        run(tiny.checkpoint, Path(name))
    assert contents(tmp_path) == {}


def test_a_finished_artifact_is_replaced_when_asked_to_and_not_before_the_new_one_is_whole(tiny, out, reference):
    run(tiny.checkpoint, out, precision="fp8")
    old = contents(out)
    with refusal(ConfigError, str(out), "finished artifact", "--overwrite"):
        run(tiny.checkpoint, out)
    with pytest.raises(Stop):
        run(tiny.checkpoint, out, overwrite=True, progress=stop_at(100))
    assert contents(out) == old
    run(tiny.checkpoint, out, overwrite=True)
    assert contents(out) == reference
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_become_the_artifact(tiny, out, reference):
    out.mkdir()
    run(tiny.checkpoint, out)
    assert contents(out) == reference
