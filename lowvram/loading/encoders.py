"""Text encoder, audio encoder and VAE from an artifact: real libraries' models under our loading.

The text encoder's quantized Linears are optimum-quanto's for 8 bit, bitsandbytes' for NF4.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from lowvram.devices import is_out_of_memory
from lowvram.loading.weights import bind, load_slabs, swap_quantized, turned
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.modules import dequantize_weight
from lowvram_models.audio_encoder import build_wav2vec2, wav2vec2_state
from lowvram_models.names import DECODER
from lowvram_models.text_encoder import build_umt5, load_tokenizer
from lowvram_quantize.format import Artifact, Component

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel, Wav2Vec2Model

    from lowvram_models.vae import StreamingVAE

log = logging.getLogger(__name__)
Tensor = torch.Tensor
NF4_BLOCK = 64
AUDIO_WEIGHTS = "audio_encoder/model.safetensors"


def load_vae(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> StreamingVAE:
    """The VAE with its convolutions' weights as stored, but channels-last: dequantized at use where they are 8-bit."""
    # diffusers takes two seconds to import: a rank that neither encodes nor decodes does not pay them.
    from lowvram.loading.fused_vae import fuse_vae
    from lowvram_models.vae import StreamingVAE, build_vae

    component = artifact.component("vae")
    with torch.device("meta"):
        model = build_vae(component.config["base_dim"])
    swap_quantized(model, component)
    load_slabs(model, component, device, dtype, last=True)
    fuse_vae(model)
    return StreamingVAE(model.eval().requires_grad_(False), dtype=dtype)


def load_decoder(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> StreamingVAE:
    """The VAE's decoder alone, its 8-bit weights widened to ``dtype`` once, one after the other: what ``load_vae``
    computes at every use. It cannot encode.

    Raises:
        CheckpointError: the artifact lacks a tensor of the decoder.
    """
    from lowvram.loading.fused_vae import fuse_vae
    from lowvram_models.vae import StreamingVAE, build_vae

    component = artifact.component("vae")
    with torch.device("meta"):
        model = build_vae(component.config["base_dim"])
    views: dict[str, Tensor] = {}
    for slab in component.slab_names:
        views |= component.views(slab, component.read_slab(slab))
    own = [name for name, _ in model.named_parameters() if name.startswith(DECODER)]
    if lacking := [name for name in own if name not in views]:
        raise CheckpointError(f"{component.path} lacks {len(lacking)} tensors, first {lacking[0]}; convert again")
    for name in own:
        values = views[name].to(device)
        scale = views.get(f"{name}_scale")
        if scale is not None:
            values = dequantize_weight(turned(values, owned=False), scale.to(device), dtype)
        bind(model, {name: values}, dtype)
    fuse_vae(model)
    return StreamingVAE(model.eval().requires_grad_(False), dtype=dtype)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; convert the checkpoint again") from error


def load_text_encoder(
    artifact: Artifact, device: torch.device, dtype: torch.dtype
) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """UMT5's encoder, its Linears dequantized at use where they are quantized, and its tokenizer.

    Raises:
        CheckpointError: the tokenizer's folder or the component is not usable.
    """
    component = artifact.component("text_encoder")
    try:
        tokenizer = load_tokenizer(artifact.path / "tokenizer")
    except ValueError as error:
        raise CheckpointError(f"the artifact's tokenizer cannot be used: {error}") from error
    with torch.device("meta"):
        model = build_umt5(**component.config)
    absent = {id(parameter): parameter for parameter in model.parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for slab in component.slab_names:
        views = component.views(slab, component.read_slab(slab).to(device))
        plain = {name: view for name, view in views.items() if component.tensor_scheme(name) in ("bf16", "fp32")}
        # One after the other: a slab whose tensors are all copied goes before the next one comes.
        bind(model, plain, dtype)
        tensors |= {name: view for name, view in views.items() if name not in plain}
        del views, plain
    swap_text_linears(model, component, tensors, dtype)
    model.encoder.embed_tokens.weight = model.shared.weight
    if left := [name for name, parameter in model.named_parameters() if id(parameter) in absent]:
        raise CheckpointError(f"{component.path} lacks {len(left)} tensors, first {left[0]}; convert again")
    return model.eval().requires_grad_(False), tokenizer


def load_audio_encoder(artifact: Artifact, device: torch.device) -> tuple[Wav2Vec2Model, bool]:
    """wav2vec2 in float32, and whether its input is to be normalised.

    Raises:
        CheckpointError: a file of the artifact's audio_encoder folder is missing, damaged or of another model.
    """
    folder = artifact.path / "audio_encoder"
    config, preprocessor = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
    try:
        with torch.device("meta"):
            model = build_wav2vec2(config)
        state = wav2vec2_state(artifact.read_tensors(AUDIO_WEIGHTS))
        model.load_state_dict({k: v.to(device, torch.float32) for k, v in state.items()}, assign=True, strict=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{folder} is no usable wav2vec2: {error}; convert the checkpoint again") from error
    return model, bool(preprocessor.get("do_normalize", True))


def swap_text_linears(model: nn.Module, component: Component, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Replace each Linear that the artifact holds quantized by the library's, with its weight in place.

    ``tensors`` are the component's, by stored name. The libraries are imported only where they are needed.
    """
    for name in component.quantized_names:
        path = name.removesuffix(".weight")
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear):
            raise TypeError(f"{path} is a {type(old).__name__}; only a Linear can be quantized")
        scheme = component.tensor_scheme(name)
        make = _nf4 if scheme == "nf4" else _quanto
        model.set_submodule(path, make(old, name, tensors, dtype))


def _quanto(old: nn.Linear, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    from optimum.quanto import QLinear, WeightQBytesTensor, qfloat8_e4m3fn, qint8

    data, scale = tensors[f"{name}._data"], tensors[f"{name}._scale"].to(dtype)
    qtype = qint8 if data.dtype is torch.int8 else qfloat8_e4m3fn
    new = QLinear(old.in_features, old.out_features, bias=False, dtype=dtype, device="meta", weights=qtype)
    # Not its ``create``: on GPUs that takes a class for fp8 whose kernel is compiled on the spot with nvcc, which users
    # do not have. This one dequantizes the weight at use with PyTorch's own operations, on every device.
    weight = WeightQBytesTensor(qtype, 0, data.shape, data.stride(), data, scale, None)
    new.weight = nn.Parameter(weight, requires_grad=False)
    # They belong to activation quantization, which is off, but have to be somewhere real.
    new.input_scale, new.output_scale = (torch.ones((), dtype=dtype, device=data.device) for _ in range(2))
    return new


def _nf4(old: nn.Linear, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    from bitsandbytes import functional as bnb
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    # UMT5 casts its feed-forward's values to the dtype of the next weight: it has to be the one to compute in.
    packed = tensors[name].flatten().view(dtype).view(-1, 1)
    state = bnb.QuantState(
        absmax=tensors[f"{name}.absmax"],
        shape=torch.Size((old.out_features, old.in_features)),
        code=bnb.get_4bit_type("nf4", device=packed.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    new = Linear4bit(
        old.in_features,
        old.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        quant_storage=dtype,
        device="meta",
    )
    # On processors with AVX512-BF16 the first call would pack the weight again, to uint8, and compute in bf16.
    new.support_avx512bf16_for_cpu = False
    new.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=NF4_BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=dtype,
        module=new,
        bnb_quantized=True,
    )
    return new
