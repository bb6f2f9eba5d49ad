"""Text encoder, a prompt to the context that the DiT attends to: clean the text, tokenize it, run the UMT5 encoder.

The network is transformers' ``UMT5EncoderModel``; every layer has a relative attention bias of its own.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"


def build_umt5(
    *, vocab_size: int, d_model: int, d_ff: int, num_heads: int, num_layers: int, d_kv: int | None = None
) -> UMT5EncoderModel:
    """Construct the encoder in eval mode without gradients; also under ``torch.device("meta")``.

    UMT5-XXL is (256384, 4096, 10240, 64, 24); ``d_kv`` is d_model / num_heads unless given. A state dict has the
    embedding under two names, ``shared.weight`` and ``encoder.embed_tokens.weight``. Raises ValueError where d_model
    is no multiple of num_heads and ``d_kv`` is not given.
    """
    if d_kv is None:
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is no multiple of num_heads {num_heads}; give d_kv")
        d_kv = d_model // num_heads
    # Four seconds to import: only who builds one pays.
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_heads=num_heads,
        num_layers=num_layers,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer of ``folder/tokenizer.json``: no network, no code from the folder.

    That file alone holds the whole text pipeline. ``tokenizer_config.json`` of the published folder names the class
    ``T5Tokenizer``, whose present version rebuilds the pipeline with another normaliser and unknown token (2, which is
    ``<s>`` in this vocabulary), so the class is not taken from there.

    Raises ValueError when the file is missing, unreadable, or has no ``</s>``, ``<pad>`` or ``<unk>``.
    """
    file = Path(folder) / TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {TOKENIZER_FILE}; copy the published folder google/umt5-xxl as a whole")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{file} is not a tokenizer ({error}); copy it again") from error
    absent = [token for token in ("</s>", "<pad>", "<unk>") if token not in tokenizer.get_vocab()]
    if absent:
        raise ValueError(f"{file} lacks the tokens {', '.join(absent)}; expected a UMT5 tokenizer")
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = "<pad>", "</s>", "<unk>"
    return tokenizer


def clean_prompt(text: str) -> str:
    """Repair mis-decoded characters, resolve HTML entities twice, collapse white space and strip."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip()


def tokenize_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, text_len: int) -> tuple[Tensor, int]:
    """Clean and tokenize a prompt.

    Returns input ids [1, text_len], int64, padded on the right, and how many of them are valid. A longer prompt is cut
    with a warning; ``</s>`` stays the last valid token, alone where the prompt is empty. Raises ValueError when
    ``text_len`` is below 1.
    """
    if text_len < 1:
        raise ValueError(f"text_len is {text_len}; expected 1 or more")
    ids = tokenizer(clean_prompt(prompt), verbose=False).input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    cut = len(ids) - text_len
    if cut > 0:
        logger.warning("the prompt has %d tokens, %d fit: its last %d are cut", len(ids) - 1, text_len - 1, cut)
        ids = [*ids[: text_len - 1], tokenizer.eos_token_id]
    padding = [tokenizer.pad_token_id] * (text_len - len(ids))
    return torch.tensor([ids + padding]), len(ids)


@torch.no_grad()
def encode_prompt(model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompt: str, text_len: int) -> Tensor:
    """Encode a prompt to its context [valid tokens, d_model], in the model's dtype on its embedding's device.

    The encoder runs over the valid tokens alone. Masked padding gets no attention and positions count only as
    distances, so that is the padded and masked result, at a cost that goes with the prompt and not with ``text_len``.
    """
    input_ids, num_valid = tokenize_prompt(tokenizer, prompt, text_len)
    device = model.get_input_embeddings().weight.device
    return model(input_ids=input_ids[:, :num_valid].to(device)).last_hidden_state[0]
