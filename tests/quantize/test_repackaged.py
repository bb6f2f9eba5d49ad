"""Checkpoints as people have them: repackaged, scaled, wrapped, cached. What is the same converts to the same bytes."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lowvram.cli import main
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import ConfigError
from lowvram_quantize import store
from lowvram_quantize.convert import convert
from lowvram_quantize.format import MANIFEST, Artifact
from lowvram_quantize.inspect import describe, summary
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, TensorRef
from lowvram_quantize.tables import open_table
from tests.golden_cases import relative_error
from tests.quantize.checkpoints import Stop, base_of, contents, refusal, stop_at
from tests.quantize.repackaged import (
    comfy_folder,
    copy_rest,
    dit_of,
    down_up,
    hugging_face_cache,
    is_layer,
    plain_folder,
    prefixed,
    save,
    scaled,
    text_encoder_of,
    vae_of,
)
from tests.quantize.test_gguf import write as write_gguf


@pytest.fixture(scope="module")
def plain(tiny) -> dict[str, bytes]:
    """What the published layout converts to in bf16, without a LoRA."""
    out = tiny.root / "plain-bf16"
    convert(tiny.checkpoint, out, precision="bf16")
    return contents(out)


def same_artifact(out: Path, plain: dict[str, bytes], *files: str) -> None:
    found = contents(out)
    for name in files or sorted(set(plain) - {MANIFEST}):
        assert found[name] == plain[name], name


def test_a_comfyui_set_gives_the_plain_ones_latents_as_far_as_fp8_allows(tiny, tmp_path):
    folder = comfy_folder(tiny.checkpoint, tmp_path / "models")
    out = convert(folder, tmp_path / "out", precision="fp32", lora=folder / "loras" / "live_avatar.safetensors")
    plain = tiny.artifact("fp32")
    # Everything but the scaled layers has the same bytes.
    ours, theirs = Artifact.open(out).manifest["components"], Artifact.open(plain).manifest["components"]
    for name in ("vae", "text_encoder"):
        assert [s["sha256"] for s in ours[name]["slabs"]] == [s["sha256"] for s in theirs[name]["slabs"]]
    weights = [load_file(folder / "dit.safetensors") for folder in (out, plain)]
    for name, origin in ((n, t["from"]) for n, t in ours["dit"]["tensors"].items()):
        off = relative_error(weights[0][name], weights[1][name])
        assert (0.01 < off < 0.04) if origin["kind"] == "F8_E4M3 times scale_weight" else off == 0, (name, off)
    latents = []
    for artifact in (out, plain):
        pipeline = AvatarPipeline.from_artifact(artifact, device="cpu")
        latents.append(first_latents(pipeline, tiny.request(num_clip=1)))
    # Weights in e4m3 are off by 2.6 % (norm); without their scales the error would be above 1.
    assert 0.001 < relative_error(*latents) < 0.06


def first_latents(pipeline: AvatarPipeline, request) -> torch.Tensor:
    recorder = TensorRecorder()
    next(pipeline.stream(request, recorder=recorder))
    tensors = recorder.tensors()
    return tensors["latents"]


def named_one_by_one(tiny, tmp_path: Path) -> dict:
    folder = plain_folder(tiny.checkpoint, tmp_path / "files")
    (folder / AUDIO_ENCODER_FOLDER).rename(tmp_path / "speech")
    (folder / "google" / "umt5-xxl").rename(tmp_path / "words")
    return {
        "ckpt_dir": None, "dit_file": folder / "some_dit.safetensors", "vae_file": folder / "a-vae.safetensors",
        "text_encoder_file": folder / "t5.safetensors", "audio_encoder_dir": tmp_path / "speech",
        "tokenizer_dir": tmp_path / "words",
    }  # fmt: skip


def found_by_what_they_hold(tiny, tmp_path: Path) -> dict:
    return {"ckpt_dir": plain_folder(tiny.checkpoint, tmp_path / "files")}


def beside_the_published_folder(tiny, tmp_path: Path) -> dict:
    path = save(tmp_path / "x.safetensors", prefixed("transformer.", dit_of(tiny.checkpoint)))
    shutil.copyfile(base_of(tiny.checkpoint) / "config.json", tmp_path / "config.json")
    return {"ckpt_dir": tiny.checkpoint, "dit_file": path}


def without_a_prefix(tiny, tmp_path: Path) -> dict:
    return {"ckpt_dir": tiny.checkpoint, "dit_file": save(tmp_path / "x.safetensors", dit_of(tiny.checkpoint))}


def behind_module(tiny, tmp_path: Path) -> dict:
    tensors = {"module": prefixed("module.", dit_of(tiny.checkpoint))}
    torch.save(tensors, tmp_path / "x.pt")
    return {"ckpt_dir": tiny.checkpoint, "dit_file": tmp_path / "x.pt"}


def wrapped_encoders(tiny, tmp_path: Path) -> dict:
    torch.save({"state_dict": prefixed("model.", vae_of(tiny.checkpoint)), "epoch": 3}, tmp_path / "v.ckpt")
    torch.save({"model": text_encoder_of(tiny.checkpoint)}, tmp_path / "t.bin")
    return {"ckpt_dir": tiny.checkpoint, "vae_file": tmp_path / "v.ckpt", "text_encoder_file": tmp_path / "t.bin"}


def all_in_one_file(tiny, tmp_path: Path) -> dict:
    tensors = prefixed("model.diffusion_model.", dit_of(tiny.checkpoint)) | prefixed("vae.", vae_of(tiny.checkpoint))
    tensors |= prefixed("text_encoders.umt5xxl.transformer.", text_encoder_of(tiny.checkpoint))
    save(tmp_path / "one" / "everything.safetensors", tensors)
    copy_rest(tiny.checkpoint, tmp_path / "one")
    return {"ckpt_dir": tmp_path / "one"}


def cache_of_the_model(tiny, tmp_path: Path) -> dict:
    return {"ckpt_dir": hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")}


def cache_root(tiny, tmp_path: Path) -> dict:
    hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")
    (tmp_path / "hub" / "models--other--bert" / "snapshots").mkdir(parents=True)
    return {"ckpt_dir": tmp_path / "hub"}


def cache_without_a_ref(tiny, tmp_path: Path) -> dict:
    return {"ckpt_dir": hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub", main=False)}


def cache_home(tiny, tmp_path: Path) -> dict:
    hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "huggingface" / "hub")
    return {"ckpt_dir": tmp_path / "huggingface"}


def snapshots_of_a_cache(tiny, tmp_path: Path) -> dict:
    """Of two, that which the ref names."""
    model = hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")
    (model / "snapshots" / ("1" * 40)).mkdir()
    return {"ckpt_dir": model / "snapshots"}


def a_snapshot(tiny, tmp_path: Path) -> dict:
    return {"ckpt_dir": hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub") / "snapshots" / ("0" * 40)}


def cache_with_an_empty_ref(tiny, tmp_path: Path) -> dict:
    model = hugging_face_cache(base_of(tiny.checkpoint), tmp_path / "hub")
    (model / "refs" / "main").write_text("\n")
    return {"ckpt_dir": model}


def links_to_another_disk(tiny, tmp_path: Path) -> dict:
    """As people keep several programs' models together: a folder of links, the published one two levels down."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "video").symlink_to(tiny.checkpoint, target_is_directory=True)
    return {"ckpt_dir": tmp_path / "models"}


