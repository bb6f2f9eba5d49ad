"""The synthetic checkpoint against the golden tiny one: same files, names and shapes, and weights that stay sane."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Wav2Vec2ForCTC

from lowvram_kernels.errors import ConfigError, InputError, OutputError
from lowvram_models.config import DiTConfig
from lowvram_models.names import umt5_name
from lowvram_models.text_encoder import build_umt5, encode_prompt, load_tokenizer, tokenize_prompt
from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_quantize.synthetic import write_checkpoint
from lowvram_quantize.synthetic_encoders import t5_shapes, vae_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "pipeline_tiny" / "ckpt"
BASE = "Wan2.2-S2V-14B"
LORA = Path("LiveAvatar", "liveavatar.safetensors")
AUDIO = "wav2vec2-large-xlsr-53-english"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("synthetic") / "new" / "root")


def dit_tensors(base: Path) -> dict[str, torch.Tensor]:
    index = json.loads((base / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(base / file)
        assert all(index["weight_map"][name] == file for name in shard)
        tensors |= shard
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def facts(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def pth(root: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(root / BASE / name, weights_only=True)


def test_every_golden_file_that_is_read_is_there(checkpoint):
    unread = {"tokenizer_config.json", "vocab.json"}  # the speech model's tokenizer
    wanted = {
        p.relative_to(TINY)
        for p in TINY.rglob("*")
        if p.is_file() and not (p.parent.name == AUDIO and p.name in unread)
    }
    assert {p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()} - wanted == {
        Path("synthetic.json")
    }
    assert all((checkpoint / path).is_file() for path in wanted)


def test_dit_and_lora_have_the_golden_names_shapes_and_dtypes(checkpoint):
    assert facts(dit_tensors(checkpoint / BASE)) == facts(dit_tensors(TINY / BASE))
    assert facts(load_file(checkpoint / LORA)) == facts(load_file(TINY / LORA))
    ours, golden = (json.loads((root / BASE / "config.json").read_text()) for root in (checkpoint, TINY))
    assert ours == golden
    DiTConfig.from_dict(ours)


def test_encoders_have_the_golden_names_and_shapes(checkpoint):
    assert facts(pth(checkpoint, "Wan2.1_VAE.pth")) == facts(pth(TINY, "Wan2.1_VAE.pth"))
    t5, golden_t5 = (facts(pth(root, "models_t5_umt5-xxl-enc-bf16.pth")) for root in (checkpoint, TINY))
    assert t5.pop("token_embedding.weight")[0][1] == golden_t5.pop("token_embedding.weight")[0][1]
    assert t5 == golden_t5
    audio, golden_audio = (facts(load_file(root / BASE / AUDIO / "model.safetensors")) for root in (checkpoint, TINY))
    assert audio == golden_audio


def test_vae_at_the_published_width_is_the_published_manifest():
    manifest = json.loads((GOLDEN / "vae_manifest.json").read_text())
    assert {name: list(shape) for name, shape in vae_shapes(96).items()} == manifest


def test_text_encoder_names_are_the_published_ones():
    manifest = json.loads((GOLDEN / "t5_manifest.json").read_text())
    three_layers = {name for name in manifest if not name.startswith("blocks.") or int(name.split(".")[1]) < 3}
    assert set(t5_shapes(95, 32)) == three_layers


def test_decoded_frames_are_neither_constant_nor_saturated(checkpoint):
    vae = build_vae(8)
    vae.load_state_dict(convert_wan_vae_to_diffusers(pth(checkpoint, "Wan2.1_VAE.pth")))
    latent = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = StreamingVAE(vae).start_decoder().decode(latent)
    assert 0.05 < frames.abs().mean() < 0.9
    assert (frames.abs() >= 1).float().mean() < 0.25
    assert frames.std(dim=(0, 2, 3)).min() > 0.05
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean() > 0.01


def test_audio_encoder_loads_with_nothing_missing(checkpoint):
    model, info = Wav2Vec2ForCTC.from_pretrained(checkpoint / BASE / AUDIO, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    hidden = model.eval().wav2vec2(torch.randn(1, 4000), output_hidden_states=True).hidden_states
    assert len(hidden) == 25
    assert all(h.isfinite().all() and 0.1 < h.std() < 20 for h in hidden)


def test_tokenizer_spells_a_usual_prompt_within_the_text_length(checkpoint):
    tokenizer = load_tokenizer(checkpoint / BASE / "google" / "umt5-xxl")
    prompt = "A cheerful person with round glasses speaks to the camera"
    ids, valid = tokenize_prompt(tokenizer, prompt, 48)
    assert ids.shape == (1, 48)
    assert valid < 48
    assert ids[0, valid - 1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[0, : valid - 1]).strip() == prompt
    assert len(tokenizer) == pth(checkpoint, "models_t5_umt5-xxl-enc-bf16.pth")["token_embedding.weight"].shape[0]


def test_text_encoder_loads_under_its_library_names(checkpoint):
    tensors = pth(checkpoint, "models_t5_umt5-xxl-enc-bf16.pth")
    vocabulary, width = tensors["token_embedding.weight"].shape
    model = build_umt5(vocab_size=vocabulary, d_model=width, d_ff=2 * width, num_heads=4, num_layers=3)
    missing, unexpected = model.load_state_dict({umt5_name(n): t.float() for n, t in tensors.items()}, strict=False)
    assert (missing, unexpected) == (["encoder.embed_tokens.weight"], [])  # the same tensor as shared.weight
    context = encode_prompt(model, load_tokenizer(checkpoint / BASE / "google" / "umt5-xxl"), "A person speaks", 48)
    assert 0.3 < context.std() < 3


def test_same_seed_same_bytes_and_shards_change_no_value(checkpoint, tmp_path):
    again = write_checkpoint(tmp_path / "again")
    for path in sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()):
        assert (again / path).read_bytes() == (checkpoint / path).read_bytes(), path
    other = dit_tensors(write_checkpoint(tmp_path / "other", shards=5) / BASE)
    assert all(torch.equal(other[name], t) for name, t in dit_tensors(checkpoint / BASE).items())
    assert len(list((tmp_path / "other" / BASE).glob("*-of-00005.safetensors"))) == 5
    seeded = load_file(write_checkpoint(tmp_path / "seeded", seed=1) / LORA)
    assert not any(torch.equal(seeded[name], t) for name, t in load_file(checkpoint / LORA).items())


def test_shards_are_of_about_equal_size(tmp_path):
    base = write_checkpoint(tmp_path, num_layers=12, shards=4) / BASE
    sizes = []
    for file in base.glob("*-of-00004.safetensors"):
        with safe_open(file, "pt") as shard:
            sizes.append(sum(shard.get_tensor(name).nbytes for name in shard.keys()))  # noqa: SIM118
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)


def test_writing_again_replaces_its_own_and_leaves_no_old_shard(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    write_checkpoint(tmp_path, shards=2)
    assert len(list((tmp_path / BASE).glob("*.safetensors"))) == 2
    assert not list(tmp_path.glob(".partial*"))


def test_a_checkpoint_that_came_from_elsewhere_is_left_alone(tmp_path):
    weights = tmp_path / BASE / "Wan2.1_VAE.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"years of training")
    with pytest.raises(InputError, match="name another folder"):
        write_checkpoint(tmp_path)
    assert weights.read_bytes() == b"years of training"
    assert sorted(p.name for p in tmp_path.iterdir()) == [BASE]


def test_a_folder_that_cannot_be_made_is_an_output_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "root")


def test_a_write_that_fails_half_way_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr("lowvram_quantize.synthetic.torch.save", full)
    with pytest.raises(OutputError, match="no space left"):
        write_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"dim": 20}, "head width of at least 6"),
        ({"audio_inject_layers": (0, 4)}, "audio_inject_layers"),
        ({"text_dim": 30}, "multiple of 4"),
        ({"audio_dim": 0}, "multiple of 4"),
        ({"vae_base_dim": 0}, "1 or more"),
        ({"shards": 0}, "1 or more"),
        ({"shards": 10_000}, "at most"),
        ({"lora_rank": -1}, "1 or more"),
    ],
)
def test_shapes_that_make_no_model_are_refused_and_nothing_is_written(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(tmp_path / "root", **wrong)
    assert not (tmp_path / "root").exists()
