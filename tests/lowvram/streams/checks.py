"""One piece of work on a device whose streams are watched, and on a plain one."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable

import torch

from lowvram.offload.copy_engine import Engine
from tests.lowvram.streams.clocks import Clocks
from tests.lowvram.streams.fake_cuda import FakeCuda
from tests.lowvram.streams.late import Late

Tensor = torch.Tensor
Work = Callable[[Engine], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """``races`` by vector clocks, ``late`` what came of copies at the last moment, ``copies`` how many there were."""

    plain: Tensor
    late: Tensor
    races: tuple[str, ...]
    copies: int


def checked(monkeypatch, work: Work) -> Checked:
    """Raises: AssertionError where the fake device itself changes what comes out."""
    plain = work(Engine(torch.device("cpu")))
    clocks = Clocks()
    with FakeCuda(clocks).installed(monkeypatch) as engine:
        assert torch.equal(work(engine), plain)
    with FakeCuda(Late()).installed(monkeypatch) as engine:
        late = work(engine)
    return Checked(plain=plain, late=late, races=tuple(clocks.races), copies=clocks.copies)


def checked_against(monkeypatch, work: Work, plain: Tensor) -> None:
    """No race, and the bits of ``plain`` however late copies run. Of values that copies alone make wrong, the run with
    late ones would tell."""
    clocks = Clocks()
    for model in (clocks, Late()):
        with FakeCuda(model).installed(monkeypatch) as engine:
            assert torch.equal(work(engine), plain), type(model).__name__
        assert not clocks.races, "\n".join(clocks.races)
    assert clocks.copies


def assert_ordered(monkeypatch, work: Work) -> Checked:
    """No race, and the same bits however late copies run."""
    found = checked(monkeypatch, work)
    assert not found.races, "\n".join(found.races)
    assert found.copies
    assert torch.equal(found.late, found.plain)
    return found


def faults(monkeypatch, work: Work, plain: Tensor) -> list[str]:
    """What the checks find wrong with ``work``, which ought to give ``plain``."""
    found, clocks = [], Clocks()
    for model in (clocks, Late()):
        with FakeCuda(model).installed(monkeypatch) as engine:
            try:
                if not torch.equal(work(engine), plain):
                    found.append(f"{type(model).__name__}: other values")
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # while the fake device is there to take its memory back
                found.append(f"{type(model).__name__}: {error!r}")
        if clocks.races:
            break
    return [*found, *clocks.races]
