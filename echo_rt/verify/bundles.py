"""Golden bundles and the decoders of models, compared with what they must compute.

The error of a tensor is ``‖actual - expected‖ / ‖expected‖``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from echo_rt.errors import EchoError, WeightsError
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.device import FLOAT8, parse_device, parse_dtype, working_dtype
from echo_rt.verify.decoder import Precision, folder_decoding
from echo_rt.verify.folder import FLOAT8_KINDS, RECIPE, Bundle, read_config
from echo_rt.verify.kinds import RUN
from echo_rt.weights.choice import Taken
from echo_rt.weights.files import open_tensors

# Largest error allowed in each dtype. float16 has eight times bfloat16's precision; its bound is tighter to match.
# float8 is that of a rollout's linear layers: elsewhere bfloat16's bound holds.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3, FLOAT8: 6e-2}
RECIPE_BOUNDS = BOUNDS | {torch.float32: 1e-5}


def bound_between(dtype: torch.dtype) -> float:
    """The largest error between two results in ``dtype``: both are rounded, in a bundle only one of them."""
    return 2 * BOUNDS[dtype]


@dataclass(frozen=True)
class Row:
    """One tensor of a bundle: its relative error and the bound for the dtype it was computed in."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        # A NaN error is not below the bound.
        return self.error <= self.bound


@dataclass(frozen=True)
class BundleReport:
    """All tensors of one bundle, and of a VAE its video in lower precisions, for which there is no bound.

    ``taken``: the recipe and the weights that a recipe's bundle ran by.
    """

    name: str
    kind: str
    backend: Backend
    rows: tuple[Row, ...]
    precisions: tuple[Precision, ...] = ()
    taken: Taken | None = None

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def verify_bundle(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str | None = None,
    dump: str | Path | None = None,
    graphs: bool | None = None,
    float8_except: Sequence[str] = (),
) -> BundleReport:
    """Run the bundle in folder ``path`` and compare every expected tensor; one that was not computed is infinitely off.

    ``dump``: a folder; all computed tensors go to ``<dump>/<bundle name>/actual.safetensors``. ``graphs``: use CUDA
    graphs (None: on a GPU, yes). ``float8_except``: patterns of layers that stay in bfloat16 in dtype float8. Raises
    :class:`EchoError` if the bundle cannot be run at all.
    """
    folder, place = Path(path), parse_device(device)
    config = read_config(folder)
    precision = parse_dtype(dtype, place)
    if config["kind"] not in FLOAT8_KINDS:
        precision = working_dtype(precision)
    inputs, expected = (open_tensors(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    try:
        computed = RUN[config["kind"]](
            Bundle(folder, config, inputs, expected, place, precision, backend, graphs, float8_except)
        )
    except KeyError as missing:
        raise WeightsError(f"{folder}/config.json lacks {missing.args[0]!r}") from None
    actual = computed.tensors
    bound = (RECIPE_BOUNDS if config["kind"] == RECIPE else BOUNDS)[precision]
    errors = {key: relative_error(actual[key], expected[key]) if key in actual else float("inf") for key in expected}
    rows = tuple(Row(key, error, bound) for key, error in errors.items())
    _dump(dump, folder, actual)
    return BundleReport(
        folder.resolve().name, config["kind"], computed.backend, rows, computed.precisions, computed.taken
    )


def verify_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str | None = None,
    dump: str | Path | None = None,
) -> BundleReport:
    """Decode a few random latents with the VAE of the model in folder ``path``, in groups of several sizes.

    All groupings must give the same frames: the error of each is that of its worst frame against all latents in one
    call. The report also compares each precision with float32. ``dump``: a folder; the videos go to
    ``<dump>/<folder's name>/actual.safetensors``. Raises :class:`EchoError` if the VAE cannot be run at all.
    """
    folder, place = Path(path), parse_device(device)
    chosen, precision = choose_backend(backend, place), working_dtype(parse_dtype(dtype, place))
    decoding = folder_decoding(folder, chosen.ops, place)
    at_once, grouped = decoding.in_groups(precision)
    bound = bound_between(precision)
    rows = tuple(Row(f"video {name}", _worst_frame(video, at_once), bound) for name, video in grouped.items())
    _dump(dump, folder, {"video": at_once, **{f"video {key}": video for key, video in grouped.items()}})
    return BundleReport(folder.resolve().name, "model", chosen, rows, decoding.precisions())


def _worst_frame(video: Tensor, expected: Tensor) -> float:
    """The largest relative error of a frame: in the error of the whole video a seam would be lost."""
    if video.shape != expected.shape:
        return float("inf")
    errors = [relative_error(one, other) for one, other in zip(video, expected, strict=True)]
    return float(torch.tensor(errors).max())  # a NaN is the largest


def _dump(dump: str | Path | None, folder: Path, actual: Mapping[str, Tensor]) -> None:
    """Write the computed tensors to ``<dump>/<folder's name>/actual.safetensors``."""
    if dump is None:
        return
    target = Path(dump) / folder.resolve().name
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EchoError(f"cannot make the folder {target}: {error.strerror}") from None
    write_whole(target / "actual.safetensors", save({name: tensor.contiguous() for name, tensor in actual.items()}))
