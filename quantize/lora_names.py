"""The names that LoRAs give their tensors, as layers of the base and what a tensor is to its layer.

Where each spelling comes from:
    base_model.model.X.lora_A.default.weight    PEFT, with and without its prefix and the adapter's name
    diffusion_model.X.lora_down.weight          ComfyUI, lightx2v, musubi-tuner's conversions; with X.alpha
    transformer.X.lora.down.weight              diffusers' older form
    transformer.blocks.0.attn1.to_q.lora_A.weight    diffusers' names of Wan's layers
    lora_unet_X_with_underscores.lora_down.weight    kohya's sd-scripts and musubi-tuner; with ....alpha
    X.diff, X.diff_b, X.w_norm, X.b_norm        whole differences of weight and bias: ComfyUI, lightx2v, LyCORIS
    X.hada_w1_a ..., X.lokr_w1 ...              LoHa and LoKr: LyCORIS, PEFT
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "dit.")
_KOHYA = ("lora_unet_", "lora_transformer_", "lora_dit_")
_ROLES = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
}
_DIFFUSERS = {
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
}
_WHOLE = {"diff": ".weight", "w_norm": ".weight", "diff_b": ".bias", "b_norm": ".bias"}
_FACTORS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
    "lokr_w2_b",
)  # fmt: skip
_OTHER_KINDS = {
    "hada_t1": "LoHa of convolutions (with a core)",
    "hada_t2": "LoHa of convolutions (with a core)",
    "lokr_t2": "LoKr of convolutions (with a core)",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a middle",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "boft_S": "BOFT",
    "ia3_l": "IA3",
    "on_input": "IA3",
    "a1": "GLoRA",
    "b1": "GLoRA",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "lora_embedding_A": "a LoRA of an embedding",
    "set_weight": "whole weights under a LoRA's name",
    "reshape_weight": "a LoRA of weights of another shape",
}
_BIASED = ("lora_B.bias", "lora_up.bias")


@dataclasses.dataclass(frozen=True)
class Name:
    """``role``: "A" [r, in], "B" [out, r], "alpha", "diff", a factor of LoHa or LoKr, or "" for a whole tensor.
    ``target``: the base's tensor. ``down_up``: spelled as kohya's tools do, for which a missing alpha means the rank.
    """

    target: str
    role: str
    down_up: bool = False


class Names:
    """Reads names against the base's tensors."""

    def __init__(self, base: Iterable[str]):
        self._base = set(base)
        self._flat = {
            name.removesuffix(".weight").replace(".", "_"): name for name in self._base if not name.endswith(".bias")
        }

    def read(self, name: str) -> Name:
        for prefix in _KOHYA:
            if name.startswith(prefix):
                flat, _, rest = name.removeprefix(prefix).partition(".")
                layer = self._flat.get(flat, flat + ".weight").removesuffix(".weight")
                return self._read(f"{layer}.{rest}")
        return self._read(_bare(name))

    def _read(self, name: str) -> Name:
        layer, _, last = name.removesuffix(".weight").rpartition(".")
        if last in _WHOLE:
            # What is no layer's weight or bias, as a modulation, is called by its own name.
            bare = last in ("diff", "w_norm") and layer in self._base
            return Name(layer if bare else layer + _WHOLE[last], "diff")
        return _read(name)


def other_kind(names: Iterable[str]) -> str | None:
    """What an adapter is that is no LoRA of two factors, and None for one that is."""
    for name in names:
        for part in name.split("."):
            if part in _OTHER_KINDS:
                return _OTHER_KINDS[part]
        if name.endswith(_BIASED):
            return "a LoRA with biases of its own"
    return None


def _bare(name: str) -> str:
    """Without prefixes, of which several may stand one behind the other."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _bare(name.removeprefix(prefix))
    for theirs, published in _DIFFUSERS.items():
        name = name.replace(theirs, published)
    return name


def _read(name: str) -> Name:
    parts = name.split(".")
    if parts[-1] == "alpha":
        return Name(".".join([*parts[:-1], "weight"]), "alpha")
    for index, part in enumerate(parts):
        if part in _FACTORS:
            return Name(".".join([*parts[:index], "weight"]), part)
        for width in (1, 2):
            mark = ".".join(parts[index : index + width])
            if mark in _ROLES:
                return Name(".".join([*parts[:index], "weight"]), _ROLES[mark], mark not in ("lora_A", "lora_B"))
    return Name(name, "")
