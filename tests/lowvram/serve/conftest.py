"""All of these need the extra ``ui``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

for module in ("fastapi", "gradio", "httpx", "uvicorn"):
    pytest.importorskip(module, reason="pip install 'lowvram[ui]'")

from lowvram.serve.limits import MIB, Limits  # noqa: E402
from tests.lowvram.serve.fakes import FakeMaker, client_of, running, voice  # noqa: E402

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from lowvram.serve.queue import WorkQueue

LIMITS = Limits(upload_bytes=MIB, seconds=5, queue=4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkQueue]:
    """For requests that are refused, of which nothing may be left."""
    with running(tmp_path_factory.mktemp("refusing") / "s", FakeMaker(free=True), LIMITS) as queue:
        yield queue


@pytest.fixture(scope="module")
def client(queue: WorkQueue) -> Iterator[TestClient]:
    with client_of(queue) as client:
        yield client


@pytest.fixture
def maker() -> FakeMaker:
    return FakeMaker(free=True)


@pytest.fixture
def working(tmp_path: Path, maker: FakeMaker) -> Iterator[WorkQueue]:
    """For those that are taken."""
    with running(tmp_path / "s", maker, LIMITS) as queue:
        yield queue


@pytest.fixture
def taking(working: WorkQueue) -> Iterator[TestClient]:
    with client_of(working) as client:
        yield client
