"""Script of a video: prompts and the times at which they begin."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from echo_rt.errors import PromptError

if TYPE_CHECKING:
    from echo_rt.runtime import Runtime

# "12:a lake", "7.5:a lake"; a sign is matched only to be refused.
_TIMED = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*:(.*)", re.DOTALL)
_ESCAPED = 'a text that begins with a number and a colon is written "0:16:9 ..."'
_SHOWN = 40
_NEVER = 2.0**53  # frames: the latest start of a prompt


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt (``text`` or the name of an embeddings ``file``) and the second of video at which it begins."""

    seconds: float
    text: str | None = None
    file: str | None = None

    @property
    def label(self) -> str:
        """Short name for messages and progress lines."""
        name = self.text if self.text is not None else f"embeddings {self.file}"
        return name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…"


def _split(argument: str, option: str) -> tuple[float, str]:
    match = _TIMED.fullmatch(argument)
    seconds, value = (float(match[1]), match[2]) if match else (0.0, argument)
    if seconds < 0:
        raise PromptError(f"{option} {argument!r}: a prompt begins at 0 seconds or later, got {seconds:g}")
    if not math.isfinite(seconds):
        raise PromptError(f"{option} {argument[:_SHOWN]!r}: the time is not a number of seconds")
    if not value.strip():
        expected = "a prompt" if option == "--prompt" else "a file"
        raise PromptError(f"{option} {argument!r}: expected {expected}, got nothing")
    if seconds > 0 and option == "--prompt" and value[0].isdigit():
        either = f"got what can be either; a blank after the colon makes it a text at {seconds:g} s, and {_ESCAPED}"
        raise PromptError(f"{option} {argument[:_SHOWN]!r}: expected a time or a text, {either}")
    return seconds, value.strip()


def parse_script(texts: Sequence[str], files: Sequence[str]) -> list[TimedPrompt]:
    """Return the prompts of ``--prompt`` and ``--prompt-embeds`` in the order in which they begin.

    ``T:text`` begins at T seconds of video, plain text at 0 (text that begins like this is written ``0:10: a clock``).
    Raises ``PromptError`` if there is no prompt, none at 0, two at one time, or an empty one.
    """
    script = [TimedPrompt(seconds, text=text) for seconds, text in (_split(one, "--prompt") for one in texts)]
    script += [TimedPrompt(seconds, file=file) for seconds, file in (_split(one, "--prompt-embeds") for one in files)]
    if not script:
        raise PromptError("expected at least one --prompt TEXT (or --prompt-embeds FILE), got none")
    script.sort(key=lambda prompt: prompt.seconds)
    if script[0].seconds > 0:
        begin = f"the first begins at {script[0].seconds:g} s"
        raise PromptError(f"no prompt for the start of the video: {begin} ({_ESCAPED})")
    for earlier, later in pairwise(script):
        if earlier.seconds == later.seconds:
            raise PromptError(
                f"two prompts begin at {later.seconds:g} s: {earlier.label!r} and {later.label!r}; "
                f'give one another time, such as --prompt "10:{later.label}"'
            )
    return script


def parse_untimed(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of ``--prompt`` without times; raises ``PromptError`` for one with a time or an empty one."""
    split = [(argument, *_split(argument, "--prompt")) for argument in texts]
    for argument, seconds, _ in split:
        if seconds > 0:
            expected = "expected a text without a time: --switch-every says when prompts change"
            raise PromptError(f"--prompt {argument!r}: {expected} ({_ESCAPED})")
    return tuple(text for _, _, text in split)


def first_block(seconds: float, runtime: Runtime, hidden: int = 0) -> int:
    """Number of the first block that begins at ``seconds`` of the recording or later.

    ``hidden``: frames in whole blocks at the beginning that are not recorded.
    """
    frames_per_block = runtime.config.window.frames_per_block

    def first_frame(block: int) -> int:
        return runtime.vae_config.video_frames(block * frames_per_block)

    frame = hidden + math.ceil(min(seconds * runtime.fps, _NEVER))
    # Every block has at least one frame, so block number `frame` is late enough.
    return bisect_left(range(frame), frame, key=first_frame)
