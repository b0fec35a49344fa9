"""``echo-rt generate``: prompts to a video file, block by block."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.cli.messages import describe, warn
from echo_rt.cli.numbers import parse_length, parse_number, parse_size
from echo_rt.cli.outputs import Named, check_outputs
from echo_rt.cli.progress import ProgressReport
from echo_rt.cli.prompts import TimedPrompt, parse_script
from echo_rt.cli.signals import StopNow, StopRequest
from echo_rt.cli.streams import say
from echo_rt.errors import ConfigError, OutputError, PromptError
from echo_rt.options import DTYPE_NAMES, OVERRIDES, MemoryMode, check_seed

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.cli.recorder import Recorder
    from echo_rt.runtime import Runtime

_EPILOG = """
A prompt that begins with a number and a colon takes over at that second of the video, at the first block from there:
  echo-rt generate --model DIR --prompt "a red fox in the snow" --prompt "10:the fox dives into a lake" -o fox.mp4
Without --frames and --seconds the video goes on until Ctrl-C or SIGTERM; what was made up to then is in the file.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="make a video from prompts",
        description="Make a video from one or more prompts and write it to an MP4 while it is made.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, required=True, metavar="DIR", help="Wan2.1 folder, original or diffusers")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="generator weights, with or without a memory")
    model.add_argument("--lora", type=Path, metavar="FILE", help="LoRA to merge into the generator")
    model.add_argument("--ema", action=argparse.BooleanOptionalAction, help="use (or not) the averaged weights")
    model.add_argument(
        "--memory",
        choices=[mode.value for mode in MemoryMode],
        help="the memory's mode; default: evolve where the weights have a memory",
    )
    model.add_argument("--dtype", choices=DTYPE_NAMES, help="default: bfloat16 on a GPU, else float32")
    model.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    model.add_argument("--backend", help="who does the operations: torch (see echo-rt doctor)")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", action="append", default=[], metavar="[T:]TEXT", help="from second T (default 0) on"
    )
    prompt.add_argument(
        "--prompt-embeds", action="append", default=[], metavar="[T:]FILE", help="saved embeddings instead of text"
    )
    prompt.add_argument(
        "--save-prompt-embeds",
        type=Path,
        metavar="FILE",
        help="keep the embeddings (safetensors); of several prompts as FILE with .0, .1, ... before the ending",
    )
    prompt.add_argument("--keep-text-encoder", action="store_true", help="leave the text encoder in memory")

    video = parser.add_argument_group("video")
    video.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4", help="the video")
    length = video.add_mutually_exclusive_group()
    length.add_argument("--frames", metavar="N", help="end after N frames")
    length.add_argument("--seconds", metavar="S", help="end after S seconds of video")
    video.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels, such as 832x480")
    video.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another fact of the rollout: {', '.join(OVERRIDES)} (a list as 1000,500)",
    )
    video.add_argument("--seed", default="0", metavar="N", help="same seed, same video (default 0)")
    video.add_argument("--latents", type=Path, metavar="FILE.safetensors", help="also write the latents, whole blocks")
    video.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also write an overview picture")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    return parser


