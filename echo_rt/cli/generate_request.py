"""What ``echo-rt generate`` can be asked for, and the checks that need no model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from echo_rt.cli.arguments import parse_length, parse_number, parse_path, parse_positive
from echo_rt.cli.model_options import add_model_options, model_files, parse_model_options
from echo_rt.cli.outputs import Named, check_folder, check_outputs
from echo_rt.cli.prompts import parse_script
from echo_rt.errors import ConfigError, TargetError
from echo_rt.options import FITS, OVERRIDES, check_seed
from echo_rt.soak.config import MANIFEST_FILE

_EPILOG = """
A prompt that begins with a number and a colon takes over at that second of the video, at the first block from there:
  echo-rt generate --model DIR --prompt "a red fox in the snow" --prompt "10:the fox dives into a lake" -o fox.mp4
Without --frames and --seconds the video goes on until Ctrl-C or SIGTERM; what was made up to then is in the file.
A long one survives a power cut in pieces, with snapshots to go on from; after a kill, the same command with --resume:
  echo-rt generate --model DIR --prompt "a red fox" -o day --segments 10 --snapshot-every 100
  echo-rt generate --model DIR --prompt "a red fox" --resume day --segments 10 --snapshot-every 100
With -o day as well it also begins a video that is not there yet: one command to start again and again.
A video can go on from another one, or from a picture (--from): its frames are the video's first, --frames and
--seconds count them, and every frame of the file is one, whatever its rate.
Exit codes: 0 the video is done; 1 something failed on the way, what was made is kept; 2 a mistake in the request;
129, 130, 143 the terminal was closed, Ctrl-C, SIGTERM.
"""


# What --latents without a file stands for; no file can be called so.
BESIDE_SEGMENTS = Path(".")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="make a video from prompts",
        description="Make a video from one or more prompts and write it to an MP4 while it is made.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", action="append", default=[], metavar="[T:]TEXT", help="from second T (default 0) on"
    )
    prompt.add_argument(
        "--prompt-embeds", action="append", default=[], metavar="[T:]FILE", help="saved embeddings instead of text"
    )
    prompt.add_argument(
        "--save-prompt-embeds",
        type=parse_path,
        metavar="FILE",
        help="keep the embeddings (safetensors); of several prompts as FILE with .0, .1, ... before the ending",
    )
    prompt.add_argument("--keep-text-encoder", action="store_true", help="leave the text encoder in memory")

    video = parser.add_argument_group("video")
    video.add_argument(
        "-o", "--output", type=parse_path, metavar="OUT.mp4", help="the video; with --segments its folder"
    )
    length = video.add_mutually_exclusive_group()
    length.add_argument("--frames", metavar="N", help="end after N frames")
    length.add_argument("--seconds", metavar="S", help="end after S seconds of video")
    video.add_argument(
        "--from", dest="initial", type=parse_path, metavar="FILE", help="a video or a picture to begin with"
    )
    video.add_argument("--fit", choices=FITS, help="with --from of another size: scale it, then cut off or add edges")
    video.add_argument("--only-new", action="store_true", help="leave the frames of --from out of the video")
    video.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels, such as 832x480")
    video.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another fact of the rollout: {', '.join(OVERRIDES)} (a list as 1000,500)",
    )
    video.add_argument("--seed", default="0", metavar="N", help="same seed, same video (default 0)")
    video.add_argument(
        "--latents",
        type=parse_path,
        nargs="?",
        const=BESIDE_SEGMENTS,
        metavar="FILE.safetensors",
        help="also write the latents, whole blocks; with --segments no FILE: they go beside the pieces",
    )
    video.add_argument("--contact-sheet", type=parse_path, metavar="FILE.png", help="also write an overview picture")

    lasting = parser.add_argument_group("long videos")
    lasting.add_argument("--segments", metavar="S", help="write pieces of S seconds and a list of them into a folder")
    lasting.add_argument(
        "--snapshot-every", metavar="N", help="keep what is needed to go on after a kill, every N blocks, in the folder"
    )
    lasting.add_argument(
        "--resume", type=parse_path, metavar="DIR", help="go on with the video in this folder, in place of -o"
    )
    faults = parser.add_argument_group("faults")
    faults.add_argument("--roll-back", action="store_true", help="go back to a good state at a NaN, instead of ending")
    faults.add_argument(
        "--evidence", type=parse_path, metavar="DIR", help="keep state and figures of a block with NaN there"
    )
    faults.add_argument("--block-seconds", metavar="S", help="end when a block takes longer; default: no bound")
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
        self.options = parse_model_options(arguments)
        for option, given in (("--fit", arguments.fit is not None), ("--only-new", arguments.only_new)):
            if given and arguments.initial is None:
                raise ConfigError(f"{option}: expected --from FILE with it, whose frames it is about, got none")
        self.embeds_files = self._embeds_files(arguments.save_prompt_embeds)
        self.segment_seconds: float | None = parse_positive(
            "--segments", arguments.segments, float, "seconds of video above 0"
        )
        self.snapshot_every: int | None = parse_positive(
            "--snapshot-every", arguments.snapshot_every, int, "a number of blocks of 1 or more"
        )
        self.block_seconds: float | None = parse_positive(
            "--block-seconds", arguments.block_seconds, float, "a number of seconds above 0"
        )
        self.output = self._output()
        self._check_outputs()

    def _embeds_files(self, file: Path | None) -> list[Path]:
        """A file for each prompt, or none at all."""
        if file is None:
            return []
        if len(self.script) == 1 or not file.suffix:  # the latter is refused as it is
            return [file]
        return [file.with_name(f"{file.stem}.{i}{file.suffix}") for i in range(len(self.script))]

    def _output(self) -> Path:
        """Where the video goes; with that, whether the options about it fit together."""
        arguments = self.arguments
        resume: Path | None = arguments.resume
        output: Path | None = resume if arguments.output is None else arguments.output
        if output is None:
            raise ConfigError("expected -o OUT.mp4 (or --resume DIR), got neither (see echo-rt generate --help)")
        if resume is not None and os.path.realpath(output) != os.path.realpath(resume):
            raise ConfigError(f"--resume and -o: expected one folder, got {str(resume)!r} and {str(output)!r}")
        if self.segment_seconds is None:
            for option, given in (("--resume", resume), ("--snapshot-every", self.snapshot_every)):
                if given is not None:
                    raise ConfigError(f"{option}: expected --segments S with it: one file cannot be gone on with")
            if arguments.latents == BESIDE_SEGMENTS:
                raise ConfigError(
                    "--latents: expected FILE.safetensors (only with --segments it has a place of its own)"
                )
            return output
        if arguments.contact_sheet is not None:
            raise ConfigError(
                "--contact-sheet: expected no --segments with it: it shows a video that one run makes whole"
            )
        if arguments.latents not in (None, BESIDE_SEGMENTS):
            raise ConfigError(
                f"--latents: expected no file with --segments, whose place they go to, got {str(arguments.latents)!r}"
            )
        if output.suffix.lower() == ".mp4":
            raise ConfigError(f"-o: expected the name of a folder with --segments, got {str(output)!r}")
        return output

    def _check_outputs(self) -> None:
        arguments = self.arguments
        whole = self.segment_seconds is None
        outputs = [
            ("--output", self.output if whole else None, ".mp4"),
            ("--latents", arguments.latents if whole else None, ".safetensors"),
            ("--contact-sheet", arguments.contact_sheet, ".png"),
            *(("--save-prompt-embeds", file, ".safetensors") for file in self.embeds_files),
        ]
        embeds = [Named("--prompt-embeds", Path(prompt.file)) for prompt in self.script if prompt.file is not None]
        initial = [] if arguments.initial is None else [Named("--from", arguments.initial)]
        read = [*model_files(arguments), *embeds, *initial]
        check_outputs([(Named(option, path), suffix) for option, path, suffix in outputs if path is not None], read)
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
        """Whether latents go beside the segments."""
        return bool(self.arguments.latents == BESIDE_SEGMENTS)

    def frame_limit(self, fps: float) -> int | None:
        """Frames of the video, None for no end."""
        return self.frames if self.seconds is None else max(1, round(self.seconds * fps))
