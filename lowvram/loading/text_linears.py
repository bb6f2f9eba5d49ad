"""The text encoder's quantized Linears: optimum-quanto's for 8 bit, bitsandbytes' for NF4."""

from __future__ import annotations

import torch
from torch import nn

from lowvram_quantize.format import Component

Tensor = torch.Tensor

NF4_BLOCK = 64


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
