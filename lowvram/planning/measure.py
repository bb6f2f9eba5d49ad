"""Rates of the card at hand: measured once, kept in the user's cache folder, read the next time.

What copies reach while all cards of a machine copy at once is kept apart, under a key that says how many they were: a
run on one card does not meet it, a run on several streams under it all the time.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from lowvram.devices import computing_on
from lowvram.offload.oom import free_cached
from lowvram.offload.pinning import mapped, registry
from lowvram.planning.cards import Card, Rates, rates_from_json
from lowvram.planning.library_memory import group_bytes, outside_allocator
from lowvram.planning.measured import cache_folder, read_cache, write_cache
from lowvram.planning.timed import timed_on

log = logging.getLogger(__name__)


# One pinned copy as large as a layer's slab, and one square product large enough to fill the largest cards: both last
# tens of milliseconds on cards of 2020, so that starting them does not count.
COPY_BYTES = 256 * 2**20
PRODUCT_SIZE = 8192
REPEATS = 5
_FIRST_WITH_FP8 = 89
_DRIVER = Path("/proc/driver/nvidia/version")


class Runner(Protocol):
    """What a card is asked to do; replaced in tests."""

    @property
    def key(self) -> str:
        """The card's name, driver and PyTorch's version: all that rates depend on."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes (free, in all), once everything that nobody holds any more is given back."""
        ...

    @property
    def generation(self) -> int:
        """The compute capability without the dot."""
        ...

    def seconds(self, what: str) -> float:
        """Seconds of one copy of ``COPY_BYTES`` ("h2d", "d2h", "memory": within the card) or one product of
        ``PRODUCT_SIZE`` ("bf16", "int8", "fp8", "fp32"), started and finished on the card."""
        ...


