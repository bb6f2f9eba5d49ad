"""Layers replayed as graphs give the same latents, bit for bit. The graphs are made up, but for the last test."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch

from lowvram.commands.shared_options import SETTINGS, memory_options, request_options
from lowvram.denoise import denoiser as denoiser_module
from lowvram.denoise.cuda_graphs import CudaCapture, LayerGraphs, layer_graphs
from lowvram.denoise.denoiser import Denoiser
from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import WholeVoice
from lowvram.offload.copy_engine import Engine
from lowvram.offload.oom import Ladder, Rung
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.parallel.team import Alone, SingleRank
from lowvram.parallel.ulysses import Whole
from lowvram.runtime import Run, Runtime, memory_report
from lowvram.schedule import blocks_of, latent_frames_per_clip
from lowvram_kernels.errors import ConfigError, DeviceError, OutOfMemoryError
from lowvram_models.config import DiTConfig
from lowvram_models.dit import Head
from lowvram_quantize.format import Artifact
from tests.lowvram.fake_capture import FakeCapture

STEPS, LAYERS, AUDIO_LAYERS, CLIPS, FRAMES, SIZE = 2, 4, 2, 5, 16, (8, 8)
CELLS = tuple((step, layer) for step in range(STEPS) for layer in range(LAYERS))
RESIDENT = Placement()
GRAPHS = STEPS * LAYERS * 2  # two blocks a clip, the second of them shorter


class Pools(list):
    """Every pool that a run opens. ``fails_at`` is the capture, counted over all pools, in which memory runs out."""

    def __init__(self, fails_at: int | None = None):
        self.captures, self.fails_at = 0, fails_at

    def __call__(self) -> FakeCapture:
        self.append(FakeCapture(self._count))
        return self[-1]

    def _count(self) -> None:
        self.captures += 1
        if self.captures - 1 == self.fails_at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")


def faked(monkeypatch, pools: Pools) -> None:
    """Let runs have graphs on a CPU, from ``pools``."""

    def graphs(engine, sequence, placement, cells, gave_up, facts, *, asked) -> LayerGraphs:
        return LayerGraphs(pools, engine, gave_up, facts, asked=asked)

    monkeypatch.setattr(denoiser_module, "layer_graphs", graphs)


@dataclasses.dataclass
class Made:
    """What came of a run: all latents, and what the run says of itself."""

    latents: torch.Tensor
    run: Run

    @property
    def runtime(self) -> Runtime:
        return self.run.runtime

    @property
    def facts(self) -> dict[str, float]:
        return memory_report(self.runtime, self.run)["cuda_graphs"]


def run(
    tiny,
    placement: Placement = RESIDENT,
    *,
    graphs: bool,
    precision="fp32",
    device="cpu",
    fallback=True,
    asked=True,
) -> Made:
    """``CLIPS`` clips of random conditions through a denoiser; graphs ``asked`` for, or had all the same."""
    runtime = Runtime(
        Artifact.open(tiny.artifact(precision)),
        torch.device(device),
        "auto",
        MemoryOptions(cuda_graphs=graphs if asked else None, fallback=fallback),
    )
    rung = Rung(placement=placement, online_decode=True)
    ladder = Ladder(rung, layers=LAYERS, steps=range(STEPS), allowed=fallback)
    one = Run(runtime=runtime, ladder=ladder, with_graphs=graphs)
    request = tiny.request(sample_steps=STEPS, infer_frames=FRAMES, cond_rope_distance="random")
    denoiser = Denoiser(
        one, request, SIZE, conditions(DiTConfig.from_dict(runtime.dit_config)), SingleRank(), range(STEPS)
    )
    blocks = blocks_of(CLIPS, latent_frames_per_clip(FRAMES))
    return Made(torch.cat([latent.flatten() for _, latent, _ in denoiser.run(blocks, Alone())]), one)


def in_lanes(kernels: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """What ``run`` counts with graphs, from what it counts without. A lane's tensors hold another block's values next
    time, so that what depends on the audio alone is not kept there: keys and their norm, values, the rows of both, and
    modulation of each layer with audio are made anew in every step but a block's first, from the second clip on."""
    anew = AUDIO_LAYERS * (STEPS - 1) * 2 * (CLIPS - 1)
    of_audio = {"norm_rope": 1, "linear_w8a8": 3, "quantize_rows": 2}
    # Rows of the feed-forward's width, which are rotated by 8, have nothing of the audio.
    return {key: calls + of_audio.get(key[0], 0) * anew * ("by 8" not in key[1]) for key, calls in kernels.items()}


