"""The work of ``echo-rt generate``: load, or find what ``--resume`` continues; generate; finish the files."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing, nullcontext
from fractions import Fraction
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import Tensor

from echo_rt.cli.progress import ProgressReport
from echo_rt.cli.request import Request, TimedPrompt, first_block
from echo_rt.cli.stdio import describe, say, warn
from echo_rt.config import VaeConfig
from echo_rt.engine.guard import ROLL_BACK, STOP, Guard
from echo_rt.engine.initial_video import check_whole_blocks
from echo_rt.engine.prompts import check_prompt_embeds, load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import ConfigError, EchoError, OutputError, PromptError, TargetError
from echo_rt.options import MOST_INITIAL_SECONDS, is_whole
from echo_rt.output import Checkpoints, Recorder, SegmentedWriter, SegmentRecorder, VideoFile
from echo_rt.output.recorder import SNAPSHOT_FOLDER
from echo_rt.output.segments import INDEX_FILE, RecordingIndex, check_free
from echo_rt.output.video import check_encoding
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import latest_snapshot, require_seed
from echo_rt.stream import Stream
from echo_rt.utils.checked_json import convert
from echo_rt.utils.signals import StopNow, StopRequest
from echo_rt.utils.threads import share_cpu
from echo_rt.utils.wording import counted, one_line
from echo_rt.weights.choice import choose_recipe
from echo_rt.weights.folder import ModelFolder


class Notes(msgspec.Struct, omit_defaults=True, rename={"initial": "from"}):
    """What the index notes about the request: its script, seed, ``--from``, and frames of it that are not recorded."""

    script: list[TimedPrompt] = msgspec.field(default_factory=list)
    seed: int | None = None
    initial: str | None = None
    hidden_frames: Annotated[int, Meta(ge=0, lt=2**53)] = 0


class Generation:
    """Makes the video that is asked for: loads the model, begins the stream, records it, fills ``report``."""

    def __init__(self, request: Request, report: dict[str, Any], stop: StopRequest) -> None:
        self._request, self._arguments, self._report, self._stop = request, request.arguments, report, stop
        self._initial: VideoFile | None = None
        initial = None if request.arguments.initial is None else str(request.arguments.initial)
        self._notes = Notes(request.script, request.arguments.seed, initial)
        # What is resumed: the recording, and its snapshot until that is used up.
        self._index: RecordingIndex | None = None
        self._snapshot: Snapshot | None = None

    def run(self) -> int:
        """Return 0, or the exit code of the signal that ended it."""
        request, arguments = self._request, self._arguments
        with self._stop.interruptible():
            check_encoding(**request.encoding)  # a missing PyAV fails before the model is loaded
            if arguments.resume is not None:
                self._find_recording()
            elif arguments.segments is not None:
                check_free(request.output)
            if self._index is None and arguments.initial is not None:
                self._initial = VideoFile(arguments.initial, most=MOST_INITIAL_SECONDS * VaeConfig.frame_rate)
                _check_initial(request, self._initial.frames)
                self._notes.hidden_frames = self._initial.frames if arguments.only_new else 0
            from_files = {one.file: load_prompt_embeds(one.file)[0] for one in request.script if one.file is not None}
            options = request.options.arguments() | {"like": self._snapshot}
            self._runtime = Runtime.from_pretrained(arguments.model, **options)
        del options  # gigabytes
        self._limit = request.frame_limit(self._runtime.fps)
        with closing(self._runtime), share_cpu(self._runtime.device):
            with self._stop.interruptible():
                embeds = self._embed_prompts(from_files)
            return self._record(embeds)

    def _find_recording(self) -> None:
        """Find what ``--resume`` continues, and check it against the request; nothing where no video has begun.

        ``TargetError`` for an absent folder, unless ``-o`` names it as well (a command that is started again and again
        gives both), and for a recording without a snapshot; ``SnapshotError`` where none can be used; ``ConfigError``
        for a request that contradicts the recording. All of it before the model is loaded.
        """
        folder = self._request.output
        if self._arguments.output is None and not folder.exists():
            advice = "to begin a new video there, name it with -o too"
            raise TargetError(f"--resume: {folder}: expected the folder of a video, but it does not exist; {advice}")
        found = latest_snapshot(folder / SNAPSHOT_FOLDER)
        if found is None:
            check_free(
                folder,
                expected=f"{SNAPSHOT_FOLDER} to resume from (--snapshot-every makes them)",
                advice="that stays as it is; begin the same video again in another folder (-o)",
            )
            if (folder / INDEX_FILE).exists():  # of a process that was killed before its first segment
                self._noted(RecordingIndex.read(folder))
            warn(self._report, f"{folder}: nothing to resume there, a new video begins")
            return
        file, self._snapshot = found
        self._index = RecordingIndex.read(folder)
        self._index.notes.setdefault("seed", self._snapshot.seed)  # what is noted counts: a rollback changes this one
        self._notes = self._noted(self._index)
        require_seed(file, self._snapshot, self._arguments.seed)

    def _noted(self, index: RecordingIndex) -> Notes:
        """Return what is noted; raise :class:`ConfigError` for a request of another video or recording of it."""
        request, arguments, initial = self._request, self._arguments, self._arguments.initial
        notes = convert(index.notes, Notes, f"{request.output / INDEX_FILE}: the notes are damaged", TargetError)
        if notes.seed not in (None, arguments.seed):
            raise ConfigError(f"--seed: the video was begun with {notes.seed}, got {arguments.seed}")
        # A resumed video needs no --from; if it is given, it must be the same.
        if initial is not None and notes.initial != str(initial):
            with_what = "none" if notes.initial is None else repr(notes.initial)
            raise ConfigError(f"--from: the video was begun with {with_what}, got {str(initial)!r}")
        if initial is not None and arguments.only_new != bool(notes.hidden_frames):
            raise ConfigError("--only-new: expected what the video was begun with, got the opposite")
        if request.keeps_latents != (index.latent_shape is not None):
            raise ConfigError(f"--latents: the recording has {'none' if request.keeps_latents else 'some'} so far")
        return notes

    def _embed_prompts(self, from_files: dict[str, Tensor]) -> list[Tensor]:
        """Embed all prompts before the stream begins: a bad one fails now, and the text encoder can be freed."""
        script, transformer = self._request.script, self._runtime.config.transformer
        for file, tensor in from_files.items():
            try:
                check_prompt_embeds(tensor, transformer.text_dim, transformer.text_len)
            except PromptError as error:
                raise PromptError(f"{file}: {error}") from None
        texts = [prompt.text for prompt in script if prompt.text is not None]
        encoded = iter(self._runtime.encode_prompts(texts) if texts else [])
        embeds = [next(encoded) if prompt.file is None else from_files[prompt.file] for prompt in script]
        for target, prompt, tensor in zip(self._request.embeds_files, script, embeds, strict=False):
            save_prompt_embeds(target, tensor, prompt.text)
        return embeds

    def _record(self, embeds: list[Tensor]) -> int:
        """Make the video with the ``embeds`` of the script's prompts; return the exit code."""
        stop = self._stop
        # If several prompts begin with one block, the last one counts.
        prompts = {
            first_block(prompt.seconds, self._runtime, self._notes.hidden_frames): (prompt, tensor)
            for prompt, tensor in zip(self._request.script, embeds, strict=True)
        }
        stream = self._begin(prompts)
        self._warn()  # not before: of a request that is refused there is one message
        begun_at = (0, 0) if self._index is None else (stream.next_block, self._recorded(stream))
        recorder, checkpoints = self._open_recorder(*begun_at)
        progress = ProgressReport(self._limit, self._runtime.fps, quiet=self._arguments.quiet, begun_at=begun_at)
        errors: list[Any] = []  # the first is raised again below, when the files are safe
        shown: TimedPrompt | None = None
        prompts_shown: list[dict[str, Any]] = []
        try:
            with stream:  # until the video has its length, or a stop is requested
                while not recorder.full and stop.request is None:
                    prompt, _ = prompts[max(block for block in prompts if block <= stream.next_block)]
                    if prompt is not shown:
                        shown, frame = prompt, self._recorded(stream)
                        what = {"text": prompt.text} if prompt.file is None else {"file": prompt.file}
                        prompts_shown.append({"frame": frame, "seconds": frame / self._runtime.fps, **what})
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
        except BaseException as error:
            errors.append(error)
        elapsed = max(progress.elapsed, 1e-9)
        progress.close()
        errors += recorder.close() + ([] if checkpoints is None else checkpoints.close())
        for further in errors[1:]:
            warn(self._report, describe(further)[0])
        stopped = None if recorder.full else stop.request
        if recorder.held_up > max(1, elapsed / 20):
            how = f"{elapsed:.0f} s; a faster --preset or another --codec takes less"
            warn(self._report, f"encoding the video held up its blocks for {recorder.held_up:.1f} of {how}")
        self._report |= recorder.report() | ({} if checkpoints is None else {"snapshots": checkpoints.report()})
        self._report |= {} if self._index is None else {"resumed_at_frame": begun_at[1]}
        self._report |= {"rollbacks": stream.rollbacks} if self._arguments.roll_back else {}
        self._report.update(
            blocks=progress.blocks,
            fps=round(progress.frames / elapsed, 3),
            elapsed=round(elapsed, 3),
            prompts=prompts_shown,
            seed=self._arguments.seed,
            memory=self._runtime.memory.value,
            backend=self._runtime.backend,
            backend_reason=self._runtime.backend_reason,
            **self._runtime.taken.as_json(),
            exit_reason="error" if errors else stopped.reason if stopped else "complete",
        )
        if not self._arguments.quiet and not self._arguments.json:
            try:
                say(_summary(self._report))
            except (OutputError, BrokenPipeError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
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

    def _begin(self, prompts: dict[int, tuple[TimedPrompt, Tensor]]) -> Stream:
        """Begin or resume the stream, and announce all prompts: each begins with its block at any lookahead."""
        arguments, initial = self._arguments, self._initial
        policy = ROLL_BACK if arguments.roll_back else STOP
        guard = Guard(policy=policy, evidence=arguments.evidence, block_seconds=arguments.block_seconds)
        if self._index is not None:
            stream = self._resume(self._index, guard)
            begun = stream.next_prompt_block
        else:
            first = min(prompts)
            begun = first + 1
            options: dict[str, Any] = {"prompt_embeds": prompts[first][1], "seed": arguments.seed, "guard": guard}
            if initial is not None:
                options |= {"initial_video": initial, "fit": arguments.fit, "include_initial": not arguments.only_new}
            # Encoding a long initial video takes long.
            with nullcontext() if initial is None else self._stop.interruptible():
                stream = self._runtime.stream(**options)
        for block, (_, embeds) in prompts.items():
            if block >= begun:
                stream.set_prompt(prompt_embeds=embeds, block=block)
        return stream

    def _resume(self, index: RecordingIndex, guard: Guard) -> Stream:
        """Resume the stream, without the prompts of later blocks: the request's script names those.

        ``StreamError`` for a snapshot of another model; ``ConfigError`` unless the recording has the runtime's size
        and rate; ``PromptError`` unless the prompts of all blocks begun so far are those of the script.
        """
        runtime = self._runtime
        made = (*runtime.frame_size, Fraction(runtime.fps))
        recorded = (index.width, index.height, index.frame_rate)
        if made != recorded:
            recording, model = ("{}x{} at {} fps".format(*size) for size in (recorded, made))
            raise ConfigError(f"{self._request.output}: the recording is {recording}, the model makes {model}")
        snapshot, self._snapshot = self._snapshot, None  # frees gigabytes when the stream has begun
        assert snapshot is not None, "begun twice"
        begun, hidden = snapshot.next_block + len(snapshot.held), self._notes.hidden_frames

        before, asked = (
            [p for p in script if p.seconds <= 0 or first_block(p.seconds, runtime, hidden) < begun]
            for script in (self._notes.script, self._request.script)
        )
        if before != asked:
            words = (json.dumps(msgspec.to_builtins(script), ensure_ascii=False) for script in (before, asked))
            recorded_words, asked_words = map(one_line, words)
            expected = f"expected the prompts of the {counted(begun, 'block')} made so far: {recorded_words}"
            raise PromptError(f"--prompt: {expected}; got {asked_words}")
        return runtime.resume(dataclasses.replace(snapshot, prompts={}), guard=guard)

    def _open_recorder(self, block: int, frame: int) -> tuple[Recorder | SegmentRecorder, Checkpoints | None]:
        """Open the video from ``block`` and recorded ``frame`` on, and the place of its snapshots if it has any."""
        request, arguments, runtime = self._request, self._arguments, self._runtime
        if arguments.segments is None:
            recorder = Recorder(
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
        segments = SegmentRecorder(self._open_segments(frame), first_frame=frame, frame_limit=self._limit)
        if arguments.snapshot_every is None:
            return segments, None
        resumed_at = None if self._index is None else block
        try:
            return segments, Checkpoints(request.output, segments, arguments.snapshot_every, resumed_at=resumed_at)
        except BaseException:
            segments.close()
            raise

    def _open_segments(self, frame: int) -> SegmentedWriter:
        request, arguments, runtime = self._request, self._arguments, self._runtime
        noted = msgspec.structs.replace(self._notes, script=request.script, seed=arguments.seed)
        notes = msgspec.to_builtins(noted)
        options = {"seconds": arguments.segments, **request.encoding}
        if self._index is None:
            latent_shape = runtime.config.latent_shape if request.keeps_latents else None
            size = runtime.frame_size
            return SegmentedWriter(
                request.output, *size, runtime.fps, latent_shape=latent_shape, notes=notes, **options
            )
        recorded = self._index.frames
        if self._limit is not None and recorded > self._limit:  # frames after the snapshot are made again, not dropped
            asked = "--seconds" if arguments.frames is None else "--frames"
            expected = f"expected a video of {counted(recorded, 'frame')} or more, which are recorded"
            raise ConfigError(f"{asked}: {expected}, got one of {self._limit}")
        writer = SegmentedWriter.resume(request.output, frame, **options)
        writer.notes.update(notes)
        return writer

    def _recorded(self, stream: Stream) -> int:
        """Number of frames in a recording of everything that ``stream`` has delivered."""
        return stream.video_frames - self._notes.hidden_frames


def _check_initial(request: Request, frames: int) -> None:
    """Check the frames of ``--from``, where request or folder say what a block is; else it is done after loading."""
    options, model = request.options, request.arguments.model
    try:
        folder = ModelFolder.open(model)
        defaults, vae = folder.rollout_defaults(), folder.latents_config()
        choice = choose_recipe(options.recipe, defaults, None, None, (), model)
    except EchoError:
        return  # the other files tell, or it is reported where the model is loaded
    frames_per_block: Any = {**choice.facts(defaults), **(options.overrides or {})}.get("frames_per_block")
    if is_whole(frames_per_block, 1):
        check_whole_blocks(frames, frames_per_block, vae)


def _summary(report: dict[str, Any]) -> str:
    if "video" not in report["files"]:
        return "no video was written" if report["blocks"] else "no frame was made; no video was written"
    width, height = report["size"]
    frames = counted(report["frames"], "frame")
    return (
        f"{report['files']['video']}: {frames}, {report['seconds']:.1f} s of {width}x{height} "
        f"at {report['video_fps']:g} fps, made at {report['fps']:.1f} fps ({report['exit_reason']})"
    )
