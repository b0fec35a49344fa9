"""``python -m training.picture``: the pictures of the documentation, made by the runtime from the demo model.

Contact sheets have a day in each row. The animation shows the same days with the memory and without, one above the
other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from echo_rt import Runtime
from training.world import DAY

_SCALE = 3
_BAR = 22  # pixels: of the line of text above a video
_COLUMNS = 12  # pictures of a day in a contact sheet

Frames = np.ndarray  # uint8 [F, H, W, 3]


def video(runtime: Runtime, prompts: Sequence[tuple[int, str]], days: Iterable[int], seed: int) -> Frames:
    """Return the frames of these days; ``prompts``: each with the block from which it is shown."""
    wanted = sorted(days)
    later = dict(prompts[1:])
    parts, made = [], 0
    with runtime.stream(prompts[0][1], seed=seed) as stream:
        for chunk in stream:
            parts.append(chunk.frames.numpy())
            made += len(chunk.frames)
            if made >= DAY * (wanted[-1] + 1):
                break
            if chunk.index + 1 in later:
                stream.set_prompt(later[chunk.index + 1])
    frames = np.concatenate(parts)
    return np.concatenate([frames[DAY * day : DAY * (day + 1)] for day in wanted])


def sheet(frames: Frames) -> Image.Image:
    """Lay out a day in each row."""
    chosen = frames[:: DAY // _COLUMNS]
    rows = [np.concatenate(list(row), 1) for row in chosen.reshape(-1, _COLUMNS, *frames.shape[1:])]
    return Image.fromarray(np.concatenate(rows))


def animation(videos: dict[str, Frames], path: Path, fps: int) -> None:
    """Write an animated WebP of videos one above the other, each under its name."""
    font = ImageFont.load_default(15)
    pictures = []
    for together in zip(*videos.values(), strict=True):
        height, width = (_SCALE * size for size in together[0].shape[:2])
        picture = Image.new("RGB", (width, len(videos) * (height + _BAR)), "white")
        draw = ImageDraw.Draw(picture)
        for row, (name, frame) in enumerate(zip(videos, together, strict=True)):
            top = row * (height + _BAR)
            draw.text((4, top + 2), name, fill="black", font=font)
            picture.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (0, top + _BAR))
        pictures.append(picture)
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=70, method=4
    )


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(prog="python -m training.picture", description=main.__doc__)
    parser.add_argument("--model", default="demo", help="the model folder (default: the one in the package)")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="(default %(default)s)")
    parser.add_argument("--prompt", default="a red ball bouncing in the snow", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=4, help="(default %(default)s)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    days, prompt = range(5), [(0, arguments.prompt)]
    videos = {}
    for mode in ("evolve", "off"):
        with Runtime.from_pretrained(arguments.model, memory=mode) as runtime:
            fps = runtime.fps
            videos[mode] = video(runtime, prompt, days, arguments.seed)
            sheet(videos[mode]).save(arguments.output / f"{mode}.png", optimize=True)
            if mode == "evolve":
                switched = [*prompt, (8, "a yellow box bouncing by the sea")]
                sheet(video(runtime, switched, days, arguments.seed)).save(
                    arguments.output / "switch.png", optimize=True
                )
                long = video(runtime, prompt, (0, 1, 199), arguments.seed)
                sheet(long).save(arguments.output / "ten-minutes.png", optimize=True)
    animation(
        {"with evolving memory": videos["evolve"][DAY:], "with the attention window alone": videos["off"][DAY:]},
        arguments.output / "demo.webp",
        fps,
    )


if __name__ == "__main__":
    main()