def gguf_of_bf16(tiny, tmp_path: Path) -> dict:
    raw = {name: t.contiguous().view(torch.uint8).numpy() for name, t in dit_of(tiny.checkpoint).items() if t.dim() < 5}
    folded = {n: t.flatten(1).contiguous() for n, t in dit_of(tiny.checkpoint).items() if t.dim() == 5}
    raw |= {name: t.view(torch.uint8).numpy() for name, t in folded.items()}
    path = write_gguf(tmp_path / "x.gguf", raw, dict.fromkeys(raw, gguf.GGMLQuantizationType.BF16))
    return {"ckpt_dir": tiny.checkpoint, "dit_file": path}


@pytest.mark.parametrize(
    "make",
    [
        named_one_by_one, found_by_what_they_hold, beside_the_published_folder, without_a_prefix, behind_module,
        wrapped_encoders, all_in_one_file, cache_of_the_model, cache_root, cache_without_a_ref, cache_home,
        snapshots_of_a_cache, a_snapshot, cache_with_an_empty_ref, links_to_another_disk, gguf_of_bf16,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_the_same_values_repackaged_are_the_same_artifact(tiny, tmp_path, plain, make):
    same_artifact(convert(out=tmp_path / "out", precision="bf16", **make(tiny, tmp_path)), plain)


def q8_text_encoder(tiny, tmp_path: Path) -> Path:
    """As llama.cpp names them; widths of 32 and 64 are whole blocks."""
    names = {"shared": "token_embd", "final_layer_norm": "enc.output_norm", "SelfAttention.q": "attn_q",
             "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o",
             "SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.layer_norm": "attn_norm",
             "layer.1.layer_norm": "ffn_norm", "wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}  # fmt: skip
    tensors, types = {}, {}
    for name, tensor in text_encoder_of(tiny.checkpoint).items():
        short = next((v for k, v in names.items() if name.removesuffix(".weight").endswith(k)), None)
        if short is None:
            continue
        block = name.split(".")[2] if ".block." in name else None
        theirs = f"enc.blk.{block}.{short}.weight" if block else f"{short}.weight"
        values = tensor.float().numpy()
        whole = values.ndim == 2 and values.shape[1] % 32 == 0
        tensors[theirs] = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0) if whole else values
        types[theirs] = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F32
    return write_gguf(tmp_path / "t5.gguf", tensors, types, arch="t5encoder")


def test_a_gguf_of_the_text_encoder(tiny, tmp_path):
    out = convert(
        tiny.checkpoint, tmp_path / "out", precision="fp32", components=("text_encoder",),
        text_encoder_file=q8_text_encoder(tiny, tmp_path),
    )  # fmt: skip
    stored, published = load_file(out / "text_encoder.safetensors"), text_encoder_of(tiny.checkpoint)
    for name in set(published) - {"spiece_model"}:
        assert relative_error(stored[name], published[name].float()) < 0.01, name
    kinds = {t["from"]["kind"] for t in Artifact.open(out).manifest["components"]["text_encoder"]["tensors"].values()}
    assert kinds == {"GGUF Q8_0", "F32"}


def reads(monkeypatch) -> list[int]:
    """Bytes of every read of a tensor's values from here on."""
    counts: list[int] = []
    read_bytes = TensorRef.read_bytes

    def counted(self, start: int, nbytes: int):
        counts.append(nbytes)
        return read_bytes(self, start, nbytes)

    monkeypatch.setattr(TensorRef, "read_bytes", counted)
    return counts


@pytest.mark.parametrize("form", ["scaled fp8", "GGUF"])
def test_tensors_are_read_in_pieces(tiny, tmp_path, monkeypatch, form):
    if form == "GGUF":
        chosen = {"text_encoder_file": q8_text_encoder(tiny, tmp_path), "components": ("text_encoder",)}
    else:
        path = save(tmp_path / "x.safetensors", scaled(dit_of(tiny.checkpoint), is_layer))
        chosen = {"dit_file": path, "components": ("dit",)}
    whole = convert(tiny.checkpoint, tmp_path / "whole", **chosen)
    counts = reads(monkeypatch)
    monkeypatch.setattr(store, "CHUNK_VALUES", 1024)
    convert(tiny.checkpoint, tmp_path / "pieces", **chosen)
    # A row of the widest tensor, or 1024 values of at most 4 bytes: never a whole matrix.
    limit = 5000 if form == "GGUF" else 8192
    assert max(counts) <= limit < max(ref.nbytes for ref in open_table(next(iter(chosen.values()))).values())
    same_artifact(tmp_path / "pieces", contents(whole))


@pytest.mark.parametrize("change", ["the weight", "the alpha", "the file"])
def test_a_run_interrupted_with_other_loras_is_not_continued(tiny, tmp_path, change):
    whole = {n: t for n, t in load_file(tiny.lora).items() if "lora_" in n}
    first = save(tmp_path / "a.safetensors", whole)
    then = {"the weight": (f"{first}:0.5", 2.0), "the alpha": (first, 3.0)}
    other = save(tmp_path / "c.safetensors", {n: -t for n, t in whole.items()})
    lora, alpha = then.get(change, (other, 2.0))
    for options in ({"lora": first, "lora_alpha": 2.0, "progress": stop_at(110)}, {"lora": lora, "lora_alpha": alpha}):
        with contextlib.suppress(Stop):
            convert(tiny.checkpoint, tmp_path / "out", components=("dit",), **options)
    convert(tiny.checkpoint, tmp_path / "fresh", components=("dit",), lora=lora, lora_alpha=alpha)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_manifest_says_what_each_tensor_came_from(tiny, tmp_path):
    folder = comfy_folder(tiny.checkpoint, tmp_path / "models")
    out = convert(folder, tmp_path / "out", components=("dit", "vae"))
    components = Artifact.open(out).manifest["components"]
    tensors = components["dit"]["tensors"]
    file = "diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors"
    assert tensors["blocks.0.self_attn.q.weight"]["from"] == {
        "file": file, "tensor": "model.diffusion_model.blocks.0.self_attn.q.weight",
        "kind": "F8_E4M3 times scale_weight", "scale": ["model.diffusion_model.blocks.0.self_attn.q.scale_weight"],
    }  # fmt: skip
    assert tensors["head.head.bias"]["from"] == {
        "file": file, "tensor": "model.diffusion_model.head.head.bias", "kind": "BF16"
    }  # fmt: skip
    assert components["vae"]["tensors"]["decoder.conv_in.bias"]["from"]["tensor"] == "decoder.conv1.bias"


def test_the_command_line_takes_single_files(tiny, tmp_path, plain):
    options = named_one_by_one(tiny, tmp_path)
    options.pop("ckpt_dir")
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(main, ["convert", *words, "--out", str(tmp_path / "out"), "--precision", "bf16"])
    assert result.exit_code == 0, result.output
    same_artifact(tmp_path / "out", plain)
    result = CliRunner().invoke(main, ["convert", "--out", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "--ckpt-dir, or --dit-file" in result.stderr


def test_several_loras_on_the_command_line(tiny, tmp_path):
    """Twice half of an update is the update; the manifest names both."""
    lora = {n: t for n, t in load_file(tiny.lora).items() if "lora_" in n}
    first, second = (save(tmp_path / name / "adapter.safetensors", lora) for name in ("a", "b:0.7"))
    whole = save(tmp_path / "whole.safetensors", lora)
    arguments = ["convert", "--ckpt-dir", tiny.checkpoint, "--precision", "fp32", "--lora-alpha", "2"]
    for out, loras in (("one", [whole]), ("two", [f"{first.parent}:0.5", f"{second}:0.5"])):
        named = [word for one in loras for word in ("--lora", one)]
        result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--out", tmp_path / out, *named)])
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / out / "dit.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)
    facts = describe(tmp_path / "two")
    assert [lora["weight"] for lora in facts["loras"]] == [0.5, 0.5]
    assert summary(facts).count("LoRA adapter.safetensors merged: weight 0.5, alpha 2, rank 4") == 2


def test_an_alpha_that_no_lora_needs_is_refused(tiny, tmp_path):
    path = save(tmp_path / "lora.safetensors", down_up(tiny.checkpoint, 2.0))
    with refusal(ConfigError, "--lora-alpha is 32", "states its own (2)", "path:weight"):
        convert(tiny.checkpoint, tmp_path / "out", lora=path, lora_alpha=32.0, components=("dit",))
