"""``echo-rt generate``: prompts to a video file, block by block."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echo_rt.cli.arguments import Arguments
from echo_rt.cli.generate_request import DESCRIPTION, EPILOG, OPTIONS, Request
from echo_rt.cli.progress import ProgressReport
from echo_rt.cli.prompts import TimedPrompt, first_block
from echo_rt.cli.signals import StopNow, StopRequest
from echo_rt.cli.stdio import describe, say, warn
from echo_rt.errors import ConfigError, OutputError, PromptError
from echo_rt.utils.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.cli.resumption import Resumption
    from echo_rt.output import Checkpoints, Recorder, SegmentedWriter, SegmentRecorder, VideoFile
    from echo_rt.runtime import Runtime
    from echo_rt.stream import Stream

__all__ = ["DESCRIPTION", "EPILOG", "OPTIONS", "run"]

_Prompts = dict[int, tuple[TimedPrompt, "Tensor"]]  # by the block that each begins with


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Check, load, generate, finish the files; 0, or the exit code of the signal that ended it."""
    request = Request(arguments)
    with stop.interruptible():
        from echo_rt.config import VaeConfig
        from echo_rt.engine.prompts import load_prompt_embeds
        from echo_rt.options import MOST_INITIAL_SECONDS
        from echo_rt.output.reader import VideoFile
        from echo_rt.output.video import check_encoding
        from echo_rt.runtime import Runtime
        from echo_rt.utils.threads import share_cpu

        check_encoding(**request.encoding)  # a missing PyAV fails before the model is loaded
        resumption = _find_resumption(request, report)
        initial = None
        if resumption is None and arguments.initial is not None:
            initial = VideoFile(arguments.initial, most=MOST_INITIAL_SECONDS * VaeConfig.frame_rate)
        from_files = {one.file: load_prompt_embeds(one.file)[0] for one in request.script if one.file is not None}
        runtime = Runtime.from_pretrained(
            arguments.model, **request.options.arguments(), like=None if resumption is None else resumption.snapshot
        )
    with closing(runtime), share_cpu(runtime.device):
        with stop.interruptible():
            embeds = _embed_prompts(runtime, request, from_files)
        return _Generation(runtime, request, resumption, initial, report).run(embeds, stop)


def _find_resumption(request: Request, report: dict[str, Any]) -> Resumption | None:
    """What to resume; None for a new video, whose folder must be free."""
    from echo_rt.cli.resumption import Resumption
    from echo_rt.output.segments import check_free

    if request.arguments.segments is None:
        return None
    if request.arguments.resume is None:
        check_free(request.output)
        return None
    resumption = Resumption.find(request)
    if resumption is None:
        warn(report, f"{request.output}: nothing to resume there, a new video begins")
    return resumption


def _embed_prompts(runtime: Runtime, request: Request, from_files: dict[str, Tensor]) -> list[Tensor]:
    """Embed all prompts before the stream begins: a bad one fails now, and the text encoder can be freed."""
    from echo_rt.engine.prompts import check_prompt_embeds, save_prompt_embeds

    transformer = runtime.config.transformer
    for file, tensor in from_files.items():
        try:
            check_prompt_embeds(tensor, transformer.text_dim, transformer.text_len)
        except PromptError as error:
            raise PromptError(f"{file}: {error}") from None
    texts = [prompt.text for prompt in request.script if prompt.text is not None]
    encoded = iter(runtime.encode_prompts(texts) if texts else [])
    embeds = [next(encoded) if prompt.file is None else from_files[prompt.file] for prompt in request.script]
    for target, prompt, tensor in zip(request.embeds_files, request.script, embeds, strict=False):
        save_prompt_embeds(target, tensor, prompt.text)
    return embeds


