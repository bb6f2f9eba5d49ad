from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowvram_quantize.convert as module
from tests.quantize.checkpoints import clone, contents, run


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Names of the tensors that are converted from here on."""
    names: list[str] = []
    write_item = module.write_item

    def counted(item, *args):
        names.append(item.name)
        return write_item(item, *args)

    monkeypatch.setattr(module, "write_item", counted)
    return names


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors here are so small that a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tiny, tmp_path) -> Path:
    return clone(tiny.checkpoint, tmp_path / "ckpt")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="package")
def reference(tiny, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run writes of some components."""
    return contents(run(tiny.checkpoint, tmp_path_factory.mktemp("reference") / "out"))
