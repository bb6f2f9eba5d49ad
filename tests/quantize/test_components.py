"""Which tensors make a component, in which order, and that the runtime's models take what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram.loading.encoders import load_text_encoder, load_vae
from lowvram.loading.weights import build_dit, load_slabs
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.rotation import rotated
from lowvram_models.names import umt5_name, vae_names
from lowvram_models.text_encoder import build_umt5, encode_prompt
from lowvram_quantize.components import plan_dit, plan_text_encoder, plan_vae
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.source import TEXT_ENCODER_FILE, VAE_FILE
from lowvram_quantize.synthetic import write_checkpoint
from tests.golden_cases import relative_error
from tests.quantize.checkpoints import (
    INDEX,
    SHARDS,
    base_of,
    change_dit,
    change_pth,
    clone,
    load_dit,
    refusal,
    replace_json,
    replace_pth,
)

CPU = torch.device("cpu")
PROMPTS = ("A person speaks", "A stout, cheerful dwarf explains and laughs in a warm studio")


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    return base_of(clone(tiny.checkpoint, tmp_path / "ckpt"))


def load_pth(base: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(base / name, weights_only=True)


def test_the_dits_slabs_follow_the_order_of_use(base):
    plan = plan_dit(base / INDEX, base / "config.json", "int8")
    slabs = list(dict.fromkeys(item.slab for item in plan.items))
    assert slabs == ["start", "shared", *(f"layer.{i}" for i in range(plan.config["num_layers"]))]
    # Each slab's items come in one run, and every tensor comes once.
    runs = [slab for i, slab in enumerate(i.slab for i in plan.items) if not i or plan.items[i - 1].slab != slab]
    assert runs == slabs
    assert sorted(item.name for item in plan.items) == sorted(load_dit(base))
    assert plan.source_files == [base / shard for shard in SHARDS]


def test_a_lora_is_one_of_the_sources(base, tiny):
    plan = plan_dit(base / INDEX, base / "config.json", "int8", [LoraSource(path=tiny.lora, alpha=2.0)])
    assert tiny.lora in plan.source_files
    assert plan.deltas
    assert set(plan.deltas) <= {item.name for item in plan.items}


def test_tensors_that_a_lora_replaces_come_from_its_file(base, tmp_path):
    name = "blocks.0.norm3.weight"
    value = load_dit(base)[name].float() + 1
    save_file({f"base_model.model.{name}": value}, tmp_path / "lora.safetensors")
    source = LoraSource(path=tmp_path / "lora.safetensors")
    plan = plan_dit(base / INDEX, base / "config.json", "fp32", [source])
    item = next(item for item in plan.items if item.name == name)
    assert torch.equal(item.ref.read(), value)


def test_the_encoders_come_under_the_libraries_names(base):
    vae, text = plan_vae(base / VAE_FILE, "int8"), plan_text_encoder(base / TEXT_ENCODER_FILE, "int8")
    published = load_pth(base, VAE_FILE)
    names = vae_names(published)
    assert {item.name: item.ref.shape for item in vae.items} == {names[n]: tuple(t.shape) for n, t in published.items()}
    assert vae.config == {"base_dim": len(published["encoder.conv1.weight"])}
    published = load_pth(base, TEXT_ENCODER_FILE)
    assert {item.name: item.ref.shape for item in text.items} == {
        umt5_name(n): tuple(t.shape) for n, t in published.items()
    }
    layers = {n.split(".")[1] for n in published if n.startswith("blocks.")}
    assert text.config["num_layers"] == len(layers)
    assert list(dict.fromkeys(i.slab for i in text.items)) == ["shared", *(f"block.{i}" for i in sorted(layers))]


@pytest.mark.parametrize("change", [{"num_layers": 5}, {"num_heads": 3}, {"unknown": 1}, {"dim": None}])
def test_a_configuration_of_another_model(base, change):
    replace_json(base / "config.json", lambda config: config.update(change))
    with refusal(CheckpointError, next(iter(change)) if change != {"num_layers": 5} else "lacks"):
        plan_dit(base / INDEX, base / "config.json", "int8")


def test_wrong_shapes(base):
    name = "blocks.1.ffn.0.weight"
    rows, width = load_dit(base)[name].shape
    change_dit(base, name, lambda t: t.t())
    with refusal(CheckpointError, name, f"[{rows}, {width}]", f"[{width}, {rows}]", "check"):
        plan_dit(base / INDEX, base / "config.json", "int8")
    change_pth(base / VAE_FILE, "decoder.conv1.weight", lambda t: t[:-1])
    with refusal(CheckpointError, "decoder.conv_in.weight", VAE_FILE, "shape", "check"):
        plan_vae(base / VAE_FILE, "int8")
    change_pth(base / TEXT_ENCODER_FILE, "blocks.1.ffn.fc2.weight", lambda t: t[:-1])
    with refusal(CheckpointError, "encoder.block.1.layer.1.DenseReluDense.wo.weight", TEXT_ENCODER_FILE, "check"):
        plan_text_encoder(base / TEXT_ENCODER_FILE, "int8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.pos_embedding.embedding.weight", torch.zeros(32, 0)),
        ("blocks.0.attn.q.weight", torch.zeros(32)),
        ("token_embedding.weight", None),
        ("blocks.900000000.attn.q.weight", torch.zeros(1, 1)),
        ("lm_head.weight", torch.zeros(1)),
    ],
)
def test_a_text_encoder_that_is_none(base, name, value):
    tensors = {n: t for n, t in load_pth(base, TEXT_ENCODER_FILE).items() if n != name}
    replace_pth(base / TEXT_ENCODER_FILE, tensors if value is None else tensors | {name: value})
    with refusal(CheckpointError, TEXT_ENCODER_FILE):
        plan_text_encoder(base / TEXT_ENCODER_FILE, "int8")


@pytest.mark.parametrize("value", [None, torch.zeros(0, 3, 3, 3, 3), torch.zeros(8), torch.zeros(7, 3, 3, 3, 3)])
def test_a_vae_that_is_none(base, value):
    name = "encoder.conv1.weight"
    tensors = {n: t for n, t in load_pth(base, VAE_FILE).items() if n != name}
    replace_pth(base / VAE_FILE, tensors if value is None else tensors | {name: value})
    with refusal(CheckpointError, VAE_FILE):
        plan_vae(base / VAE_FILE, "int8")


def merged_weights(tiny) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The DiT with its LoRA, in float64 from the published files alone, and the sum of magnitudes behind each value."""
    lora = {n.removeprefix("base_model.model."): t.double() for n, t in load_file(tiny.lora).items()}
    weights = {n: (t.double(), t.double().abs()) for n, t in load_dit(base_of(tiny.checkpoint)).items()}
    for name, value in lora.items():
        if "lora_" not in name:
            weights[name] = value, value.abs()
        elif ".lora_A" in name:
            a, b, (weight, size) = value, lora[name.replace("lora_A", "lora_B")], weights[target_of(name)]
            factor = 2.0 / len(a)
            weights[target_of(name)] = weight + factor * (b @ a), size + factor * (b.abs() @ a.abs())
    return weights


