"""Parameters never cross from rank to rank: what is sent is counted, and is what the layout says, to the byte.

Shapes: L tokens of a call, l of them this rank's; N heads, n of them this rank's; H head_dim, D = N x H width.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowvram.planning.rank_layout import ParallelLayout, shares
from lowvram_models.constants import FRAMES_PER_LATENT
from lowvram_models.rope import condition_rope
from tests.lowvram.parallel.conftest import layout_options
from tests.lowvram.parallel.spy import MOVERS, spying

HEADS, HEAD_DIM, LAYERS, STEPS, GRID = 5, 16, 4, 4, (8, 8)
FRAMES = [3, 1, 3, 1]  # latent frames of the blocks
LATENT = 16 * 16 * 16  # values of a latent frame
PATCH = 16 * 2 * 2  # values of a token behind the head
HANDSHAKE = 1 << 16  # values
FLOAT = 4


@pytest.mark.parametrize(
    ("stages", "ulysses", "vae", "more"),
    [
        (1, 3, True, []),
        (1, 2, False, ["--offload-model", "--offload-kv-cache"]),
        (3, 1, False, []),
        (2, 2, True, ["--kv=int8"]),
    ],
)
def test_bytes_that_cross(maker, tmp_path, stages, ulysses, vae, more):
    layout = ParallelLayout(num_gpus_dit=stages * ulysses, ulysses_size=ulysses, vae_rank=vae)
    given = layout_options(stages, ulysses, vae)
    made = maker.make(tmp_path, layout.world_size, *given, *more, options={"around": spying})
    audio = made.tensors["audio_emb"]
    heard = audio.nbytes // audio.shape[-1] * FRAMES_PER_LATENT * sum(FRAMES)  # not what no frame is made of
    encoded = heard + sum(made.tensors[name].nbytes for name in ("context", "ref_latents", "motion_latents"))
    for rank, end in enumerate(made.ended):
        role, seen, said = layout.role(rank), end.seen, made.report["ranks"][rank]["sent_bytes"]
        assert seen["offences"] == []
        assert set(seen["calls"]) <= {"all_to_all_single", "isend", "irecv", "broadcast", "all_reduce"}
        # Whether memory ran out: a number a piece of work that ranks of a stage do together.
        assert seen["sent"].get("all_reduce", 0) == 8 * seen["calls"].get("all_reduce", 0)
        assert bool(seen["calls"].get("all_reduce")) == (role.denoises and ulysses > 1)
        # Where it denoises, its parameters were known while it sent: of the layers that are there, and what all share.
        layers = 1 if "--offload-model" in more else LAYERS
        assert seen["parameters"] > layers if role.denoises else seen["parameters"] == 0
        assert said["exchange"] == seen["sent"]["all_to_all_single"] == exchanged(layout, role)
        assert said["latents"] == seen["sent"]["isend"] == passed_on(layout, role)
        assert said["conditions"] == seen["sent"]["broadcast"] == role.media * encoded * (layout.world_size - 1)


def exchanged(layout, role) -> int:
    """Queries, keys and values for other ranks' heads, and what was attended for other ranks' tokens: a rank, layer
    and step 4 x own tokens x D values less what stays at home, where heads and tokens are shared evenly."""
    if layout.ulysses_size == 1 or not role.denoises:
        return 0
    tokens = GRID[0] * GRID[1]
    heads = shares(HEADS, layout.ulysses_size)[role.index]

    def layer(total: int, own: int) -> int:
        return (3 * own * (HEADS - heads) + (total - own) * heads) * HEAD_DIM

    def share(total: int) -> int:
        return shares(total, layout.ulysses_size)[role.index]

    steps = len(layout.steps(role.stage, STEPS))
    conditions = len(condition_rope(*GRID, HEAD_DIM).cos)
    values = sum(LAYERS * steps * layer(frames * tokens, frames * share(tokens)) for frames in FRAMES)
    values += sum(steps * (layout.ulysses_size - 1) * frames * share(tokens) * PATCH for frames in FRAMES)
    values += 2 * LAYERS * layer(conditions, share(conditions))  # the sink, filled twice
    values += (layout.ulysses_size - 1) * HANDSHAKE
    return values * FLOAT


def passed_on(layout, role) -> int:
    """Of each block its latent, to the next stage or to the VAE's rank; from the last stage to the others the first
    latent frame."""
    if not role.denoises:
        return 0
    last = role.stage == layout.stages - 1
    to_vae = last and layout.vae_rank and role.index == 0
    blocks = sum(FRAMES) * LATENT if not last or to_vae else 0
    return (blocks + last * (layout.stages - 1) * LATENT) * FLOAT


def test_even_shares_are_four_times_own_tokens_and_width():
    layout = ParallelLayout(num_gpus_dit=5, ulysses_size=5)
    for index in range(5):
        own, heads = 12, shares(HEADS, 5)[index]
        sent = (3 * own * (HEADS - heads) + (60 - own) * heads) * HEAD_DIM
        assert sent == 4 * own * HEADS * HEAD_DIM * (layout.ulysses_size - 1) / layout.ulysses_size


def test_the_spy_knows_a_parameter_by_its_memory(monkeypatch):
    moved = []
    monkeypatch.setattr(dist, "isend", lambda tensor, *rest, **options: moved.append(tensor))
    monkeypatch.setattr("lowvram.denoise.denoiser.build_dit", lambda component: component)
    model = nn.Linear(4, 4)
    with spying() as seen:
        import lowvram.denoise.denoiser

        assert lowvram.denoise.denoiser.build_dit(model) is model
        dist.isend(torch.zeros(3), 1, tag=0)
        dist.isend(model.weight.detach()[1:, 2], 1, tag=0)
    assert seen["offences"] == ["isend of [3]"]
    assert seen["sent"] == {"isend": 24}
    assert len(moved) == 2


def test_the_spy_knows_every_function_that_moves_tensors():
    """A function of a later torch that takes tensors is to be listed too."""
    words = ("gather", "reduce", "scatter", "send", "recv", "to_all", "broadcast")
    functions = [name for name in dist.distributed_c10d.__all__ if name.islower() and hasattr(dist, name)]
    moving = {name for name in functions if any(word in name for word in words)} - {"reduce_op"}
    assert len(moving) > 20
    assert moving <= set(MOVERS)
