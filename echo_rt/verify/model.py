"""The folder of a model, of which nobody has computed what to expect: its VAE's decoder, held against itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from echo_rt.ops.backends import choose_backend
from echo_rt.utils.device import parse_device, parse_dtype, working_dtype
from echo_rt.verify.bundles import BundleReport, Row, bound_between, dump_tensors, relative_error
from echo_rt.verify.decoder import folder_decoding


def verify_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str | None = None,
    dump: str | Path | None = None,
) -> BundleReport:
    """Decode a few random latents with the VAE in folder ``path``, in ``dtype`` in groups of several sizes.

    How latents are grouped must not show: the error of each grouping is that of its worst frame, against all latents in
    one call. The report also has how each precision looks beside float32. ``dump``: a folder; the videos go to
    ``<dump>/<folder's name>/actual.safetensors``. Raises :class:`EchoError` where the VAE cannot be run at all.
    """
    folder, place = Path(path), parse_device(device)
    chosen, precision = choose_backend(backend, place), working_dtype(parse_dtype(dtype, place))
    decoding = folder_decoding(folder, chosen.ops, place)
    at_once, grouped = decoding.in_groups(precision)
    bound = bound_between(precision)
    rows = [Row(f"video {name}", _worst_frame(video, at_once), bound) for name, video in grouped.items()]
    name = folder.resolve().name
    if dump is not None:
        dump_tensors(Path(dump) / name, {"video": at_once, **{f"video {key}": video for key, video in grouped.items()}})
    return BundleReport(name=name, kind="model", backend=chosen, rows=tuple(rows), precisions=decoding.precisions())


def _worst_frame(video: Tensor, expected: Tensor) -> float:
    """The largest of the frames' relative errors: over all of them a seam would be lost."""
    if video.shape != expected.shape:
        return float("inf")
    errors = [relative_error(one, other) for one, other in zip(video, expected, strict=True)]
    return float(torch.tensor(errors).max())  # a NaN is the largest