def target_of(name: str) -> str:
    return name.split(".lora_A")[0] + ".weight"


def loaded_dit(tiny, precision: str) -> tuple[dict[str, torch.Tensor], Artifact]:
    artifact = Artifact.open(tiny.artifact(precision))
    component = artifact.component("dit")
    model = build_dit(component)
    load_slabs(model, component, CPU, torch.float32)
    return dict(model.named_parameters()), artifact


# Float32 rounds the LoRA's sum of rank + 2 terms; bf16 then keeps 8 bits, half a step is 2^-8 of the value.
FLOAT32, BF16 = 6 * 2**-24, 2**-8


def met(stored: torch.Tensor, weight: torch.Tensor, size: torch.Tensor, step: float) -> bool:
    return bool(((stored.double() - weight).abs() <= step * weight.abs() + FLOAT32 * size).all())


@pytest.mark.parametrize(("precision", "step"), [("fp32", 0.0), ("bf16", BF16)])
def test_kept_weights_in_the_runtimes_model(tiny, precision, step):
    parameters, _ = loaded_dit(tiny, precision)
    expected = merged_weights(tiny)
    assert set(parameters) == set(expected)
    for name, (weight, size) in expected.items():
        assert met(parameters[name], weight, size, step), name


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_weights_in_the_runtimes_model(tiny, precision):
    parameters, artifact = loaded_dit(tiny, precision)
    facts = artifact.manifest["components"]["dit"]["tensors"]
    quantized = {name for name in parameters if f"{name}_scale" in parameters}
    assert {name for name, fact in facts.items() if "relative_error" in fact} == quantized
    assert len(quantized) > 40
    for name, (weight, size) in merged_weights(tiny).items():
        if name not in quantized:
            assert met(parameters[name], weight, size, BF16), name
            continue
        weight = rotated(weight.double(), facts[name].get("rotated_group", 1))
        scale = parameters[f"{name}_scale"].double().view(-1, *[1] * (weight.ndim - 1))
        back = parameters[name].double() * scale
        half = scale / 2 if precision == "int8" else (weight.abs() * 2**-4).maximum(scale * 2**-10)
        assert ((back - weight).abs() <= half * (1 + 1e-5)).all(), name
        assert facts[name]["relative_error"] == pytest.approx(relative_error(back, weight), rel=1e-3), name


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.012), ("fp8", 0.04)])
def test_quantized_convolutions_in_the_runtimes_vae(tiny, precision, bound):
    artifact = Artifact.open(tiny.artifact(precision))
    facts = artifact.manifest["components"]["vae"]["tensors"]
    state = dict(load_vae(artifact, CPU, torch.float32).vae.named_parameters())
    published = load_pth(base_of(tiny.checkpoint), VAE_FILE)
    names = vae_names(published)
    errors = {}
    for name, weight in ((names[n], t.double()) for n, t in published.items()):
        if f"{name}_scale" in state:
            scale = state[f"{name}_scale"].double().view(-1, *[1] * (weight.ndim - 1))
            errors[name] = relative_error(state[name].double() * scale, weight)
            assert facts[name]["relative_error"] == pytest.approx(errors[name], rel=1e-3), name
        else:
            assert torch.equal(state[name].double(), weight), name
    assert len(errors) > 30
    assert 0 < max(errors.values()) < bound


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory) -> Path:
    """One whose text encoder is as wide as a block of 4-bit values, so that all its Linears can be quantized."""
    return write_checkpoint(tmp_path_factory.mktemp("wide"), text_dim=64)


