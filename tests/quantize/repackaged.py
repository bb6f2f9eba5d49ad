"""The tiny checkpoint in the forms that people have: repackaged from the published layout, with nothing trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lowvram_models.names import umt5_name
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, TEXT_ENCODER_FILE, TOKENIZER_FOLDER, VAE_FILE
from tests.quantize.checkpoints import base_of, load_dit, lora_of

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn


def save(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def dit_of(checkpoint: Path) -> Tensors:
    return load_dit(base_of(checkpoint))


def text_encoder_of(checkpoint: Path) -> Tensors:
    """Under transformers' names, as ComfyUI has it, with what lies beside it there."""
    published = torch.load(base_of(checkpoint) / TEXT_ENCODER_FILE, weights_only=True)
    tensors = {str(umt5_name(name)): tensor for name, tensor in published.items()}
    return tensors | {"spiece_model": torch.arange(9, dtype=torch.uint8)}


def vae_of(checkpoint: Path) -> Tensors:
    return torch.load(base_of(checkpoint) / VAE_FILE, weights_only=True)


def scaled(tensors: Tensors, layers: Callable[[str], bool]) -> Tensors:
    """ComfyUI's scaled fp8: one scale a layer, so that its largest value is fp8's largest."""
    out: Tensors = {"scaled_fp8": torch.zeros(2, dtype=E4M3)}
    for name, tensor in tensors.items():
        out[name] = tensor
        if layers(name):
            scale = tensor.float().abs().amax() / 448
            out[name] = (tensor.float() / scale).to(E4M3)
            out[name.removesuffix("weight") + "scale_weight"] = scale
            out[name.removesuffix("weight") + "scale_input"] = torch.ones(())
    return out


def is_layer(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(
        (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".0.weight")
    )


def down_up(checkpoint: Path, alpha: float, prefix: str = "diffusion_model.") -> Tensors:
    """The LoRA as ComfyUI's tools write it; its whole tensor stays as it is."""
    out = {}
    for name, tensor in load_file(lora_of(checkpoint)).items():
        layer = name.partition(".lora_")[0]
        if ".lora_A" in name:
            out[f"{prefix}{layer}.lora_down.weight"] = tensor
            out[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
        elif ".lora_B" in name:
            out[f"{prefix}{layer}.lora_up.weight"] = tensor
        else:
            out[prefix + name] = tensor
    return out


def copy_rest(checkpoint: Path, folder: Path, *, config: bool = True) -> None:
    """Audio encoder, tokenizer and the DiT's config.json, which are never repackaged."""
    for name in (AUDIO_ENCODER_FOLDER, TOKENIZER_FOLDER):
        shutil.copytree(base_of(checkpoint) / name, folder / name, copy_function=os.link)
    if config:
        shutil.copyfile(base_of(checkpoint) / "config.json", folder / "config.json")


def comfy_folder(checkpoint: Path, folder: Path) -> Path:
    """ComfyUI's ``models``: nothing lies under its published name, and nothing is a .pth."""
    dit = prefixed("model.diffusion_model.", scaled(dit_of(checkpoint), is_layer))
    save(folder / "diffusion_models" / "wan2.2_s2v_14B_fp8_scaled.safetensors", dit)
    save(folder / "text_encoders" / "umt5_xxl_bf16.safetensors", text_encoder_of(checkpoint))
    save(folder / "vae" / "wan_2.1_vae.safetensors", vae_of(checkpoint))
    save(folder / "loras" / "live_avatar.safetensors", down_up(checkpoint, 2.0))
    copy_rest(checkpoint, folder)
    return folder


def plain_folder(checkpoint: Path, folder: Path) -> Path:
    """The same bf16 values as published, in single files under other names."""
    save(folder / "some_dit.safetensors", prefixed("diffusion_model.", dit_of(checkpoint)))
    save(folder / "t5.safetensors", text_encoder_of(checkpoint))
    save(folder / "a-vae.safetensors", vae_of(checkpoint))
    copy_rest(checkpoint, folder)
    return folder


def hugging_face_cache(source: Path, root: Path, *, main: bool = True) -> Path:
    """The published folder as a cache has it: links to blobs, and a ref that names the snapshot."""
    model = root / "models--Wan-AI--Wan2.2-S2V-14B"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob, link = blobs / f"{number:064x}", snapshot / path.relative_to(source)
        os.link(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("0" * 40)
    return model
