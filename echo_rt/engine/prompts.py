"""Prompts of a runtime: encoding texts, checking embeddings, blending them, and files of embeddings."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from echo_rt.config import TransformerConfig
from echo_rt.engine.memory_budget import has_room
from echo_rt.errors import ConfigError, EchoError, PromptError, StreamError
from echo_rt.model.text import TextEncoder, clean_prompt
from echo_rt.options import WORDS, is_path, is_whole
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.checked_json import convert
from echo_rt.utils.device import model_context
from echo_rt.weights.files import open_tensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.tensors import first_names

_logger = logging.getLogger("echo_rt.prompt")

_EMBEDS_KEY = "prompt_embeds"
_PROMPT_KEY = "prompt"
NOW = "now"  # key, among the facts of prompts in a snapshot, of the one of the last block begun
_MOST_BLOCKS = 10_000  # of a blend


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """Embeddings float32 ``[length, text_dim]`` on the host, and how blocks come to them.

    ``text``: None if only the embeddings were given. ``over``: number of blocks in which they are reached, the next one
    included. ``continued``: an earlier block began the blend, so the memory is not rebuilt again.
    """

    embeds: Tensor
    text: str | None = None
    over: Annotated[int, msgspec.Meta(ge=1, le=_MOST_BLOCKS)] = 1
    continued: bool = False

    def step(self, now: Tensor) -> tuple[Prompt, Prompt | None]:
        """Return the prompt of the next block, where ``now`` is that of the last one, and what is left of the blend."""
        if self.over == 1:
            return self, None
        # The transformer pads a text with zeros, so a shorter one may be padded here.
        length = max(len(now), len(self.embeds))
        old, new = (pad(embeds, (0, 0, 0, length - len(embeds))) for embeds in (now, self.embeds))
        blended = torch.lerp(old, new, 1 / self.over)
        return replace(self, embeds=blended, over=1), replace(self, over=self.over - 1, continued=True)

    def facts(self) -> dict[str, Any]:
        """All but the embeddings, in plain JSON types, where it is not the default."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "embeds"}
        return {name: value for name, value in own.items() if value != getattr(Prompt, name)}


def prompt_of(embeds: Tensor, facts: Mapping[str, Any] | None) -> Prompt:
    """Make a prompt of what a snapshot holds; :class:`PromptError` for facts that are none."""
    known = convert(facts or {}, dict[str, Any], "facts", PromptError)
    return convert(known | {"embeds": embeds}, Prompt, "facts", PromptError)


def check_over(over: int) -> int:
    """Return the number of blocks of a blend; :class:`ConfigError` for what is none."""
    if not is_whole(over, 1) or over > _MOST_BLOCKS:
        raise ConfigError(f"over must be a number of blocks in 1..{_MOST_BLOCKS}, got {over!r}")
    return over


