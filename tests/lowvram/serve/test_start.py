"""How it is started, and what it says that fits."""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.planning.card_names import card_named
from lowvram.planning.planner import plan
from lowvram.planning.rank_plan import DoesNotFit
from lowvram.planning.workload import Workload
from lowvram.serve.limits import Limits
from lowvram.serve.presets import NOT_PREDICTED, SIZES, choose, presets_of
from lowvram.serve.server import Address, serve
from lowvram_kernels.errors import ConfigError, HardwareError
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact
from tests.lowvram.serve.fakes import PRESETS, FakeMaker


def predicted(seconds: float) -> Any:
    workload = SimpleNamespace(frames_per_block=3)
    return SimpleNamespace(workload=workload, seconds_per_block=seconds, peak_vram_bytes=2**30, peak_host_bytes=2**31)


@pytest.mark.parametrize(
    ("fits", "chosen", "frames"),
    [
        ({48: 4}, [0, 2, 3], 48),
        ({48: 3}, [0, 2, 2], 48),
        ({48: 2}, [0, 1, 1], 48),
        ({48: 1}, [0, 0, 0], 48),
        ({24: 2}, [0, 1, 1], 24),
        ({12: 3}, [0, 2, 2], 12),
    ],
)
def test_presets_are_sizes_that_fit(fits: dict[int, int], chosen: list[int], frames: int):
    def planned(size: str, infer_frames: int) -> Any:
        place = SIZES.index(size)
        return predicted(1.0 + 0.5 * place) if place < fits.get(infer_frames, 0) else None

    found = choose(planned, "cuda")
    assert [each.size for each in found.presets] == [SIZES[place] for place in chosen]
    assert [each.name for each in found.presets] == ["light", "balanced", "best"]
    assert {each.infer_frames for each in found.presets} == {frames}
    assert found.presets[0].frames_per_second == 12.0


def test_a_card_that_takes_nothing():
    found = choose(lambda size, frames: None, "cuda")
    assert not found.presets
    assert "not even 384*256" in found.note


def test_presets_of_a_planned_card(tmp_path: Path):
    artifact = Artifact.open(write_shape_artifact(tmp_path / "14b", preset="tiny", precision="int8"))
    card = card_named("rtx4090")

    def planned(size: str, infer_frames: int) -> Any:
        if size not in (SIZES[0], SIZES[-1]):
            return None
        work = Workload.of_size(size, infer_frames=infer_frames)
        try:
            return plan(artifact, work, vram_bytes=card.usable_bytes, ram_bytes=64 * 2**30, card=card)
        except DoesNotFit:
            return None

    light, balanced, best = choose(planned, "cuda").presets
    assert (light.size, best.size) == ("384*256", "1280*720")
    assert (light.frames_per_second or 0) >= (balanced.frames_per_second or 0) >= (best.frames_per_second or 0) > 0
    assert 0 < (light.vram_bytes or 0) <= card.usable_bytes
    assert 0 < (best.vram_bytes or 0) <= card.usable_bytes


def test_on_a_processor_nothing_is_predicted():
    device = SimpleNamespace(type="cpu", __str__=lambda self: "cpu")
    found = presets_of(SimpleNamespace(runtime=SimpleNamespace(device=device)))  # type: ignore[arg-type]
    assert found.note == NOT_PREDICTED
    assert [each.frames_per_second for each in found.presets] == [None] * 3


@pytest.mark.parametrize(
    ("host", "token", "asks", "url"),
    [
        ("127.0.0.1", None, False, "http://127.0.0.1:7/"),
        ("localhost", None, False, "http://localhost:7/"),
        ("::1", None, False, "http://[::1]:7/"),
        ("127.0.0.1", "secret token", True, "http://127.0.0.1:7/?token=secret%20token"),
        ("0.0.0.0", None, True, "http://127.0.0.1:7/?token="),
        ("::", None, True, "http://[::1]:7/?token="),
        ("192.168.0.7", "secret-token", True, "http://192.168.0.7:7/?token=secret-token"),
        ("machine.local", None, True, "http://machine.local:7/?token="),
    ],
)
def test_any_address_but_this_machines_own_has_a_token(host: str, token: str | None, asks: bool, url: str):
    where = Address(host=host, token=token).settled()
    assert (where.token is not None) == asks
    assert where.url(7).startswith(url)
    assert len(where.token or "12345678") >= 8


@pytest.mark.parametrize(
    "changes",
    [{"port": -1}, {"port": 65536}, {"token": ""}, {"token": "short"}, {"token": "x" * 300}, {"token": "a\n" * 8}],
)
def test_addresses_that_cannot_be(changes: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"--(port|token)"):
        dataclasses.replace(Address(), **changes)


def test_a_port_that_is_taken(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(port=taken.getsockname()[1])
        with pytest.raises(HardwareError, match="choose another --port"):
            serve(tmp_path, FakeMaker(), lambda: PRESETS, address=address, limits=Limits(), say=print)


@pytest.mark.parametrize("module", ["uvicorn", "fastapi", "pydantic", "gradio"])
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str):
    for name in [name for name in sys.modules if name.startswith("lowvram.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    ran = CliRunner().invoke(main, ["serve", "--model", str(tmp_path)])
    assert ran.exit_code == 2
    assert ran.stderr.strip().endswith("pip install 'lowvram[ui]'")
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--max-queue", "0"],
        ["--max-upload", "much"],
        ["--max-seconds", "0"],
        ["--port", "99999"],
        ["--token", "short"],
        [],
    ],
    ids=str,
)
def test_options_that_cannot_be_used(tmp_path: Path, options: list[str]):
    ran = CliRunner().invoke(main, ["serve", "--model", str(tmp_path / "nothing"), "--no-selftest", *options])
    assert ran.exit_code == 2
    assert (options or ["nothing"])[0].lstrip("-").split("-")[-1] in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
