"""A tiny random checkpoint in the published layout: every step runs on it, on any machine, and nothing is trained.

What each file holds is said once, as names and shapes: the DiT's come from the model, whose state dict has the
published names; those of the VAE, the text encoder and the LoRA are written out here (model-spec sections 1 and 6).
Every tensor has a random generator of its own, seeded with the seed and the tensor's name, so that neither the order
nor the number of shards changes a value, and no more than one shard is in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram_kernels.errors import ConfigError, InputError, OutputError
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_quantize.presets import dit_config
from lowvram_quantize.synthetic_encoders import (
    t5_shapes,
    text_tokenizer,
    vae_shapes,
    wav2vec2_model,
    wav2vec2_preprocessor,
)

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForCTC

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

BASE_FOLDER = "Wan2.2-S2V-14B"
LORA_FOLDER = "LiveAvatar"
LORA_SUFFIXES = ("q", "k", "v", "o", "ffn.0", "ffn.2")
"""The LoRA is on every Linear whose name ends in one of these."""
MARKER = "synthetic.json"
"""The file that says that a checkpoint beside it was made here."""
DIT_FILE = "diffusion_pytorch_model"
# Tensors that are used as they are, not multiplied into a sum: a width to spread them by would mean nothing.
_PLAIN_STD = {"modulation": 0.1, "padding_tokens": 0.1, "trainable_cond_mask.weight": 0.1, "masked_spec_embed": 0.3}
_EMBEDDING = "token_embedding.weight"
_GAIN_STD = 0.1
_BIAS_STD = 0.05


def write_checkpoint(
    root: str | Path,
    *,
    seed: int = 0,
    dim: int = 80,
    ffn_dim: int = 216,
    num_heads: int = 5,
    num_layers: int = 4,
    audio_inject_layers: tuple[int, ...] = (0, 2),
    text_dim: int = 32,
    text_len: int = 48,
    freq_dim: int = 32,
    audio_dim: int = 24,
    vae_base_dim: int = 8,
    shards: int = 2,
    lora_rank: int = 4,
) -> Path:
    """Write ``root/Wan2.2-S2V-14B`` and ``root/LiveAvatar/liveavatar.safetensors``; return ``root``.

    DiT, LoRA and text encoder are bfloat16, VAE and audio encoder float32. Weights keep activations near 1, and the
    VAE decodes random latents to frames that are neither constant nor saturated. The same arguments give the same
    bytes. Both folders appear whole or not at all; what an earlier call wrote there is replaced.

    Args:
        root: folder to write in, made where it does not exist.
        seed: of all weights.
        dim, ffn_dim, num_heads, num_layers, audio_inject_layers, text_len, freq_dim: of the DiT.
        text_dim: width of the text encoder, a multiple of 4.
        audio_dim: width of the audio encoder, a multiple of 4; its 24 layers are fixed.
        vae_base_dim: rows of the VAE's first convolution (96 in the published one).
        shards: files of the DiT.
        lora_rank: of every pair; with an alpha of half of it the LoRA merges as strongly as the published one.

    Raises:
        ConfigError: shapes that do not make a model.
        InputError: ``root`` holds a checkpoint that did not come from here.
        OutputError: the folder cannot be written.
    """
    root = Path(root)
    settings = {
        "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "num_layers": num_layers, "text_dim": text_dim,
        "text_len": text_len, "freq_dim": freq_dim, "audio_dim": audio_dim,
        "audio_inject_layers": list(audio_inject_layers),
    }  # fmt: skip
    _check_widths(text_dim=text_dim, audio_dim=audio_dim, vae_base_dim=vae_base_dim, shards=shards, rank=lora_rank)
    config = dit_config(settings)
    model = _meta_dit(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if shards > len(shapes):
        raise ConfigError(f"shards is {shards}, but the DiT has {len(shapes)} tensors; ask for that many at most")
    refuse_foreign(root)
    draw = Draw(seed)
    with _whole(root, {"seed": seed, "lora_rank": lora_rank} | settings) as (base, lora):
        _write_dit(base, draw, config, shapes, shards)
        _write_vae(base, draw, vae_base_dim)
        _write_text_encoder(base, draw, text_dim)
        _write_audio_encoder(base, draw, audio_dim)
        save_file(_lora(model, draw, lora_rank), lora / "liveavatar.safetensors", {"format": "pt"})
    log.info("wrote a random checkpoint of %d DiT tensors in %s", len(shapes), root)
    return root


@contextlib.contextmanager
def _whole(root: Path, facts: dict[str, Any]) -> Iterator[tuple[Path, Path]]:
    """Folders of base and LoRA to write in, which come to ``root`` as a whole, with what they were made of."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
            folders = Path(partial, BASE_FOLDER), Path(partial, LORA_FOLDER)
            for folder in folders:
                folder.mkdir()
            yield folders
            publish(root, folders, {"note": "random weights in the published layout; not a trained model"} | facts)
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own for a full disk
        raise OutputError(f"{root} cannot be written: {error}; choose another folder or free some space") from error


