from __future__ import annotations

import pytest

import lowvram.commands.compare as command


@pytest.fixture
def no_run(monkeypatch):
    def never(*_arguments, **_more):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(command, "open_pipeline", never)
