"""The three components that are converted tensor by tensor: what each holds, under which names, in which slabs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.names import SHARED, START, dit_slab, umt5_name, umt5_slab, vae_names
from lowvram_models.text_encoder import build_umt5
from lowvram_models.vae import build_vae
from lowvram_quantize.lora import Lora, open_lora
from lowvram_quantize.schemes import Scheme, dit_scheme, text_encoder_scheme, vae_scheme, with_rotation
from lowvram_quantize.source import (
    TEXT_ENCODER_FILE,
    VAE_FILE,
    TensorRef,
    TensorTable,
    check_shapes,
    open_dit,
    open_pth,
    read_json,
)

# What an index or a dictionary may hold beside the encoder itself.
_T5_EMBEDDING = "token_embedding.weight"

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor to convert: ``name`` in the artifact, where it comes from, how and in which slab it is stored."""

    name: str
    ref: TensorRef
    scheme: Scheme
    slab: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A component to convert; ``config`` is what the runtime needs to build its model."""

    name: str
    precision: str
    config: dict[str, Any]
    items: list[Item]
    lora: Lora | None = None

    @property
    def rotated(self) -> bool:
        return any(item.scheme.group > 1 for item in self.items)

    @property
    def source_files(self) -> list[Path]:
        files = {item.ref.file for item in self.items} | ({self.lora.file} if self.lora else set())
        return sorted(files)


def plan_dit(base: Path, precision: str, lora: Path | None, lora_alpha: float, *, rotate: bool = False) -> Plan:
    config_file = base / "config.json"
    values = read_json(config_file)
    try:
        config = DiTConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    table = open_dit(base)
    check_shapes(table, dit_shapes(config), f"the DiT in {base}")
    merged = open_lora(lora, lora_alpha, table) if lora else None
    sources = table | (merged.replaced if merged else {})
    return Plan("dit", precision, values, dit_items(config, sources, precision, rotate=rotate), merged)


def dit_shapes(config: DiTConfig) -> Shapes:
    """Names and shapes of the DiT in the model's order, which are also the published names."""
    with torch.device("meta"):
        return _shapes(CausalDiT(config))


def dit_items(config: DiTConfig, sources: TensorTable, precision: str, *, rotate: bool = False) -> list[Item]:
    """The DiT's tensors slab by slab: those of the start, shared ones, then layer after layer."""
    items = []
    for name, shape in dit_shapes(config).items():
        scheme = dit_scheme(name, precision)
        scheme = with_rotation(scheme, shape) if rotate else scheme
        items.append(Item(name, sources[name], scheme, dit_slab(name, config.audio_inject_layers)))
    order = {START: -2, SHARED: -1} | {f"layer.{i}": i for i in range(config.num_layers)}
    return sorted(items, key=lambda item: order[item.slab])


def plan_vae(base: Path, precision: str) -> Plan:
    file = base / VAE_FILE
    published = open_pth(file)
    names = vae_names(published)
    table = {names[name]: ref for name, ref in published.items()}
    first = published.get("encoder.conv1.weight")
    if first is None or len(first.shape) != 5:
        raise CheckpointError(f"{file} has no encoder.conv1.weight of 5 dimensions; expected Wan 2.1's VAE: fetch it")
    config = {"base_dim": first.rows}
    check_shapes(table, vae_shapes(**config), f"the VAE {file.name}")
    return Plan("vae", precision, config, vae_items(config, table, precision))


def vae_shapes(base_dim: int) -> Shapes:
    """Names (of diffusers' module) and shapes of the VAE."""
    with torch.device("meta"):
        return _shapes(build_vae(base_dim))


def vae_items(config: dict[str, int], sources: TensorTable, precision: str) -> list[Item]:
    """The VAE's tensors, all in one slab."""
    return [Item(n, sources[n], vae_scheme(n, s, precision), SHARED) for n, s in vae_shapes(**config).items()]


def plan_text_encoder(base: Path, precision: str) -> Plan:
    file = base / TEXT_ENCODER_FILE
    published = open_pth(file)
    table: TensorTable = {}
    for name, ref in published.items():
        ours = umt5_name(name)
        if ours is None:
            raise CheckpointError(f"{file} holds {name}, which the UMT5 encoder does not have; fetch the published one")
        table[ours] = ref
    config = _umt5_config(file, published)
    check_shapes(table, text_encoder_shapes(**config), f"the text encoder {file.name}")
    return Plan("text_encoder", precision, config, text_encoder_items(config, table, precision))


def text_encoder_shapes(**config: int) -> Shapes:
    """Names (of transformers' module) and shapes of the text encoder; ``config`` as ``build_umt5`` takes it."""
    with torch.device("meta"):
        return _shapes(build_umt5(**config))


def text_encoder_items(config: dict[str, int], sources: TensorTable, precision: str) -> list[Item]:
    """The text encoder's tensors slab by slab: shared ones, then block after block."""
    items = [
        Item(name, sources[name], text_encoder_scheme(name, shape, precision), umt5_slab(name))
        for name, shape in text_encoder_shapes(**config).items()
    ]
    return sorted(items, key=lambda item: -1 if item.slab == SHARED else int(item.slab.removeprefix("block.")))


def _umt5_config(file: Path, published: TensorTable) -> dict[str, int]:
    """The encoder's widths, which no file states, from the shapes of its first block."""
    wanted = {
        "embedding": _T5_EMBEDDING,
        "query": "blocks.0.attn.q.weight",
        "gate": "blocks.0.ffn.gate.0.weight",
        "positions": "blocks.0.pos_embedding.embedding.weight",
    }
    shapes = {name: published[name].shape if name in published else () for name in wanted.values()}
    missing = [name for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]} as a matrix; expected the UMT5-XXL encoder: fetch it")
    shape = {key: published[name].shape for key, name in wanted.items()}
    heads = shape["positions"][1]
    return {
        "vocab_size": shape["embedding"][0],
        "d_model": shape["embedding"][1],
        "d_ff": shape["gate"][0],
        "num_heads": heads,
        "d_kv": shape["query"][0] // heads,
        # Counted, so that a number out of line is an unknown name and not a model of that many layers.
        "num_layers": len({n.split(".")[1] for n in published if n.startswith("blocks.")}),
    }


def _shapes(model: torch.nn.Module) -> Shapes:
    # named_parameters and not state_dict: an embedding under two names is stored once.
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


PLANNERS: dict[str, Callable[[Path, str], Plan]] = {"vae": plan_vae, "text_encoder": plan_text_encoder}
