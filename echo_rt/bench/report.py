"""A run as tables, as JSON and as bars: parts of a block, targets and resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from echo_rt.bench.run import Entry, Run, from_checkout
from echo_rt.bench.runner import median_p99
from echo_rt.bench.tables import Table, columns, draw, results, write_results
from echo_rt.engine.build import convolutions_in_words
from echo_rt.utils.device import FLOAT8, dtype_name
from echo_rt.utils.wording import counted

ALONE = "whole block, one at a time"
_TRANSFORMER, _MEMORY, _DECODE = "transformer, all passes", "memory update", "VAE decode"
_BESIDE = "beside each other: "

_PARTS = columns(
    "variant|variant", "part|part", "ms|ms|.3f", "p99_ms|p99|.3f", "fps|FPS|.2f", "x_torch|x torch|.2f",
    "blocks|blocks|",
)  # fmt: skip
_VARIANTS = columns(
    "variant|variant", "memory|memory", "backend|backend", "graphs|graphs", "latents_error|latents off by|.1e",
    "frames_error|frames off by|.1e", "bound|bound|.1e", "idle|idle|.2%", "joules_a_frame|J a frame|.3f", "verdict|",
)  # fmt: skip
_BASELINES = columns(
    "peer|peer", "ms|ms|.3f", "p99_ms|p99|.3f", "ours_ms|ours, ms|.3f", "ratio|x ours|.2f", "error|off by|.1e",
    "what|what is compared",
)  # fmt: skip
_GOALS = columns("goal|goal", "value|value|.2f", "unit|", "verdict|")
_FIGURES = columns("what|what", "value|value|.4g", "unit|", "how|how it comes about")


class Report:
    """What a run says, ready to be shown or written."""

    def __init__(self, run: Run) -> None:
        self.run, self.ahead = run, run.request.lookahead
        self.whole = f"whole block, {self.ahead} begun ahead" if self.ahead else ALONE  # a block in a stream
        block = run.model.config.window.frames_per_block
        self.frames_a_block = run.model.vae.video_frames(1 + block) - run.model.vae.video_frames(1)
        self.judged = run.on_gpu and run.model.released and run.dtype in (torch.bfloat16, FLOAT8)
        self.seconds = {entry.variant.name: self._seconds(entry) for entry in run.measured}
        self.tables: dict[str, Table] = {
            "Block": (self._parts(), _PARTS),
            "Variants": ([self._variant(entry) for entry in run.entries], _VARIANTS),
            "Peers": (self._baselines(), _BASELINES),
            "Resources": (self._resources(), _FIGURES),
        }
        if self.judged and (goals := from_checkout("goals")) is not None:
            self.tables["Goals"] = (goals.judge(self.content()[0], float8=run.dtype == FLOAT8), _GOALS)

    def content(self) -> tuple[dict[str, Any], str]:
        """As one JSON object, and as a page."""
        return results("A whole block", self.run.header, self.tables, self._notes(), **self._facts())

    def write(self, folder: Path, *, picture: bool) -> list[Path]:
        """``block.json``, ``block.md`` and, if asked for, ``block.png``; raises ``OutputError``."""
        write_results(folder, "block", *self.content())
        files = [folder / "block.json", folder / "block.md"]
        if picture:
            files.append(folder / "block.png")
            bars = [(row["variant"], row["part"], row["ms"], row["p99_ms"]) for row in self.tables["Block"][0]]
            beside = [row for row in self.tables["Peers"][0] if row["ms"] is not None]
            bars += [(row["peer"], "peer, of a part", row["ms"], row["p99_ms"]) for row in beside]
            gpu = self.run.header["gpu"]
            place = gpu["name"] if gpu else "CPU, host clock: no results"
            draw(files[-1], f"A whole block: {self.run.model.source}\n{place}", bars)
        return files

    # ---------------------------------------------------------------- rows

    def _seconds(self, entry: Entry) -> dict[str, list[float]]:
        """Seconds a block, by part: alone, where no two blocks overlap, and both lanes beside each other."""
        alone, ahead = entry.samples[0], entry.samples[self.ahead]
        parts = {_TRANSFORMER: alone.transformer, _MEMORY: alone.memory, _DECODE: alone.decode, ALONE: alone.whole}
        if self.ahead:
            parts |= {_BESIDE + _TRANSFORMER: ahead.transformer, _BESIDE + _DECODE: ahead.decode}
        return {part: s for part, s in parts.items() if part != _MEMORY or any(s)} | {self.whole: ahead.whole}

    def ms(self, variant: str, part: str) -> float | None:
        """The median in milliseconds; None where it was not measured."""
        sample = self.seconds.get(variant, {}).get(part)
        return None if sample is None else 1e3 * median_p99(sample)[0]

    def _parts(self) -> list[dict[str, Any]]:
        """A part of a block in one variant a row; a rehearsal has no rates: ``fps`` is None."""
        rows = []
        for variant, parts in self.seconds.items():
            for part, sample in parts.items():
                ms, p99 = (1e3 * each for each in median_p99(sample))
                theirs = None if variant == "torch" else self.ms("torch", part)
                row = {"variant": variant, "part": part, "ms": ms, "p99_ms": p99, "blocks": len(sample)}
                row["fps"] = 1e3 * self.frames_a_block / ms if self.run.on_gpu else None
                rows.append({**row, "x_torch": None if theirs is None else theirs / ms})
        return rows

    def _variant(self, entry: Entry) -> dict[str, Any]:
        """What holds for a variant as a whole; shares and joules are those with blocks begun ahead.

        ``graphs_failed``: the stage that could not be captured and why, where it was measured without graphs for it.
        """
        sample = None if entry.problem else entry.samples.get(self.ahead)
        joules = None if sample is None else sample.joules_a_block
        latents, frames = entry.errors or (None, None)
        verdict = "not yet held against torch" if entry.errors is None else "right"
        verdict += ", measured" if entry.samples else ", not yet measured"
        verdict += " without graphs, which failed" if entry.graphs_failed else ""
        return {
            "variant": entry.variant.name,
            "memory": entry.mode.value,
            "backend": entry.backend,
            "graphs": entry.graphs and self.run.on_gpu,
            "graphs_failed": entry.graphs_failed or None,
            "latents_error": latents,
            "frames_error": frames,
            "bound": None if entry.errors is None else self.run.bound,
            "idle": None if sample is None else sample.idle,
            "joules_a_frame": None if joules is None else joules / self.frames_a_block,
            "verdict": entry.problem or verdict,
        }

    def _baselines(self) -> list[dict[str, Any]]:
        """Another's code beside ours; None where it was not measured."""
        ours = self.ms(next(iter(self.seconds), ""), _DECODE)
        rows = [each.row(ours) for each in self.run.baselines]
        rows += [{"peer": name, "what": why} for name, why in self.run.missing.items()]
        return [dict.fromkeys(column.key for column in _BASELINES) | row for row in rows]

    def _resources(self) -> list[dict[str, Any]]:
        found, name = self.run.resources, self.run.entries[0].variant.name
        alone = f"{name}, alone on the device"
        of_torch = alone if self.run.on_gpu else "there is no GPU"
        clock = "host clock, from a new video whose prompt is encoded; other blocks begun ahead are included"
        figures = (
            ("device memory, steady", found["device"], "GB", of_torch),
            ("its growth over some steady blocks", found["growth"], "bytes", of_torch),
            ("its peak, loading included", found["peak"], "GB", of_torch),
            ("held by torch's allocator", found["reserved"], "GB", of_torch),
            ("the decoder's memory of a stream", found["decoder"], "GB", "counted by the decoder"),
            ("host memory of the process", found["host"], "GB", alone),
            ("time to the first frame, first video", found["first_frame_cold"], "s", clock),
            ("time to the first frame, later video", found["first_frame_warm"], "s", clock),
        )
        return [
            {"what": what, "value": value and value / (1e9 if unit == "GB" else 1), "unit": unit, "how": how}
            for what, value, unit, how in figures
        ]

    # ---------------------------------------------------------------- all else

    def _facts(self) -> dict[str, Any]:
        run, taken = self.run, self.run.model.taken
        recipe = {} if taken is None else taken.as_json()
        recipe.pop("model", None)  # where it is from is told already
        return {
            "passed": run.passed,
            "complete": run.complete,
            "result": run.on_gpu,
            "clock": run.clock if run.on_gpu else f"{run.clock}: no result",
            "model": {"source": run.model.source, **run.model.config.to_flat()},
            **recipe,
            "dtype": dtype_name(run.dtype),
            "backend": run.backend.name,
            "backend_reason": run.backend.reason,
            "float8_except": list(run.request.float8_except),
            "attention": [
                {"name": e.name, "reason": e.reason, "milliseconds": dict(e.timings), "rejected": dict(e.rejected)}
                for e in run.attention
            ],
            "convolutions": {str(s): {"name": e.name, "reason": e.reason} for s, e in run.convolutions.items()},
            "vae_tiles": run.request.vae_tiles,
            "lookahead": self.ahead,
            "rounds": run.rounds,
            "blocks": run.blocks,
            "order": run.order,
            "frames_per_block": self.frames_a_block,
            "absent": run.absent,
            "milliseconds": {
                variant: {part: [1e3 * each for each in s] for part, s in parts.items()}
                for variant, parts in self.seconds.items()
            },
            "peer_milliseconds": {each.name: [1e3 * s for s in each.seconds] for each in run.baselines if each.ok},
            "resources": run.resources,
        }

    def _notes(self) -> list[str]:
        run, vae, bands = self.run, self.run.model.vae, self.run.request.vae_tiles
        width, height = (size * vae.spatial_stride for size in run.model.config.latent_shape[:0:-1])
        names = ("over the cache", "over the text", "of the decoder", "over the cache in float8")
        used = zip(names, run.attention, strict=False)
        lines = [
            "" if run.complete else "Not complete: the run had not ended when this was written.",
            "" if run.on_gpu else "Times of the host clock on a CPU: a rehearsal, no results: no rates.",
            f"{run.model.source}; {width}x{height}, {dtype_name(run.dtype)}; steady state (window full, ids "
            f"saturated); {self.frames_a_block} frames a block, with the VAE and the copy to the host, without the "
            "text encoder.",
            f"Clock: {'the GPU events around every stage' if run.on_gpu else 'of the host'}. "
            f"{counted(run.rounds, 'round')} in which the variants take turns, {counted(run.blocks, 'block')} each: "
            "one at a time, of which the parts are told, then with others begun ahead. A whole block is the time "
            "between two arrivals on the host; idle: the share of it without any stage at work.",
            "x torch: the time of the torch variant over that of this one. Errors: relative, of one steady block, "
            "against the torch backend without graphs, which begins it from the same state.",
            f"Backend: {run.backend.name}, {run.backend.reason}.",
            *(f"Attention {place}: {each.name}, {each.reason}." for place, each in used),
            f"Convolutions of the decoder: {convolutions_in_words(run.convolutions)}.",
            f"The decoder works in {bands} bands of rows, that of the torch variant in one." if bands > 1 else "",
            *(
                f"GRAPHS FAILED in variant {e.variant.name}, whose times are without them: {e.graphs_failed}."
                for e in run.entries
                if e.graphs_failed
            ),
            "" if self.judged else "Goals are judged on a GPU alone, at the released sizes in bfloat16 or float8.",
            *(f"Not measured: {name}: {why}." for name, why in run.absent.items()),
        ]
        return [line for line in lines if line]