def sums_and_norms(kernels: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """The same with every fused pass counted as the sum and the norm that it is: a graph's last sum is a pass of its
    own, because what it gives has to stand at one address, and the next layer norms what is summed already."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for (operation, kind), calls in kernels.items():
        if operation == "add_gated_norm_rows":
            found["add_gated", "torch"] += calls
            found["norm_rows", kind] += calls
        else:
            found[operation, kind] += calls
    return dict(found)


def conditions(config: DiTConfig) -> Conditions:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    return Conditions(
        context=random(5, config.text_dim),
        audio=WholeVoice(random(1, config.audio_layers, config.audio_dim, CLIPS * FRAMES)),
        reference=random(16, 1, *SIZE),
        motion=random(16, 19, *SIZE),
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("wave", [1, 2])
def test_replays_give_the_same_latents_and_counts(tiny, monkeypatch, precision, wave):
    placement = Placement(wave=wave, kv="int8" if precision == "int8" else "plain")
    plain = run(tiny, placement, graphs=False, precision=precision)
    faked(monkeypatch, pools := Pools())
    replayed = run(tiny, placement, graphs=True, precision=precision)
    assert torch.equal(replayed.latents, plain.latents)
    assert sums_and_norms(replayed.runtime.kernels) == in_lanes(sums_and_norms(plain.runtime.kernels))
    # The first clip is eager, the second warms up, the third captures and replays.
    assert (replayed.facts["captured"], replayed.facts["replayed"]) == (GRAPHS, GRAPHS * (CLIPS - 2))
    assert replayed.facts["capture_s"] > 0
    assert len(pools) == 1


def test_what_comes_from_the_host_is_not_captured(tiny, monkeypatch):
    placement = Placement(streamed_layers=(0, 2), host_rings=((1, 1),))
    plain = run(tiny, graphs=False)
    faked(monkeypatch, Pools())
    replayed = run(tiny, placement, graphs=True)
    assert torch.equal(replayed.latents, plain.latents)
    assert sums_and_norms(replayed.runtime.kernels) == in_lanes(sums_and_norms(plain.runtime.kernels))
    assert replayed.facts["captured"] == 3 * 2  # of (step, layer) (0, 1), (0, 3) and (1, 3), two blocks each


def test_nothing_is_captured_where_everything_streams(tiny, monkeypatch):
    faked(monkeypatch, pools := Pools())
    run(tiny, Placement(streamed_layers=tuple(range(LAYERS))), graphs=True)
    run(tiny, Placement(host_rings=CELLS), graphs=True)
    assert not pools


def test_moving_weights_and_rings_begins_anew(tiny, monkeypatch):
    plain = run(tiny, graphs=False)
    faked(monkeypatch, pools := Pools())
    real, passes = Denoiser._advance, itertools.count()

    def advance(self: Denoiser, tick, latent) -> None:
        if next(passes) == 2 * 2 * STEPS + 3:  # of the third clip's two blocks the second has taken a step
            lanes = list(self.rollout.graphs._lanes.values())
            assert any(lane.captured for lane in lanes)
            self._run.ladder._step_down("denoise", "made up")
            self.degrade(self._run.rung)
            assert not any(lane.captured for lane in lanes)
        real(self, tick, latent)

    monkeypatch.setattr(Denoiser, "_advance", advance)
    replayed = run(tiny, graphs=True)
    assert torch.equal(replayed.latents, plain.latents)
    assert sums_and_norms(replayed.runtime.kernels) == in_lanes(sums_and_norms(plain.runtime.kernels))
    assert len(replayed.run.rung.placement.streamed_layers) == 1
    assert len(pools) == 2
    assert pools[1].graphs


def test_a_pass_that_fails_behind_its_replays_is_repeated(tiny, monkeypatch):
    """The residual in the lane is that of the last layer by then, and the ring has the block's keys already."""
    plain = run(tiny, graphs=False)
    faked(monkeypatch, Pools())
    real, calls = Head.forward, itertools.count()

    def forward(self: Head, x_LD, time, dtype):
        if next(calls) == 3 * 2 * STEPS + 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, x_LD, time, dtype)

    monkeypatch.setattr(Head, "forward", forward)
    replayed = run(tiny, graphs=True)
    assert torch.equal(replayed.latents, plain.latents)
    assert replayed.run.ladder.events == ["denoise: 1 of 4 layers are streamed now"]


