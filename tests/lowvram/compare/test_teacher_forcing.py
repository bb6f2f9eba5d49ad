"""A candidate that is teacher-forced sees the baseline's latents at every step, in sink and rings too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.compare.teacher_forcing import force, record
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import TensorRecorder
from lowvram_kernels.errors import InputError

STEPS, BLOCKS = 2, 4


def pipeline(tiny, precision: str = "fp32", **memory) -> AvatarPipeline:
    return AvatarPipeline.from_artifact(tiny.artifact(precision), device="cpu", memory=MemoryOptions(**memory))


@pytest.fixture(scope="module")
def teacher(tiny):
    return record(pipeline(tiny), tiny.request())


def test_what_is_recorded_is_the_free_run(tiny, teacher):
    recorder = TensorRecorder()
    for _ in pipeline(tiny).stream(tiny.request(), recorder=recorder):
        pass
    free = recorder.tensors()
    assert (teacher.blocks, teacher.total, teacher.steps) == (BLOCKS, BLOCKS, STEPS)
    for block in range(BLOCKS):
        trajectory = teacher.trajectory(block)
        assert trajectory.before.shape == trajectory.velocities.shape == (STEPS, *trajectory.end.shape)
        assert torch.equal(free[f"latents.block{block}"], trajectory.end)


@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        ({}, {}),
        ({}, {"base_seed": 1}),
        ({"wave": 2}, {"base_seed": 2}),
        ({"offload_model": True}, {"base_seed": 3}),
        ({"offload_kv_cache": True, "wave": 2}, {"base_seed": 4}),
    ],
)
def test_of_its_own_latents_nothing_is_left(tiny, teacher, memory, changes):
    """Another seed's noise, which the sink is refreshed from too, is never seen."""
    found = force(pipeline(tiny, **memory), tiny.request(**changes), teacher)
    assert found.velocity.relative_error.value < 1e-6
    assert max(found.layers.relative_errors) < 1e-6
    assert found.latents.relative_error < 1e-6


@pytest.mark.parametrize("memory", [{"wave": 2}, {"offload_model": True}])
def test_what_is_recorded_does_not_depend_on_where_layers_are(tiny, teacher, memory):
    found = record(pipeline(tiny, **memory), tiny.request())
    for block in range(BLOCKS):
        mine, theirs = found.trajectory(block), teacher.trajectory(block)
        for name in ("before", "velocities", "end"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
        assert (mine.layers is None) == (theirs.layers is None) == (block not in (0, BLOCKS - 1))
        if mine.layers is not None and theirs.layers is not None:
            assert mine.layers.shape[:2] == (STEPS, 5)
            torch.testing.assert_close(mine.layers, theirs.layers)


def test_the_first_blocks_alone(tiny, teacher):
    some = record(pipeline(tiny), tiny.request(), blocks=2)
    assert (some.blocks, some.total) == (2, BLOCKS)
    assert some.trajectory(1).layers is not None
    found = force(pipeline(tiny, "int8"), tiny.request(), some)
    assert len(found.by_block) == 2
    whole = force(pipeline(tiny, "int8"), tiny.request(), teacher, blocks=2)
    assert found.velocity == whole.velocity
    assert whole.layers_of == (0,)


@pytest.mark.parametrize(
    ("precision", "memory", "most"),
    [
        ("int8", {}, 0.05),
        ("fp8", {}, 0.15),
        ("int8", {"kv": "int8"}, 0.05),
        ("fp32", {"kv": "int8"}, 0.01),
        ("bf16", {}, 0.02),
    ],
)
def test_a_candidate_is_scored_step_by_step(tiny, teacher, precision, memory, most):
    found = force(pipeline(tiny, precision, **memory), tiny.request(), teacher)
    assert [(score.block, score.step) for score in found.each] == [
        (block, step) for block in range(BLOCKS) for step in range(STEPS)
    ]
    assert len(found.by_step) == STEPS
    assert len(found.by_block) == BLOCKS
    errors = [score.velocity.relative_error for score in found.each]
    assert 0 < min(errors) <= found.velocity.relative_error.value <= max(errors) < most
    values = found.values
    assert values["velocity_error"] == found.velocity.relative_error.value
    assert values["velocity_error_first"] == found.by_block[0].relative_error
    assert values["velocity_error_max"] >= values["velocity_error"]
    assert 0 < values["latent_error"] < most
    assert 0.98 < values["velocity_cosine"] < 1


@pytest.mark.parametrize("quiet", [False, True])
def test_how_far_it_is(tiny, teacher, capsys, monkeypatch, quiet):
    monkeypatch.setattr("lowvram.progress.EVERY_S", 0.0)
    force(pipeline(tiny), tiny.request(), teacher, blocks=3, quiet=quiet)
    said = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("teacher-forced  ")]
    assert said[:3] == ([] if quiet else [f"{done}/3 blocks" for done in (1, 2, 3)])


def test_errors_do_not_add_up(tiny, teacher):
    """The first step sees the same noise as a free run; behind it a free run is further away."""
    int8 = pipeline(tiny, "int8")
    forced, free = force(int8, tiny.request(), teacher), record(int8, tiny.request())

    def error(block: int, step: int) -> float:
        wanted = teacher.trajectory(block).velocities[step]
        return float((free.trajectory(block).velocities[step] - wanted).norm() / wanted.norm())

    each = {(score.block, score.step): score.velocity.relative_error for score in forced.each}
    assert each[0, 0] == pytest.approx(error(0, 0), rel=1e-4)
    later = [at for at in each if at != (0, 0)]
    assert sum(error(*at) for at in later) > 1.02 * sum(each[at] for at in later)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_candidate_of_more_layers_is_another_model(tiny, teacher, layers):
    fewer = {
        block: dataclasses.replace(one, layers=None if one.layers is None else one.layers[:, : layers + 1])
        for block, one in teacher.kept.items()
    }
    said = f"has {layers + 1} layers or more, the baseline had {layers}: they are of different models"
    with pytest.raises(InputError, match=said):
        force(pipeline(tiny), tiny.request(), dataclasses.replace(teacher, kept=fewer))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_clip": 1}, "2 blocks, the baseline did 4"),
        ({"infer_frames": 12}, "2 blocks, the baseline did 4"),
        ({"infer_frames": 20}, r"latents \[16, 2, 16, 16\] of block 1, the baseline did \[16, 1, 16, 16\]"),
        ({"sample_steps": 3}, "3 steps, the baseline did 2"),
        ({"sample_steps": 1}, "1 steps, the baseline did 2"),
    ],
)
def test_another_request(tiny, teacher, changes, said):
    with pytest.raises(InputError, match=said):
        force(pipeline(tiny), tiny.request(**changes), teacher)
