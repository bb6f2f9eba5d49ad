"""The fused blocks against the models' own, from the same parameters; and that 8-bit layers stay in 8 bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.denoise.kv_cache import RingMemory, Rings, RingShape, Sink
from lowvram.denoise.kv_format import kv_format
from lowvram.loading import fused_block
from lowvram.loading.fused_block import FusedBlock, fuse
from lowvram.loading.residual import joined
from lowvram.offload.copy_engine import Engine
from lowvram.pipeline import AvatarPipeline
from lowvram_kernels import choices
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.modules import Attention, NormRope, QuantizedLinear, swap_linear
from lowvram_kernels.ring_attention import reference_ring_attention, ring_and_sink_attention, ring_attention
from lowvram_kernels.ring_codec import KVBlock, SlotLayout, decode_block, encode_block, rotate_block
from lowvram_kernels.rope import rotate
from lowvram_kernels.rotation import SYLVESTER
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import trace_kernels
from lowvram_models.attention import CrossAttention, HeadNorm
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT, LayerInputs, TimeEmbedding
from lowvram_models.rope import Rope, apply_rope
from lowvram_quantize.convert import convert

HEADS, HEAD_DIM, TOKENS, SINK_TOKENS = 4, 12, 18, 7
CONFIG = DiTConfig(
    dim=HEADS * HEAD_DIM, ffn_dim=80, num_heads=HEADS, num_layers=1, freq_dim=8, text_len=5, audio_dim=8,
    audio_inject_layers=(), text_dim=8,
)  # fmt: skip
DTYPES = [torch.int8, torch.float8_e4m3fn]


def relative_error(out, expected) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def random_rope(tokens: int, seed: int = 1) -> Rope:
    angle = torch.rand(tokens, HEAD_DIM // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return Rope(angle.cos(), angle.sin())


def model(dtype: torch.dtype = torch.float32, group: int = 1, *, smooth: bool = False) -> CausalDiT:
    """One layer with random parameters everywhere, its Linears in 8 bit where ``dtype`` is, in rotated groups, all
    their inputs smoothed where asked."""
    torch.manual_seed(0)
    dit = CausalDiT(CONFIG).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    if dtype in DTYPES:
        quantize(dit.blocks[0], dtype, group, smooth=smooth)
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            module.attention = Attention()
    return dit


def quantize(block: torch.nn.Module, dtype: torch.dtype, group: int, *, smooth: bool = False) -> None:
    linears = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        plain = block.get_submodule(name)
        # The same for q, k and v, which share an input, and others for every other layer.
        draw = torch.Generator().manual_seed(len(name) if "self_attn" not in name or name.endswith("o") else 1000)
        powers = torch.randint(-2, 3, plain.weight.shape[1:], generator=draw) if smooth else torch.tensor(0)
        factors = torch.exp2(powers.float())
        q, scale = quantize_rows(plain.weight / factors, dtype, group=group)
        swap_linear(block, name, dtype, group=group, smooth=smooth)
        new = block.get_submodule(name)
        new.weight.data, new.weight_scale.data, new.bias.data = q, scale[:, 0].contiguous(), plain.bias.data
        if smooth:
            new.smooth_scale.data = factors


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> LayerInputs:
    generator = torch.Generator().manual_seed(3)
    time = TimeEmbedding(torch.zeros(CONFIG.dim), 0.5 * torch.randn(6, CONFIG.dim, generator=generator))
    text = torch.randn(CONFIG.text_len, CONFIG.dim, generator=generator).to(dtype)
    return LayerInputs(time=time, text=text, rope=random_rope(tokens), frames=1)


def residual(tokens: int = TOKENS) -> torch.Tensor:
    return 2 * torch.randn(tokens, CONFIG.dim, generator=torch.Generator().manual_seed(4)) + 1


class Memory:
    """Rings of two slots, of which the first is written already, and a sink; ``attend`` as in the second block."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32):
        self.kind = kv_format(kind, HEADS, HEAD_DIM, dtype)
        self.sink = Sink(self.kind, 1, SINK_TOKENS, torch.device("cpu"))
        shape = RingShape(slots=(TOKENS, TOKENS))
        self.rings = Rings(shape, self.kind, Engine(torch.device("cpu")), steps=range(1), layers=1)
        self.rings.place((), 0)
        generator = torch.Generator().manual_seed(5)
        first, sink = (torch.randn(2, n, HEADS, HEAD_DIM, generator=generator) for n in (TOKENS, SINK_TOKENS))
        self.kind.write(self.rings.open((0, 0))[0][0], *first.to(dtype))
        self.sink.write(0, *sink.to(dtype))

    def second(self) -> RingMemory:
        window = self.rings.shape.window(0, 1)
        return RingMemory(self.rings, self.sink, (0, 0), window, random_rope(SINK_TOKENS, seed=2))


