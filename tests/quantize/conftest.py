from __future__ import annotations

import pytest
import torch

import lowvram_quantize.convert as module


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
