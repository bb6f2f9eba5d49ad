"""An adapter's tensors for one layer as its update: whether they are whole, and whether their shapes fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.lora_updates import Delta, Difference, Hadamard, Kronecker, Update
from lowvram_quantize.source import TensorRef

USE = "use the LoRA that was made for this checkpoint"
_LORA = ("A", "B")
_LOHA = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_WAYS = [({w}, {f"{w}_a", f"{w}_b"}) for w in ("lokr_w1", "lokr_w2")]
_INNER = 0  # in _LORA and _LOHA, a factor that has the rank as its rows
Roles = Mapping[str, TensorRef]


def rank_of(path: Path, target: str, roles: Roles) -> int | None:
    """The rank that an alpha is divided by; None where nothing is a product, so that there is nothing to scale.

    Raises:
        CheckpointError: the tensors of two kinds of adapter, or not all of one.
    """
    kinds = [names for names in (_LORA, _LOHA, _LOKR) if any(name in roles for name in names)]
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: {target} has {_named(roles)}, which are of several kinds; expected one: {USE}")
    if not kinds:
        if "alpha" in roles and "diff" not in roles:
            raise CheckpointError(
                f"{path}: {target} has only alpha; expected lora_A and lora_B beside it: fetch it again"
            )
        return None
    lokr = kinds[0] is _LOKR
    if lokr:
        parts = [{w, f"{w}_a", f"{w}_b"} & set(roles) for w in ("lokr_w1", "lokr_w2")]
        whole = parts[0] in _WAYS[0] and parts[1] in _WAYS[1]
    else:
        whole = set(kinds[0]) <= set(roles)
    if not whole:
        expected = {_LORA: "lora_A and lora_B", _LOHA: "all four of LoHa", _LOKR: "both factors of LoKr"}[kinds[0]]
        raise CheckpointError(f"{path}: {target} has only {_named(roles)}; expected {expected}: fetch it again")
    # Where both of LoKr's factors are products they have one rank; LyCORIS divides by the second's.
    inner = roles.get("lokr_w2_b", roles.get("lokr_w1_b")) if lokr else roles[kinds[0][_INNER]]
    return None if inner is None else inner.rows


def update_of(path: Path, target: str, roles: Roles, base: TensorRef, factor: float) -> Update | None:
    """What the factors add, ``factor`` times; None where there are none.

    Raises:
        CheckpointError: the shapes do not fit each other or the base's.
    """
    if "A" in roles:
        a, b = roles["A"], roles["B"]
        fits = _matrices(a, b, base) and (b.rows, a.shape[1]) == base.shape
        if not fits or a.rows != b.shape[1] or not a.rows:
            raise _unfit(path, target, roles, base, "[r, in] and [out, r]")
        return Delta(a, b, factor)
    if "hada_w1_a" in roles:
        w1_b, w1_a, w2_b, w2_a = (roles[name] for name in _LOHA)
        fits = _matrices(w1_a, w1_b, w2_a, w2_b, base) and all(
            (a.shape[0], b.shape[1]) == base.shape and a.shape[1] == b.rows > 0 for a, b in ((w1_a, w1_b), (w2_a, w2_b))
        )
        if not fits:
            raise _unfit(path, target, roles, base, "[out, r] and [r, in] twice")
        return Hadamard(w1_a, w1_b, w2_a, w2_b, factor)
    if any(name in roles for name in _LOKR):
        w1, w2 = (_either(roles, name) for name in ("lokr_w1", "lokr_w2"))
        shapes = [_product_shape(refs) for refs in (w1, w2)]
        fits = len(base.shape) == 2 and all(shapes)
        if not fits or tuple(math.prod(sizes) for sizes in zip(*shapes, strict=True)) != base.shape:
            raise _unfit(path, target, roles, base, "two factors whose Kronecker product has the base's shape")
        return Kronecker(w1, w2, factor)
    return None


def difference_of(path: Path, whole: TensorRef, base: TensorRef, weight: float) -> Difference:
    """Raises: CheckpointError where the shape is not the base's."""
    if whole.shape != base.shape:
        raise CheckpointError(
            f"{path}: {whole.name} has shape {list(whole.shape)}, the base's is {list(base.shape)}; {USE}"
        )
    return Difference(whole, weight)


def _either(roles: Roles, name: str) -> tuple[TensorRef, ...]:
    return (roles[name],) if name in roles else (roles[f"{name}_a"], roles[f"{name}_b"])


def _product_shape(refs: tuple[TensorRef, ...]) -> tuple[int, ...]:
    """() where these are no matrices that can be multiplied."""
    if not _matrices(*refs) or any(first.shape[1] != second.rows for first, second in itertools.pairwise(refs)):
        return ()
    return refs[0].rows, refs[-1].shape[1]


def _matrices(*refs: TensorRef) -> bool:
    return all(len(ref.shape) == 2 for ref in refs)


def _named(roles: Roles) -> str:
    return " and ".join(f"lora_{role}" if role in _LORA else role for role in sorted(roles))


def _unfit(path: Path, target: str, roles: Roles, base: TensorRef, expected: str) -> CheckpointError:
    own = {f"lora_{role}" if role in _LORA else role: ref for role, ref in sorted(roles.items()) if role != "alpha"}
    shapes = " and ".join(f"{role} {list(ref.shape)}" for role, ref in own.items())
    return CheckpointError(f"{path}: {shapes} do not fit {target} {list(base.shape)}; expected {expected}: {USE}")
