"""Write the video as numbered PNG files; started again, continue where it ended.

    pip install pillow
    python numbered_frames.py FOLDER --prompt "a red ball bouncing in the desert" --frames 160

Ctrl-C ends it after a whole block. After a kill, the same command continues from the last snapshot and makes the frames
since then again, bit for bit. --turn-to continues with another prompt.
"""

import argparse
import signal
import sys
import threading
from pathlib import Path

from PIL import Image

import echo_rt
from echo_rt import share_cpu


def begin(runtime: echo_rt.Runtime, state: Path, prompt: str, turn_to: str | None) -> echo_rt.Stream:
    """Return the video of the snapshot ``state``, turning to ``turn_to``; without that file, a new video."""
    if not state.exists():
        return runtime.stream(prompt)
    stream = runtime.resume(echo_rt.Snapshot.load(state))
    if turn_to is not None:
        stream.set_prompt(turn_to)
    return stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint")
    parser.add_argument("--recipe", help="needed if the files do not select one; see echo-rt recipes")
    parser.add_argument("--prompt", default="a red ball bouncing in the desert", help="first prompt of a new video")
    parser.add_argument("--turn-to", metavar="PROMPT", help="next prompt of a video that continues")
    parser.add_argument("--frames", type=int, default=160, help="number of frames to add, in whole blocks")
    parser.add_argument("--keep-every", type=int, default=50, help="blocks between two snapshots")
    options = parser.parse_args()
    state = options.folder / "state.safetensors"
    ended = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: ended.set())

    with (
        echo_rt.Runtime.from_pretrained(options.model, checkpoint=options.checkpoint, recipe=options.recipe) as runtime,
        share_cpu(runtime.device),  # on a CPU: stay fast beside other programs
        begin(runtime, state, options.prompt, options.turn_to) as stream,
    ):
        options.folder.mkdir(parents=True, exist_ok=True)
        last = stream.video_frames + options.frames
        for chunk in stream:
            # The chunk knows its place in the video, so the numbers continue after a resume.
            for number, frame in enumerate(chunk.frames.numpy(), start=chunk.first_frame):
                Image.fromarray(frame).save(options.folder / f"frame-{number:08d}.png")
            if (chunk.index + 1) % options.keep_every == 0:
                stream.snapshot(state)
            if ended.is_set() or stream.video_frames >= last:
                break
        stream.snapshot(state)


if __name__ == "__main__":
    try:
        main()
    except echo_rt.EchoError as error:  # one line: what was expected and what was found
        print(f"numbered_frames.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
