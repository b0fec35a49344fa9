"""``echo-rt generate``: prompts to a video file, block by block."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from echo_rt.cli.generate_request import Request, add_parser
from echo_rt.cli.progress import ProgressReport
from echo_rt.cli.prompts import TimedPrompt, first_block
from echo_rt.cli.signals import StopNow, StopRequest
from echo_rt.cli.stdio import describe, say, warn
from echo_rt.errors import ConfigError, OutputError, PromptError
from echo_rt.utils.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.cli.resumption import Resumption
    from echo_rt.engine.guard import Guard
    from echo_rt.output import Checkpoints, Recorder, SegmentRecorder, VideoFile
    from echo_rt.runtime import Runtime
    from echo_rt.stream import Stream

__all__ = ["add_parser", "run"]


def _load(request: Request, resumption: Resumption | None) -> Runtime:
    from echo_rt.runtime import Runtime

    like = None if resumption is None else resumption.snapshot
    return Runtime.from_pretrained(request.arguments.model, **request.options.arguments(), like=like)


def _read_embeds(script: list[TimedPrompt]) -> dict[str, Tensor]:
    """The embeddings files of the script, read before the model, so that a bad one is found in no time."""
    files = [prompt.file for prompt in script if prompt.file is not None]
    if not files:
        return {}
    from echo_rt.engine.prompts import load_prompt_embeds

    return {file: load_prompt_embeds(file)[0] for file in files}


def _embed_prompts(runtime: Runtime, request: Request, from_files: dict[str, Tensor]) -> list[Tensor]:
    """Embeddings of all prompts, before the stream begins: a bad one fails now, and the text encoder can go."""
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
    if request.embeds_files:
        for target, prompt, tensor in zip(request.embeds_files, request.script, embeds, strict=True):
            save_prompt_embeds(target, tensor, prompt.text)
    return embeds


def _guard(request: Request) -> Guard:
    from echo_rt.engine.guard import ROLL_BACK, STOP, Guard

    arguments = request.arguments
    return Guard(
        policy=ROLL_BACK if arguments.roll_back else STOP,
        evidence=arguments.evidence,
        block_seconds=request.block_seconds,
    )


class _Generation:
    """One run over a stream: says which prompt begins with which block, records blocks, reports.

    ``prompts``: by the blocks that they begin with. ``checkpoints``: where snapshots go, None without them. ``hidden``:
    how many frames at the beginning of the video are not recorded.
    """

    def __init__(
        self,
        stream: Stream,
        prompts: dict[int, tuple[TimedPrompt, Tensor]],
        recorder: Recorder | SegmentRecorder,
        progress: ProgressReport,
        *,
        fps: int,
        checkpoints: Checkpoints | None = None,
        hidden: int = 0,
    ) -> None:
        self._stream, self._prompts, self._fps, self._hidden = stream, prompts, fps, hidden
        self._recorder, self._progress, self._checkpoints = recorder, progress, checkpoints
        self.shown: list[dict[str, Any]] = []
        self.rollbacks = 0

    def run(self, stop: StopRequest) -> None:
        """Make blocks until the video has its length or ``stop`` has a request."""
        with self._stream as stream:
            shown: TimedPrompt | None = None
            while not self._recorder.full and stop.request is None:
                prompt, _ = self._prompts[max(block for block in self._prompts if block <= stream.next_block)]
                if prompt is not shown:
                    shown = prompt
                    self._note(prompt, self._recorded(stream))
                if self._checkpoints is not None:
                    self._checkpoints.before_block(stream)
                with stop.after_block():
                    chunk = next(stream)
                self.rollbacks = stream.rollbacks
                before = self._recorder.frames
                self._recorder.write(chunk)
                self._progress.block_done(self._recorder.frames - before, prompt.label)
            # Not where the video ends amid a block: its other frames would be missing from one that goes on there.
            if self._checkpoints is not None and self._recorder.frames == self._recorded(stream):
                self._checkpoints.after_last_block(stream)

    def _recorded(self, stream: Stream) -> int:
        """How many frames a recording of all that ``stream`` has handed out has."""
        return stream.video_frames - self._hidden

    def _note(self, prompt: TimedPrompt, frame: int) -> None:
        what = {"text": prompt.text} if prompt.file is None else {"file": prompt.file}
        self.shown.append({"frame": frame, "seconds": frame / self._fps, **what})


def _begin(
    runtime: Runtime,
    request: Request,
    prompts: dict[int, tuple[TimedPrompt, Tensor]],
    resumption: Resumption | None,
    initial: VideoFile | None,
    stop: StopRequest,
) -> Stream:
    """The stream, told of every prompt ahead: so each begins with its block, however many are begun ahead."""
    if resumption is not None:
        stream = resumption.begin(runtime, request.script, _guard(request))
        begun = stream.next_prompt_block
    else:
        first = min(prompts)
        stream = _new_stream(runtime, request, prompts[first][1], initial, stop)
        begun = first + 1
    for block, (_, embeds) in prompts.items():
        if block >= begun:
            stream.set_prompt(prompt_embeds=embeds, block=block)
    return stream


def _new_stream(
    runtime: Runtime, request: Request, prompt_embeds: Tensor, initial: VideoFile | None, stop: StopRequest
) -> Stream:
    guard = _guard(request)
    if initial is None:
        return runtime.stream(prompt_embeds=prompt_embeds, seed=request.seed, guard=guard)
    with stop.interruptible():  # encoding a video takes as long as it is long
        return runtime.stream(
            prompt_embeds=prompt_embeds,
            seed=request.seed,
            guard=guard,
            initial_video=initial,
            fit=request.arguments.fit,
            include_initial=not request.arguments.only_new,
        )


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Check, load, generate, finish the files; 0, or the exit code of the signal that ended it."""
    request = Request(arguments)
    with stop.interruptible():
        from echo_rt.output.video import load_av
        from echo_rt.utils.threads import share_cpu

        load_av()  # or it would be missed when the model has been loaded
        resumption = _find_resumption(request, report)
        initial = None if resumption is not None else _read_initial(request)
        from_files = _read_embeds(request.script)
        runtime = _load(request, resumption)
    try:
        with share_cpu(runtime.device):
            with stop.interruptible():
                embeds = _embed_prompts(runtime, request, from_files)
            return _record(runtime, request, embeds, resumption, initial, stop, report)
    finally:
        runtime.close()