@pytest.fixture(scope="module")
def text_artifact(wide_checkpoint, tmp_path_factory):
    found: dict[str, Artifact] = {}

    def make(precision: str) -> Artifact:
        if precision not in found:
            out = tmp_path_factory.mktemp("text") / precision
            convert(wide_checkpoint, out, text_encoder=precision, components=("text_encoder", "tokenizer"))
            found[precision] = Artifact.open(out, verify=True)
        return found[precision]

    return make


def contexts(artifact: Artifact) -> list[torch.Tensor]:
    model, tokenizer = load_text_encoder(artifact, CPU, torch.float32)
    return [encode_prompt(model, tokenizer, prompt, 48) for prompt in PROMPTS]


def dequantized(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The text encoder's weights in float32, by our own arithmetic."""
    component = artifact.component("text_encoder")
    stored: dict[str, torch.Tensor] = {}
    for slab in component.slab_names:
        stored |= component.views(slab, component.read_slab(slab))
    weights = {}
    for name in component.facts["tensors"]:
        scheme = component.tensor_scheme(name)
        if scheme == "nf4":
            weights[name] = from_nf4(stored[name], stored[f"{name}.absmax"])
        elif scheme.endswith("_quanto"):
            weights[name] = stored[f"{name}._data"].float() * stored[f"{name}._scale"]
        else:
            weights[name] = stored[name].float()
    return weights


# The 16 values of NF4: Dettmers et al., QLoRA, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def from_nf4(packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    values = NF4[torch.cat([packed >> 4, packed & 15], dim=1).flatten().long()]
    return (values.view(len(absmax), -1) * absmax[:, None]).flatten()


PUBLISHED = {"int8": "int8_quanto", "fp8": "fp8_quanto", "nf4": "nf4"}


@pytest.mark.parametrize("precision", ["int8", "fp8", "nf4", "bf16", "fp32"])
def test_the_text_encoder_computes_what_is_stored(text_artifact, precision):
    artifact = text_artifact(precision)
    model = build_umt5(**artifact.component("text_encoder").config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = {name: weight.view(shapes[name]) for name, weight in dequantized(artifact).items()}
    model.load_state_dict(weights, strict=False)
    _, tokenizer = load_text_encoder(artifact, CPU, torch.float32)
    expected = [encode_prompt(model, tokenizer, prompt, 48) for prompt in PROMPTS]
    errors = [relative_error(*pair) for pair in zip(contexts(artifact), expected, strict=True)]
    assert max(errors) < 1e-5, errors


# Twice what is met here, on random weights of width 64: trained and wider ones err less. bf16 is what is published.
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.06), ("fp8", 0.25), ("nf4", 0.6), ("bf16", 1e-9)])
def test_the_text_encoder_stays_close_to_float32(text_artifact, precision, bound):
    pairs = zip(contexts(text_artifact(precision)), contexts(text_artifact("fp32")), strict=True)
    errors = [relative_error(*pair) for pair in pairs]
    assert max(errors) < bound, errors


# Relative errors of normal numbers: a quarter more than 1/127 and 2^-5 of 3 deviations, and NF4's 9 %.
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.012), ("fp8", 0.035), ("nf4", 0.12)])
def test_the_text_encoders_linears_are_the_libraries(wide_checkpoint, text_artifact, precision, bound):
    from bitsandbytes.nn import Linear4bit
    from optimum.quanto import QLinear

    artifact = text_artifact(precision)
    model, _ = load_text_encoder(artifact, CPU, torch.float32)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kind = Linear4bit if precision == "nf4" else QLinear
    assert {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kind)} == linears != set()
    facts = artifact.component("text_encoder").facts["tensors"]
    assert {name for name, fact in facts.items() if fact["scheme"] == PUBLISHED[precision]} == linears
    published = load_pth(base_of(wide_checkpoint), TEXT_ENCODER_FILE)
    weights = {umt5_name(n): t.double() for n, t in published.items()}
    stored = dequantized(artifact)
    for name in linears:
        error = relative_error(stored[name], weights[name].view(stored[name].shape))
        assert facts[name]["relative_error"] == pytest.approx(error, rel=1e-3), name
        assert 0 < error < bound, name


def test_rows_that_are_no_whole_4_bit_blocks_are_kept(tiny):
    plan = plan_text_encoder(base_of(tiny.checkpoint) / TEXT_ENCODER_FILE, "nf4")
    assert {item.ref.shape[1] % 64 for item in plan.items if item.scheme.name == "nf4"} == {0}
    assert any(item.scheme.name == "bf16" and "SelfAttention.q" in item.name for item in plan.items)