@pytest.mark.parametrize("fails_at", [0, 9])
@pytest.mark.parametrize("wave", [1, 2])
def test_memory_that_runs_out_in_a_capture_ends_all_graphs(tiny, monkeypatch, caplog, fails_at, wave):
    plain = run(tiny, Placement(wave=wave), graphs=False)
    faked(monkeypatch, pools := Pools(fails_at))
    replayed = run(tiny, Placement(wave=wave), graphs=True)
    assert torch.equal(replayed.latents, plain.latents)
    least, found = (sums_and_norms(made.runtime.kernels) for made in (plain, replayed))
    most = in_lanes(least)  # lanes end with the graphs
    assert found.keys() == least.keys()
    for key, calls in least.items():
        assert calls <= found[key] <= most[key], key
    assert (len(pools), pools.captures) == (1, fails_at + 1)
    assert replayed.run.ladder.events == ["cuda_graphs: layers run without graphs from here on"]
    assert replayed.run.rung.placement == Placement(wave=wave)
    assert sum("9.00 GiB): layers run without graphs" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("error", ["CUDA out of memory. Tried to allocate 9.00 GiB.", "operation not permitted"])
def test_graphs_that_nobody_asked_for_end_aloud_whatever_fails(tiny, monkeypatch, caplog, error):
    """Also where --no-fallback forbids to go on slower: what was asked for goes on as it would have without."""
    plain = run(tiny, graphs=False)
    faked(monkeypatch, pools := Pools())

    def fails() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(pools, "_count", fails)
    replayed = run(tiny, graphs=True, asked=False, fallback=False)
    assert torch.equal(replayed.latents, plain.latents)
    assert replayed.run.ladder.events == ["cuda_graphs: layers run without graphs from here on"]
    assert sum(error.rstrip(".").split(". ")[0] in record.getMessage() for record in caplog.records) == 1


def test_no_fallback_takes_no_run_without_graphs(tiny, monkeypatch):
    faked(monkeypatch, Pools(fails_at=3))
    with pytest.raises(OutOfMemoryError, match=r"cuda_graphs: .*9\.00 GiB; --no-fallback"):
        run(tiny, graphs=True, fallback=False)


def test_what_cannot_be_captured_ends_the_run(tiny, monkeypatch):
    pools = Pools()
    monkeypatch.setattr(pools, "_count", refuse)
    faked(monkeypatch, pools)
    with pytest.raises(DeviceError, match=r"layer 0 could not be captured .*not permitted.*--cuda-graphs"):
        run(tiny, graphs=True)


def refuse() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_the_stand_in_shows_what_does_not_stay():
    """A tensor that was read in the capture and is another one later: a replay reads the old one."""
    out, other = torch.zeros(3), [torch.ones(3)]
    replay = FakeCapture()(lambda: out.copy_(other[0] + 1))
    assert out.tolist() == [0, 0, 0]
    other[0] = torch.full((3,), 7.0)
    replay()
    assert out.tolist() == [2, 2, 2]
    kept = []
    FakeCapture()(lambda: kept.append(other[0] + 1))
    assert kept[0].isnan().all()


def test_cuda_graphs_share_a_pool_and_a_stream_and_come_back_from_it(monkeypatch):
    """What speaks to a GPU is replaced."""
    asked: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def entered(*what: Any, **options: Any) -> Iterator[None]:
        asked.append((*what, options))
        yield
        asked.append(("left", *what))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: asked.append(("replay",))))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: entered("graph", **options))
    capture = CudaCapture(torch.device("cuda", 1))
    settings = {"pool": (0, 7), "stream": "side", "capture_error_mode": "thread_local"}
    for _ in range(2):
        asked.clear()
        replay = capture(lambda: asked.append(("work",)))
        assert asked == [("main", {}), ("graph", settings), ("work",), ("left", "graph"), ("left", "main")]
        replay()
        assert asked[-1] == ("replay",)


