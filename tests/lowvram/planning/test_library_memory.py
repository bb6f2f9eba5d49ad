"""What lies outside of torch's allocator, measured against a card that takes what it is told to."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

from lowvram.planning import library_memory as outside
from lowvram.planning.library_memory import (
    OutsideAllocator,
    measure_outside_allocator,
    measure_parts,
    outside_allocator,
    outside_key,
)
from lowvram.selftest import library_memory_probe as outside_work
from lowvram.simulate.device import SimulatedDevice
from lowvram_kernels.errors import DeviceError
from lowvram_kernels.trace import trace_kernels
from lowvram_models.config import DiTConfig

KEY = "Card | driver 1 | torch 2"
GPU = torch.device("cuda", 0)
SMALL, LARGE = 704 * 384, 1280 * 720
FOUND = OutsideAllocator(context=400, cublas=18, modules=60, vae=((SMALL, 130), (LARGE, 500)))


@dataclasses.dataclass
class FakeRunner:
    """Takes (outside, inside) for each part, on top of a context of 400."""

    takes: dict[str, tuple[int, int]]
    taken: int = 400
    too_large: str = ""

    def outside(self) -> int:
        return self.taken

    def run(self, part: str) -> int:
        if part == self.too_large:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        more, inside = self.takes[part]
        self.taken += more
        return inside


TAKES = {"cublas": (10, 8), "modules": (60, 0), "704*384": (30, 100), "1280*720": (20, 450)}


def test_each_part_is_what_comes_on_top():
    assert measure_parts(FakeRunner(TAKES)) == FOUND


def test_a_size_that_does_not_fit_is_left_out():
    found = measure_parts(FakeRunner(TAKES, too_large="1280*720"))
    assert found.vae == ((SMALL, 130),)


def test_memory_that_others_give_back_is_not_ours():
    found = measure_parts(FakeRunner(TAKES | {"modules": (-300, 0)}))
    assert found.modules == 0
    assert found.cublas == 18


@pytest.mark.parametrize(
    ("pixels", "nbytes"), [(100, 130), (SMALL, 130), (SMALL + 1, 500), (LARGE, 500), (2 * LARGE, 1000)]
)
def test_the_vae_takes_what_the_next_larger_size_took(pixels, nbytes):
    assert FOUND.of_vae(pixels) == nbytes
    assert FOUND.reserved(pixels) == 18 + 60 + nbytes


def test_what_was_measured_is_read_the_next_time(tmp_path):
    file = tmp_path / "new" / "outside.json"
    assert outside_allocator(KEY, file=file) is None
    started = []

    def start(device: torch.device) -> dict:
        started.append(device)
        return json.loads(json.dumps(dataclasses.asdict(FOUND)))

    assert measure_outside_allocator(GPU, KEY, start=start, file=file) == FOUND
    assert outside_allocator(KEY, file=file) == FOUND
    assert outside_allocator("Other card", file=file) is None
    assert started == [GPU]
    assert list(json.loads(file.read_text())) == [outside_key(KEY)]


def test_the_key_has_what_the_bytes_depend_on(monkeypatch):
    versions = {"triton": "3.7.1", "lowvram": "1.0"}
    monkeypatch.setattr(outside, "version", versions.__getitem__)
    key = outside_key(KEY)
    assert KEY in key
    for package in versions:
        versions[package] += ".1"
        assert outside_key(KEY) != key
        key = outside_key(KEY)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"a": {"context": 1}}', '{"a": {"context": -1, "cublas": 1, "modules": 1, "vae": []}}',
     '{"a": {"context": "1", "cublas": 1, "modules": 1, "vae": []}}', '{"a": 5}'],
)  # fmt: skip
def test_a_damaged_file_is_said_and_replaced(tmp_path, caplog, text):
    file = tmp_path / "outside.json"
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert outside_allocator(KEY, file=file) is None
    assert "cannot be used" in caplog.text
    outside.write_outside(KEY, FOUND, file=file)
    assert outside_allocator(KEY, file=file) == FOUND


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ("no_such_module", r"exit code 1: .*No module named no_such_module\); plans"),
        ("abc", r"exit code 0: \); plans"),
    ],
)
def test_a_process_that_fails_is_said(monkeypatch, probe, said):
    assert outside_work.__name__ == outside._PROBE
    monkeypatch.setattr(outside, "_PROBE", probe)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1, 2))
    with pytest.raises(DeviceError, match=r"could not be measured \(" + said + ".*flat value"):
        outside._start(GPU)


def test_the_layers_of_a_run_call_its_kernels():
    config = DiTConfig(
        dim=80, ffn_dim=216, num_heads=5, num_layers=1, freq_dim=32, text_len=16, text_dim=32, audio_dim=24,
        audio_inject_layers=(0,),
    )  # fmt: skip
    with trace_kernels() as kernels:
        for kv in ("int8", "plain"):
            outside_work.layers(config, torch.device("cpu"), dtype=torch.int8, kv=kv, latent_size=(8, 8))
    called = {operation for operation, _ in kernels}
    assert {"linear_w8a8", "attention", "ring_attention"} <= called, called


def test_the_vae_is_run_as_a_run_does():
    with SimulatedDevice(cublas_workspace_bytes=0) as gpu:
        outside_work.decode(8, torch.device("meta"), (16, 16))
        decoded = gpu.peak_allocated
        gpu.reset_peaks()
        outside_work.encode(8, torch.device("meta"), (16, 16))
    assert min(decoded, gpu.peak_allocated) > 2**20
    outside_work.decode(4, torch.device("cpu"), (8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_card_has_plausible_parts(tmp_path):
    found = measure_outside_allocator(GPU, KEY, file=tmp_path / "outside.json")
    assert 2**26 < found.context < 2**31
    assert 0 < found.cublas < 2**28
    assert found.modules < 2**30
    assert found.vae
