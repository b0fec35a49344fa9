"""``echo-rt generate``: what it can be asked for, and the checks that need no model."""

from __future__ import annotations

from typing import Any

import click

from echo_rt.cli.arguments import MODEL, TEXT, Arguments, Value, number, shared, table
from echo_rt.cli.request import BESIDE_SEGMENTS, Request
from echo_rt.cli.stdio import say_loading
from echo_rt.options import CODECS, FITS
from echo_rt.utils.signals import StopRequest

DESCRIPTION = "Make a video from one or more prompts and write it to an MP4 while it is made."
EPILOG = """
A prompt that begins with a number and a colon takes over at that second of the video, with the next block:

\b
  echo-rt generate --model DIR --prompt "a red fox in the snow" --prompt "10:the fox dives into a lake" -o fox.mp4

Without --frames and --seconds the video continues until Ctrl-C or SIGTERM; the file keeps all that was made by then.

A long video survives a power cut in segments, with snapshots to resume from; after a kill, repeat it with --resume:

\b
  echo-rt generate --model DIR --prompt "a red fox" -o day --segments 10 --snapshot-every 100
  echo-rt generate --model DIR --prompt "a red fox" --resume day --segments 10 --snapshot-every 100

With both -o day and --resume day, the same command begins the video and resumes it.

With --from a video continues another video or a picture. The frames of that file are the first frames of the video and
count in --frames and --seconds; every one is taken, whatever the file's frame rate.

Exit codes: 0 the video is done; 1 a failure on the way, what was made is kept; 2 a mistake in the request; 129, 130,
143 the terminal was closed, Ctrl-C, SIGTERM.
"""

_MOST = 10**9  # frames or seconds: a longer video is one without an end
_PROMPT = """
--prompt [T:]TEXT            prompt from second T on; without T from the start
--prompt-embeds [T:]FILE     saved embeddings in place of a text
--save-prompt-embeds FILE    write the embeddings (safetensors); several prompts go to FILE with .0, .1, ... before the
                             ending
--keep-text-encoder          keep the text encoder in memory
"""
_VIDEO = """
-o --output OUT.mp4          file of the video; with --segments its folder
--frames N                   end after N frames
--seconds S                  end after S seconds of video
--from initial FILE          video or picture to begin with
--fit HOW                    scale a --from of another size, then crop or pad it
--only-new                   leave the frames of --from out of the video
--latents FILE.safetensors   also write the latents, in whole blocks; with --segments without a FILE: they go into the
                             folder
--contact-sheet FILE.png     also write an overview picture
--overwrite                  replace files that exist
"""
_ENCODING = f"""
--codec NAME                 {", ".join(CODECS)} (nvenc: on GPUs that encode); default h264
--preset NAME                speed of the encoder, in its own words; default of h264: veryfast
--crf Q                      quality; 0 is the best; default of h264: 18
--fragmented                 leave the finished video in the fragments in which it is written
"""
_LASTING = """
--segments S                 write segments of S seconds and a playlist into a folder
--snapshot-every N           save a snapshot to resume from every N blocks, in the folder
--resume DIR                 continue the video in this folder
"""
_FAULTS = """
--evidence DIR               folder for state and statistics of a block that contains NaN
--block-seconds S            end when a block takes longer; default: no limit
"""
_REPEATED: dict[str, Any] = {"type": TEXT, "multiple": True}
OPTIONS = {
    "model": shared(MODEL),
    "prompt": table(_PROMPT, prompt=_REPEATED, prompt_embeds=_REPEATED | {"type": Value(str, files=True)}),
    "video": (
        *table(
            _VIDEO,
            frames={"type": number(int, f"an integer of 1 or more and at most {_MOST}", least=1, most=_MOST)},
            seconds={"type": number(float, f"a number above 0 and at most {_MOST}", positive=True, most=_MOST)},
            fit={"type": click.Choice(FITS)},
            latents={"is_flag": False, "flag_value": BESIDE_SEGMENTS},
        ),
        *shared(["--size", "--set", "--seed"]),
    ),
    "encoding": table(
        _ENCODING,
        codec={"type": Value(str, words=CODECS), "default": "h264"},
        preset={
            "type": Value(str, words=lambda given: CODECS[given["codec"]].presets if given["codec"] in CODECS else ())
        },
        crf={"type": number(float, "a number of 0 or more")},
    ),
    "long videos": table(_LASTING),
    "faults": (*shared(["--roll-back"]), *table(_FAULTS)),
    "general": table("--quiet  no progress and no summary"),
}


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Check, load, generate, finish the files; 0, or the exit code of the signal that ended it."""
    request = Request(arguments)
    say_loading(arguments)
    with stop.importing():
        from echo_rt.cli.generation import Generation
    return Generation(request, report, stop).run()
