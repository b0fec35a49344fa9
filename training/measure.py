"""``python -m training.measure``: how good the demo model's video is, and what its memory remembers, read from frames.

Every figure comes from videos of the runtime, read by ``evaluate``, with seeds that no choice in training looked at.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt import Chunk, Runtime
from echo_rt.utils.wording import counted
from training.evaluate import Reading, read
from training.world import DAY, HELD_OUT, Scene, random_scene, render

NOON = 24  # frame of the day when the balloon is highest
MODES = ("evolve", "prior", "off")
_FIRST_SEED = 10_000  # seeds below were looked at while the model was made


@dataclass(frozen=True)
class Sizes:
    """How much is measured: ``streams`` a mode over ``days``, ``long`` streams over ``long_days``, and so on."""

    streams: int = 16
    days: int = 8
    many: int = 64
    many_days: int = 3
    long: int = 4
    long_days: int = 41
    given: int = 32
    prompts: int = 4
    prompt_blocks: int = 16
    drift_days: int = 200
    first_blocks: int = 16


Opener = Callable[..., Runtime]


def frames_of(chunks: Iterable[Chunk], numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return the frames with these ``numbers``, ``[H, W, 3]`` in [0, 1]; reads no further than the last."""
    wanted, found = set(numbers), {}
    for chunk in chunks:
        end = chunk.first_frame + len(chunk.frames)
        for number in wanted & set(range(chunk.first_frame, end)):
            found[number] = chunk.frames[number - chunk.first_frame].float() / 255
        if end > max(wanted):
            break
    return found


def noons(days: Iterable[int]) -> list[int]:
    """Numbers of the frames in which the balloon is highest."""
    return [DAY * day + NOON for day in days]


def follows(reading: Reading, scene: Scene) -> bool:
    """Whether a frame shows the object and the place that the prompt names."""
    return (reading.colour, reading.shape, reading.place) == (scene.colour, scene.shape, scene.place)


def share(values: Iterable[bool]) -> float:
    """Return the share of true values."""
    listed = list(values)
    return sum(listed) / len(listed)


def adherence(runtime: Runtime, sizes: Sizes) -> dict[str, Any]:
    """Read one frame of every block of prompts that training has never shown, and of as many that it has."""
    result: dict[str, Any] = {}
    step = 4 * runtime.config.window.frames_per_block
    for kind in ("held out", "trained"):
        chance = random.Random(kind)
        named = sorted(HELD_OUT) if kind == "held out" else [_named(random_scene(chance)) for _ in HELD_OUT]
        rows: list[tuple[Reading, Scene]] = []
        firsts: list[bool] = []
        for colour, shape, place in named:
            scene = Scene(colour, shape, place, "red", 0, 0)
            for index in range(sizes.first_blocks):
                blocks = sizes.prompt_blocks if index < sizes.prompts else 1
                with runtime.stream(scene.prompt, seed=_FIRST_SEED + index) as stream:
                    frames = frames_of(stream, [step * block + 4 for block in range(blocks)])
                readings = [read(frame, number) for number, frame in sorted(frames.items())]
                firsts.append(follows(readings[0], scene))
                rows += [(reading, scene) for reading in readings if index < sizes.prompts]
        result[kind] = {
            "blocks": len(rows),
            "all": share(follows(reading, scene) for reading, scene in rows),
            "colour": share(reading.colour == scene.colour for reading, scene in rows),
            "shape": share(reading.shape == scene.shape for reading, scene in rows),
            "place": share(reading.place == scene.place for reading, scene in rows),
            "first blocks": len(firsts),
            "first block": share(firsts),
        }
    return result


def _named(scene: Scene) -> tuple[str, str, str]:
    return scene.colour, scene.shape, scene.place


def recall(runtime: Runtime, streams: int, days: int, base: int = _FIRST_SEED) -> dict[str, Any]:
    """Stream freely; return the share of streams, for each later day, whose balloon is that of the first day."""
    same: list[list[tuple[bool, bool]]] = []
    for index in range(streams):
        scene = random_scene(random.Random(f"recall {index}"))
        with runtime.stream(scene.prompt, seed=base + index) as stream:
            frames = frames_of(stream, noons(range(days)))
        first, *later = (read(frames[number], number) for number in noons(range(days)))
        same.append([(each.lane == first.lane, each.balloon == first.balloon) for each in later])
    by_day = list(zip(*same, strict=True))
    return {
        "streams": streams,
        "returns": streams * (days - 1),
        "both": share(lane and colour for row in same for lane, colour in row),
        "lane by day": [share(lane for lane, _ in day) for day in by_day],
        "colour by day": [share(colour for _, colour in day) for day in by_day],
    }