class PromptEncoder:
    """The text encoder of a model folder, loaded for a prompt and released after it unless ``keep``.

    ``keep`` None keeps it for a video that is live, where the memory of the device has room. Any thread may use it; one
    prompt is encoded at a time. Embeddings are float32 on the host, so that streams and snapshots do not depend on
    the device. Without a folder there is no text encoder. ``dtype``: the model's; float32 weights of the encoder are
    kept only where that is float32, and converted to bfloat16 elsewhere.
    """

    def __init__(
        self,
        folder: ModelFolder | None,
        config: TransformerConfig,
        device: torch.device,
        *,
        keep: bool | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._keep = keep
        self._videos: weakref.WeakSet[object] = weakref.WeakSet()
        self._widest = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._folder, self._config, self._device = folder, config, device
        self._lock = threading.RLock()  # reentrant: a signal handler may close amid a prompt of its own thread
        self._encoding = False
        self._noted: set[str] = set()  # words that the model does not know, and that were told
        self._encoder: TextEncoder | None = None
        self._closed = False

    @property
    def loaded(self) -> bool:
        """Whether the text encoder is in memory now."""
        return self._encoder is not None

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a model of few words knows; empty for one that was trained on all kinds of text."""
        return () if self._folder is None else tuple(self._folder.rollout_defaults().get(WORDS, ()))

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Encode prompts to ``[length, text_dim]`` each; :class:`PromptError` for an empty or a far too long one."""
        if isinstance(prompts, str):  # whose items are prompts of one letter
            raise PromptError(f"expected a sequence of prompts, got one text: {prompts!r:.40}")
        try:
            # Also the default device meanwhile: the library makes tensors on it.
            with self._lock, model_context(self._device, torch.float32), self._device:
                return self._encode(prompts)
        finally:
            self._release_unless_kept()

    def _encode(self, prompts: Sequence[str]) -> list[Tensor]:
        if self._closed:
            raise StreamError("the runtime is closed; load another with Runtime.from_pretrained(...)")
        if self._folder is None:
            raise PromptError("expected embeddings: this model has no folder with a text encoder, got a text")
        for prompt in [clean_prompt(prompt) for prompt in prompts]:  # raises before the folder is read
            self._note_unknown(prompt)
        self._encoding = True
        try:
            if self._encoder is None:
                self._encoder = TextEncoder(
                    self._folder.text_encoder.config(),
                    self._folder.text_encoder.tensors(),
                    self._folder.tokenizer_path(),
                    text_len=self._config.text_len,
                    device=self._device,
                    dtype=self._widest,
                )
            return [self._encoder.encode(prompt).to("cpu", torch.float32) for prompt in prompts]
        finally:
            self._encoding = False

    def _note_unknown(self, prompt: str) -> None:
        """Warn of a prompt with words that a model of few words does not know."""
        known = self.words
        words = dict.fromkeys(re.findall(r"[^\W_]+", prompt.lower()) if known else ())
        unknown = [word for word in words if word not in known and word not in self._noted]
        self._noted.update(unknown)  # each is told once
        if unknown:
            _logger.warning("the model does not know %s; it knows the words %s", ", ".join(unknown), ", ".join(known))

    def resolve(self, prompt: str | None, prompt_embeds: Tensor | None) -> Prompt:
        """Return the prompt of a text, or of a copy of given embeddings; :class:`PromptError` for both or neither."""
        if (prompt is None) == (prompt_embeds is None):
            both = "neither" if prompt is None else "both"
            raise PromptError(f"give a prompt or prompt_embeds, one of the two; got {both}")
        if prompt is not None:
            return Prompt(text=prompt, embeds=self.encode([prompt])[0])
        assert prompt_embeds is not None
        check_prompt_embeds(prompt_embeds, self._config.text_dim, self._config.text_len)
        return Prompt(embeds=prompt_embeds.detach().to("cpu", torch.float32, copy=True))

    def hold(self, video: object) -> None:
        """Keep the encoder, unless told otherwise, for ``video``, which may be given prompts at any time."""
        self._videos.add(video)

    def let_go(self, video: object) -> None:
        """Forget ``video``. From any thread; never waits."""
        self._videos.discard(video)
        self._release_unless_kept()

    def close(self) -> None:
        """Release the encoder; waits for a prompt that is being encoded."""
        self._closed = True
        with self._lock:
            self._release_unless_kept()

    def _release_unless_kept(self) -> None:
        # Where another thread is encoding, it does this afterwards.
        if self._lock.acquire(blocking=False):
            try:
                if self._encoder is None or self._encoding:
                    return
                keep = bool(self._videos) and has_room(self._device) if self._keep is None else self._keep
                if self._closed or not keep:
                    self._encoder.close()
                    self._encoder = None
            finally:
                self._lock.release()


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
    if not is_path(path):
        raise PromptError(f"expected the path of prompt embeddings, got {path!r}")
    try:
        file = open_tensors(path)
        if _EMBEDS_KEY not in file:
            raise PromptError(f"expected a tensor {_EMBEDS_KEY!r}, found {first_names(list(file))}")
        embeds = file[_EMBEDS_KEY]
        _check_matrix(embeds)
    except EchoError as error:
        what = str(error).removeprefix(f"{path}: ")
        raise PromptError(f"{path}: cannot read prompt embeddings: {what}") from error
    prompt = file.facts.get(_PROMPT_KEY)
    return embeds, None if prompt is None else str(prompt)