def _read_initial(request: Request) -> VideoFile | None:
    """The video or the picture to begin with, looked through before the model is loaded."""
    path = request.arguments.initial
    if path is None:
        return None
    from echo_rt.config import VaeConfig
    from echo_rt.options import MOST_INITIAL_SECONDS
    from echo_rt.output.reader import VideoFile

    return VideoFile(path, most=MOST_INITIAL_SECONDS * VaeConfig.frame_rate)


def _find_resumption(request: Request, report: dict[str, Any]) -> Resumption | None:
    """What to go on from; None for a new video, which must have a place of its own."""
    if request.segment_seconds is None:
        return None
    if request.arguments.resume is None:
        from echo_rt.output.segments import check_free

        check_free(request.output)
        return None
    from echo_rt.cli.resumption import Resumption

    resumption = Resumption.find(request)
    if resumption is None:
        warn(report, f"{request.output}: nothing there to go on from, a new video begins")
    return resumption


def _open_recorder(
    runtime: Runtime,
    request: Request,
    limit: int | None,
    resumption: Resumption | None,
    begun_at: tuple[int, int],
    hidden: int,
) -> tuple[Recorder | SegmentRecorder, Checkpoints | None]:
    """What the video is written to, and where its snapshots go if they are asked for.

    ``begun_at``: the block and the recorded frame that this run goes on from; ``hidden``: frames that are not recorded.
    """
    arguments = request.arguments
    if request.segment_seconds is None:
        from echo_rt.output import Recorder

        recorder = Recorder(
            request.output,
            arguments.latents,
            arguments.contact_sheet,
            frame_size=runtime.frame_size,
            fps=runtime.fps,
            latent_shape=runtime.config.latent_shape,
            frame_limit=limit,
            metadata={"seed": str(request.seed), "prompt": request.script[0].label},
        )
        return recorder, None
    from echo_rt.cli.resumption import notes_of
    from echo_rt.output import Checkpoints, SegmentedWriter, SegmentRecorder

    block, frame = begun_at
    if resumption is None:
        writer = SegmentedWriter(
            request.output,
            *runtime.frame_size,
            runtime.fps,
            seconds=request.segment_seconds,
            latent_shape=runtime.config.latent_shape if request.keeps_latents else None,
            notes=notes_of(request, hidden),
        )
    else:
        recorded = resumption.index.frames
        if limit is not None and recorded > limit:  # what is behind the snapshot is made again, not thrown away
            asked = "--seconds" if request.frames is None else "--frames"
            raise ConfigError(
                f"{asked}: expected a video of {counted(recorded, 'frame')} or more, which are recorded, "
                f"got one of {limit}"
            )
        writer = SegmentedWriter.resume(request.output, frame, seconds=request.segment_seconds)
        writer.notes.update(notes_of(request, hidden))
    try:
        checkpoints = (
            None
            if request.snapshot_every is None
            else Checkpoints(
                request.output, writer, request.snapshot_every, resumed_at=None if resumption is None else block
            )
        )
    except BaseException:
        writer.close()
        raise
    return SegmentRecorder(writer, first_frame=frame, frame_limit=limit), checkpoints


