"""Grouped Hadamard rotation: it spreads a large channel over its neighbours before int8 rounds them.

Every group of neighbouring channels is multiplied by the same orthogonal, symmetric matrix, so that rotated activations
times rotated weights are the product as it was: (x H) (W H)^T = x W^T.

Groups above 16 take a regular Hadamard matrix as far as there is one, all of whose rows have the same sum (ConvRot,
https://arxiv.org/abs/2512.03673): what is alike in all channels, as where GELU gave little more than zero, stays spread
too, while Sylvester's first row would gather it in one. Here it is the Kronecker power of (J - 2) / 2, with J the 4 x 4
ones, as a pass that quantizes computes it from sums of four; groups that are no power of 4 have [[1, 1], [1, -1]]
behind it. Groups up to 16 are Sylvester's, as artifacts of format version 2 have them.
"""

from __future__ import annotations

import functools
import math

import torch

Tensor = torch.Tensor

GROUP = 256
"""Of what ``convert`` rotates. Within a warp of a pass that quantizes meet twice as many neighbours."""
SYLVESTER = 16
"""The largest group of Sylvester's construction."""
ONE_PRODUCT = 64
"""The largest group that is rotated in one product with its whole matrix: more arithmetic than two products with small
ones, but faster on a processor, where thousands of products of 8 x 16 values cost more than what they compute."""
IN_FOURS = 128
"""The largest group that is rotated in one product with a matrix of a quarter of its size, and in sums of four behind
it: two thirds of the time of one product with the whole matrix, on one core with AVX2."""
# Rotated at a time, in so many pieces at the most: what stands between two products takes little memory, few launches.
_CHUNK_VALUES, _CHUNKS = 1 << 18, 8


def largest_group(width: int, most: int = GROUP) -> int:
    """The largest power of two up to ``most``, itself one, that divides ``width``; 1 (no rotation) for odd widths."""
    return math.gcd(width, most)


def rotated(x: Tensor, group: int) -> Tensor:
    """[..., K] floating point with each group of channels rotated, in the dtype of ``x``; ``x`` itself for group 1.

    The sums are those of matrix products, so that they may round otherwise than the Triton passes' own.

    Raises:
        ValueError: ``group`` is no power of two that divides K.
    """
    check_group(group, x.shape[-1])
    if group == 1:
        return x
    if not x.numel():
        return x.clone()
    if group <= ONE_PRODUCT or (torch.is_grad_enabled() and x.requires_grad):  # what follows writes into places
        return (x.reshape(-1, group) @ _ready("whole", group, x)).view(x.shape)
    if group <= IN_FOURS:
        fours = (x.reshape(-1, group // 4) @ _ready("quarter", group, x)).view(-1, 4, group // 4)
        a, b, c, d = fours.unbind(1)
        half = (a + b).add_(c).add_(d).mul_(0.5)
        return torch.sub(half[:, None], fours, out=fours).view(x.shape)
    # As products with small matrices: 16 times as fast as butterflies in PyTorch, on one core with AVX-512, and a
    # quarter of the time of one product with the matrix of 256.
    near, far = _ready("near", group, x), _ready("far", group, x)
    values = x.reshape(-1, len(far), len(near))
    chunk = max(1, _CHUNK_VALUES // group, -(-len(values) // _CHUNKS))
    out = torch.empty_like(values)
    for part, place in zip(values.split(chunk), out.split(chunk), strict=True):
        torch.matmul(far, (part.reshape(-1, len(near)) @ near).view(part.shape), out=place)
        if x.is_meta:  # without values: the other pieces would take the same memory once more, and time
            break
    return out.view(x.shape)


_made: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}


def _ready(which: str, group: int, x: Tensor) -> Tensor:
    """A matrix as ``x`` is: kept, since a copy to a GPU at every call would let the host wait, and could not be in a
    CUDA graph; a call before the graph is captured makes it. What a simulated device or a tracer gives is not kept."""
    key = (which, group, x.dtype, x.device)
    found = _made.get(key)
    if found is not None and type(x) in (Tensor, torch.nn.Parameter):
        return found
    with torch.inference_mode(False):  # one made in inference mode could not be used where gradients are wanted
        made = _matrices(group)[which].to(x, copy=True)
    if type(made) is Tensor and not made.is_meta:
        _made[key] = made
    return made


def _matrices(group: int) -> dict[str, Tensor]:
    near, far = _factors(group)
    quarter = {"quarter": matrix(group // 4)} if group > SYLVESTER * 4 else {}
    return {"whole": matrix(group), "near": near, "far": far} | quarter


def check_group(group: int, width: int, dtype: torch.dtype = torch.int8) -> None:
    """Raises: ValueError where rows of this width, in this dtype, cannot be rotated in such groups."""
    if group < 1 or group & (group - 1) or width % group:
        raise ValueError(f"groups of {group} channels were to be rotated; expected a power of two that divides {width}")
    if group > 1 and dtype is not torch.int8:
        raise ValueError(f"groups of {group} channels were to be rotated in {dtype}; rotation goes with int8 rows only")


@functools.cache
def matrix(group: int) -> Tensor:
    """Orthogonal and symmetric [group, group], float64."""
    near, far = _factors(group)
    return torch.kron(far, near)


@functools.cache
def _factors(group: int) -> tuple[Tensor, Tensor]:
    """Matrices of neighbours and of what lies further apart, float64; ``matrix`` is their Kronecker product."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    four = torch.ones(4, 4, dtype=torch.float64, device="cpu") - 2 * torch.eye(4, dtype=torch.float64, device="cpu")
    if group <= SYLVESTER:
        near, far = _power(two, group), _power(two, 1)
    else:
        near = torch.kron(four, two if group.bit_length() % 2 == 0 else four)
        far = _power(four, group // len(near))
    return near / math.sqrt(len(near)), far / math.sqrt(len(far))


def _power(factor: Tensor, size: int) -> Tensor:
    out = torch.ones_like(factor[:1, :1])
    while len(out) < size:
        out = torch.kron(out, factor)
    return out