class Request:
    """The arguments, checked as far as that is possible without the model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.script = parse_script(arguments.prompt, arguments.prompt_embeds)
        self.seed = check_seed(parse_number("--seed", arguments.seed, int, "an integer of 0 or more"))
        self.frames: int | None = parse_length("--frames", arguments.frames, int, "a number of frames of 1 or more")
        self.seconds: float | None = parse_length("--seconds", arguments.seconds, float, "a number of seconds above 0")
        self.width, self.height = parse_size(arguments.size)
        self.overrides = self._overrides(arguments.set)
        self.embeds_files = self._embeds_files(arguments.save_prompt_embeds)
        self._check_outputs()

    @staticmethod
    def _overrides(texts: list[str]) -> dict[str, Any]:
        overrides: dict[str, Any] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if name not in OVERRIDES or not equals:
                raise ConfigError(f"--set: expected NAME=VALUE with a NAME of {', '.join(OVERRIDES)}; got {text!r}")
            try:
                parsed = json.loads(f"[{value}]" if "," in value else value)
            except ValueError:
                raise ConfigError(f"--set: expected a number, a list of numbers, true or false; got {text!r}") from None
            # One step is a list of one.
            overrides[name] = [parsed] if name == "denoising_steps" and not isinstance(parsed, list) else parsed
        return overrides

    def _embeds_files(self, file: Path | None) -> list[Path]:
        """A file for each prompt, or none at all."""
        if file is None:
            return []
        if len(self.script) == 1:
            return [file]
        return [file.with_name(f"{file.stem}.{i}{file.suffix}") for i in range(len(self.script))]

    def _check_outputs(self) -> None:
        arguments = self.arguments
        outputs = [
            ("--output", arguments.output, ".mp4"),
            ("--latents", arguments.latents, ".safetensors"),
            ("--contact-sheet", arguments.contact_sheet, ".png"),
            *(("--save-prompt-embeds", file, ".safetensors") for file in self.embeds_files),
        ]
        inputs = [
            ("--model", arguments.model),
            ("--checkpoint", arguments.checkpoint),
            ("--lora", arguments.lora),
            *(("--prompt-embeds", Path(prompt.file)) for prompt in self.script if prompt.file is not None),
        ]
        check_outputs(
            [(Named(option, path), suffix) for option, path, suffix in outputs if path is not None],
            [Named(option, path) for option, path in inputs if path is not None],
        )

    def frame_limit(self, fps: float) -> int | None:
        """Frames of the video, None for no end."""
        return self.frames if self.seconds is None else max(1, round(self.seconds * fps))


def _load(request: Request) -> Runtime:
    from echo_rt.runtime import Runtime

    arguments = request.arguments
    return Runtime.from_pretrained(
        arguments.model,
        checkpoint=arguments.checkpoint,
        lora=arguments.lora,
        ema=arguments.ema,
        device=arguments.device,
        dtype=arguments.dtype,
        memory=arguments.memory,
        backend=arguments.backend,
        width=request.width,
        height=request.height,
        keep_text_encoder=arguments.keep_text_encoder,
        overrides=request.overrides,
    )


def _read_embeds(script: list[TimedPrompt]) -> dict[str, Tensor]:
    """The embeddings files of the script, read before the model, so that a bad one is found in no time."""
    files = [prompt.file for prompt in script if prompt.file is not None]
    if not files:
        return {}
    from echo_rt.prompts import load_prompt_embeds

    return {file: load_prompt_embeds(file)[0] for file in files}


def _embed_prompts(runtime: Runtime, request: Request, from_files: dict[str, Tensor]) -> list[Tensor]:
    """Embeddings of all prompts, before the stream begins: a bad one fails now, and the text encoder can go."""
    from echo_rt.prompts import check_prompt_embeds, save_prompt_embeds

    transformer = runtime.config.transformer
    for file, tensor in from_files.items():
        try:
            check_prompt_embeds(tensor, transformer.text_dim, transformer.text_len)
        except PromptError as error:
            raise PromptError(f"{file}: {error}") from None
    texts = [prompt.text for prompt in request.script if prompt.text is not None]
    encoded = iter(runtime.encode_prompts(texts) if texts else [])
    embeds = [next(encoded) if prompt.file is None else from_files[prompt.file] for prompt in request.script]
    if request.embeds_files:
        for target, prompt, tensor in zip(request.embeds_files, request.script, embeds, strict=True):
            save_prompt_embeds(target, tensor, prompt.text)
    return embeds


class _Generation:
    """One run over a stream: switches prompts when it is their time, records blocks, reports."""

    def __init__(
        self, runtime: Runtime, request: Request, embeds: list[Tensor], recorder: Recorder, progress: ProgressReport
    ) -> None:
        self._runtime, self._request = runtime, request
        self._recorder, self._progress = recorder, progress
        self._pending = list(zip(request.script, embeds, strict=True))
        self.shown: list[dict[str, Any]] = []

    def run(self, stop: StopRequest) -> None:
        """Make blocks until the video has its length or ``stop`` has a request."""
        prompt, embeds = self._pending.pop(0)
        self._note(prompt, 0)
        with self._runtime.stream(prompt_embeds=embeds, seed=self._request.seed) as stream:
            while not self._recorder.full and stop.request is None:
                due = self._due(stream.video_frames)
                if due is not None:
                    prompt, embeds = due
                    stream.set_prompt(prompt_embeds=embeds)
                    self._note(prompt, stream.video_frames)
                with stop.after_block():
                    chunk = next(stream)
                before = self._recorder.frames
                self._recorder.write(chunk)
                self._progress.block_done(self._recorder.frames - before, prompt.label)

    def _due(self, frame: int) -> tuple[TimedPrompt, Tensor] | None:
        """The prompt to switch to at a block that begins with ``frame``; of several due ones the last."""
        due = None
        while self._pending and self._pending[0][0].seconds * self._runtime.fps <= frame:
            due = self._pending.pop(0)
        return due

    def _note(self, prompt: TimedPrompt, frame: int) -> None:
        what = {"text": prompt.text} if prompt.file is None else {"file": prompt.file}
        self.shown.append({"frame": frame, "seconds": frame / self._runtime.fps, **what})


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Check, load, generate, finish the files; 0, or the exit code of the signal that ended it."""
    request = Request(arguments)
    with stop.interruptible():
        from_files = _read_embeds(request.script)
        runtime = _load(request)
    try:
        with stop.interruptible():
            embeds = _embed_prompts(runtime, request, from_files)
        return _record(runtime, request, embeds, stop, report)
    finally:
        runtime.close()