class CudaRunner:
    """The work itself, timed by CUDA events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._work: dict[str, Callable[[], Any]] = {}

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self._device)

    @property
    def key(self) -> str:
        return f"{self.name} | driver {driver_version()} | torch {torch.__version__}"

    @property
    def memory(self) -> tuple[int, int]:
        self._work = {}
        # What this process holds without need counts as taken to whoever asks the driver.
        free_cached()
        return torch.cuda.mem_get_info(self._device)

    @property
    def generation(self) -> int:
        major, minor = torch.cuda.get_device_capability(self._device)
        return 10 * major + minor

    def seconds(self, what: str) -> float:
        # Pinned memory, too, belongs to the current device: without this the first card would lose some of its own.
        with computing_on(self._device):
            if what not in self._work:
                self._work = {what: self._prepared(what)}  # what was measured before gives its memory back
            work = self._work[what]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _prepared(self, what: str) -> Callable[[], Any]:
        if what in ("h2d", "d2h"):
            # Not PyTorch's pinned memory, which it would keep for the rest of the process. Where nothing can be pinned,
            # the rate is that of a run's copies there, too.
            host = mapped(COPY_BYTES)
            registry().pin(host)
            card = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self._device)
            dst, src = (card, host) if what == "h2d" else (host, card)
            return lambda: dst.copy_(src, non_blocking=True)
        if what == "memory":
            source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2))
            return lambda: target.copy_(source)
        shape = (PRODUCT_SIZE, PRODUCT_SIZE)
        if what == "int8":
            a, b = (torch.ones(shape, dtype=torch.int8, device=self._device) for _ in range(2))
            return lambda: torch._int_mm(a, b.t())
        dtype = torch.float32 if what == "fp32" else torch.bfloat16
        a, b = (torch.ones(shape, dtype=dtype, device=self._device) for _ in range(2))
        if what in ("bf16", "fp32"):
            return lambda: a @ b.t()
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        rows, columns = (
            torch.ones(PRODUCT_SIZE, 1, device=self._device),
            torch.ones(1, PRODUCT_SIZE, device=self._device),
        )
        # As the runtime calls it: a scale a row and a column.
        return lambda: torch._scaled_mm(a8, b8.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=False)


def driver_version() -> str:
    try:
        return _DRIVER.read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):  # not Linux, or WSL: the version of the driver's interface has to do
        builtins: Any = torch._C
        return f"api {builtins._cuda_getDriverVersion()}"


def measure(runner: Runner) -> Rates:
    """Best of ``REPEATS`` after one run to warm up, for each kind of work."""

    def best(what: str) -> float:
        return min([runner.seconds(what) for _ in range(REPEATS + 1)][1:])

    operations = 2 * PRODUCT_SIZE**3
    return Rates(
        int8=operations / best("int8"),
        fp8=operations / best("fp8") if runner.generation >= _FIRST_WITH_FP8 else None,
        bf16=operations / best("bf16"),
        fp32=operations / best("fp32"),
        h2d=COPY_BYTES / best("h2d"),
        d2h=COPY_BYTES / best("d2h"),
        measured=True,
        memory=2 * COPY_BYTES / best("memory"),  # read and written
        generation=runner.generation,
    )


def rates_of(device: torch.device, *, runner: Runner | None = None, file: Path | None = None) -> Rates:
    """Measured rates of a CUDA card, from ``file`` where they are known for this card, driver and PyTorch.

    Measuring takes a few seconds, 0.9 GB of the card and 0.5 GB of pinned host memory. A file that cannot be read or
    written is said and does no harm: rates are measured again.
    """
    runner = runner or CudaRunner(device)
    file = file or cache_file()
    known = _read(file)
    # An earlier edition measured no memory.
    if runner.key in known and known[runner.key].memory is not None:
        return known[runner.key]
    log.info("measuring %s: copies and products, a few seconds", runner.name)
    rates = measure(runner)
    _write(file, known | {runner.key: rates})
    return rates


def card_at_hand(device: torch.device, *, runner: Runner | None = None, file: Path | None = None) -> Card:
    """A CUDA card with measured rates; usable is what is free on it now, which what an earlier run has left in torch's
    allocator is, and what it still holds is not."""
    runner = runner or CudaRunner(device)
    rates = rates_of(device, runner=runner, file=file)
    # Behind the measuring, which takes memory too.
    free, total = runner.memory
    outside = outside_allocator(runner.key, file=file.with_name("outside_allocator.json") if file else None)
    nccl = group_bytes(runner.key, file=file.with_name("grouped.json") if file else None)
    timed = timed_on(runner.key, file=file.with_name("timed.json") if file else None)
    rates = dataclasses.replace(rates, timed=timed)
    return Card(name=runner.name, vram_bytes=total, usable_bytes=free, rates=rates, outside=outside, nccl=nccl)


def free_bytes(device: torch.device) -> int:
    """What is free on a CUDA card, once everything that nobody holds any more is given back."""
    return CudaRunner(device).memory[0]


def cache_file() -> Path:
    return cache_folder() / "cards.json"


def _read(file: Path) -> dict[str, Rates]:
    return read_cache(file, "rates", _rates)


def _rates(values: dict[str, Any]) -> Rates:
    rates = rates_from_json(values)
    for name in ("int8", "bf16", "fp32", "h2d", "d2h"):
        if not isinstance(getattr(rates, name), (int, float)) or not getattr(rates, name) > 0:
            raise ValueError(f"{name} is {getattr(rates, name)!r}, expected a rate above 0")
    for name in ("fp8", "memory"):
        value = getattr(rates, name)
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{name} is {value!r}, expected a rate above 0 or null")
    return rates


def _write(file: Path, rates: dict[str, Rates]) -> None:
    write_cache(file, "rates", {key: dataclasses.asdict(value) for key, value in rates.items()})


# Some tenths of a second each way: ranks do not begin at one moment, and the middle one of so many is contended.
_COPIES = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """Bytes a second."""

    h2d: float
    d2h: float

    def __post_init__(self) -> None:
        for value in (self.h2d, self.d2h):
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"a rate of copies is {value!r}, expected bytes a second above 0")


def contended_rates(
    rates: Rates, cards: int, runner: Runner, meet: Callable[[bool], bool], *, file: Path | None = None
) -> Rates:
    """``rates`` with the copies that one of ``cards`` cards of this machine reaches while all of them copy.

    ``meet`` tells the other ranks whether this one knows them already, waits for all, and says whether all of them do:
    only then nobody measures.
    """
    file = file or cache_folder() / "contended.json"
    key = f"{runner.key} | {cards} cards at once"
    known = _read_contended(file)
    if not meet(key in known):
        known = _read_contended(file) | {key: _measure_contended(runner)}
        # All ranks of a machine write: whoever does so last has read the keys of other cards before.
        write_cache(file, "rates", {name: dataclasses.asdict(copies) for name, copies in known.items()})
    return dataclasses.replace(rates, **dataclasses.asdict(known[key]))


def _measure_contended(runner: Runner) -> Copies:
    taken: dict[str, list[float]] = {"h2d": [], "d2h": []}
    for what, seconds in taken.items():
        seconds.extend(runner.seconds(what) for _ in range(_COPIES))
    return Copies(**{what: COPY_BYTES / statistics.median(seconds) for what, seconds in taken.items()})


def _read_contended(file: Path) -> dict[str, Copies]:
    def parse(values: dict[str, Any]) -> Copies:
        return Copies(**values)

    return read_cache(file, "rates", parse)
