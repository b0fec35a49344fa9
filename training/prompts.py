"""Embeddings of the world's prompts by the demo model's text encoder, which is random and never trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig
from echo_rt.model.text import TextEncoder
from echo_rt.weights.shapes import text_encoder_shapes
from echo_rt.weights.tiny_model import Draw, random_tensors
from training.tokenizer import write_tokenizer
from training.world import OBJECT_COLOURS, PLACES, SHAPES, Scene

CONFIG = TextEncoderConfig(vocab_size=1024, d_model=64, d_attn=64, d_ff=128, num_heads=4, num_layers=2)
TEXT_LEN = 24
# Random layers mix words up; the less they add, the better the words are told apart.
_BRANCH = 0.15


def encoder_weights(seed: int = 0) -> dict[str, Tensor]:
    """Draw the text encoder, under Wan's names."""
    weights = random_tensors(text_encoder_shapes(CONFIG), Draw(seed))
    for name in weights:
        if name.endswith((".attn.o.weight", ".ffn.fc2.weight")):
            weights[name] = _BRANCH * weights[name]
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def embed(prompts: Sequence[str], tokenizer: Path) -> Tensor:
    """Embed prompts: float32 ``[N, TEXT_LEN, d_model]``, zero where a prompt has ended."""
    tokenizer.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, CONFIG.vocab_size, TEXT_LEN)
    out = torch.zeros(len(prompts), TEXT_LEN, CONFIG.d_model)
    with closing(TextEncoder(CONFIG, encoder_weights(), tokenizer, text_len=TEXT_LEN)) as encoder:
        for row, prompt in zip(out, prompts, strict=True):
            embedded = encoder.encode(prompt)
            row[: len(embedded)] = embedded
    return out


def all_prompts() -> list[str]:
    """Return every prompt of the world, in a fixed order."""
    return [Scene(*named, "red", 0, 0).prompt for named in itertools.product(OBJECT_COLOURS, SHAPES, PLACES)]