@dataclass
class _Generation:
    """One video of a loaded model: begins the stream, records its blocks, closes the files, fills ``report``."""

    _runtime: Runtime
    _request: Request
    _resumption: Resumption | None
    _initial: VideoFile | None
    _report: dict[str, Any]

    def __post_init__(self) -> None:
        self._arguments = self._request.arguments
        self._limit = self._request.frame_limit(self._runtime.fps)
        self._shown: list[dict[str, Any]] = []
        self._prompt: TimedPrompt | None = None
        # Frames at the beginning of the stream that are not recorded.
        self._hidden = 0 if self._resumption is None else self._resumption.notes.hidden_frames
        if self._initial is not None and self._arguments.only_new:
            self._hidden = self._initial.frames

    def run(self, embeds: list[Tensor], stop: StopRequest) -> int:
        """Make the video with the ``embeds`` of the script's prompts; return the exit code."""
        self._warn()
        # If several prompts begin with one block, the last one counts.
        prompts = {
            first_block(prompt.seconds, self._runtime, self._hidden): (prompt, tensor)
            for prompt, tensor in zip(self._request.script, embeds, strict=True)
        }
        stream = self._begin(prompts, stop)
        begun_at = (0, 0) if self._resumption is None else (stream.next_block, self._recorded(stream))
        recorder, checkpoints = self._open_recorder(*begun_at)
        progress = ProgressReport(self._limit, self._runtime.fps, quiet=self._arguments.quiet, begun_at=begun_at)
        problem: BaseException | None = None
        try:
            with stream:  # until the video has its length, or a stop is requested
                while not recorder.full and stop.request is None:
                    prompt, _ = prompts[max(block for block in prompts if block <= stream.next_block)]
                    self._note(prompt, self._recorded(stream))
                    if checkpoints is not None:
                        checkpoints.before_block(stream)
                    with stop.after_block():
                        chunk = next(stream)
                    before = recorder.frames
                    recorder.write(chunk, prompt.label if prompt.text is None else prompt.text)
                    progress.block_done(recorder.frames - before, prompt.label)
                # Not if the video ends amid a block: one that resumes there would lack the block's other frames.
                if checkpoints is not None and recorder.frames == self._recorded(stream):
                    checkpoints.after_last_block(stream)
        except StopNow:
            pass  # stop.request says so as well
        except BaseException as error:  # raised again below, when the files are safe
            problem = error
        elapsed = max(progress.elapsed, 1e-9)
        progress.close()
        errors = recorder.close() + ([] if checkpoints is None else checkpoints.close())
        if problem is None and errors:
            problem = errors.pop(0)
        for further in errors:
            warn(self._report, describe(further)[0])
        stopped = None if recorder.full else stop.request
        if recorder.held_up > max(1, elapsed / 20):
            how = f"{elapsed:.0f} s; a faster --preset or another --codec takes less"
            warn(self._report, f"encoding the video held up its blocks for {recorder.held_up:.1f} of {how}")
        self._report |= recorder.report() | ({} if checkpoints is None else {"snapshots": checkpoints.report()})
        self._report |= {} if self._resumption is None else {"resumed_at_frame": begun_at[1]}
        self._report |= {"rollbacks": stream.rollbacks} if self._arguments.roll_back else {}
        self._report.update(
            blocks=progress.blocks,
            fps=round(progress.frames / elapsed, 3),
            elapsed=round(elapsed, 3),
            prompts=self._shown,
            seed=self._arguments.seed,
            memory=self._runtime.memory.value,
            backend=self._runtime.backend,
            backend_reason=self._runtime.backend_reason,
            **self._runtime.taken.as_json(),
            exit_reason="error" if problem else stopped.reason if stopped else "complete",
        )
        if not self._arguments.quiet and not self._arguments.json:
            try:
                say(_summary(self._report))
            except (OutputError, BrokenPipeError) as error:
                problem = problem or error
        if problem is not None:
            raise problem
        return stopped.exit_code if stopped else 0

    def _warn(self) -> None:
        """Warn of a request that is possible, but hardly meant; report the file that the video begins with."""
        fps, limit, initial = self._runtime.fps, self._limit, self._initial
        for prompt in self._request.script:
            if limit is not None and prompt.seconds * fps >= limit:
                end = f"the end of the video at {limit / fps:g} s"
                warn(self._report, f"the prompt at {prompt.seconds:g} s comes after {end}")
        if initial is None:
            return
        self._report["from"] = {"file": str(initial.path), "frames": initial.frames, "fps": initial.fps}
        if initial.fps is not None and round(initial.fps, 3) != fps:
            taken = f"every frame is taken, so motion is {fps / initial.fps:.3g} times as fast"
            warn(self._report, f"{initial.path} has {initial.fps:.4g} frames a second and the video {fps}: {taken}")
        if not self._arguments.only_new and limit is not None and limit <= initial.frames:
            frames = counted(initial.frames, "frame")
            warn(self._report, f"the video ends within the {frames} of {initial.path}: none are new")

    def _begin(self, prompts: _Prompts, stop: StopRequest) -> Stream:
        """Begin or resume the stream, and announce all prompts: each begins with its block at any lookahead."""
        from echo_rt.engine.guard import ROLL_BACK, STOP, Guard

        arguments, initial = self._arguments, self._initial
        policy = ROLL_BACK if arguments.roll_back else STOP
        guard = Guard(policy=policy, evidence=arguments.evidence, block_seconds=arguments.block_seconds)
        if self._resumption is not None:
            stream = self._resumption.begin(self._runtime, self._request.script, guard)
            begun = stream.next_prompt_block
        else:
            first = min(prompts)
            begun = first + 1
            options: dict[str, Any] = {"prompt_embeds": prompts[first][1], "seed": arguments.seed, "guard": guard}
            if initial is not None:
                options |= {"initial_video": initial, "fit": arguments.fit, "include_initial": not arguments.only_new}
            # Encoding a long initial video takes long.
            with nullcontext() if initial is None else stop.interruptible():
                stream = self._runtime.stream(**options)
        for block, (_, embeds) in prompts.items():
            if block >= begun:
                stream.set_prompt(prompt_embeds=embeds, block=block)
        return stream

    def _open_recorder(self, block: int, frame: int) -> tuple[Recorder | SegmentRecorder, Checkpoints | None]:
        """Open the video from ``block`` and recorded ``frame`` on, and the place of its snapshots if it has any."""
        from echo_rt import output

        request, arguments, runtime = self._request, self._arguments, self._runtime
        if arguments.segments is None:
            recorder = output.Recorder(
                request.output,
                arguments.latents,
                arguments.contact_sheet,
                frame_size=runtime.frame_size,
                fps=runtime.fps,
                latent_shape=runtime.config.latent_shape,
                frame_limit=self._limit,
                metadata={"seed": str(arguments.seed), "prompt": request.script[0].label},
                fragmented=arguments.fragmented,
                **request.encoding,
            )
            return recorder, None
        segments = output.SegmentRecorder(self._open_segments(frame), first_frame=frame, frame_limit=self._limit)
        if arguments.snapshot_every is None:
            return segments, None
        resumed_at = None if self._resumption is None else block
        try:
            return segments, output.Checkpoints(
                request.output, segments, arguments.snapshot_every, resumed_at=resumed_at
            )
        except BaseException:
            segments.close()
            raise

    def _open_segments(self, frame: int) -> SegmentedWriter:
        from echo_rt.cli.resumption import notes_of
        from echo_rt.output import SegmentedWriter

        request, arguments, runtime = self._request, self._arguments, self._runtime
        notes, seconds = notes_of(request, self._hidden), arguments.segments
        if self._resumption is None:
            latent_shape = runtime.config.latent_shape if request.keeps_latents else None
            width, height = runtime.frame_size
            kept = {"seconds": seconds, "latent_shape": latent_shape, "notes": notes, **request.encoding}
            return SegmentedWriter(request.output, width, height, runtime.fps, **kept)
        recorded = self._resumption.index.frames
        if self._limit is not None and recorded > self._limit:  # frames after the snapshot are made again, not dropped
            asked = "--seconds" if arguments.frames is None else "--frames"
            expected = f"expected a video of {counted(recorded, 'frame')} or more, which are recorded"
            raise ConfigError(f"{asked}: {expected}, got one of {self._limit}")
        writer = SegmentedWriter.resume(request.output, frame, seconds=seconds, **request.encoding)
        writer.notes.update(notes)
        return writer

    def _recorded(self, stream: Stream) -> int:
        """Number of frames in a recording of everything that ``stream`` has delivered."""
        return stream.video_frames - self._hidden

    def _note(self, prompt: TimedPrompt, frame: int) -> None:
        """Note for the report that ``prompt`` is shown from ``frame`` on."""
        if prompt is not self._prompt:
            self._prompt = prompt
            what = {"text": prompt.text} if prompt.file is None else {"file": prompt.file}
            self._shown.append({"frame": frame, "seconds": frame / self._runtime.fps, **what})


def _summary(report: dict[str, Any]) -> str:
    if "video" not in report["files"]:
        return "no video was written" if report["blocks"] else "no frame was made; no video was written"
    width, height = report["size"]
    frames = counted(report["frames"], "frame")
    return (
        f"{report['files']['video']}: {frames}, {report['seconds']:.1f} s of {width}x{height} "
        f"at {report['video_fps']:g} fps, made at {report['fps']:.1f} fps ({report['exit_reason']})"
    )
