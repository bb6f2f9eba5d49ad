from __future__ import annotations

import pytest

import lowvram.commands.compare as command
from tests.lowvram.compare.calls import RUNS, SETTINGS, record


@pytest.fixture
def no_run(monkeypatch):
    def never(*_arguments, **_more):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(command, "open_pipeline", never)


@pytest.fixture(scope="session")
def reference(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "ref"
    done = record(tiny, out, *SETTINGS, *RUNS, "--quiet")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == f"{out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["ref"]
    return out
