"""The residual from layer to layer: a sum that waits for the pass behind it is the same sum, and none is made twice."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from lowvram.loading.fused_block import FusedInjector, fuse
from lowvram.loading.residual import Residual, joined, normed
from lowvram_kernels.modules import swap_linear
from lowvram_kernels.norm import add_gated, norm_rows
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import trace_kernels
from lowvram_models.audio_adapter import AudioTokens
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT, LayerInputs, TimeEmbedding
from lowvram_models.rope import Rope

LAYERS, FRAMES, TOKENS = 4, 2, 6
CONFIG = DiTConfig(
    dim=48, ffn_dim=80, num_heads=4, num_layers=LAYERS, freq_dim=8, text_len=5, audio_dim=8,
    audio_inject_layers=(1, 3), text_dim=8,
)  # fmt: skip
FORMS = ["tensor", "nothing to add", "no gate", "gate", "gate a group"]


def parts(form: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(len(form))
    x, y = torch.randn(2, FRAMES * TOKENS, CONFIG.dim, generator=draw)
    gate = torch.randn(FRAMES, CONFIG.dim, generator=draw)
    gates = {"gate": gate[0], "gate a group": gate}
    return x, None if form in FORMS[:2] else y.bfloat16(), gates.get(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.int8, 1), (torch.int8, 16)]
)
def test_a_sum_that_waits_is_the_same_sum(form, dtype, group):
    x, y, gate = parts(form)
    expected = x if y is None else add_gated(x, y, gate)
    gain, offset = torch.randn(2, FRAMES, CONFIG.dim)
    how = {"eps": 1e-6, "dtype": dtype, "group": group}

    def given() -> torch.Tensor | Residual:
        return x if form == "tensor" else Residual(x.clone(), y, gate)

    assert torch.equal(joined(given()), expected)
    found = normed(given(), gain, offset, **how)
    for ours, theirs in zip(found, (expected, *norm_rows(expected, gain, offset, **how)), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert torch.equal(x, parts(form)[0])


@pytest.mark.parametrize("read", [joined, lambda r: normed(r, *torch.ones(2, 48), eps=1e-6, dtype=torch.int8, group=1)])
def test_it_is_taken_once_and_lets_go_of_what_it_adds(read):
    x, y = torch.randn(2, 4, 48)
    seen, residual = weakref.ref(y), Residual(x, y)
    del y
    read(residual)
    assert seen() is None
    with pytest.raises(RuntimeError, match="taken already"):
        joined(residual)


def model(eight_bit: bool, group: int) -> CausalDiT:
    torch.manual_seed(0)
    dit = CausalDiT(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    names = [
        n for n, m in dit.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(("blocks", "audio_inj"))
    ]
    for name in names if eight_bit else ():
        plain = dit.get_submodule(name)
        q, scale = quantize_rows(plain.weight, torch.int8, group=group)
        swap_linear(dit, name, torch.int8, group=group)
        new = dit.get_submodule(name)
        new.weight.data, new.weight_scale.data, new.bias.data = q, scale[:, 0].contiguous(), plain.bias.data
    fuse(dit)
    return dit


class Values:
    """Stands for attention: every token reads its own value."""

    def attend(self, queries, keys, v_LNH, rope):
        return v_LNH + queries(rope) + keys(rope)


def inputs(actors: int) -> LayerInputs:
    draw = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    angle = random(FRAMES * TOKENS, CONFIG.dim // CONFIG.num_heads // 2)
    masks = None if actors == 1 else torch.rand(actors, FRAMES, TOKENS, 1, generator=draw)
    return LayerInputs(
        time=TimeEmbedding(random(CONFIG.dim), random(6, CONFIG.dim)),
        text=random(CONFIG.text_len, CONFIG.dim),
        rope=Rope(angle.cos(), angle.sin()),
        frames=FRAMES,
        audio=AudioTokens(random(actors, FRAMES, 5, CONFIG.dim), random(actors, FRAMES, CONFIG.dim)),
        actor_masks=masks,
    )


@pytest.mark.parametrize("actors", [1, 2, 0], ids=["one actor", "two actors", "no audio"])
@pytest.mark.parametrize(("eight_bit", "group"), [(False, 1), (True, 1), (True, 16)])
@torch.inference_mode()
def test_layers_in_a_row_sum_only_in_the_pass_that_norms(actors, eight_bit, group):
    """Bit for bit what they give where the sum is made behind every layer; one sum of its own is left, the last."""
    dit, given = model(eight_bit, group), inputs(max(actors, 1))
    given = given if actors else dataclasses.replace(given, audio=None)
    assert isinstance(dit.audio_injector, FusedInjector)
    start = torch.randn(FRAMES * TOKENS, CONFIG.dim)

    def through(between) -> tuple[torch.Tensor, dict[str, int]]:
        x = start
        with trace_kernels() as counts:
            for layer in range(LAYERS):
                x = between(dit.layer(layer, x, given, Values()))
            out = joined(x)
        names = ("add_gated", "norm_rows", "add_gated_norm_rows")
        return out, {name: sum(n for (operation, _), n in counts.items() if operation == name) for name in names}

    out, found = through(lambda x: x)
    expected, apart = through(joined)
    assert torch.equal(out, expected)
    heard = len(CONFIG.audio_inject_layers) * bool(actors)
    others = len(CONFIG.audio_inject_layers) * max(0, actors - 1)  # of further actors, who norm what is summed already
    assert found == {"add_gated": 1, "norm_rows": 1 + others, "add_gated_norm_rows": 3 * LAYERS - 1 + heard}
    assert apart["add_gated"] == LAYERS


@torch.inference_mode()
def test_a_given_tensor_is_not_changed():
    dit, given = model(True, 1), inputs(1)
    x = torch.randn(FRAMES * TOKENS, CONFIG.dim)
    before = x.clone()
    for layer in range(LAYERS):
        joined(dit.layer(layer, x, given, Values()))
        assert torch.equal(x, before)