def given(runtime: Runtime, count: int) -> dict[str, float]:
    """Give a true first day, then stream: is the balloon of the second day that of the first?"""
    size = 4 * runtime.config.window.frames_per_block
    blocks = -(-(DAY + 1) // size)
    lanes, colours = [], []
    for index in range(count):
        scene = random_scene(random.Random(f"given {index}"))
        video = (255 * render([scene] * (1 + size * blocks - 4))).round().to(torch.uint8)
        number = DAY + NOON
        with runtime.stream(scene.prompt, seed=_FIRST_SEED + index, initial_video=video) as stream:
            reading = read(frames_of(stream, [number])[number], number)
        lanes.append(reading.lane == scene.lane)
        colours.append(reading.balloon == scene.balloon)
    return {"streams": count, "lane": share(lanes), "colour": share(colours)}


def switches(runtime: Runtime, count: int, before: int = 6, after: int = 10) -> dict[str, float]:
    """Switch the prompt in mid-stream: does the picture follow, and does the balloon stay what it was?"""
    step = 4 * runtime.config.window.frames_per_block
    right, second, kept = [], [], []
    for index in range(count):
        chance = random.Random(f"switch {index}")
        scene = random_scene(chance)
        other = random_scene(chance)
        numbers = [NOON, *(step * block + 4 for block in range(before, before + after)), *noons([3])]
        with runtime.stream(scene.prompt, seed=_FIRST_SEED + index) as stream:

            def chunks() -> Iterable[Chunk]:
                for chunk in stream:
                    yield chunk
                    if chunk.index == before - 1:
                        stream.set_prompt(other.prompt)  # noqa: B023

            frames = frames_of(chunks(), numbers)
        readings = {number: read(frame, number) for number, frame in frames.items()}
        shown = [readings[step * block + 4] for block in range(before, before + after)]
        right += [follows(reading, other) for reading in shown[2:]]
        second.append(follows(shown[1], other))
        first, last = readings[NOON], readings[noons([3])[0]]
        kept.append((first.lane, first.balloon) == (last.lane, last.balloon))
    return {"streams": count, "second block": share(second), "later blocks": share(right), "balloon kept": share(kept)}


def drift(runtime: Runtime, days: int) -> dict[str, Any]:
    """Compare the last day of a long stream with its second: mean and spread of pixels, and what is read."""
    scene = random_scene(random.Random("drift"))
    hours = range(0, DAY, 6)
    wanted = [DAY * day + hour for day in (1, days - 1) for hour in hours]
    began = time.monotonic()
    with runtime.stream(scene.prompt, seed=_FIRST_SEED) as stream:
        frames = frames_of(stream, wanted)
    seconds = time.monotonic() - began
    early, late = (torch.stack([frames[DAY * day + hour] for hour in hours]) for day in (1, days - 1))
    return {
        "days": days,
        "frames a second": days * DAY / seconds,
        "mean": [float(early.mean()), float(late.mean())],
        "spread": [float(early.std()), float(late.std())],
        "difference": float((early - late).abs().mean()),
        "prompt followed": share(follows(read(frames[n], n), scene) for n in wanted if n >= DAY * (days - 1)),
    }


def hidden(runtime: Runtime, days: int = 8) -> dict[str, list[float]]:
    """The memory of one stream block by block: its size (root mean square) and the share that an update keeps."""
    scene = random_scene(random.Random("hidden"))
    found: dict[str, list[float]] = {"size": [], "kept": []}
    with runtime.stream(scene.prompt, seed=_FIRST_SEED) as stream:
        for chunk in stream:
            vitals = chunk.stats.vitals
            if vitals.memory_norm is not None and vitals.gate_mean is not None:
                found["size"].append(vitals.memory_norm)
                found["kept"].append(vitals.gate_mean)
            if chunk.first_frame > days * DAY:
                return found
    raise AssertionError("a stream has no end")


def positions(open_runtime: Opener, days: Sequence[int]) -> dict[str, Any]:
    """Follow the prompt with bounded temporal ids, and with ids that run on past those of training; share by day."""
    scene = random_scene(random.Random("positions"))
    hours = range(0, DAY, 6)
    result: dict[str, Any] = {"day": list(days)}
    for name, overrides in (("bounded", {}), ("running on", {"max_temporal_id": DAY * (max(days) + 1)})):
        with open_runtime(overrides=overrides) as runtime, runtime.stream(scene.prompt, seed=_FIRST_SEED) as stream:
            frames = frames_of(stream, [DAY * day + hour for day in days for hour in hours])
        numbers = [[DAY * day + hour for hour in hours] for day in days]
        result[name] = [share(follows(read(frames[n], n), scene) for n in day) for day in numbers]
    return result


def first_seconds(runtime: Runtime, prompts: int = 4, seconds: float = 3.0) -> Tensor:
    """The first ``seconds`` of as many ``prompts``, ``[prompts, F, H, W, 3]`` in [0, 1]."""
    numbers = range(round(seconds * runtime.fps))
    parts = []
    for index in range(prompts):
        scene = random_scene(random.Random(f"precision {index}"))
        with runtime.stream(scene.prompt, seed=_FIRST_SEED + index) as stream:
            frames = frames_of(stream, numbers)
        parts.append(torch.stack([frames[number] for number in numbers]))
    return torch.stack(parts)


def psnr(one: Tensor, other: Tensor) -> float:
    """PSNR of pixels in [0, 1], in dB."""
    return float(-10 * (one - other).square().mean().log10())


def precision(open_runtime: Opener, dtypes: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """PSNR in dB of the first seconds beside float32's, over four prompts, and recall, for each dtype."""
    result: dict[str, Any] = {}
    videos: dict[str, Tensor] = {}
    for dtype in ("float32", *dtypes):
        with open_runtime(dtype=dtype) as runtime:
            videos[dtype] = first_seconds(runtime)
            result[dtype] = {
                "PSNR": None if dtype == "float32" else psnr(videos[dtype], videos["float32"]),
                "recall": recall(runtime, sizes.streams, 4)["both"],
            }
    return result


def measure(open_runtime: Opener, sizes: Sizes, report: Callable[[str, Any], None]) -> None:
    """Measure everything, and tell ``report`` each result by its name as it is found."""
    with open_runtime() as runtime:
        report("adherence", adherence(runtime, sizes))
        report("switches", switches(runtime, sizes.streams))
        report("recall of many", recall(runtime, sizes.many, sizes.many_days))
        report("recall over days", recall(runtime, sizes.long, sizes.long_days))
        report("memory", hidden(runtime))
        report("drift", drift(runtime, sizes.drift_days))
    days = [day for day in (0, 1, 2, 4, 8, 16, 32, 64) if day < sizes.drift_days]
    report("positions", positions(open_runtime, days))
    report("precision", precision(open_runtime, ("bfloat16", "float16", "float8"), sizes))
    for mode in MODES:
        with open_runtime(memory=mode) as runtime:
            report(f"recall {mode}", recall(runtime, sizes.streams, sizes.days))
            report(f"given {mode}", given(runtime, sizes.given))


def main() -> None:
    """Measure a model folder; print each figure, and write all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m training.measure", description=main.__doc__)
    parser.add_argument("--model", default="demo", help="the model folder (default: the one in the package)")
    parser.add_argument("--output", type=Path, default=Path("build/measured.json"), help="(default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that all of it runs")
    arguments = parser.parse_args()
    sizes = Sizes(2, 3, 2, 2, 1, 4, 2, 1, 4, 6, 2) if arguments.quick else Sizes()
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"
    }
    began = time.monotonic()

    def report(name: str, value: Any) -> None:
        results[name] = value
        print(f"{time.monotonic() - began:6.0f} s  {name}: {json.dumps(value)}", flush=True)

    measure(lambda **options: Runtime.from_pretrained(arguments.model, **options), sizes, report)
    results["minutes"] = (time.monotonic() - began) / 60
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