class Draw:
    """Random tensors, each by its own name: the same seed and name give the same values, in any order."""

    def __init__(self, seed: int):
        self._seed = seed

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor fit for what ``name`` says it is; values are rounded to ``dtype``."""
        values = torch.randn(shape, generator=self._generator(name))
        mean, std = distribution(name, shape)
        return values.mul_(std).add_(mean).to(dtype)

    def all(self, shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self(name, shape, dtype) for name, shape in shapes.items()}

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and std: norms near 1, biases small, weights 1/sqrt(fan_in)."""
    last = name.rpartition(".")[2]
    for suffix, std in _PLAIN_STD.items():
        if name.endswith(suffix):
            return 0.0, std
    if name.endswith("pos_embedding.embedding.weight"):
        return 0.0, 0.3
    if name.endswith(_EMBEDDING):
        return 0.0, 1.0
    if name == "casual_audio_encoder.weights":
        return 0.55, 0.03
    if last == "bias":
        return 0.0, _BIAS_STD
    if last in ("gamma", "original0") or (last == "weight" and len(shape) == 1):
        return 1.0, _GAIN_STD
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def _check_widths(*, text_dim: int, audio_dim: int, **positive: int) -> None:
    for name, value in {"text_dim": text_dim, "audio_dim": audio_dim}.items():
        if value < 4 or value % 4:
            raise ConfigError(f"{name} is {value}; expected a multiple of 4, as its encoder has 4 heads")
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")


def _meta_dit(config: dict[str, Any]) -> CausalDiT:
    try:
        with torch.device("meta"):
            return CausalDiT(DiTConfig.from_dict(config))
    except ValueError as error:
        raise ConfigError(f"these shapes make no DiT: {error}") from error


def refuse_foreign(root: Path) -> None:
    """Raises: InputError where ``root`` holds a checkpoint that was not made here."""
    there = [folder for folder in (BASE_FOLDER, LORA_FOLDER) if (root / folder).exists()]
    if there and not (root / MARKER).is_file():
        raise InputError(
            f"{root} already holds {' and '.join(there)}, and it is no checkpoint that was made here; "
            "name another folder"
        )


def publish(root: Path, folders: tuple[Path, ...], facts: dict[str, Any]) -> None:
    """Move finished ``folders`` into ``root``; ``facts`` stand in the marker that says where they are from."""
    # First the marker: cut at any later point, what is there may be replaced.
    write_json(root / MARKER, facts)
    for folder in folders:
        target = root / folder.name
        if target.exists():
            shutil.rmtree(target)
        folder.replace(target)


def _write_dit(base: Path, draw: Draw, config: dict[str, Any], shapes: Shapes, shards: int) -> None:
    write_json(base / "config.json", config)
    weight_map: dict[str, str] = {}
    groups = list(_shards(shapes, shards))
    for number, names in enumerate(groups, 1):
        file = f"{DIT_FILE}-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = draw.all({name: shapes[name] for name in names}, torch.bfloat16)
        save_file(tensors, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * torch.bfloat16.itemsize
    write_json(
        base / f"{DIT_FILE}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _shards(shapes: Shapes, count: int) -> Iterator[list[str]]:
    """``count`` runs of the sorted names, of about equal size and none of them empty."""
    names = sorted(shapes)
    left = sum(math.prod(shapes[name]) for name in names)
    for shard in range(count):
        remaining, budget = count - shard - 1, left / (count - shard)
        taken: list[str] = []
        size = 0
        while len(names) > remaining and (not taken or not remaining or size + math.prod(shapes[names[0]]) <= budget):
            size += math.prod(shapes[names[0]])
            taken.append(names.pop(0))
        left -= size
        yield taken


def _write_vae(base: Path, draw: Draw, base_dim: int) -> None:
    torch.save(draw.all(vae_shapes(base_dim), torch.float32), base / "Wan2.1_VAE.pth")


def _write_text_encoder(base: Path, draw: Draw, width: int) -> None:
    folder = base / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    tensors = draw.all(t5_shapes(write_tokenizer(folder), width), torch.bfloat16)
    torch.save(tensors, base / "models_t5_umt5-xxl-enc-bf16.pth")


def write_tokenizer(folder: Path) -> int:
    """Write the synthetic tokenizer's two files; returns the size of its vocabulary."""
    tokenizer, config = text_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size()


def _write_audio_encoder(base: Path, draw: Draw, width: int) -> None:
    folder = base / "wav2vec2-large-xlsr-53-english"
    folder.mkdir()
    with torch.device("meta"):
        model = wav2vec2_model(width)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    save_file(draw.all(shapes, torch.float32), folder / "model.safetensors", {"format": "pt"})
    write_wav2vec2_config(folder, model)


def write_wav2vec2_config(folder: Path, model: Wav2Vec2ForCTC) -> None:
    """Write the audio encoder's two JSON files."""
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json", use_diff=False)
    write_json(folder / "preprocessor_config.json", wav2vec2_preprocessor())


def _lora(model: CausalDiT, draw: Draw, rank: int) -> dict[str, Tensor]:
    """A pair for each adapted Linear, and one whole tensor, as the published file may hold them."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and f".{name}".endswith(tuple(f".{suffix}" for suffix in LORA_SUFFIXES)):
            down, up = (rank, layer.in_features), (layer.out_features, rank)
            tensors[f"{name}.lora_A.default.weight"] = draw(f"{name}.lora_A", down, torch.bfloat16)
            # Against the weight it is added to, a product of 0.2: to be seen, but not to take over.
            tensors[f"{name}.lora_B.default.weight"] = draw(f"{name}.lora_B", up, torch.bfloat16) * 0.4
    tensors["head.head.bias"] = draw("lora/head.head.bias", tuple(model.head.head.bias.shape), torch.bfloat16)
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As people read it, with a newline at the end."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