def both(dit: CausalDiT) -> tuple[torch.nn.Module, torch.nn.Module]:
    fused = copy.deepcopy(dit)
    fuse(fused)
    assert isinstance(fused.blocks[0], FusedBlock)
    return dit.blocks[0], fused.blocks[0]


def run(block: torch.nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Memory]:
    memory = Memory(kind, dtype)
    with torch.inference_mode():
        return joined(block(residual(), inputs(dtype), memory.second())), memory


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_float32_meets_the_models_own_block(kind):
    plain, fused = both(model())
    expected, expected_memory = run(plain, kind)
    out, memory = run(fused, kind)
    assert out.dtype is torch.float32
    assert relative_error(out, expected) < 1e-6
    for ours, theirs in zip(
        memory.rings.snapshot(0, 0, torch.float32), expected_memory.rings.snapshot(0, 0, torch.float32), strict=True
    ):
        assert relative_error(ours[TOKENS:], theirs[TOKENS:]) < (1e-6 if kind == "plain" else 1e-3)


@pytest.mark.parametrize(
    ("dtype", "group", "smooth"),
    [*((dtype, 1, False) for dtype in DTYPES), (torch.int8, 16, False), (torch.int8, 1, True), (torch.int8, 16, True)],
)
def test_eight_bits_equal_the_path_that_is_not_fused(dtype, group, smooth):
    """The float32 rows that are quantized differ in their last bits: a value here and there falls a step apart."""
    plain, fused = both(model(dtype, group, smooth=smooth))
    assert isinstance(fused.ffn[0], QuantizedLinear)
    expected, out = run(plain, "plain")[0], run(fused, "plain")[0]
    assert relative_error(out - residual(), expected - residual()) < 2e-3
    exact = run(model().blocks[0], "plain")[0]
    assert 1e-3 < relative_error(out - residual(), exact - residual()) < 0.08


def test_factors_are_kept_in_no_weight_of_a_layer_that_may_be_replaced():
    """Another layer's weights come to where this one's are; what later calls of a timestep take is their own."""
    _, fused = both(model(torch.int8, smooth=True))
    given = inputs()
    with torch.inference_mode():
        first = joined(fused(residual(), given, Memory("plain").second()))
        vectors = given.time.derived[fused]
        for parameter in fused.parameters():
            assert all(parameter.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in vectors)
        second = joined(fused(residual(), given, Memory("plain").second()))
    assert torch.equal(first, second)


def test_every_product_of_a_rotated_block_rotates_its_input():
    _, fused = both(model(torch.int8, group=16))
    with trace_kernels() as counts:
        run(fused, "plain")
    rows = {name: calls for (operation, name), calls in counts.items() if "rows" in operation}
    assert set(rows) == {"int8 rotated by 16: torch"}


def test_projections_that_share_an_input_are_rotated_alike():
    dit = model(torch.int8)
    dit.blocks[0].self_attn.k.group = 16
    with pytest.raises(CheckpointError, match=r"groups of \[1, 16, 1\]; expected the same"):
        fuse(dit)


def test_projections_that_share_an_input_are_smoothed_alike():
    dit = model(torch.int8, smooth=True)
    dit.blocks[0].self_attn.v.smooth_scale = None
    with pytest.raises(CheckpointError, match=r"smoothed: \[True, True, False\]; expected the same"):
        fuse(dit)


