"""A run as tables, as JSON and as bars."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from echo_rt.attention import AttentionSelection
from echo_rt.bench.model import Model
from echo_rt.bench.run import Entry, Run
from echo_rt.bench.tables import Column, draw, results, write_results
from echo_rt.bench.targets import Achieved, Figure, Target, a_day, gigabytes, judge
from echo_rt.bench.timing import DEVICE_CLOCK, Sample, milliseconds
from echo_rt.engine.decoding import convolutions_in_words
from echo_rt.utils.device import FLOAT8, dtype_name
from echo_rt.utils.wording import counted

NAME = "block"
ALONE = "whole block, one at a time"
_TRANSFORMER, _MEMORY, _DECODE = "transformer, all passes", "memory update", "VAE decode"


@dataclass(frozen=True)
class PartRow:
    """A part of a block in one variant: milliseconds, video frames a second, and how many blocks were measured.

    A rehearsal has no rates: ``fps`` is None.
    """

    variant: str
    part: str
    ms: float
    p99_ms: float
    fps: float | None
    x_torch: float | None
    blocks: int


PART_COLUMNS = (
    Column("variant", "variant", text=True),
    Column("part", "part", text=True),
    Column("ms", "ms", ".3f"),
    Column("p99_ms", "p99", ".3f"),
    Column("fps", "FPS", ".2f"),
    Column("x_torch", "x torch", ".2f"),
    Column("blocks", "blocks"),
)
VARIANT_COLUMNS = (
    Column("variant", "variant", text=True),
    Column("memory", "memory", text=True),
    Column("backend", "backend", text=True),
    Column("graphs", "graphs", text=True),
    Column("latents_error", "latents off by", ".1e"),
    Column("frames_error", "frames off by", ".1e"),
    Column("bound", "bound", ".1e"),
    Column("idle", "idle", ".2%"),
    Column("joules_a_frame", "J a frame", ".3f"),
    Column("verdict", "", text=True),
)
PEER_COLUMNS = (
    Column("peer", "peer", text=True),
    Column("ms", "ms", ".3f"),
    Column("p99_ms", "p99", ".3f"),
    Column("ours_ms", "ours, ms", ".3f"),
    Column("ratio", "x ours", ".2f"),
    Column("error", "off by", ".1e"),
    Column("what", "what is compared", text=True),
)
TARGET_COLUMNS = (
    Column("goal", "goal", text=True),
    Column("value", "value", ".2f"),
    Column("unit", "", text=True),
    Column("verdict", "", text=True),
)
_PEER_KEYS = tuple(column.key for column in PEER_COLUMNS)
FIGURE_COLUMNS = (
    Column("what", "what", text=True),
    Column("value", "value", ".4g"),
    Column("unit", "", text=True),
    Column("how", "how it comes about", text=True),
)


class Report:
    """What a run says, ready to be shown or written."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ahead = run.request.lookahead
        block = run.model.config.window.frames_per_block
        self.frames_a_block = run.model.vae_config.video_frames(1 + block) - run.model.vae_config.video_frames(1)
        self.is_result = run.clock == DEVICE_CLOCK
        self.judged = self.is_result and run.model.released and run.dtype in (torch.bfloat16, FLOAT8)
        self.parts = self._part_rows()
        self.variants = [self._variant_row(entry) for entry in run.entries]
        self.peers = self._peer_rows()
        self.goals = self._goals()
        self.resources = self._resource_figures()
        self.day = self._day()

    @property
    def whole(self) -> str:
        """The name of the part that is a block in a stream."""
        return f"whole block, {self.ahead} begun ahead" if self.ahead else ALONE

    # ---------------------------------------------------------------- rows

    def _samples(self, entry: Entry) -> dict[str, list[float]]:
        """Seconds by part. Parts are told apart where no two blocks overlap."""
        alone, ahead = entry.samples[0], entry.samples[self.ahead]
        parts = {_TRANSFORMER: alone.transformer, _MEMORY: alone.memory, _DECODE: alone.decode, ALONE: alone.whole}
        if not any(alone.memory):
            del parts[_MEMORY]
        return parts | {self.whole: ahead.whole}

    def _part_rows(self) -> list[PartRow]:
        seconds = {entry.variant.name: self._samples(entry) for entry in self.run.measured}
        medians = {(v, part): milliseconds(s)[0] for v, parts in seconds.items() for part, s in parts.items()}
        rows = []
        for variant, parts in seconds.items():
            for part, sample in parts.items():
                median, p99 = milliseconds(sample)
                torchs = medians.get(("torch", part))
                ratio = None if torchs is None or variant == "torch" else torchs / median
                fps = 1e3 * self.frames_a_block / median if self.is_result else None
                rows.append(PartRow(variant, part, median, p99, fps, ratio, len(sample)))
        return rows

    def _variant_row(self, entry: Entry) -> dict[str, Any]:
        """What holds for a variant as a whole; shares and joules are those with blocks begun ahead.

        ``graphs_failed``: the stage that could not be captured and why, where it was measured without graphs for it.
        """
        sample: Sample | None = entry.samples.get(self.ahead) if not entry.problem else None
        joules = None if sample is None else sample.joules_a_block
        exact = entry.exactness
        return {
            "variant": entry.variant.name,
            "memory": entry.mode.value,
            "backend": entry.backend,
            "graphs": entry.graphs and self.run.device.type == "cuda",
            "graphs_failed": entry.graphs_failed or None,
            "latents_error": None if exact is None else exact.latents,
            "frames_error": None if exact is None else exact.frames,
            "bound": None if exact is None else exact.bound,
            "idle": None if sample is None else sample.idle,
            "joules_a_frame": None if joules is None else joules / self.frames_a_block,
            "verdict": entry.problem or _verdict(entry),
        }

    def _peer_rows(self) -> list[dict[str, Any]]:
        """Another's code beside ours; None where it was not measured. ``ratio``: its time over ours."""
        first = self.run.measured[0].variant.name if self.run.measured else ""
        whole, passes = self._ms(first, _TRANSFORMER), len(self.run.model.config.sampler.denoising_steps) + 1
        ours = {"decode": self._ms(first, _DECODE), "pass": None if whole is None else whole / passes}
        rows = [dict.fromkeys(_PEER_KEYS) | {"peer": each.name, "what": each.why} for each in self.run.missing]
        found = []
        for peer in self.run.peers:
            row = dict.fromkeys(_PEER_KEYS) | {"peer": peer.name, "ours_ms": ours[peer.beside], "error": peer.error}
            row["what"] = peer.what
            if peer.ok:
                row["ms"], row["p99_ms"] = milliseconds(self.run.peer_seconds[peer.name])
                row["ratio"] = None if row["ours_ms"] is None else row["ms"] / row["ours_ms"]
            else:
                row["what"] = f"not timed, as it differs from ours by more than {peer.bound:.1e}; {peer.what}"
            found.append(row)
        return found + rows

    def _ms(self, variant: str, part: str) -> float | None:
        return next((row.ms for row in self.parts if (row.variant, row.part) == (variant, part)), None)

    # ---------------------------------------------------------------- goals

    def _goals(self) -> list[Target]:
        """Judged are the released sizes on a GPU alone, with the memory evolving."""
        if not self.judged:
            return []
        entry = next((entry for entry in self.run.measured if entry.variant.name == "evolve"), None)
        whole = next((row for row in self.parts if (row.variant, row.part) == ("evolve", self.whole)), None)
        without, resources = self._ms("off", self.whole), self.run.resources
        of_evolve = self.run.entries[0].variant.name == "evolve"
        return judge(
            Achieved(
                block_ms=None if whole is None else whole.ms,
                memory_cost=None if whole is None or without is None else whole.ms / without - 1,
                idle=None if entry is None else entry.samples[self.ahead].idle,
                spread=None if whole is None else whole.p99_ms / whole.ms,
                growth_bytes=resources.growth if of_evolve else None,
                peak_bytes=resources.peak if of_evolve else None,
            ),
            float8=self.run.dtype == FLOAT8,
        )

    # ---------------------------------------------------------------- resources

    def _resource_figures(self) -> list[Figure]:
        found, name = self.run.resources, self.run.entries[0].variant.name
        alone, no_gpu = f"{name}, alone on the device", "there is no GPU"
        of_torch = alone if self.run.device.type == "cuda" else no_gpu

        clock = "host clock, from a new video whose prompt is encoded; other blocks begun ahead are included"
        return [
            gigabytes("device memory, steady", found.device, of_torch),
            Figure("its growth over some steady blocks", found.growth, "bytes", of_torch),
            gigabytes("its peak, loading included", found.peak, of_torch),
            gigabytes("held by torch's allocator", found.reserved, of_torch),
            gigabytes("the decoder's memory of a stream", found.decoder, "counted by the decoder"),
            gigabytes("host memory of the process", found.host, alone),
            Figure("time to the first frame, first video", found.first_frame_cold, "s", clock),
            Figure("time to the first frame, later video", found.first_frame_warm, "s", clock),
        ]

    def _day(self) -> list[Figure]:
        """By the first variant, as a stream runs; nothing, where times are no results."""
        if not self.run.measured or not self.is_result:
            return []
        sample, model = self.run.measured[0].samples[self.ahead], self.run.model
        config, stride = model.config, model.vae_config.spatial_stride
        channels, height, width = config.latent_shape
        latents = config.window.frames_per_block * channels * height * width
        resources = self.run.resources
        return a_day(
            blocks=len(sample.whole),
            seconds_a_block=sum(sample.whole) / len(sample.whole),
            frames_a_block=self.frames_a_block,
            frame_rate=model.vae_config.frame_rate,
            joules_a_block=sample.joules_a_block,
            frame_bytes=self.frames_a_block * 3 * height * width * stride**2,
            latent_bytes=4 * latents,
            snapshot_bytes=resources.snapshot,
            host_bytes=resources.host,
            device_bytes=resources.device,
        )

    # ---------------------------------------------------------------- showing

    def _tables(self) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "Block": (self.parts, PART_COLUMNS),
            "Variants": (self.variants, VARIANT_COLUMNS),
            "Peers": (self.peers, PEER_COLUMNS),
            "Resources": (self.resources, FIGURE_COLUMNS),
        }
        if self.goals:
            tables["Goals"] = (self.goals, TARGET_COLUMNS)
        if self.day:
            tables["A day, extrapolated"] = (self.day, FIGURE_COLUMNS)
        return tables

    def _facts(self) -> dict[str, Any]:
        run = self.run
        return {
            "passed": run.passed,
            "complete": run.complete,
            "result": self.is_result,
            "clock": run.clock if self.is_result else f"{run.clock}: no result",
            "model": {"source": run.model.source, **run.model.config.to_flat()},
            **_recipe(run.model),
            "dtype": dtype_name(run.dtype),
            "backend": run.backend.name,
            "backend_reason": run.backend.reason,
            "float8_except": list(run.request.float8_except),
            "attention": [_choice(choice) for choice in run.attention],
            "convolutions": {
                str(shape): {"name": choice.kind.name, "reason": choice.reason}
                for shape, choice in run.convolutions.items()
            },
            "vae_tiles": run.request.vae_tiles,
            "lookahead": self.ahead,
            "rounds": run.rounds,
            "blocks": run.blocks,
            "order": run.order,
            "frames_per_block": self.frames_a_block,
            "absent": run.absent,
            "milliseconds": {
                entry.variant.name: {part: [1e3 * s for s in v] for part, v in self._samples(entry).items()}
                for entry in run.measured
            },
            "peer_milliseconds": {name: [1e3 * s for s in v] for name, v in run.peer_seconds.items()},
            "resources": asdict(run.resources),
        }

    def _arguments(self) -> dict[str, Any]:
        """For :mod:`echo_rt.bench.tables`."""
        return {
            "title": "A whole block",
            "header": self.run.header,
            "tables": self._tables(),
            "notes": _notes(self.run, frames_a_block=self.frames_a_block, judged=self.judged),
            **self._facts(),
        }

    def content(self) -> tuple[dict[str, Any], str]:
        """As one JSON object, and as a page."""
        return results(**self._arguments())

    def write(self, folder: Path, *, picture: bool) -> list[Path]:
        """``block.json``, ``block.md`` and, if asked for, ``block.png``; raises ``OutputError``."""
        write_results(folder, NAME, **self._arguments())
        files = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
        if picture:
            files.append(folder / f"{NAME}.png")
            bars = [(row.variant, row.part, row.ms, row.p99_ms) for row in self.parts]
            bars += [(r["peer"], "peer, of a part", r["ms"], r["p99_ms"]) for r in self.peers if r["ms"] is not None]
            gpu = self.run.header["gpu"]
            place = gpu["name"] if gpu else "CPU, host clock: no results"
            draw(files[-1], f"A whole block: {self.run.model.source}\n{place}", bars)
        return files


