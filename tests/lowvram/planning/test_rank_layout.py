from __future__ import annotations

import pytest

from lowvram.planning.rank_layout import LayoutOptions, ParallelLayout, Role, chosen_layout, layouts, shares, span
from lowvram_kernels.errors import ConfigError


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(40, 3, (14, 13, 13)), (3375, 2, (1688, 1687)), (4, 4, (1, 1, 1, 1)), (5, 4, (2, 1, 1, 1)), (2, 3, (1, 1, 0))],
)
def test_shares(total, parts, expected):
    assert shares(total, parts) == expected
    spans = [span(total, parts, part) for part in range(parts)]
    assert [len(part) for part in spans] == list(expected)
    assert [index for part in spans for index in part] == list(range(total))


def test_roles_of_two_stages_of_three_and_a_vae():
    layout = ParallelLayout(num_gpus_dit=6, ulysses_size=3, vae_rank=True)
    assert (layout.stages, layout.world_size, layout.media_rank) == (2, 7, 6)
    assert layout.role(4) == Role(rank=4, stage=1, index=1, media=False)
    assert layout.role(6) == Role(rank=6, stage=None, index=None, media=True)
    assert not layout.role(6).denoises
    assert [role.rank for role in layout.roles() if role.media] == [6]
    assert [list(layout.members(stage)) for stage in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(layout.steps(stage, 5)) for stage in range(2)] == [[0, 1, 2], [3, 4]]
    assert layout.role(4).name == "rank 4 (stage 1, part 1)"
    assert layout.role(6).name == "rank 6 (VAE)"
    assert layout.words() == "6 for the DiT (2 stages x 3), 1 for the VAE"


def test_without_a_rank_for_the_vae_latents_end_at_the_first_rank_of_the_last_stage():
    layout = ParallelLayout(num_gpus_dit=6, ulysses_size=2)
    assert layout.media_rank == 4
    assert layout.role(4) == Role(rank=4, stage=2, index=0, media=True)
    assert [role.rank for role in layout.roles() if role.media] == [4]


def test_one_rank_does_everything():
    layout = ParallelLayout()
    assert layout.roles() == [Role(rank=0, stage=0, index=0, media=True)]
    assert list(layout.steps(0, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_step_is_some_stage_s(stages):
    layout = ParallelLayout(num_gpus_dit=stages)
    assert [step for stage in range(stages) for step in layout.steps(stage, 4)] == [0, 1, 2, 3]
    assert all(len(layout.steps(stage, 4)) for stage in range(stages))


@pytest.mark.parametrize(
    ("gpus", "dit", "ulysses", "vae"),
    [(1, 1, 1, False), (2, 2, 1, False), (3, 3, 3, False), (4, 3, 3, True), (5, 4, 1, True), (9, 8, 2, True)],
)
def test_defaults(gpus, dit, ulysses, vae):
    found = chosen_layout(gpus, sample_steps=4, heads=40)
    assert found == ParallelLayout(num_gpus_dit=dit, ulysses_size=ulysses, vae_rank=vae)


def test_what_is_given_is_kept():
    chosen = {"sample_steps": 4, "heads": 40}
    assert chosen_layout(5, LayoutOptions(num_gpus_dit=4, ulysses_size=4), **chosen).stages == 1
    assert chosen_layout(4, LayoutOptions(num_gpus_dit=4), **chosen) == ParallelLayout(num_gpus_dit=4)
    assert chosen_layout(4, LayoutOptions(enable_vae_parallel=False), **chosen) == ParallelLayout(num_gpus_dit=4)
    assert chosen_layout(3, LayoutOptions(enable_vae_parallel=True), **chosen) == ParallelLayout(
        num_gpus_dit=2, vae_rank=True
    )
    assert chosen_layout(2, LayoutOptions(num_gpus_dit=1), **chosen) == ParallelLayout(vae_rank=True)


def test_every_layout_of_four_gpus():
    found = [(layout.stages, layout.ulysses_size, layout.vae_rank) for layout in layouts(4, sample_steps=4, heads=40)]
    assert found == [(4, 1, False), (2, 2, False), (1, 4, False), (3, 1, True), (1, 3, True)]
    few = [(layout.stages, layout.ulysses_size) for layout in layouts(4, sample_steps=2, heads=3)]
    assert few == [(2, 2), (1, 3)]


@pytest.mark.parametrize(
    ("gpus", "choice", "model", "words"),
    [
        (4, {"num_gpus_dit": 2}, {}, r"4 ranks were started, but --num_gpus_dit 2 are 2; .*--num_gpus_dit 4"),
        (
            4,
            {"num_gpus_dit": 4, "enable_vae_parallel": True},
            {},
            r"4 and one for the VAE \(--enable_vae_parallel\) are 5",
        ),
        (3, {"num_gpus_dit": 3, "ulysses_size": 2}, {}, "make no whole number of stages"),
        (
            8,
            {"enable_vae_parallel": False},
            {"sample_steps": 3, "heads": 3},
            "8 GPUs for the DiT make no layout of 3 steps",
        ),
    ],
)
def test_what_does_not_add_up_is_refused(gpus, choice, model, words):
    with pytest.raises(ConfigError, match=words):
        chosen_layout(gpus, LayoutOptions(**choice), **{"sample_steps": 4, "heads": 40} | model)


@pytest.mark.parametrize("values", [{"num_gpus_dit": 0}, {"num_gpus_dit": 3, "ulysses_size": 2}, {"ulysses_size": 0}])
def test_no_whole_number_of_stages(values):
    with pytest.raises(ConfigError, match="stages x ulysses_size"):
        ParallelLayout(**values)


def test_every_rank_has_something_to_do():
    four = ParallelLayout(num_gpus_dit=4)
    four.check(sample_steps=4, heads=1, tokens_per_frame=1)
    with pytest.raises(ConfigError, match=r"4 stages for 3 denoising steps; .* larger --ulysses_size"):
        four.check(sample_steps=3, heads=5, tokens_per_frame=64)
    wide = ParallelLayout(num_gpus_dit=6, ulysses_size=6)
    with pytest.raises(ConfigError, match="--ulysses_size is 6 for 5 heads and 64 tokens"):
        wide.check(sample_steps=4, heads=5, tokens_per_frame=64)
    with pytest.raises(ConfigError, match="40 heads and 4 tokens"):
        wide.check(sample_steps=4, heads=40, tokens_per_frame=4)