def _record(
    runtime: Runtime,
    request: Request,
    embeds: list[Tensor],
    resumption: Resumption | None,
    initial: VideoFile | None,
    stop: StopRequest,
    report: dict[str, Any],
) -> int:
    arguments = request.arguments
    limit = request.frame_limit(runtime.fps)
    for prompt in request.script:
        if limit is not None and prompt.seconds * runtime.fps >= limit:
            end = limit / runtime.fps
            warn(report, f"the prompt at {prompt.seconds:g} s comes after the end of the video at {end:g} s")
    hidden = 0 if resumption is None else resumption.hidden
    if initial is not None:
        hidden = _note_initial(runtime, request, initial, limit, report)
    # Of several prompts that begin with one block, the last.
    prompts = {
        first_block(prompt.seconds, runtime, hidden): (prompt, tensor)
        for prompt, tensor in zip(request.script, embeds, strict=True)
    }
    stream = _begin(runtime, request, prompts, resumption, initial, stop)
    begun_at = (0, 0) if resumption is None else (stream.next_block, stream.video_frames - hidden)
    recorder, checkpoints = _open_recorder(runtime, request, limit, resumption, begun_at, hidden)
    progress = ProgressReport(limit, runtime.fps, quiet=arguments.quiet, begun_at=begun_at)
    generation = _Generation(
        stream, prompts, recorder, progress, fps=runtime.fps, checkpoints=checkpoints, hidden=hidden
    )
    problem: BaseException | None = None
    try:
        generation.run(stop)
    except StopNow:
        pass  # stop.request says so as well
    except BaseException as error:  # raised again below, when the files are safe
        problem = error
    elapsed = max(progress.elapsed, 1e-9)
    progress.close()
    closing = recorder.close() + ([] if checkpoints is None else checkpoints.close())
    if problem is None and closing:
        problem = closing.pop(0)
    for further in closing:
        warn(report, describe(further)[0])

    stopped = None if recorder.full else stop.request
    report.update(recorder.report())
    if checkpoints is not None:
        report["snapshots"] = checkpoints.report()
    if resumption is not None:
        report["resumed_at_frame"] = begun_at[1]
    if arguments.roll_back:
        report["rollbacks"] = generation.rollbacks
    report.update(
        blocks=progress.blocks,
        fps=round(progress.frames / elapsed, 3),
        elapsed=round(elapsed, 3),
        prompts=generation.shown,
        seed=request.seed,
        memory=runtime.memory.value,
        backend=runtime.backend,
        backend_reason=runtime.backend_reason,
        **runtime.taken.as_json(),
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


def _note_initial(
    runtime: Runtime, request: Request, initial: VideoFile, limit: int | None, report: dict[str, Any]
) -> int:
    """Report on what the video begins with; how many frames of it are not recorded."""
    report["from"] = {"file": str(initial.path), "frames": initial.frames, "fps": initial.fps}
    if initial.fps is not None and round(initial.fps, 3) != runtime.fps:
        warn(
            report,
            f"{initial.path} has {initial.fps:.4g} frames a second and the video {runtime.fps}: every frame is taken, "
            f"so what moves is {runtime.fps / initial.fps:.3g} times as fast",
        )
    if request.arguments.only_new:
        return initial.frames
    if limit is not None and limit <= initial.frames:
        warn(report, f"the video ends within the {counted(initial.frames, 'frame')} of {initial.path}: none are new")
    return 0


def _summary(report: dict[str, Any]) -> str:
    if "video" not in report["files"]:
        return "no video was written" if report["blocks"] else "no frame was made; no video was written"
    width, height = report["size"]
    frames = counted(report["frames"], "frame")
    return (
        f"{report['files']['video']}: {frames}, {report['seconds']:.1f} s of {width}x{height} "
        f"at {report['video_fps']:g} fps, made at {report['fps']:.1f} fps ({report['exit_reason']})"
    )
