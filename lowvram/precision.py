"""float32 that is float32: no TF32 in convolutions and matrix products while a run computes.

PyTorch lets cuDNN round the inputs of float32 convolutions to TF32 (10 bits of mantissa) unless told otherwise, and
programs around a run may allow more. These switches are the process's, so they are set while something computes and
set back behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch

_BACKENDS = ("cuda", "mkldnn")
_OPERATIONS = ("conv", "matmul", "rnn")
_EXACT, _INHERITED = "ieee", "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a program had set: precision of all operations of a backend and, where that does not decide, of single ones;
    the older switch for matrix products; and whether bf16 products may be summed up in bf16, and in parts."""

    everything: dict[str, str]
    single: dict[tuple[str, str], str]
    matmul: str
    bf16_sums: tuple[bool, bool]


class _Guard:
    """Several runs, in several threads, may compute at once: the first to begin sets, the last to end sets back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: _Settings | None = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _set_exact()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._before is not None:
                _set_back(self._before)
                self._before = None


_guard = _Guard()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Let float32 be IEEE's, and bf16 products be summed up in float32, on every device and in every thread."""
    _guard.enter()
    try:
        yield
    finally:
        _guard.leave()


# PyTorch 2.10 to 2.13 keep a precision for each backend and operation, "none" standing for that of the level above:
# operation, backend ("all"), everything ("generic"). A getter gives the one in effect, and not what was set. cuDNN's
# are TF32 from the start: as a value of its own in 2.10, in 2.13 as one that stands in for "none" and that no setter
# can bring back. So a backend's level above is set, which what was never set follows, and only operations that do not
# follow it are set one by one. The older switches (allow_tf32, set_float32_matmul_precision) have a memory of their
# own, and asking them raises where it contradicts the newer; of products it is brought along, since PyTorch itself
# asks it. cuDNN's cannot be without losing that stand-in: torch.backends.cudnn.allow_tf32 cannot be asked in a run.


def _set_exact() -> _Settings:
    reductions = torch.backends.cuda.matmul
    bf16_sums = (
        reductions.allow_bf16_reduced_precision_reduction,
        reductions.allow_bf16_reduced_precision_reduction_split_k,
    )
    everything = _own_of_backends()
    products = {(backend, "matmul"): _own_of_products(backend) for backend in everything}
    for backend in everything:
        _set(backend, "all", _EXACT)
    keys = [(backend, operation) for backend in everything for operation in _OPERATIONS]
    single = {key: value for key in keys if (value := _get(*key)) != _EXACT}
    for key in single:
        _set(*key, _EXACT)
    # Asked only now: exact operations contradict none of its values.
    matmul = torch.get_float32_matmul_precision()
    if matmul != "highest":
        single |= products
        torch.set_float32_matmul_precision("highest")  # which makes products exact, too
    reductions.allow_bf16_reduced_precision_reduction = (False, bf16_sums[1])
    return _Settings(everything=everything, single=single, matmul=matmul, bf16_sums=bf16_sums)


def _set_back(before: _Settings) -> None:
    if before.matmul != "highest":
        torch.set_float32_matmul_precision(before.matmul)
    for key, value in before.single.items():
        _set(*key, value)
    for backend, value in before.everything.items():
        _set(backend, "all", value)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before.bf16_sums


def _own_of_backends() -> dict[str, str]:
    """What the backends themselves were set to: what they have in effect where nothing is set above them."""
    generic = _get("generic", "all")
    _set("generic", "all", _INHERITED)
    own = {backend: _get(backend, "all") for backend in _BACKENDS}
    _set("generic", "all", generic)
    return own


def _own_of_products(backend: str) -> str:
    """What matrix products themselves were set to; leaves their backend with another value than it had."""
    seen = []
    for above in ("tf32", _EXACT):
        _set(backend, "all", above)
        seen.append(_get(backend, "matmul"))
    return _INHERITED if seen == ["tf32", _EXACT] else seen[0]


def _get(backend: str, operation: str) -> str:
    value: str = torch._C._get_fp32_precision_getter(backend, operation)
    return value


def _set(backend: str, operation: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, value)
