"""The real runtime on a tiny DiT, its streams watched: wherever weights and rings lie, and in waves of any length."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from lowvram.denoise.denoiser import Denoiser
from lowvram.encode.conditions import Conditions
from lowvram.encode.voice import WholeVoice
from lowvram.offload.copy_engine import Engine
from lowvram.offload.oom import Ladder, Rung
from lowvram.offload.placement import MemoryOptions, Placement
from lowvram.parallel.team import Alone, SingleRank
from lowvram.request import Request
from lowvram.runtime import Run, Runtime
from lowvram.schedule import Block, blocks_of, latent_frames_per_clip
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_quantize import shape_artifact
from lowvram_quantize.format import Artifact
from lowvram_quantize.presets import TINY
from lowvram_quantize.shape_artifact import RandomFill, write_shape_artifact
from tests.lowvram.offload.test_oom import full
from tests.lowvram.streams.checks import checked_against

Tensor = torch.Tensor
# Four blocks fill the rings, so that all four of them share a pass in a wave of 4; the fifth sees whole rings.
LAYERS, STEPS, FRAMES, BLOCKS, SIZE = 2, 4, 48, 5, (8, 8)
CELLS = tuple((step, layer) for step in range(STEPS) for layer in range(LAYERS))
ALL = tuple(range(LAYERS))

PLACEMENTS = {
    "resident": Placement(),
    "streamed through one slot": Placement(streamed_layers=ALL, weight_slots=1),
    "rings on the host": Placement(host_rings=CELLS),
    "some of both, a slot each": Placement(streamed_layers=(1,), host_rings=CELLS[1::3], weight_slots=1, ring_slots=1),
    "nothing stays": Placement(streamed_layers=ALL, host_rings=CELLS),
    "many slots": Placement(streamed_layers=ALL, host_rings=CELLS, weight_slots=3, ring_slots=5),
}
# Every placement with every wave; both kinds of rings with every placement, and with every wave.
TABLE = [
    (name, wave, "plain" if (row + wave) % 2 else "int8")
    for row, name in enumerate(PLACEMENTS)
    for wave in range(1, STEPS + 1)
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    few = dataclasses.replace(TINY, dit=TINY.dit | {"num_layers": LAYERS, "audio_inject_layers": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shape_artifact.PRESETS, "tiny", few)
        path = tmp_path_factory.mktemp("tiny") / "fp32"
        write_shape_artifact(path, preset="tiny", precision="fp32", fill=RandomFill())
    return Artifact.open(path)


@pytest.fixture(scope="module")
def plain(artifact) -> dict[str, Tensor]:
    """Latents by kind of rings, made without copies: the same wherever things lie, and in whatever wave."""
    return {kv: latents(artifact, Placement(kv=kv), Engine(torch.device("cpu"))) for kv in ("plain", "int8")}


def latents(artifact: Artifact, placement: Placement, engine: Engine) -> Tensor:
    runtime = Runtime(artifact, torch.device("cpu"), "float32", MemoryOptions(), engine)
    rung = Rung(placement=placement, online_decode=True)
    run = Run(runtime=runtime, ladder=Ladder(rung, layers=LAYERS, steps=range(STEPS), allowed=True))
    nowhere: Any = None
    request = Request(image=nowhere, audio=nowhere, prompt="", infer_frames=FRAMES, sample_steps=STEPS)
    denoiser = Denoiser(run, request, SIZE, conditions(runtime.dit_config), SingleRank(), range(STEPS))
    made = torch.cat([latent.flatten() for _, latent, _ in denoiser.run(blocks(), Alone())])
    assert made.isfinite().all()
    return made


def blocks() -> list[Block]:
    return list(itertools.islice(blocks_of(2, latent_frames_per_clip(FRAMES)), BLOCKS))


def conditions(config: dict[str, Any]) -> Conditions:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    dit = DiTConfig.from_dict(config)
    return Conditions(
        context=random(5, dit.text_dim),
        audio=WholeVoice(random(1, dit.audio_layers, dit.audio_dim, 2 * FRAMES)),
        reference=random(16, 1, *SIZE),
        motion=random(16, 19, *SIZE),
    )


def test_the_table_has_every_pair():
    kinds = {(name, kv) for name, _, kv in TABLE} | {(wave, kv) for _, wave, kv in TABLE}
    assert kinds == set(itertools.product((*PLACEMENTS, *range(1, STEPS + 1)), ("plain", "int8")))
    assert {(name, wave) for name, wave, _ in TABLE} == set(itertools.product(PLACEMENTS, range(1, STEPS + 1)))


@pytest.mark.parametrize(("name", "wave", "kv"), TABLE)
def test_latents_are_made_in_order(artifact, plain, monkeypatch, name, wave, kv):
    placement = dataclasses.replace(PLACEMENTS[name], wave=wave, kv=kv)
    checked_against(monkeypatch, lambda engine: latents(artifact, placement, engine), plain[kv])


@pytest.mark.parametrize(("wave", "kv"), [(3, "plain"), (4, "int8")])
def test_layers_and_rings_that_move_in_the_middle_of_a_wave_are_in_order(artifact, plain, monkeypatch, wave, kv):
    """Memory runs out three times, in the middle of passes: what is repeated finds what it needs, and overtakes
    nobody."""

    def work(engine: Engine) -> Tensor:
        real, calls = CausalDiT.layer, itertools.count()

        def layer(*args: Any) -> Tensor:
            if next(calls) in (13, 18, 24):
                raise full()
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(CausalDiT, "layer", layer)
            placement = Placement(streamed_layers=(0,), host_rings=CELLS[::2], wave=wave, kv=kv)
            return latents(artifact, placement, engine)

    checked_against(monkeypatch, work, plain[kv])
