"""``echo-rt verify``: golden bundles, run through the code that ``generate`` uses, and the decoders of models."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.cli.arguments import parse_path
from echo_rt.cli.model_options import BACKEND_HELP, add_float8_except, add_no_graphs
from echo_rt.cli.outputs import Named, check_apart
from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import complain, describe, say
from echo_rt.errors import ConfigError, EchoError
from echo_rt.options import DTYPE_NAMES

if TYPE_CHECKING:
    from echo_rt.verify.bundles import BundleReport


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="hold golden bundles, or a model's decoder, against this installation",
        description="Run golden bundles and compare every tensor with the published implementation's; of a model's "
        "folder, decode a few random latents in groups of several sizes, which must not show. Of both, show how other "
        "precisions of the decoder look beside float32. "
        "Exit code 0 if all are within bounds, 1 if not, 2 if a folder cannot be run; the others are run all the same.",
    )
    parser.add_argument(
        "bundles",
        nargs="+",
        type=parse_path,
        metavar="BUNDLE",
        help="folder of a golden bundle, of several in folders below it, or of a model",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float32", help="default: float32")
    add_float8_except(parser)
    parser.add_argument("--backend", help=BACKEND_HELP)
    add_no_graphs(parser)
    parser.add_argument("--dump", type=parse_path, metavar="DIR", help="keep what was computed in DIR/BUNDLE/")
    parser.set_defaults(quiet=True)  # what a recipe's bundle ran by stands below its tensors
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Verify every bundle and print its tensors; 0 if all are within bounds, 1 if not, or the worst error's code."""
    if arguments.float8_except and arguments.dtype != "float8":
        raise ConfigError(f"--float8-except: expected --dtype float8 with it, got {arguments.dtype}")
    report["passed"] = False  # until the last one is through
    entries: list[dict[str, Any]] = []
    report["bundles"] = entries
    worst = 0
    # A bundle is a folder; `verify golden/*` also names the README beside them.
    files = [path for path in arguments.bundles if os.path.isfile(path)]  # pathlib raises for too long a name
    folders = [path for path in arguments.bundles if path not in files]
    for path in files:
        complain(f"echo-rt: {path}: a file, not the folder of a bundle; left out")
    if not folders:
        raise ConfigError(f"expected the folder of a golden bundle or of a model, got the file {str(files[0])!r}")
    with stop.interruptible():
        from echo_rt.verify.bundles import find_bundles

        folders = [found for path in folders for found in find_bundles(path) or [path]]
    names = [path.resolve().name for path in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if arguments.dump is not None and twice is not None:
        raise ConfigError(f"--dump: expected bundles of different names, got two called {twice!r}")
    if arguments.dump is not None:
        from echo_rt.utils.atomic_file import check_results_folder

        for path, name in zip(folders, names, strict=True):
            check_apart(Named("--dump", arguments.dump / name), [Named("the bundle", path)])
            check_results_folder(arguments.dump / name)
    with stop.interruptible():
        _check_patterns(arguments.float8_except, folders)
    for path in folders:
        try:
            with stop.interruptible():
                from echo_rt.utils.device import parse_device
                from echo_rt.utils.threads import share_cpu
                from echo_rt.verify.bundles import verify_bundle
                from echo_rt.verify.model import verify_model
                from echo_rt.weights.folder import holds_vae

                facts = {name: getattr(arguments, name) for name in ("device", "dtype", "backend", "dump")}
                with share_cpu(parse_device(arguments.device)):
                    if holds_vae(path):
                        bundle = verify_model(path, **facts)
                    else:
                        bundle = verify_bundle(
                            path, float8_except=arguments.float8_except, graphs=arguments.graphs, **facts
                        )
        except EchoError as error:
            text, code = describe(error)
            worst = max(worst, code)
            entries.append({"name": path.resolve().name, "passed": False, "error": text})
            complain(f"echo-rt: error: {text}")
            continue
        worst = max(worst, 0 if bundle.passed else 1)
        entries.append(_as_json(bundle))
        if not arguments.json:
            _print(bundle)
    report["passed"] = worst == 0
    return worst


def _check_patterns(patterns: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises ``ConfigError`` for ``--float8-except`` where nothing has layers that could be float8.

    Whether a pattern matches those of a rollout is seen when that is run.
    """
    if not patterns:
        return
    from echo_rt.model.linear import float8_layers
    from echo_rt.verify.bundles import has_float8_layers
    from echo_rt.weights.folder import holds_vae

    for path in folders:
        try:
            if not holds_vae(path) and has_float8_layers(path):
                return
        except EchoError:
            return  # when its turn comes, it is refused for what it is
    named = ", ".join(map(repr, patterns))
    raise ConfigError(
        f"--float8-except: {named} matches no layer of what is verified: only bundles of a rollout have layers "
        f"that can be float8, {float8_layers()}"
    )


def _as_json(bundle: BundleReport) -> dict[str, Any]:
    # JSON has no infinity and no NaN: an error that is not a number is null.
    tensors = [
        {
            "name": row.name,
            "error": _number(row.error),
            "bound": row.bound,
            "ok": row.ok,
        }
        for row in bundle.rows
    ]
    precisions = [
        {"dtype": each.dtype, "psnr": _number(each.quality.psnr), "ssim": _number(each.quality.ssim)}
        for each in bundle.precisions
    ]
    return {
        "name": bundle.name,
        "kind": bundle.kind,
        "backend": bundle.backend.name,
        "backend_reason": bundle.backend.reason,
        "passed": bundle.passed,
        "tensors": tensors,
        "precisions": precisions,
        **({} if bundle.taken is None else bundle.taken.as_json()),
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print(bundle: BundleReport) -> None:
    wide = max(len(name) for name in ("tensor", *(row.name for row in bundle.rows)))
    lines = [f"{bundle.name} ({bundle.kind})", f"  {'tensor':<{wide}}  {'error':>8}  {'bound':>8}"]
    for row in bundle.rows:
        lines.append(f"  {row.name:<{wide}}  {row.error:8.2e}  {row.bound:8.1e}  {'ok' if row.ok else 'off'}")
    lines.append(f"  backend {bundle.backend.name}: {bundle.backend.reason}")
    if bundle.taken is not None:
        lines.append(f"  {bundle.taken.line}")
    for each in bundle.precisions:
        ssim = "-" if each.quality.ssim is None else f"{each.quality.ssim:.5f}"
        lines.append(f"  video in {each.dtype} beside float32: PSNR {each.quality.psnr:.1f} dB, SSIM {ssim}")
    good, state = sum(row.ok for row in bundle.rows), "passed" if bundle.passed else "failed"
    say("\n".join([*lines, f"{bundle.name}: {state}, {good} of {len(bundle.rows)} tensors within bounds\n"]))
