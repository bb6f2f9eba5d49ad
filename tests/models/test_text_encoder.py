"""From prompt to context: golden ids and context, cleaning, cutting, and tokenizers that must not be trusted."""

import json
import logging
import shutil

import pytest
import torch
from transformers import UMT5EncoderModel

from lowvram_models.text_encoder import build_umt5, clean_prompt, encode_prompt, load_tokenizer, tokenize_prompt
from tests.golden_cases import cases, relative_error

CHECKPOINT = "ckpt/Wan2.2-S2V-14B"
TOKENIZER = f"{CHECKPOINT}/google/umt5-xxl"
LAYER_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

each_case = pytest.mark.parametrize("case", cases("pipeline"), ids=lambda case: case.folder.name)


def library_state(published):
    """The published tensors under transformers' names, float32."""
    published = {name: tensor.float() for name, tensor in published.items()}
    embedding, norm = published.pop("token_embedding.weight"), published.pop("norm.weight")
    state = {"shared.weight": embedding, "encoder.embed_tokens.weight": embedding}
    state["encoder.final_layer_norm.weight"] = norm
    for name, tensor in published.items():
        _, layer, rest = name.split(".", 2)
        theirs = next(key for key in LAYER_NAMES if rest.startswith(key))
        state[f"encoder.block.{layer}.{LAYER_NAMES[theirs]}{rest.removeprefix(theirs)}"] = tensor
    return state


def golden_umt5(case) -> UMT5EncoderModel:
    published = torch.load(case.folder / CHECKPOINT / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    with torch.device("meta"):
        model = build_umt5(
            vocab_size=published["token_embedding.weight"].shape[0],
            d_model=published["token_embedding.weight"].shape[1],
            d_ff=published["blocks.0.ffn.fc1.weight"].shape[0],
            num_heads=published["blocks.0.pos_embedding.embedding.weight"].shape[1],
            num_layers=sum(name.endswith("norm1.weight") for name in published),
        )
    model.load_state_dict(library_state(published), assign=True)
    return model


@pytest.fixture(scope="module")
def case():
    found = cases("pipeline")
    if not found:
        pytest.skip("no pipeline case holds a tokenizer")
    return found[0]


@pytest.fixture(scope="module")
def tokenizer(case):
    return load_tokenizer(case.folder / TOKENIZER)


@pytest.mark.golden
@each_case
def test_prompt_meets_the_golden_ids_and_context(case):
    expected, settings = case.tensors("outputs"), case.settings
    text_len = json.loads((case.folder / CHECKPOINT / "config.json").read_text())["text_len"]
    tokenizer, model = load_tokenizer(case.folder / TOKENIZER), golden_umt5(case)
    ids, num_valid = tokenize_prompt(tokenizer, settings["prompt"], text_len)
    assert torch.equal(ids, expected["input_ids"])
    context = encode_prompt(model, tokenizer, settings["prompt"], text_len)
    assert context.shape == expected["context"].shape == (num_valid, model.config.d_model)
    assert relative_error(context, expected["context"]) < 2e-6


def test_encoding_valid_tokens_alone_is_masking_the_padding(case, tokenizer):
    model = golden_umt5(case)
    ids, num_valid = tokenize_prompt(tokenizer, "a warm studio", 40)
    mask = (torch.arange(40) < num_valid).long()[None]
    padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, :num_valid]
    assert 1 < num_valid < 40
    assert relative_error(encode_prompt(model, tokenizer, "a warm studio", 40), padded) < 2e-6


def test_meta_model_has_the_published_encoder_s_shape():
    with torch.device("meta"):
        model = build_umt5(vocab_size=256384, d_model=4096, d_ff=10240, num_heads=64, num_layers=24)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(5.68e9, rel=1e-3)
    assert model.encoder.block[23].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 64)
    assert model.config.d_kv == 64
    assert not model.training


def test_heads_that_do_not_divide_the_width_need_d_kv():
    sizes = {"vocab_size": 8, "d_model": 10, "d_ff": 8, "num_heads": 4, "num_layers": 1}
    with pytest.raises(ValueError, match="give d_kv"):
        build_umt5(**sizes)
    assert build_umt5(**sizes, d_kv=3).encoder.block[0].layer[0].SelfAttention.q.weight.shape == (12, 10)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  two\n\twords  ", "two words"),
        ("a &amp;amp; b", "a & b"),
        ("&lt;b&gt; l'&eacute;t&eacute;", "<b> l'été"),
        ("schÃ¶n", "schön"),
        (" ", ""),
    ],
)
def test_prompts_are_cleaned(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_an_empty_prompt_is_its_end_token(case, tokenizer):
    ids, num_valid = tokenize_prompt(tokenizer, "  ", 6)
    assert ids.tolist() == [[1, 0, 0, 0, 0, 0]]
    assert num_valid == 1
    context = encode_prompt(golden_umt5(case), tokenizer, "", 6)
    assert context.shape[0] == 1
    assert context.isfinite().all()


def test_a_long_prompt_is_cut_and_the_count_is_logged(tokenizer, caplog):
    prompt = "warm studio " * 20
    full, num_full = tokenize_prompt(tokenizer, prompt, 1000)
    with caplog.at_level(logging.WARNING, logger="lowvram_models.text_encoder"):
        ids, num_valid = tokenize_prompt(tokenizer, prompt, 12)
    assert num_valid == 12
    assert ids.tolist() == [[*full[0, :11].tolist(), 1]]
    assert [record.args for record in caplog.records] == [(num_full - 1, 11, num_full - 12)]


def test_a_prompt_that_just_fits_is_not_cut(tokenizer, caplog):
    num_valid = tokenize_prompt(tokenizer, "warm", 1000)[1]
    with caplog.at_level(logging.WARNING):
        ids, _ = tokenize_prompt(tokenizer, "warm", num_valid)
    assert ids.shape == (1, num_valid)
    assert not caplog.records


def test_a_text_length_below_one_is_refused(tokenizer):
    with pytest.raises(ValueError, match="text_len is 0"):
        tokenize_prompt(tokenizer, "a", 0)


def test_the_class_named_in_the_published_folder_does_not_change_the_ids(case, tokenizer, tmp_path):
    shutil.copy(case.folder / TOKENIZER / "tokenizer.json", tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\n\x0b\n\x05<pad>\x15\x00\x00\x00\x00\x18\x03")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 300, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code from the folder ran')")
    prompt = "an unknown 漢 sign"
    ids, num_valid = tokenize_prompt(load_tokenizer(tmp_path), prompt, 40)
    assert torch.equal(ids, tokenize_prompt(tokenizer, prompt, 40)[0])
    assert tokenizer.unk_token_id == 3
    assert 3 in ids[0, :num_valid]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no tokenizer.json"), ("{", "is not a tokenizer"), ("vocabulary", "lacks the tokens </s>, <pad>")],
)
def test_folders_without_a_usable_tokenizer_are_refused(tmp_path, content, message):
    if content == "vocabulary":
        content = json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
