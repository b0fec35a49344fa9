"""From a prompt to its embeddings: cleaning, tokens, the umT5 encoder.

The encoder is the library's ``UMT5EncoderModel`` with Wan's weights in it. Its weights stay in the (narrow) type they
are stored in, its arithmetic is float32: umT5 does not scale its attention scores, so 8 bits of mantissa cost 4% of the
result, and float16 overflows in its feed-forward layers. A prompt is encoded once, so the wider arithmetic is cheap.
"""

from __future__ import annotations

import contextlib
import gc
import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echo_rt.config import TextEncoderConfig
from echo_rt.errors import PromptError, StreamError, WeightsError
from echo_rt.utils.device import give_memory_back
from echo_rt.utils.packages import needing
from echo_rt.utils.wording import first_line, warn_caller
from echo_rt.weights.reading import names_in, not_opened
from echo_rt.weights.shapes import names_of, text_encoder_modules

# A prompt is cut to the model's few hundred tokens; what is far longer is no prompt, and would take minutes to clean.
LONGEST_PROMPT = 100_000  # characters
_PROBE = "a"  # any text: what comes after its tokens is what the tokenizer appends


def clean_prompt(text: str) -> str:
    """The prompt as Wan's models were trained to see it: mended Unicode, no HTML entities, single spaces.

    Errors: ``PromptError`` when ``text`` is not a string, is longer than ``LONGEST_PROMPT`` characters, or nothing is
    left of it; ``BackendError`` without ftfy.
    """
    with needing("ftfy", "cleaning a prompt"):
        import ftfy
    if not isinstance(text, str):
        raise PromptError(f"a prompt must be a string, got {type(text).__name__}")
    if len(text) > LONGEST_PROMPT:
        raise PromptError(f"expected a prompt of at most {LONGEST_PROMPT} characters, got {len(text)}")
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    cleaned = re.sub(r"\s+", " ", mended).strip()
    if not any(character.isprintable() and not character.isspace() for character in cleaned):
        raise PromptError("the prompt is empty: expected some text")
    return cleaned


class _Float32Block(nn.Module):
    """Runs a layer in float32 whatever its weights are stored in; only this one layer's copies exist at a time."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        widened = {name: weight.float() for name, weight in self.block.named_parameters()}
        return torch.func.functional_call(self.block, widened, args, kwargs)


def _build_umt5(
    config: TextEncoderConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Any:
    """The library's encoder with ``tensors`` (original names) as its weights, nothing initialized in between."""
    with needing("transformers", "the text encoder"):
        from transformers import UMT5Config, UMT5EncoderModel

    positions = ("relative_attention_num_buckets", "relative_attention_max_distance")
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", *positions)
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    # The one implementation of attention that every supported version of the library has.
    options |= {"layer_norm_epsilon": config.eps, "dropout_rate": 0.0, "attn_implementation": "eager"}
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **options))

    weights: dict[str, Tensor] = {}
    for name, other in names_of(text_encoder_modules(config), config.num_layers).items():
        stored = tensors[name]
        # Only ever narrowed: widening costs memory and changes nothing, the arithmetic is float32 anyway.
        keep = stored.dtype.itemsize <= dtype.itemsize
        weights[other] = stored.to(device, stored.dtype if keep else dtype)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]  # one table under two names
    model.load_state_dict(weights, strict=True, assign=True)
    model.encoder.final_layer_norm.float()
    model.encoder.block = nn.ModuleList(_Float32Block(block) for block in model.encoder.block)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _refusing(folder: Path | None) -> Iterator[None]:
    """Make one error of whatever the tokenizer's library raises for files that it cannot use."""
    try:
        yield
    except BaseException as error:
        # The panics of its half in Rust are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        found = f"one that the library fails with: {first_line(error)}"
        raise not_opened(folder or Path(), error, "a tokenizer", found) from error


