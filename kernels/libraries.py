"""Other libraries' kernels, where they are installed: they run only where the selftest found them right and faster.

None is a dependency. What they are called with here is their public interface of the versions named at each; whatever
another version does instead shows in the selftest, which then keeps to what runs anyway.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import functional as F

Tensor = torch.Tensor

CUDNN, SAGE, COMFY, TORCHAO = "cudnn", "sageattention", "comfy-kitchen", "torchao"

# By backend: the module that is imported, and the name that it is installed under. cuDNN comes with PyTorch.
MODULES = {SAGE: "sageattention", COMFY: "comfy_kitchen", TORCHAO: "torchao"}


@functools.cache
def installed(backend: str) -> bool:
    """Whether there is something to import; nothing is imported for the question."""
    return backend == CUDNN or (backend in MODULES and importlib.util.find_spec(MODULES[backend]) is not None)


def versions() -> dict[str, str]:
    """Of those that are installed: results of a selftest hold for these."""
    found = {}
    for backend in MODULES:
        if installed(backend):
            try:
                found[backend] = version(backend)
            except PackageNotFoundError:
                found[backend] = "unknown"
    return found


def int8_product(backend: str, q_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """q @ weight.T, int8 by int8 into int32 [M, N]: torchao 0.18 ``kernel.int_matmul`` or comfy-kitchen 0.2
    ``mm_int8``. Raises: whatever the library does, and KeyError for a backend without such a product."""
    return _PRODUCTS[backend](q_MK, weight_NK.t())


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask, [B, L, N, H] and [B, S, N, H] -> [B, L, N, H]: cuDNN through PyTorch, SageAttention 2
    ``sageattn`` or comfy-kitchen 0.2 ``int8_attention``. Raises: as ``int8_product``."""
    return _ATTENTIONS[backend](q, k, v)


def _torchao_product(q_MK: Tensor, weight_KN: Tensor) -> Tensor:
    from torchao.kernel.intmm import int_matmul

    product: Tensor = int_matmul(q_MK, weight_KN)
    return product


def _comfy_product(q_MK: Tensor, weight_KN: Tensor) -> Tensor:
    import comfy_kitchen

    product: Tensor = comfy_kitchen.mm_int8(q_MK, weight_KN)
    return product


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    attended: Tensor = sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    return attended


def _comfy_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from comfy_kitchen.sage_attention import int8_attention

    attended: Tensor = int8_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return attended.transpose(1, 2)


_PRODUCTS = {TORCHAO: _torchao_product, COMFY: _comfy_product}
_ATTENTIONS = {CUDNN: _cudnn_attention, SAGE: _sage_attention, COMFY: _comfy_attention}
