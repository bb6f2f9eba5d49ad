"""Which device a run computes on: the one that was asked for is the current one while it does, and not behind it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram import devices
from lowvram.devices import choose_device, computing_on, cuda_is_here, current, each_within
from lowvram.offload.copy_engine import Engine
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline
from lowvram.planning.measure import CudaRunner
from lowvram.runtime import Runtime
from lowvram_kernels.errors import HardwareError
from lowvram_quantize.format import Artifact


class Cards:
    """Stands for torch.cuda's idea of the current device."""

    def __init__(self) -> None:
        self.current = 0

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cards(monkeypatch) -> Cards:
    found = Cards()
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
    return found


def test_a_gpu_is_the_current_device_while_it_computes(cards):
    with computing_on(torch.device("cuda", 1)):
        assert cards.current == 1
        with computing_on(torch.device("cuda", 3)):
            assert cards.current == 3
        assert cards.current == 1
    assert cards.current == 0
    with pytest.raises(RuntimeError, match="no"), computing_on(torch.device("cuda", 1)):
        raise RuntimeError("no")
    assert cards.current == 0
    with current(torch.device("cpu")):
        assert cards.current == 0


class EveryOperation(TorchDispatchMode):
    """Notes which card is the current one, and how float32 is computed, at every single operation."""

    def __init__(self, cards: Cards):
        super().__init__()
        self._cards = cards
        self.at: set[int] = set()
        self.float32: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.at.add(self._cards.current)
        self.float32 |= {torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision}
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_two_pipelines_on_two_cards_take_turns(tiny, cards, monkeypatch):
    """Each operation of each is asked for while its card is the current one and float32 is exact; between them the
    caller's settings hold."""
    # The devices are the CPU under two indices, which are taken for those of cards.
    monkeypatch.setattr(devices, "current", cards.device)
    pipelines = [AvatarPipeline.from_artifact(tiny.artifact("int8"), device=f"cpu:{index}") for index in (1, 2)]
    streams = [pipeline.stream(tiny.request(num_clip=2, infer_frames=12, sample_steps=1)) for pipeline in pipelines]
    cards.current = 7
    for _ in range(2):
        for index, frames in zip((1, 2), streams, strict=True):
            with EveryOperation(cards) as watch:
                next(frames)
            assert watch.count > 300
            assert watch.at == {index}
            assert watch.float32 == {"ieee"}
            assert cards.current == 7
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert [next(frames, None) for frames in streams] == [None, None]
    assert cards.current == 7


def test_an_engine_is_made_where_it_works(tiny, cards, monkeypatch):
    made_at = []

    def engine_for(device: torch.device) -> Engine:
        made_at.append(cards.current)
        return Engine(device)

    monkeypatch.setattr("lowvram.runtime.engine_for", engine_for)
    artifact = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu").runtime.artifact
    memory = AvatarPipeline.from_artifact(tiny.artifact("int8"), device="cpu").runtime.memory
    made_at.clear()
    Runtime(artifact, torch.device("cuda", 1), "auto", memory)
    assert made_at == [1]
    assert cards.current == 0


@pytest.mark.parametrize(("nbytes", "share"), [(None, 1.0), (20 << 30, 0.25), (90 << 30, 1.0)])
def test_a_process_is_capped_on_its_card_alone(tiny, cards, monkeypatch, nbytes, share):
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *asked: seen.append(asked))
    artifact, memory = Artifact.open(tiny.artifact("int8")), MemoryOptions()
    Runtime(artifact, torch.device("cpu"), "auto", memory).cap(nbytes)
    assert not seen
    card = torch.device("cuda", 1)
    Runtime(artifact, card, "auto", memory, Engine(torch.device("cpu"))).cap(nbytes)
    assert seen == [(share, card)]


def test_a_card_is_measured_where_it_is(cards, monkeypatch):
    seen = []

    class Event:
        def __init__(self, **_):
            seen.append(cards.current)

        def record(self): ...

        synchronize = record

        def elapsed_time(self, other):
            return 1.0

    def prepared(self, what):
        seen.append(cards.current)
        return lambda: seen.append(cards.current)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(CudaRunner, "_prepared", prepared)
    CudaRunner(torch.device("cuda", 2)).seconds("h2d")
    assert seen == [2] * 4


def test_steps_are_taken_within_their_context_and_ended_there(cards):
    log = []

    @contextlib.contextmanager
    def context():
        log.append("in")
        yield
        log.append("out")

    def steps():
        try:
            yield 1
            yield 2
        finally:
            log.append("closed")

    assert list(each_within(context, steps())) == [1, 2]
    assert log == ["in", "out", "in", "out", "in", "closed", "out", "in", "out"]
    log.clear()
    left = each_within(context, steps())
    assert next(left) == 1
    left.close()
    assert log == ["in", "out", "in", "closed", "out"]
    assert list(each_within(context, iter([3]))) == [3]


def unusable(monkeypatch, message: str, error: type[Exception] = RuntimeError) -> None:
    def init() -> None:
        raise error(message)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(devices, "_said", set())


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.mark.parametrize(
    ("message", "error"),
    [(TOO_OLD, RuntimeError), ("libcudart functions unavailable", AssertionError), ("No CUDA GPUs are", RuntimeError)],
)
def test_a_gpu_that_cannot_be_used_is_said_with_its_reason(monkeypatch, caplog, message, error):
    unusable(monkeypatch, message, error)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with caplog.at_level(logging.WARNING, "lowvram"):
        assert choose_device("auto") == torch.device("cpu")
        assert not cuda_is_here()
    (said,) = [record.getMessage() for record in caplog.records]
    assert message in said
    assert "CUDA_VISIBLE_DEVICES is ''" in said
    with pytest.raises(HardwareError, match="lowvram doctor") as refused:
        choose_device("cuda:0")
    assert message in str(refused.value)


def test_asking_for_gpus_may_itself_fail(monkeypatch, caplog):
    unusable(monkeypatch, "")

    def asked() -> bool:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    assert choose_device("auto") == torch.device("cpu")
    assert "Error 804" in caplog.text
    with pytest.raises(HardwareError, match="Error 804"):
        choose_device("cuda")


def test_a_machine_without_a_driver_is_no_surprise(monkeypatch, caplog):
    unusable(monkeypatch, "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")
    assert choose_device("auto") == torch.device("cpu")
    assert not caplog.records
    with pytest.raises(HardwareError, match="no NVIDIA driver is here"):
        choose_device("cuda")


def test_a_card_beyond_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(HardwareError, match=r"'cuda:3', but 1 CUDA devices are here .*'3'"):
        choose_device("cuda:3")
    assert choose_device("cuda:0") == torch.device("cuda", 0)
