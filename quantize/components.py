"""The three components that are converted tensor by tensor: what each holds, under which names, in which slabs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.rotation import GROUP
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.names import SHARED, START, dit_slab, umt5_slab
from lowvram_models.text_encoder import build_umt5
from lowvram_quantize.activations import Measured
from lowvram_quantize.lora import Lora, LoraSource, merge_loras, open_lora
from lowvram_quantize.lora_updates import Update
from lowvram_quantize.presets import PUBLISHED
from lowvram_quantize.schemes import (
    Scheme,
    dit_scheme,
    is_convolution,
    text_encoder_scheme,
    vae_scheme,
    with_rotation,
    with_smoothing,
)
from lowvram_quantize.source import TensorRef, TensorTable, check_shapes, fitted, read_json
from lowvram_quantize.spellings import umt5_table, vae_table
from lowvram_quantize.tables import open_component

Tensor = torch.Tensor
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor to convert: ``name`` in the artifact, where it comes from, how and in which slab it is stored; whether
    it is a convolution's weight that is stored ``channels_last``."""

    name: str
    ref: TensorRef
    scheme: Scheme
    slab: str
    channels_last: bool = False


@dataclasses.dataclass(frozen=True)
class ComponentPlan:
    """A component to convert; ``config`` is what the runtime needs to build its model. ``precision`` is "mixed" where
    layers that could all be in 8 bit are stored in several ways; ``choice`` says of one that was chosen what from."""

    name: str
    precision: str
    config: dict[str, Any]
    items: list[Item]
    loras: tuple[Lora, ...] = ()
    deltas: dict[str, Update] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """The root mean square of each input channel [K] of the weights for which it was measured."""
    activations_sha256: str = ""
    """Of the file that they were read from."""
    choice: dict[str, Any] | None = None

    @property
    def smoothed(self) -> bool:
        """Whether any tensor is."""
        return any(item.scheme.smooth for item in self.items)

    @property
    def channels_last(self) -> bool:
        """Whether any tensor is stored so."""
        return any(item.channels_last for item in self.items)

    @property
    def largest_group(self) -> int:
        """Of the input channels that are rotated together; 1 where none are."""
        return max((item.scheme.group for item in self.items), default=1)

    @property
    def source_files(self) -> list[Path]:
        return sorted({item.ref.file for item in self.items} | {file for lora in self.loras for file in lora.files})


def plan_dit(
    dit: Path,
    config_file: Path | None,
    precision: str,
    loras: Sequence[LoraSource] = (),
    *,
    group: int = GROUP,
    smooth: bool = True,
    activations: Measured | None = None,
) -> ComponentPlan:
    """The DiT of a file, or an index of shards, with LoRAs merged into it.

    Args:
        config_file: its config.json; without one only the published model's shapes are known.
        group: the most input channels of int8 Linears to rotate together; 1: none.
        smooth: whether to smooth inputs of int8 Linears, by what their weights say and, where there are any,
            ``activations``.
    """
    table = open_component(dit, "dit")
    values = PUBLISHED.dit if config_file is None else read_json(config_file)
    where = config_file or f"{dit} (no config.json lies beside it)"
    try:
        config = DiTConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    shapes = dit_shapes(config)
    table = fitted(table, shapes)
    if config_file is None and {name: ref.shape for name, ref in table.items()} != shapes:
        raise CheckpointError(
            f"{dit} has no config.json beside it and is not of the published shapes; expected the folder of the "
            "published checkpoint, or its config.json beside the file or in --ckpt-dir: put it there"
        )
    check_shapes(table, shapes, f"the DiT in {dit.parent}")
    opened = tuple(open_lora(source, table) for source in loras)
    deltas, replaced = merge_loras(opened)
    activations = activations or Measured.of(None)
    if activations.given:
        activations.check(shapes)
    known = activations.by_weight
    items = dit_items(config, table | replaced, precision, group, smooth=smooth, measured=known)
    return ComponentPlan("dit", precision, values, items, opened, deltas, known, activations.sha256)