def _record(runtime: Runtime, request: Request, embeds: list[Tensor], stop: StopRequest, report: dict[str, Any]) -> int:
    from echo_rt.cli.recorder import Recorder

    arguments = request.arguments
    limit = request.frame_limit(runtime.fps)
    for prompt in request.script:
        if limit is not None and prompt.seconds * runtime.fps >= limit:
            end = limit / runtime.fps
            warn(report, f"the prompt at {prompt.seconds:g} s comes after the end of the video at {end:g} s")
    recorder = Recorder(
        arguments.output,
        arguments.latents,
        arguments.contact_sheet,
        frame_size=runtime.frame_size,
        fps=runtime.fps,
        latent_shape=runtime.config.latent_shape,
        frame_limit=limit,
        metadata={"seed": str(request.seed), "prompt": request.script[0].label},
    )
    progress = ProgressReport(limit, runtime.fps, quiet=arguments.quiet)
    generation = _Generation(runtime, request, embeds, recorder, progress)
    problem: BaseException | None = None
    try:
        generation.run(stop)
    except StopNow:
        pass  # stop.request says so as well
    except BaseException as error:  # raised again below, when the files are safe
        problem = error
    elapsed = max(progress.elapsed, 1e-9)
    progress.close()
    closing = recorder.close()
    if problem is None and closing:
        problem = closing.pop(0)
    for further in closing:
        warn(report, describe(further)[0])

    stopped = None if recorder.full else stop.request
    report.update(recorder.report())
    report.update(
        blocks=progress.blocks,
        fps=round(progress.frames / elapsed, 3),
        elapsed=round(elapsed, 3),
        prompts=generation.shown,
        seed=request.seed,
        memory=runtime.memory.value,
        exit_reason="error" if problem else stopped.reason if stopped else "complete",
    )
    if not arguments.quiet and not arguments.json:
        try:
            say(_summary(report))
        except (OutputError, BrokenPipeError) as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return stopped.exit_code if stopped else 0


def _summary(report: dict[str, Any]) -> str:
    if "video" not in report["files"]:
        return "no video was written" if report["blocks"] else "no frame was made; no video was written"
    width, height = report["size"]
    return (
        f"{report['files']['video']}: {report['frames']} frames, {report['seconds']:.1f} s of {width}x{height} "
        f"at {report['video_fps']:g} fps, made at {report['fps']:.1f} fps ({report['exit_reason']})"
    )
