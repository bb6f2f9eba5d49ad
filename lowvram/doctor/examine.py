"""All checks in their order. One that fails to ask its question becomes a problem of its own; the others go on."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lowvram.doctor import cards, memory, ranks, software
from lowvram.doctor.findings import Finding, ok, problem
from lowvram.doctor.probes import CardState, Gpu, Probes
from lowvram.doctor.wants import Room, Wants, wants_of
from lowvram.planning.model_sizes import ModelSizes
from lowvram_kernels.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """``gpus`` None: all that are here. ``sizes`` gives the model's sizes; ``converted``: its artifact is here."""

    sizes: Callable[[], ModelSizes]
    converted: bool = False
    gpus: int | None = None
    port: int = 29500
    measure: bool = True

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}; expected 1 or more")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; expected 1 to 65535")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """What several checks look at."""

    gpus: tuple[Gpu, ...]
    states: Mapping[int, CardState]
    wants: Wants | None
    ranks: int

    @property
    def on_gpu(self) -> bool:
        return bool(self.gpus)

    @property
    def used(self) -> tuple[Gpu, ...]:
        return self.gpus[: self.ranks]


def examine(probes: Probes, options: Options) -> list[Finding]:
    """Ask everything; at least one finding a question.

    Raises:
        CheckpointError: the artifact that the user named cannot be read.
    """
    findings: list[Finding] = []
    sizes = options.sizes() if options.converted else _asked("plan", options.sizes, None, findings)
    none: tuple[Gpu, ...] = ()
    gpus = _asked("cuda", probes.gpus, none, findings)
    nothing: Mapping[int, CardState] = {}
    states = _asked("nvidia-smi", probes.card_states, nothing, findings) if gpus else nothing
    count = options.gpus or max(1, len(gpus))
    wants = _asked("plan", lambda: _wants(probes, sizes, gpus[:count], count), None, findings)
    seen = _Seen(gpus=gpus, states=states, wants=wants, ranks=count)
    for name, check in _checks(probes, options, seen):
        findings.extend(_asked(name, check, [], findings))
    return findings


def _asked(name: str, question: Callable[[], T], otherwise: T, findings: list[Finding]) -> T:
    try:
        return question()
    except Exception as error:  # whatever a driver, a library or the system answers is a finding
        findings.append(
            problem(
                name,
                f"could not be checked ({type(error).__name__}: {error})",
                advice="see to that error first",
                why="a run asks the same",
            )
        )
        return otherwise


def _wants(probes: Probes, sizes: ModelSizes | None, gpus: tuple[Gpu, ...], count: int) -> Wants | None:
    if sizes is None:
        return None
    available, _ = probes.ram()
    if not gpus:
        return wants_of(sizes, [None] * count, ram_bytes=available)
    rooms = [Room(gpu=gpu.name, vram_bytes=gpu.free_bytes) for gpu in gpus]
    # That there are too few cards is said elsewhere; those that are missing are taken for ones like the smallest.
    smallest = min(rooms, key=lambda room: room.vram_bytes)
    return wants_of(sizes, rooms + [smallest] * (count - len(rooms)), ram_bytes=available)


Named = tuple[str, Callable[[], list[Finding]]]


def _checks(probes: Probes, options: Options, seen: _Seen) -> Iterator[Named]:
    yield "python", lambda: [software.check_python(probes)]
    yield "torch", lambda: [software.check_torch(probes)]
    yield "triton", lambda: [software.check_triton(probes, on_gpu=seen.on_gpu)]
    yield "compiler", lambda: [software.check_compiler(probes, on_gpu=seen.on_gpu)]
    yield "driver", lambda: [software.check_driver(probes)]
    yield "ffmpeg", lambda: [software.check_encoders(probes)]
    yield "allocator", lambda: [software.check_allocator(probes, on_gpu=seen.on_gpu)]
    yield "gpus", lambda: [cards.check_count(seen.gpus, seen.ranks)]
    for gpu in seen.used:
        yield from _of_a_gpu(probes, options, seen, gpu)
    yield from _of_the_host(probes, options, seen)
    yield "rank variables", lambda: [ranks.check_left_over(probes)]
    if seen.ranks > 1:
        yield from _of_ranks(probes, options, seen)
    else:
        yield "ranks", lambda: [ok("ranks", "1, so nothing between ranks was checked; --gpus N checks for N")]


def _of_a_gpu(probes: Probes, options: Options, seen: _Seen, gpu: Gpu) -> Iterator[Named]:
    state = seen.states.get(gpu.index)
    yield f"gpu {gpu.index}", lambda: [cards.check_generation(gpu, probes.torch())]
    yield f"vram {gpu.index}", lambda: [cards.check_vram(gpu, state, seen.wants)]
    if options.measure:
        yield f"pcie {gpu.index}", lambda: [cards.check_pcie(gpu, state, seen.wants, probes)]


def _of_the_host(probes: Probes, options: Options, seen: _Seen) -> Iterator[Named]:
    if (wants := seen.wants) is not None:
        # Without a GPU and without a model of the user's, the 14B is an example and not what will run.
        planned = seen.on_gpu or options.converted
        yield "ram", lambda: [memory.check_ram(probes, wants, planned=planned)]
    yield "pinning", lambda: [memory.check_pinning(probes, seen.wants, on_gpu=seen.on_gpu)]
    yield "wsl", lambda: [memory.check_wsl(probes)]
    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    yield f"disk {here}", lambda: [memory.check_disk(probes, here, seen.wants, converted=options.converted)]
    if temporary != here:
        yield f"disk {temporary}", lambda: [memory.check_disk(probes, temporary, None, converted=True)]


def _of_ranks(probes: Probes, options: Options, seen: _Seen) -> Iterator[Named]:
    yield "nccl", lambda: ranks.check_backend(probes, on_gpu=seen.on_gpu)
    if len(seen.used) > 1:
        yield "p2p", lambda: [ranks.check_peers(probes, seen.used)]
    yield "shm", lambda: [ranks.check_shared_memory(probes, seen.ranks, on_gpu=seen.on_gpu)]
    yield "port", lambda: [ranks.check_port(probes, options.port)]
    yield "host name", lambda: [ranks.check_names(probes)]
    yield "threads", lambda: [ranks.check_threads(probes, seen.ranks, on_gpu=seen.on_gpu)]
