import logging

import torch

from lowvram_kernels import uploads
from lowvram_kernels.uploads import upload


def test_from_pinned_memory_without_waiting_where_a_plain_copy_would_wait(monkeypatch):
    asked = []
    monkeypatch.setattr(uploads, "waits", lambda device: True)
    monkeypatch.setattr(uploads, "pinned", lambda tensor: asked.append(tensor) or tensor)
    given = torch.ones(3)
    assert upload(given, torch.device("meta")).is_meta
    assert len(asked) == 1
    assert asked[0] is given
    there = torch.ones(3, device="meta")
    assert upload(there, torch.device("meta")) is there
    assert len(asked) == 1


def test_a_plain_copy_elsewhere():
    given = torch.ones(3)
    assert upload(given, torch.device("cpu")) is given


def test_without_pinned_memory_it_says_so_once(monkeypatch, caplog):
    def fails(tensor):
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(torch.Tensor, "pin_memory", fails)
    uploads._say_once.cache_clear()
    given = torch.ones(3)
    with caplog.at_level(logging.WARNING):
        assert uploads.pinned(given) is given
        assert uploads.pinned(given) is given
    assert [record.message for record in caplog.records] == [
        "no pinned memory for small copies (CUDA error: out of memory): the host waits for each of them"
    ]