def test_bfloat16_rounds_where_the_models_own_block_does():
    plain, fused = both(model().bfloat16())
    out, expected = (run(block, "plain", torch.bfloat16)[0] for block in (fused, plain))
    assert out.dtype is torch.float32
    assert relative_error(out - residual(), expected - residual()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_parameters_keep_names_values_and_storage(dtype):
    dit = model(dtype)
    before = {name: parameter.data_ptr() for name, parameter in dit.named_parameters()}
    fuse(dit)
    assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_neither_the_residual_nor_the_text_is_written_to(dtype):
    _, fused = both(model(dtype))
    x, given = residual(), inputs()
    with torch.inference_mode():
        out = joined(fused(x, given, Memory("plain").second()))
    assert torch.equal(x, residual())
    assert torch.equal(given.text, inputs().text)
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_the_sink_keeps_keys_before_rope(kind):
    plain, fused = both(model())
    kept = []
    for block in (plain, fused):
        sink = Sink(kv_format(kind, HEADS, HEAD_DIM, torch.float32), 1, SINK_TOKENS, torch.device("cpu"))
        with torch.inference_mode():
            out = joined(block(residual(SINK_TOKENS), inputs(tokens=SINK_TOKENS), sink.recorder(0)))
        kept.append((out, *sink.read(0, torch.float32)))
    for ours, theirs in zip(kept[1], kept[0], strict=True):
        assert relative_error(ours, theirs) < (1e-6 if kind == "plain" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(TOKENS,), (3, 5)])
def test_norm_of_heads(shape, dtype):
    torch.manual_seed(0)
    norm = HeadNorm(CONFIG.dim, HEADS, 1e-6)
    norm.weight.data.normal_()
    fused = NormRope(norm.weight, HEADS, 1e-6)
    x = 3 * torch.randn(*shape, CONFIG.dim).to(dtype)
    with torch.inference_mode():
        out, expected = fused(x), norm(x)
        assert out.shape == (*shape, HEADS, HEAD_DIM)
        assert out.dtype is dtype
        bound = 1e-6 if dtype is torch.float32 else 4e-3
        assert relative_error(out, expected) < bound
        if len(shape) == 1:
            # One rounding instead of two.
            exact = apply_rope(norm(x.double().float()), random_rope(TOKENS))
            assert relative_error(fused(x, random_rope(TOKENS)), exact) < bound


def random_block(tokens: int) -> KVBlock:
    layout = SlotLayout(tokens=tokens, heads=HEADS, head_dim=16)
    block = layout.block(torch.zeros(layout.nbytes, dtype=torch.uint8))
    k = torch.randn(tokens, HEADS, 16) + 2 * torch.randn(HEADS, 16)
    encode_block(k, torch.randn(tokens, HEADS, 16), block)
    return block


def test_ring_with_a_rotated_sink_against_float64():
    torch.manual_seed(0)
    ring, sink, q = [random_block(40), random_block(24)], random_block(17), torch.randn(30, HEADS, 16)
    angle = torch.rand(17, 8, dtype=torch.float64) * 6
    k, v = (list(part) for part in zip(*(decode_block(b, torch.float64) for b in (*ring, sink)), strict=True))
    k[-1] = rotate(k[-1], angle.cos(), angle.sin())
    scores = torch.einsum("lnh,snh->nls", q.double(), torch.cat(k)) / 4
    exact = torch.einsum("nls,snh->lnh", scores.softmax(-1), torch.cat(v))
    table = angle.cos().float(), angle.sin().float()
    assert relative_error(ring_and_sink_attention(q, ring, sink, *table), exact) < 1e-6
    # As the Triton kernel has it: the sink's rotated keys in 8 bit once more.
    turned = rotate_block(sink, *table)
    assert 1e-6 < relative_error(ring_attention(q, [*ring, turned]), exact) < 0.01
    assert relative_error(reference_ring_attention(q, [*ring, turned]), exact) < 0.01
    assert relative_error(ring_attention(q, [*ring, sink]), exact) > 0.1


