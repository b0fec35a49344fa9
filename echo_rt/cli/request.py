"""What a video is asked for: its script of prompts, and ``echo-rt generate``'s arguments, checked without the model."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from echo_rt.cli.arguments import Arguments, model_files, options_of, require
from echo_rt.cli.outputs import Named, check_folder, check_outputs
from echo_rt.errors import ConfigError, PromptError, TargetError
from echo_rt.options import RuntimeOptions, find_codec
from echo_rt.soak.config import MANIFEST_FILE

if TYPE_CHECKING:
    from echo_rt.runtime import Runtime

# "12:a lake", "7.5:a lake"; a sign is matched only to be refused.
_TIMED = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*:(.*)", re.DOTALL)
_ESCAPED = 'a text that begins with a number and a colon is written "0:16:9 ..."'
_SHOWN = 40
_NEVER = 2.0**53  # frames: the latest start of a prompt
# Value of --latents without a file; no file can have this name.
BESIDE_SEGMENTS = Path(".")


class TimedPrompt(msgspec.Struct, frozen=True, omit_defaults=True):
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
        text = value[:_SHOWN]
        raise PromptError(
            f"{option} {argument[:_SHOWN]!r}: expected SECONDS:TEXT such as '90:a ball', got a text that begins with a "
            f"number; if that is meant, write '{seconds:g}: {text}', or '0:{seconds:g}:{text}' for the start"
        )
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
            another = f'--prompt "10:{later.label}"' if later.file is None else f'--prompt-embeds "10:{later.file}"'
            raise PromptError(
                f"two prompts begin at {later.seconds:g} s: {earlier.label!r} and {later.label!r}; "
                f"give one another time, such as {another}"
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
    """Number of the first block at ``seconds`` or later of a recording that leaves out the first ``hidden`` frames."""
    frames_per_block = runtime.config.window.frames_per_block

    def first_frame(block: int) -> int:
        return runtime.vae_config.video_frames(block * frames_per_block)

    frame = hidden + math.ceil(min(seconds * runtime.fps, _NEVER))
    # Every block has at least one frame, so block number `frame` is late enough.
    return bisect_left(range(frame), frame, key=first_frame)


class Request:
    """The arguments, checked as far as that is possible without the model."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.script = parse_script(arguments.prompt, arguments.prompt_embeds)
        self.options = options_of(RuntimeOptions, arguments)
        if arguments.frames is not None and arguments.seconds is not None:
            raise ConfigError("--frames and --seconds: expected one of them, got both")
        for name, given in (("--fit", arguments.fit), ("--only-new", arguments.only_new or None)):
            require(name, given, "--from FILE", arguments.initial)
        self.embeds_files: list[Path] = []  # one for each prompt, or none
        if (file := arguments.save_prompt_embeds) is not None:
            several = len(self.script) > 1 and file.suffix  # without a suffix it is refused as it is
            numbered = (file.with_name(f"{file.stem}.{i}{file.suffix}") for i in range(len(self.script)))
            self.embeds_files = list(numbered) if several else [file]
        find_codec(**self.encoding)
        self.output = self._output()
        self._check_outputs()

    def _output(self) -> Path:
        """Return the place of the video; checks that the options about it fit together."""
        arguments = self.arguments
        output: Path | None = arguments.resume if arguments.output is None else arguments.output
        if output is None:
            raise ConfigError("expected -o OUT.mp4 (or --resume DIR), got neither (see echo-rt generate --help)")
        if arguments.resume is not None and os.path.realpath(output) != os.path.realpath(arguments.resume):
            raise ConfigError(
                f"--resume and -o: expected one folder, got {str(arguments.resume)!r} and {str(output)!r}"
            )
        if arguments.segments is None:
            for option, given in (("--resume", arguments.resume), ("--snapshot-every", arguments.snapshot_every)):
                require(option, given, "--segments S", None, " (a single file cannot be resumed)")
            if arguments.latents == BESIDE_SEGMENTS:
                raise ConfigError("--latents: expected FILE.safetensors, which only --segments can do without")
        elif arguments.fragmented:
            raise ConfigError("--fragmented: expected no --segments with it: every segment is fragmented")
        elif arguments.contact_sheet is not None:
            raise ConfigError("--contact-sheet: expected no --segments with it: it needs the whole video in one run")
        elif arguments.latents not in (None, BESIDE_SEGMENTS):
            raise ConfigError(
                f"--latents: expected no file with --segments, whose folder they go to, got {str(arguments.latents)!r}"
            )
        elif output.suffix.lower() == ".mp4":
            raise ConfigError(f"--output: expected the name of a folder with --segments, got {str(output)!r}")
        return output

    def _check_outputs(self) -> None:
        arguments = self.arguments
        whole = arguments.segments is None
        read = model_files(arguments)
        read += [Named("--prompt-embeds", Path(prompt.file)) for prompt in self.script if prompt.file is not None]
        read += [] if arguments.initial is None else [Named("--from", arguments.initial)]
        outputs = [
            ("--output", self.output if whole else None, ".mp4"),
            ("--latents", arguments.latents if whole else None, ".safetensors"),
            ("--contact-sheet", arguments.contact_sheet, ".png"),
            *(("--save-prompt-embeds", file, ".safetensors") for file in self.embeds_files),
        ]
        named = [(Named(option, path), suffix) for option, path, suffix in outputs if path is not None]
        check_outputs(named, read, overwrite=arguments.overwrite)
        if arguments.evidence is not None:
            check_folder(Named("--evidence", arguments.evidence), read)
        if not whole:
            check_folder(Named("--resume" if arguments.resume is not None else "--output", self.output), read)
            if (self.output / MANIFEST_FILE).exists():
                raise TargetError(
                    f"{self.output}: expected a folder for a recording, got that of a soak: {MANIFEST_FILE} is in it"
                )

    @property
    def keeps_latents(self) -> bool:
        """Whether the latents go into the segments' folder."""
        return bool(self.arguments.latents == BESIDE_SEGMENTS)

    @property
    def encoding(self) -> dict[str, Any]:
        """Keywords of the writers of video."""
        return {name: getattr(self.arguments, name) for name in ("codec", "preset", "crf")}

    def frame_limit(self, fps: float) -> int | None:
        """Frames of the video, None for no end."""
        seconds: float | None = self.arguments.seconds
        frames: int | None = self.arguments.frames
        return frames if seconds is None else max(1, round(seconds * fps))