def _verdict(entry: Entry) -> str:
    right = "not yet held against torch" if entry.exactness is None else "right"
    graphs = " without graphs, which failed" if entry.graphs_failed else ""
    return f"{right}, {'measured' if entry.samples else 'not yet measured'}{graphs}"


def _recipe(model: Model) -> dict[str, Any]:
    """By which recipe a model runs, and of which weights; nothing of random ones."""
    taken = {} if model.taken is None else model.taken.as_json()
    return {name: value for name, value in taken.items() if name != "model"}  # where it is from is told already


def _choice(choice: AttentionSelection) -> dict[str, Any]:
    return {
        "name": choice.attention.name,
        "reason": choice.reason,
        "milliseconds": dict(choice.timings),
        "rejected": dict(choice.rejected),
    }


def _notes(run: Run, *, frames_a_block: int, judged: bool) -> list[str]:
    """``judged``: whether goals are."""
    width, height = (size * run.model.vae_config.spatial_stride for size in run.model.config.latent_shape[:0:-1])
    on_gpu = run.clock == DEVICE_CLOCK
    lines = [] if on_gpu else ["Times of the host clock on a CPU: a rehearsal, no results, hence no rates and no day."]
    if not run.complete:
        lines.append("Not complete: the run had not ended when this was written.")
    lines += [
        f"{run.model.source}; {width}x{height}, {dtype_name(run.dtype)}; steady state (window full, "
        f"ids saturated); {frames_a_block} video frames a block; every whole block has the VAE and the way of the "
        "frames to the host in it; the text encoder is left out.",
        f"Clock: {'the GPU events around every stage' if on_gpu else 'of the host'}. {counted(run.rounds, 'round')} in "
        f"which the variants take turns, {counted(run.blocks, 'block')} each: in a turn blocks are made one at a time, "
        "then with others begun ahead.",
        "Transformer, memory update and VAE decode are those of blocks made one at a time, which share the device with "
        "no other block; the memory update runs beside the first pass.",
        "A whole block is the time between two arrivals on the host.",
        "Idle: of the time between the arrivals of the first and the last block of a turn, the share in which no lane "
        "was in a stage, with blocks begun ahead. Gaps between the kernels of one stage count as work: a trace shows "
        "those (bench/nsight).",
        "x torch: the time of the torch variant over that of this one. Errors: relative, of one steady block, against "
        "the torch backend without graphs, which begins it from the same state.",
    ]
    lines.append(f"Backend: {run.backend.name}, {run.backend.reason}.")
    lines += [
        f"Attention {what}: {choice.attention.name}, {choice.reason}."
        for what, choice in zip(("over the cache", "over the text", "of the decoder"), run.attention, strict=True)
    ]
    lines.append(f"Convolutions of the decoder: {convolutions_in_words(run.convolutions)}.")
    if run.request.vae_tiles > 1:
        lines.append(f"The decoder works in {run.request.vae_tiles} bands of rows, that of the torch variant in one.")
    lines += [
        f"GRAPHS FAILED in variant {entry.variant.name}, whose times are without them: {entry.graphs_failed}."
        for entry in run.entries
        if entry.graphs_failed
    ]
    if not judged:
        lines.append("Goals are judged on a GPU alone, at the released sizes in bfloat16 or float8.")
    return lines + [f"Not measured: {name}: {why}." for name, why in run.absent.items()]
