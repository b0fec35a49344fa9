"""``echo-rt verify``: golden bundles, run through the code that ``generate`` uses, and the decoders of models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echo_rt.cli.arguments import Arguments, path_or, shared, table
from echo_rt.cli.outputs import Named, check_results
from echo_rt.cli.stdio import complain, describe, say
from echo_rt.errors import ConfigError, EchoError
from echo_rt.options import DEMO
from echo_rt.utils.signals import StopRequest

if TYPE_CHECKING:
    from echo_rt.verify.bundles import BundleReport


DESCRIPTION = """
Run golden bundles and compare every tensor with that of the published implementation. A BUNDLE is the folder of one, a
folder with bundles below it, a model folder, or demo for the model in the package. For a model, decode a few random
latents in groups of several sizes, which must all give the same frames. For both, show how close the decoder's other
dtypes are to float32.
"""
EPILOG = """
Exit codes: 0 all tensors are within their bounds; 1 one is not; 2 a folder cannot be run; the others run anyway.
"""
_SHARED = ("--device", "--dtype", "--float8-except", "--backend", "--no-graphs")
OPTIONS = {
    "check": (
        click.Argument(["bundles"], nargs=-1, required=True, type=path_or(DEMO), metavar="BUNDLE..."),
        *shared(_SHARED, dtype={"default": "float32", "help": "dtype to check (default float32)"}),
        *table("--dump DIR  write the computed tensors to DIR/BUNDLE/"),
    )
}


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Verify every bundle and print its tensors; 0 if all are within bounds, 1 if not, or the worst error's code."""
    if arguments.float8_except and arguments.dtype != "float8":
        raise ConfigError(f"--float8-except: expected --dtype float8 with it, got {arguments.dtype}")
    entries: list[dict[str, Any]] = []
    report |= {"passed": False, "bundles": entries}  # passed is set when the last one is through
    worst = 0
    with stop.importing():
        folders = _find_folders(arguments.bundles)
        if arguments.dump is not None:
            _check_dump(arguments.dump, folders)
        if arguments.float8_except and not any(map(_may_be_float8, folders)):
            from echo_rt.model.linear import float8_layers

            named = ", ".join(map(repr, arguments.float8_except))
            raise ConfigError(
                f"--float8-except: {named} matches no layer of what is verified: only bundles of a rollout have layers "
                f"that can be float8, {float8_layers()}"
            )
        from echo_rt.utils.device import parse_device
        from echo_rt.utils.threads import share_cpu
        from echo_rt.verify.bundles import verify_bundle
    names = ("device", "dtype", "backend", "dump", "graphs", "float8_except")
    for path in folders:
        try:
            with stop.interruptible(), share_cpu(parse_device(arguments.device)):
                bundle = verify_bundle(path, **{name: getattr(arguments, name) for name in names})
        except EchoError as error:
            text, code = describe(error)
            entries.append({"name": path.resolve().name, "passed": False, "error": text})
            complain(f"echo-rt: error: {text}")
        else:
            code = 0 if bundle.passed else 1
            entries.append(_as_json(bundle))
            if not arguments.json:
                say(*_page(bundle))
        worst = max(worst, code)
    report["passed"] = worst == 0
    return worst


def _find_folders(named: Sequence[Path | str]) -> list[Path]:
    """The bundles at and below the ``named`` folders; files, which ``golden/*`` can name too, are left out."""
    from echo_rt.verify.bundles import find_bundles
    from echo_rt.weights.folder import DEMO_FOLDER

    paths = [DEMO_FOLDER if path == DEMO else Path(path) for path in named]  # ./demo is Path("demo")
    files = [path for path in paths if os.path.isfile(path)]  # pathlib raises for too long a name
    for path in files:
        complain(f"echo-rt: {path}: a file, not the folder of a bundle; left out")
    if len(files) == len(paths):
        raise ConfigError(f"expected the folder of a golden bundle or of a model, got the file {str(files[0])!r}")
    return [found for path in paths if path not in files for found in find_bundles(path) or [path]]


def _check_dump(dump: Path, folders: Sequence[Path]) -> None:
    names = [path.resolve().name for path in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--dump: expected bundles of different names, got two called {twice!r}")
    for path, name in zip(folders, names, strict=True):
        check_results(Named("--dump", dump / name), [Named("the bundle", path)])


def _may_be_float8(path: Path) -> bool:
    """Whether a folder has layers that can be float8; a rollout checks its patterns when it runs."""
    from echo_rt.verify.bundles import FLOAT8_KINDS, read_config
    from echo_rt.weights.folder import holds_vae

    try:
        return not holds_vae(path) and read_config(path)["kind"] in FLOAT8_KINDS
    except EchoError:
        return True  # the error is reported when it runs


def _as_json(bundle: BundleReport) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "kind": bundle.kind,
        "backend": bundle.backend.name,
        "backend_reason": bundle.backend.reason,
        "passed": bundle.passed,
        "tensors": [{**vars(row), "error": _number(row.error), "ok": row.ok} for row in bundle.rows],
        "precisions": [
            {"dtype": each.dtype, "psnr": _number(each.psnr), "ssim": _number(each.ssim)} for each in bundle.precisions
        ],
        **({} if bundle.taken is None else bundle.taken.as_json()),
    }


def _number(value: float | None) -> float | None:
    # JSON has no infinity and no NaN.
    return value if value is not None and math.isfinite(value) else None


def _page(bundle: BundleReport) -> Iterator[str]:
    wide = max(len(name) for name in ("tensor", *(row.name for row in bundle.rows)))
    yield f"{bundle.name} ({bundle.kind})"
    yield f"  {'tensor':<{wide}}  {'error':>8}  {'bound':>8}"
    for row in bundle.rows:
        yield f"  {row.name:<{wide}}  {row.error:8.2e}  {row.bound:8.1e}  {'ok' if row.ok else 'off'}"
    yield f"  backend {bundle.backend.name}: {bundle.backend.reason}"
    if bundle.taken is not None:
        yield f"  {bundle.taken.line}"
    for each in bundle.precisions:
        ssim = "-" if each.ssim is None else f"{each.ssim:.5f}"
        yield f"  video in {each.dtype} beside float32: PSNR {each.psnr:.1f} dB, SSIM {ssim}"
    good, state = sum(row.ok for row in bundle.rows), "passed" if bundle.passed else "failed"
    yield f"{bundle.name}: {state}, {good} of {len(bundle.rows)} tensors within bounds"
    yield ""
