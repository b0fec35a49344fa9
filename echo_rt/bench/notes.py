"""How the figures of a run were come by, in sentences: what stands below its tables."""

from __future__ import annotations

from echo_rt.bench.run import Run
from echo_rt.bench.timing import DEVICE_CLOCK
from echo_rt.engine.decoding import convolutions_in_words
from echo_rt.utils.device import dtype_name
from echo_rt.utils.wording import counted


def notes(run: Run, *, frames_a_block: int, judged: bool) -> list[str]:
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