class NoFloatProducts(TorchDispatchMode):
    """Raises at a matrix product of floats; attention, which has operations of its own, may compute, and so may the
    rotation of groups, whose matrices are of 16 channels at the most and which is no layer's product."""

    def __init__(self) -> None:
        super().__init__()
        self.in_8_bit = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "linear", "matmul", "addmv", "mv"):
            operands = [(t.dtype, tuple(t.shape)) for t in args if isinstance(t, torch.Tensor)]
            if max(operands[1][1]) > SYLVESTER:
                raise AssertionError(f"a product in floating point ran: {name} of {operands}")
        self.in_8_bit += name in ("_int_mm", "_scaled_mm")
        return func(*args, **(kwargs or {}))


def layers_without_float_products(monkeypatch, artifact, request) -> tuple[int, int]:
    """Run every layer of the DiT under ``NoFloatProducts``; (8-bit products that ran, those that the trace told)."""
    seen = [0]
    layer = CausalDiT.layer

    def watched(self, *args):
        assert all(
            module.weight.dtype in DTYPES for module in self.blocks.modules() if isinstance(module, QuantizedLinear)
        )
        with NoFloatProducts() as mode:
            out = layer(self, *args)
        seen[0] += mode.in_8_bit
        return out

    monkeypatch.setattr(CausalDiT, "layer", watched)
    pipeline = AvatarPipeline.from_artifact(artifact, device="cpu")
    with trace_kernels() as outside:
        for _ in pipeline.stream(request):
            pass
    told = [*pipeline.runtime.kernels.items(), *outside.items()]
    return seen[0], sum(calls for (operation, _), calls in told if operation == "linear_w8a8")


def take_8_bit_products() -> None:
    """As a GPU does; a processor may find its float32 products faster."""
    for operation, own in (("linear_w8a8 int8", choices.INT_MM), ("linear_w8a8 fp8", choices.SCALED_MM)):
        for name in (operation, f"{operation} gelu"):
            if own not in choices.backends(name, torch.device("cpu")):
                pytest.skip(f"{own} is wrong on this processor, or missing")
            choices.prefer(name, own, torch.device("cpu"), "this test is about it")


@pytest.mark.parametrize(("precision", "rotate"), [("int8", None), ("int8", False), ("fp8", None)])
def test_no_layer_of_an_8_bit_artifact_multiplies_in_floating_point(tiny, monkeypatch, tmp_path, precision, rotate):
    take_8_bit_products()
    artifact = tiny.artifact(precision)
    if rotate is False:
        artifact = convert(tiny.checkpoint, tmp_path / "plain", lora=tiny.lora, lora_alpha=2.0, rotate=False)
    ran, told = layers_without_float_products(monkeypatch, artifact, tiny.request(num_clip=1))
    # 4 layers with 10 products each, in 2 blocks of 2 steps and once for the sink. 2 of them have 5 more of the audio
    # in a block's first step; what depends on the audio alone is kept, so that 2 are left in its second.
    assert ran == 4 * 10 * (2 * 2 + 1) + 2 * (5 + 2) * 2
    assert ran == told


def test_a_product_in_floating_point_would_be_seen(tiny, monkeypatch):
    with pytest.raises(AssertionError, match="a product in floating point ran"):
        layers_without_float_products(monkeypatch, tiny.artifact("bf16"), tiny.request(num_clip=1))


def test_a_layer_that_dequantizes_would_be_seen(monkeypatch):
    take_8_bit_products()
    _, fused = both(model(torch.int8))
    with NoFloatProducts() as mode:
        run(fused, "plain")
    assert mode.in_8_bit == 10
    monkeypatch.setattr(
        fused_block, "linear", lambda layer, rows, dtype: rows[0].to(dtype) @ layer.weight.t().to(dtype)
    )
    with pytest.raises(AssertionError, match="a product in floating point ran"), NoFloatProducts():
        run(fused, "plain")
