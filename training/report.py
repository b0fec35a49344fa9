"""``python -m training.report``: put what ``measure`` and ``claim`` found into docs/memory.md, as tables and plots."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_rt.utils.wording import counted
from training.measure import MODES

Found = dict[str, Any]
_BALLOON = ("lane", "colour")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(value: float | None) -> str:
    """``98.4 %``, or a dash for nothing."""
    return "-" if value is None else f"{100 * value:.1f} %"


def prompts(found: Found) -> str:
    """How often frames show what the prompt names."""
    keys = ("colour", "shape", "place", "all")
    rows = [
        [
            f"{kind}, {each['blocks']} blocks",
            *(percent(each[key]) for key in keys),
            f"{percent(each['first block'])} of {each['first blocks']}",
        ]
        for kind, each in found["adherence"].items()
    ]
    switch = found["switches"]
    text = (
        f"After a prompt switch ({switch['streams']} streams), {percent(switch['second block'])} of the second blocks "
        f"and {percent(switch['later blocks'])} of later ones show the new prompt; the balloon is that of before in "
        f"{percent(switch['balloon kept'])}."
    )
    return f"{table(['prompts', *keys, 'first block'], rows)}\n\n{text}"


def recall(found: Found) -> str:
    """What the three modes of the same weights remember."""
    rows = []
    for mode in MODES:
        free, given = found[f"recall {mode}"], found[f"given {mode}"]
        lane, colour = (statistics.mean(free[f"{name} by day"]) for name in ("lane", "colour"))
        rows.append([f"`{mode}`", *map(percent, (given["lane"], given["colour"], lane, colour, free["both"]))])
    streams, returns = found["given evolve"]["streams"], found["recall evolve"]["returns"]
    head = [f"{case}: {what}" for case in (f"{streams} given days", f"{returns} free returns") for what in _BALLOON]
    right = " and ".join(
        f"{round(each['both'] * each['returns'])} of {each['returns']} returns over {1 + len(each['lane by day'])} "
        f"days of {counted(each['streams'], 'stream')}"
        for each in (found["recall of many"], found["recall over days"])
    )
    text = f"Chance: 50 %, 25 %, and 12.5 % for both. With `evolve`, {right} are right."
    return f"{table(['memory', *head, 'both'], rows)}\n\n{text}"


def drift(found: Found) -> str:
    """The second day of a long stream beside its last."""
    each = found["drift"]
    rows = [[name, *(f"{value:.4f}" for value in each[name])] for name in ("mean", "spread")]
    text = (
        f"The two days' pixels differ by {each['difference']:.4f} in the mean; {percent(each['prompt followed'])} of "
        "the frames read on the last day show the prompt."
    )
    return f"{table(['pixels', 'day 2', 'day {days}'.format(**each)], rows)}\n\n{text}"


def precision(found: Found) -> str:
    """What a lower precision costs."""
    rows = [
        [f"`{dtype}`", "-" if each["PSNR"] is None else f"{each['PSNR']:.1f} dB", percent(each["recall"])]
        for dtype, each in found["precision"].items()
    ]
    return table(["dtype", "first 3 s beside float32", "balloon remembered"], rows)


def positions(found: Found) -> str:
    """Bounded ids and ids that run on."""
    each = found["positions"]
    rows = [[name, *map(percent, each[name])] for name in ("bounded", "running on")]
    return table(["temporal ids", *(f"day {day + 1}" for day in each["day"])], rows)


def claim(runs: Sequence[Found]) -> str:
    """Recall by hidden time for each kind of model, mean and range over seeds; how often a balloon is shown."""
    kinds = list(dict.fromkeys(each["kind"] for each in runs))
    hidden = [row["hidden frames"] for row in runs[0]["returns"]]
    recalled, seen = [], []
    for kind in kinds:
        of_kind = [each for each in runs if each["kind"] == kind]
        columns = list(zip(*(each["returns"] for each in of_kind), strict=True))
        name = f"{kind}, {counted(len(of_kind), 'seed')} of {of_kind[0]['steps']} steps"
        recalled.append([name, *(" / ".join(_mean_and_range(column, key) for key in _BALLOON) for column in columns)])
        seen.append([name, *(_mean_and_range(column, "shown") for column in columns[1:])])
    first = table(["model", *(f"hidden {frames} frames: lane / colour" for frames in hidden)], recalled)
    second = table(["share of streams with a balloon", *(f"hidden {frames} frames" for frames in hidden[1:])], seen)
    return f"{first}\n\n{second}"


def _mean_and_range(rows: Sequence[Found], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    spread = f" ({100 * min(values):.0f}-{100 * max(values):.0f})" if len(set(values)) > 1 else ""
    return f"{100 * statistics.mean(values):.0f} %{spread}" if values else "-"


def machine(found: Found) -> str:
    """Where and how long it was measured."""
    frames = found["drift"]["frames a second"]
    return f"Measured on {found['machine']}, in {found['minutes']:.0f} minutes; {frames:.0f} frames a second."


def plots(found: Found, runs: Sequence[Found], folder: Path) -> None:
    """Draw recall by day, recall by hidden time and the memory of one stream as SVG files in ``folder``."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "echo-rt"  # the same plot is the same file
    from matplotlib import pyplot

    def draw(name: str, across: str, up: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
        for label, x, y in lines:
            axes.plot(x, y, marker=".", label=label)
        axes.set(xlabel=across, ylabel=up, ylim=(0, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    by_day = [(mode, found[f"recall {mode}"]["colour by day"]) for mode in MODES]
    draw(
        "recall-by-day",
        "day",
        "share with the first day's colour",
        [(mode, range(2, 2 + len(shares)), shares) for mode, shares in by_day],
    )
    memory = found["memory"]
    draw(
        "memory-by-block",
        "update of the memory, one a block",
        "",
        [
            ("size of the memory (root mean square)", range(len(memory["size"])), memory["size"]),
            ("share of the old memory that is kept", range(len(memory["kept"])), memory["kept"]),
        ],
    )
    lines = []
    for kind in dict.fromkeys(each["kind"] for each in runs):
        rows = [each["returns"] for each in runs if each["kind"] == kind]
        means = [statistics.mean(row["colour"] or 0.0 for row in column) for column in zip(*rows, strict=True)]
        lines.append((kind, [row["hidden frames"] for row in rows[0]], means))
    if lines:
        draw("recall-by-hidden-time", "frames for which the balloon was hidden", "share with the right colour", lines)


def main() -> None:
    """Replace the tables between the marks of the page, and the plots beside it."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description=main.__doc__)
    parser.add_argument("--measured", type=Path, default=Path("build/measured.json"), help="(default %(default)s)")
    parser.add_argument("--claim", type=Path, default=Path("build/claim.json"), help="(default %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/memory.md"), help="(default %(default)s)")
    arguments = parser.parse_args()
    found = json.loads(arguments.measured.read_text())
    runs = json.loads(arguments.claim.read_text()) if arguments.claim.exists() else []
    texts = {make.__name__: make(found) for make in (prompts, recall, drift, precision, positions, machine)}
    if runs:  # else the page keeps what it has
        texts["claim"] = claim(runs)
    page = arguments.page.read_text()
    for name, text in texts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{arguments.page}: expected a place for the table {name!r}, found none")
        page = f"{before}{mark}\n{text}\n\n{end}{after}"
    arguments.page.write_text(page)
    (arguments.page.parent / "images").mkdir(exist_ok=True)
    plots(found, runs, arguments.page.parent / "images")


if __name__ == "__main__":
    main()