def _load_tokenizer(folder: Path, vocab_size: int) -> Any:
    with needing("transformers", "the tokenizer"):
        from transformers import AutoTokenizer
    # The library would take the name of a folder that does not exist for that of a model on the network.
    for path in [folder / name for name in names_in(folder)]:
        if path.exists() and not (path.is_file() or path.is_dir()):  # to open a pipe is to wait for whoever fills it
            raise WeightsError(f"{path}: expected a file of the tokenizer, found a pipe or a device")
    with _refusing(folder):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        probe = tokenizer(_PROBE).input_ids
    if len(tokenizer) > vocab_size:
        raise WeightsError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the text encoder's table only {vocab_size}"
        )
    if tokenizer.eos_token_id is None or not probe or probe[-1] != tokenizer.eos_token_id:
        raise WeightsError(f"{folder}: expected a tokenizer that appends an end token, got {probe} for {_PROBE!r}")
    return tokenizer


class TextEncoder:
    """Wan's umT5 text encoder and its tokenizer.

    ``tensors``: its weights under Wan's names, of the shapes that ``config`` says; ``dtype``: the widest type in which
    they are kept. ``tokenizer_path``: the tokenizer's folder, None for an encoder that only takes token ids.
    ``text_len``: the most tokens of a prompt that the video model takes, the end token included.

    Errors: ``WeightsError`` for a tokenizer that cannot be used; ``BackendError`` without transformers.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        tensors: Mapping[str, Tensor],
        tokenizer_path: Path | None,
        *,
        text_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config = config
        self.text_len = text_len
        self.device = torch.device(device)
        # The tokenizer first: it is quick to load and quick to be found missing.
        self._tokenizer_path = tokenizer_path
        self._tokenizer = None if tokenizer_path is None else _load_tokenizer(Path(tokenizer_path), config.vocab_size)
        self._model: Any = _build_umt5(config, tensors, self.device, dtype)

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt, the end token last; warns and cuts where there are more than ``text_len``.

        Errors: ``PromptError`` as :func:`clean_prompt`; ``StreamError`` for an encoder made without a tokenizer.
        """
        if self._tokenizer is None:
            raise StreamError("this text encoder has no tokenizer: it was closed, or made without one")
        cleaned = clean_prompt(prompt)
        with _refusing(self._tokenizer_path):
            ids: list[int] = self._tokenizer(cleaned, verbose=False).input_ids
        if len(ids) > self.text_len:
            warn_caller(f"the prompt has {len(ids)} tokens, the model takes {self.text_len}: the rest is left out")
            ids = [*ids[: self.text_len - 1], ids[-1]]
        return ids

    def encode(self, prompt: str) -> Tensor:
        """Embeddings ``[length <= text_len, d_model]`` of a prompt's tokens, float32 on the encoder's device.

        Wan pads them with zeros to ``text_len``; that is left to the caller. Errors: those of :meth:`tokenize`.
        """
        ids = torch.tensor([self.tokenize(prompt)], dtype=torch.long)
        return self.encode_ids(ids, torch.ones_like(ids))[0]

    @torch.no_grad()
    def encode_ids(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``[n, L, d_model]`` of token ids ``[n, L]``, float32, zero where ``attention_mask [n, L]`` is 0.

        Errors: ``PromptError`` for ids outside the vocabulary or shapes that differ; ``StreamError`` after
        :meth:`close`.
        """
        if self._model is None:
            raise StreamError("this text encoder is closed")
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape or input_ids.numel() == 0:
            raise PromptError(
                f"expected token ids and a mask of one shape [n, length], got {list(input_ids.shape)} and "
                f"{list(attention_mask.shape)}"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise PromptError(f"token ids must be in 0..{self.config.vocab_size - 1}, got {low}..{high}")
        ids = input_ids.to(self.device, torch.long)
        mask = attention_mask.to(self.device, torch.long)
        # Embeddings go in as float32, and so does everything that is computed from them.
        embedded = self._model.shared(ids).float()
        hidden: Tensor = self._model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1)

    def close(self) -> None:
        """Drops the weights and gives their memory back; the encoder cannot be used any more."""
        self._model = self._tokenizer = None
        gc.collect()
        give_memory_back(self.device)
