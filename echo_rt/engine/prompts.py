"""Prompts of a runtime: encoding texts, checking embeddings, and files of embeddings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from echo_rt.config import TransformerConfig
from echo_rt.errors import EchoError, PromptError, StreamError
from echo_rt.model.text import TextEncoder, clean_prompt
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.device import model_context
from echo_rt.weights.folder import ModelFolder

_EMBEDS_KEY = "prompt_embeds"
_PROMPT_KEY = "prompt"


class PromptEncoder:
    """The text encoder of a model folder, loaded for a prompt and released after it unless ``keep``.

    Any thread may use it; one prompt is encoded at a time. Embeddings are float32 on the host, so that streams and
    snapshots do not depend on the device. Without a folder there is no text encoder. ``dtype``: the model's; float32
    weights of the encoder are kept only where that is float32, and converted to bfloat16 elsewhere.
    """

    def __init__(
        self,
        folder: ModelFolder | None,
        config: TransformerConfig,
        device: torch.device,
        *,
        keep: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.keep = keep
        self._widest = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._folder, self._config, self._device = folder, config, device
        self._lock = threading.RLock()  # reentrant: a signal handler may close amid a prompt of its own thread
        self._encoding = False
        self._encoder: TextEncoder | None = None
        self._closed = False

    @property
    def loaded(self) -> bool:
        """Whether the text encoder is in memory now."""
        return self._encoder is not None

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Encode prompts to ``[length, text_dim]`` each; :class:`PromptError` for an empty or a far too long one."""
        if isinstance(prompts, str):  # whose items are prompts of one letter
            raise PromptError(f"expected a sequence of prompts, got one text: {prompts!r:.40}")
        # Also the default device meanwhile: the library makes tensors on it.
        with self._lock, model_context(self._device, torch.float32), self._device:
            if self._closed:
                raise StreamError("the runtime is closed; load another with Runtime.from_pretrained(...)")
            if self._folder is None:
                raise PromptError("expected embeddings: this model has no folder with a text encoder, got a text")
            for prompt in prompts:
                clean_prompt(prompt)  # raises before the encoder is read
            self._encoding = True
            try:
                if self._encoder is None:
                    self._encoder = TextEncoder(
                        self._folder.text_encoder_config(),
                        self._folder.text_encoder_tensors(),
                        self._folder.tokenizer_path(),
                        text_len=self._config.text_len,
                        device=self._device,
                        dtype=self._widest,
                    )
                return [self._encoder.encode(prompt).to("cpu", torch.float32) for prompt in prompts]
            finally:
                self._encoding = False
                if not self.keep or self._closed:
                    self._release()

    def resolve(self, prompt: str | None, prompt_embeds: Tensor | None) -> Tensor:
        """Return the embeddings of a text, or a copy of given ones; :class:`PromptError` for both or neither."""
        if (prompt is None) == (prompt_embeds is None):
            both = "neither" if prompt is None else "both"
            raise PromptError(f"give a prompt or prompt_embeds, one of the two; got {both}")
        if prompt is not None:
            return self.encode([prompt])[0]
        assert prompt_embeds is not None
        check_prompt_embeds(prompt_embeds, self._config.text_dim, self._config.text_len)
        return prompt_embeds.detach().to("cpu", torch.float32, copy=True)

    def close(self) -> None:
        """Release the encoder; waits for a prompt that is being encoded."""
        with self._lock:
            self._closed = True
            if not self._encoding:
                self._release()

    def _release(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None


def check_dense(tensor: Tensor, what: str, error: type[EchoError]) -> None:
    """Raise ``error`` for a sparse tensor, and for one on torch's device "meta", which has no values."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise error(f"{what}: expected a dense tensor with values, found {tensor.layout} on {tensor.device}")


def _check_matrix(embeds: Tensor) -> None:
    if not isinstance(embeds, Tensor):
        raise PromptError(f"prompt embeddings must be a tensor, got {type(embeds).__name__}")
    if embeds.ndim != 2 or 0 in embeds.shape:
        raise PromptError(f"prompt embeddings must be [length, width], got {list(embeds.shape)}")
    if embeds.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise PromptError(f"prompt embeddings must be floating point of 16, 32 or 64 bits, got {embeds.dtype}")
    check_dense(embeds, "prompt embeddings", PromptError)
    if not bool(embeds.isfinite().all()):
        raise PromptError(f"prompt embeddings {list(embeds.shape)} hold NaN or infinity")


def check_prompt_embeds(embeds: Tensor, text_dim: int, text_len: int) -> None:
    """Raise ``PromptError`` unless ``embeds`` is ``[length, text_dim]``, finite, with ``1 <= length <= text_len``."""
    _check_matrix(embeds)
    length, width = embeds.shape
    if width != text_dim:
        raise PromptError(f"prompt embeddings are {width} wide, the model takes {text_dim}")
    if length > text_len:
        raise PromptError(f"prompt embeddings have {length} tokens, the model takes at most {text_len}")


def save_prompt_embeds(path: str | Path, embeds: Tensor, prompt: str | None = None) -> None:
    """Write embeddings ``[length, text_dim]`` and their prompt to a safetensors file that appears whole or not at all.

    Raises ``PromptError`` for embeddings that :func:`load_prompt_embeds` would refuse, ``OutputError`` where the file
    cannot be written.
    """
    _check_matrix(embeds)
    metadata = {} if prompt is None else {_PROMPT_KEY: prompt}
    tensors = {_EMBEDS_KEY: embeds.detach().cpu().contiguous()}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def load_prompt_embeds(path: str | Path) -> tuple[Tensor, str | None]:
    """Read embeddings ``[length, text_dim]`` and their prompt, None where the file has none.

    Raises ``PromptError`` for a file that is missing, damaged, or holds something else.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if _EMBEDS_KEY not in names:
                raise PromptError(f"{path}: expected a tensor {_EMBEDS_KEY!r}, found {', '.join(names[:3]) or 'none'}")
            embeds: Tensor = file.get_tensor(_EMBEDS_KEY)
            prompt: str | None = (file.metadata() or {}).get(_PROMPT_KEY)
    except (OSError, safetensors.SafetensorError) as error:
        raise PromptError(f"{path}: cannot read prompt embeddings: {error}") from error
    try:
        _check_matrix(embeds)
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None
    return embeds, prompt
