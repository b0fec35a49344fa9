"""What a day would take, by a measured run: multiplication, and said to be no more."""

from __future__ import annotations

from dataclasses import dataclass

from echo_rt.utils.wording import counted

_DAY = 24 * 3600.0
_JOULES_A_KWH = 3.6e6
SNAPSHOT_SECONDS = 3600.0  # between two snapshots


@dataclass(frozen=True)
class Measured:
    """Means and sizes of a run. Bytes are of one block's frames and latents, and of one whole snapshot."""

    blocks: int
    seconds_a_block: float
    frames_a_block: int
    frame_rate: int
    joules_a_block: float | None
    frame_bytes: int
    latent_bytes: int
    snapshot_bytes: int
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Figure:
    """One line: ``value`` is None where it was not measured."""

    what: str
    value: float | None
    unit: str
    how: str


def a_day(run: Measured) -> list[Figure]:
    """24 hours at the mean pace of ``run``, each figure with how it comes about."""
    blocks = _DAY / run.seconds_a_block
    frames = blocks * run.frames_a_block
    by = f"extrapolated from {counted(run.blocks, 'measured block')}"
    energy = None if run.joules_a_block is None else blocks * run.joules_a_block / _JOULES_A_KWH
    snapshots = _DAY / SNAPSHOT_SECONDS
    resident = f"measured after {counted(run.blocks, 'block')}, taken to stay"
    return [
        Figure("blocks", blocks, "", by),
        Figure("frames", frames, "", by),
        Figure("video", frames / run.frame_rate / 3600, "h", f"{by}; at {run.frame_rate} frames a second"),
        Figure("energy of the GPU", energy, "kWh", by if energy is not None else "no board told its energy"),
        Figure(
            "frames, as bytes", blocks * run.frame_bytes / 1e9, "GB", f"{by}; raw RGB: of an MP4 the content decides"
        ),
        Figure("latents", blocks * run.latent_bytes / 1e9, "GB", f"{by}; float32, as a file of latents holds them"),
        Figure(
            "snapshots",
            snapshots * run.snapshot_bytes / 1e9,
            "GB",
            f"{snapshots:.0f} of {run.snapshot_bytes / 1e9:.3g} GB, one an hour, all kept; from the size of one",
        ),
        Figure("host memory", None if run.host_bytes is None else run.host_bytes / 1e9, "GB", resident),
        Figure(
            "device memory",
            None if run.device_bytes is None else run.device_bytes / 1e9,
            "GB",
            resident if run.device_bytes is not None else "there is no GPU",
        ),
    ]