def dit_shapes(config: DiTConfig) -> Shapes:
    """Names and shapes of the DiT in the model's order, which are also the published names."""
    with torch.device("meta"):
        return _shapes(CausalDiT(config))


def dit_items(
    config: DiTConfig,
    sources: TensorTable,
    precision: str,
    group: int = GROUP,
    apart: Mapping[str, str] = MappingProxyType({}),
    *,
    smooth: bool = True,
    measured: Collection[str] = (),
) -> list[Item]:
    """The DiT's tensors slab by slab: those of the start, shared ones, then layer after layer; those that are set
    ``apart`` in a precision of their own. ``smooth``: with smoothed inputs, also of those whose activations were
    ``measured``."""
    items = []
    for name, shape in dit_shapes(config).items():
        scheme = with_rotation(dit_scheme(name, apart.get(name, precision)), shape, group)
        scheme = with_smoothing(scheme, name, measured=name in measured) if smooth else scheme
        items.append(Item(name, sources[name], scheme, dit_slab(name, config.audio_inject_layers)))
    order = {START: -2, SHARED: -1} | {f"layer.{i}": i for i in range(config.num_layers)}
    return sorted(items, key=lambda item: order[item.slab])


def plan_vae(file: Path, precision: str) -> ComponentPlan:
    table = vae_table(open_component(file, "vae"))
    config = {"base_dim": table["encoder.conv_in.weight"].rows}
    shapes = vae_shapes(**config)
    table = fitted(table, shapes)
    check_shapes(table, shapes, f"the VAE {file.name}")
    return ComponentPlan("vae", precision, config, vae_items(config, table, precision))


def vae_shapes(base_dim: int) -> Shapes:
    """Names (of diffusers' module) and shapes of the VAE."""
    # diffusers takes two seconds to import: a checkpoint that cannot be used is refused before.
    from lowvram_models.vae import build_vae

    with torch.device("meta"):
        return _shapes(build_vae(base_dim))


def vae_items(config: dict[str, int], sources: TensorTable, precision: str) -> list[Item]:
    """The VAE's tensors, all in one slab, and the weights of its convolutions as it computes with them."""
    return [
        Item(name, sources[name], vae_scheme(name, shape, precision), SHARED, is_convolution(name, shape))
        for name, shape in vae_shapes(**config).items()
    ]


def plan_text_encoder(file: Path, precision: str) -> ComponentPlan:
    table, unknown = umt5_table(open_component(file, "text_encoder"))
    if unknown:
        raise CheckpointError(
            f"{file} holds {unknown[0]}, which the UMT5 encoder does not have; fetch the published one"
        )
    config = _umt5_config(file, table)
    check_shapes(table, text_encoder_shapes(**config), f"the text encoder {file.name}")
    return ComponentPlan("text_encoder", precision, config, text_encoder_items(config, table, precision))


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


def _umt5_config(file: Path, table: TensorTable) -> dict[str, int]:
    """The encoder's widths, which no file states, from the shapes of its first block."""
    wanted = {
        "embedding": "shared.weight",
        "query": "encoder.block.0.layer.0.SelfAttention.q.weight",
        "gate": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    }
    shapes = {name: table[name].shape if name in table else () for name in wanted.values()}
    missing = [name for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]
    if missing:
        raise CheckpointError(f"{file} lacks {missing[0]} as a matrix; expected the UMT5-XXL encoder: fetch it")
    shape = {key: table[name].shape for key, name in wanted.items()}
    heads = shape["positions"][1]
    return {
        "vocab_size": shape["embedding"][0],
        "d_model": shape["embedding"][1],
        "d_ff": shape["gate"][0],
        "num_heads": heads,
        "d_kv": shape["query"][0] // heads,
        # Counted, so that a number out of line is an unknown name and not a model of that many layers.
        "num_layers": len({n.split(".")[2] for n in table if n.startswith("encoder.block.")}),
    }


def _shapes(model: torch.nn.Module) -> Shapes:
    # named_parameters and not state_dict: an embedding under two names is stored once.
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


PLANNERS: dict[str, Callable[[Path, str], ComponentPlan]] = {"vae": plan_vae, "text_encoder": plan_text_encoder}