def graphs_on(device: str, placement: Placement = RESIDENT, sequence: object = None) -> LayerGraphs | None:
    return layer_graphs(Engine(torch.device(device)), sequence or Whole(), placement, CELLS, print, {})


def test_where_graphs_have_no_effect_they_are_warned_about(caplog):
    assert graphs_on("cuda") is not None
    assert not caplog.records
    assert graphs_on("cpu") is None
    assert graphs_on("cuda", sequence=object()) is None
    assert graphs_on("cuda", Placement(host_rings=CELLS)) is None
    assert graphs_on("cuda", Placement(streamed_layers=(0, 1), host_rings=CELLS[2:4] + CELLS[6:])) is None
    assert graphs_on("cuda", Placement(streamed_layers=(0, 1), host_rings=CELLS[2:4])) is not None
    said = [record.getMessage() for record in caplog.records]
    assert all(text.startswith("--cuda-graphs has no effect ") for text in said)
    assert [next(k for k in ("on cpu", "ulysses", "host") if k in text) for text in said] == [
        "on cpu", "ulysses", "host", "host",
    ]  # fmt: skip


def test_a_run_on_a_cpu_warns_and_goes_on(tiny, caplog):
    assert run(tiny, graphs=True).facts is None
    assert "no effect on cpu" in caplog.text


def test_nothing_is_said_of_graphs_that_nobody_asked_for(tiny, caplog):
    assert run(tiny, graphs=True, asked=False).facts is None
    assert "cuda-graphs" not in caplog.text


@pytest.mark.parametrize("name", ["offload_model", "offload_kv_cache"])
def test_graphs_of_what_never_stays_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} takes all"):
        MemoryOptions(cuda_graphs=True, **{name: True})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], None),
        (["--cuda-graphs"], True),
        (["--cuda_graphs", "True"], True),
        (["--cuda_graphs", "False"], False),
    ],
    ids=str,
)
def test_the_option_reaches_the_run(given, wanted):
    command = request_options(click.Command("infer", callback=lambda **options: memory_options(options).cuda_graphs))
    command.context_settings = SETTINGS
    assert command.main(given, standalone_mode=False) is wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("precision", "kv"), [("int8", "int8"), ("bf16", "plain")])
@pytest.mark.parametrize("wave", [1, 2])
def test_on_the_card(tiny, precision, kv, wave):
    placement = Placement(streamed_layers=(1,), kv=kv, wave=wave)
    plain = run(tiny, placement, graphs=False, precision=precision, device="cuda")
    replayed = run(tiny, placement, graphs=True, precision=precision, device="cuda")
    assert torch.equal(replayed.latents, plain.latents)
    assert sums_and_norms(replayed.runtime.kernels) == in_lanes(sums_and_norms(plain.runtime.kernels))
    assert (replayed.facts["captured"], replayed.facts["replayed"]) == (GRAPHS * 3 // 4, GRAPHS * 3 // 4 * (CLIPS - 2))
    assert replayed.run.ladder.events == []
