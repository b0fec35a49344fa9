"""What attention in float8 costs in accuracy: ``python bench/float8_attention.py --out DIR``, on a CPU.

Every way to quantize q, k, v and the weights P is simulated in place of the model's attention, in all layers: on all
rollout and recipe bundles beside float8 products alone (one bound holds for both together), and in the demo model.
The second row is what the runtime does. The last tables tell the error where one layer and one pass alone attend in
float8, everything else being float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _checkout
import torch
from golden import homes
from torch import Tensor

from echo_rt import Runtime
from echo_rt.bench.tables import columns, environment
from echo_rt.engine.state import BlockCache, WindowCache
from echo_rt.model.transformer import Transformer
from echo_rt.ops.float8 import FLOAT8_MAX
from echo_rt.utils.device import FLOAT8
from echo_rt.verify.bundles import BOUNDS, FLOAT8_KINDS, find_bundles, read_config, verify_bundle
from training.measure import first_seconds, psnr, recall

CONTEXT = -1  # the pass after the last denoising step; the pass of a prompt switch counts as one
COLUMNS = columns(
    "name|attention", "latents|latents|.2e", "memory|memory|.2e", "recipes|recipes' latents|.2e", "bound|of bound|.0%",
    "psnr|demo, dB|.1f", "least|least|.1f", "recall|balloon|.0%",
)  # fmt: skip
_PASSES = ("step 0", "step 1", "step 2", "step 3", "context", "all")
ERRORS, DECIBELS = (columns("layer|layer", *(f"{name}|{name}|{form}" for name in _PASSES)) for form in (".1e", ".1f"))
_KEYS = 128  # keys of a block, as the libraries cut them
_DEPTH = 32  # products that one instruction sums
_WEIGHT_SCALE = 256.0  # P is at most 1


@dataclass(frozen=True)
class Scheme:
    """Quantized attention, computed with float32 sums.

    ``qk`` and ``v``: what shares a scale (``none`` leaves numbers as they are, ``one`` has scale 1). ``p``: whether the
    weights are quantized; their sum is not. ``smooth``: keys without the mean of all keys. ``int8``: q and k in int8
    instead of e4m3. ``sums``: float32, or as Hopper's instructions sum: 14 bits, truncated, over all keys (``short``)
    or over one block of keys (``two-level``).
    """

    name: str
    qk: str
    v: str
    p: bool = True
    smooth: bool = False
    int8: bool = False
    sums: str = "float32"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [n, H, d]``, ``k, v [m, H, d]`` -> ``[n, H·d]`` in q's dtype."""
        q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
        if self.smooth:
            k = k - k.mean(0)
        q, k, v = rounded(q, self.qk, self.int8), rounded(k, self.qk, self.int8), rounded(v, self.v)
        q, k, v = q.transpose(0, 1) * q.shape[-1] ** -0.5, k.permute(1, 2, 0), v.transpose(0, 1)
        scores = q @ k if self.int8 else self._sum(q, k, "short" if self.sums == "two-level" else self.sums)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total = weights.sum(-1, keepdim=True)
        if self.p:
            weights = (weights * _WEIGHT_SCALE).to(FLOAT8).float() / _WEIGHT_SCALE
        return (self._sum(weights, v, self.sums) / total).transpose(0, 1).flatten(1).to(dtype)

    @staticmethod
    def _sum(a: Tensor, b: Tensor, sums: str) -> Tensor:
        if sums == "float32":
            return a @ b
        total = torch.zeros(())
        for some, others in zip(a.split(_KEYS, -1), b.split(_KEYS, -2), strict=True):
            part = torch.zeros(()) if sums == "two-level" else total
            for left, right in zip(some.split(_DEPTH, -1), others.split(_DEPTH, -2), strict=True):
                part = truncated(part + left @ right)
            total = total + part if sums == "two-level" else part
        return total


def truncated(x: Tensor) -> Tensor:
    """Float32 ``x`` without the last 10 of its 23 bits, as tensor cores keep a sum of float8 products."""
    return (x.contiguous().view(torch.int32) & ~0x3FF).view(torch.float32)


def rounded(x: Tensor, shared: str, int8: bool = False) -> Tensor:
    """``x [n, H, d]`` quantized with one scale for what is ``shared``, and back in float32."""
    if shared == "none":
        return x
    if shared == "block of keys":
        return torch.cat([rounded(some, "head", int8) for some in x.split(_KEYS)])
    dims = {"one": (), "tensor": (0, 1, 2), "head": (0, 2), "token": (2,), "channel": (0,)}[shared]
    largest = x.abs().amax(dims, keepdim=True) if dims else torch.tensor(FLOAT8_MAX)
    scale = largest.clamp(min=2.0**-100) / (127 if int8 else FLOAT8_MAX)
    return (
        (x / scale).round() * scale if int8 else (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float() * scale
    )


SCHEMES = (
    Scheme("q, k alone, by token", "token", "none", p=False),
    Scheme("v alone, by channel", "none", "channel", p=False),
    Scheme("P alone", "none", "none"),
    Scheme("scale 1", "one", "one"),
    Scheme("by tensor", "tensor", "tensor"),
    Scheme("by head", "head", "head"),
    Scheme("by block of keys", "block of keys", "block of keys"),
    Scheme("by token", "token", "token"),
    Scheme("by head, v by channel", "head", "channel"),
    Scheme("by block, v by channel", "block of keys", "channel"),
    Scheme("by head, k smoothed", "head", "head", smooth=True),
    Scheme("by block, k smoothed, v by channel", "block of keys", "channel", smooth=True),
    Scheme("... q, k in int8", "block of keys", "channel", smooth=True, int8=True),
    Scheme("by head, sums of 14 bits", "head", "head", sums="short"),
    Scheme("by head, two-level sums", "head", "head", sums="two-level"),
    Scheme("scale 1, sums of 14 bits", "one", "one", sums="short"),
)  # fmt: skip
CHOSEN = SCHEMES[-1]
BUILT = "as built"
NO_ATTENTION = ("*.attention",)


@contextmanager
def attending(scheme: Scheme, where: Callable[[int, int], bool] = lambda layer, step: True) -> Iterator[None]:
    """Have self-attention follow ``scheme`` in each layer and pass that ``where`` names."""
    now = CONTEXT
    caches, flow = (BlockCache, WindowCache), Transformer.flow
    own = {cache: cache.attend for cache in caches}

    def attend(self: Any, index: int, q: Tensor) -> Tensor:
        with patch.object(self, "_attention", scheme if where(index, now) else self._attention):
            return own[type(self)](self, index, q)

    def denoise(self: Any, latents: Tensor, timestep: int, *rest: Any) -> Tensor:
        nonlocal now
        now = timestep
        try:
            return flow(self, latents, timestep, *rest)
        finally:
            now = CONTEXT

    with ExitStack() as stack:
        for cache in caches:
            stack.enter_context(patch.object(cache, "attend", attend))
        stack.enter_context(patch.object(Transformer, "flow", denoise))
        yield


def worst(bundles: Sequence[Path], dtype: str, kept: Sequence[str] = ()) -> dict[str, float]:
    """The largest errors of the bundles' tensors, by kind of tensor, and the largest share of a bound."""
    found: dict[str, float] = {}
    for folder in bundles:
        kind = read_config(folder)["kind"]
        for row in verify_bundle(folder, device="cpu", dtype=dtype, backend="torch", float8_except=kept).rows:
            name = "memory" if row.name.startswith("memory") else "latents" if kind == "rollout" else "recipes"
            found[name] = max(found.get(name, 0.0), row.error)
    return found | {"bound": max(found.values()) / BOUNDS[FLOAT8]}


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Simulate and write; whether the chosen scheme is within the bound, and the page."""
    header, prompts = environment("cpu"), 1 if arguments.quick else 7
    bundles = [each for home in homes(arguments.quick) for each in find_bundles(home)]
    kinds = {each.name: (each, kind) for each in bundles if (kind := read_config(each)["kind"]) in FLOAT8_KINDS}
    bundles = [each for each, _ in kinds.values()]
    rollouts = [each for each, kind in kinds.values() if kind == "rollout"]
    rows: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    notes = [f"{len(bundles)} bundles; the demo model: {prompts} prompts, the median and the least of them."]

    def save(passed: bool) -> str:
        tables = {
            "Attention in float8 beside float8 products": (rows, COLUMNS),
            "Error of the rollouts, one place in float8": (places, ERRORS),
            "PSNR of the demo model, one place in float8": (seen, DECIBELS),
        }
        title = "Attention in float8, simulated"
        return _checkout.save(arguments.out, "float8_attention", title, header, tables, notes, passed=passed)

    with ExitStack() as stack:

        def demo(dtype: str, kept: Sequence[str] = ()) -> Runtime:
            options = {"device": "cpu", "backend": "torch", "dtype": dtype, "float8_except": kept}
            return stack.enter_context(Runtime.from_pretrained("demo", **options))

        exact, products, whole = demo("float32"), demo("float8", NO_ATTENTION), demo("float8")
        expected = first_seconds(exact, prompts)

        def add(name: str, runtime: Runtime, kept: Sequence[str], scheme: Scheme | None = None) -> None:
            _checkout.say(name)
            rows.append({"name": name} | worst(bundles, "float8", kept))
            each = sorted(map(psnr, first_seconds(runtime, prompts), expected))
            # A stream whose balloon or object turns out another one is far off: the median prompt, and the worst.
            rows[-1] |= {"psnr": statistics.median(each), "least": each[0], "recall": None}
            if scheme in (None, CHOSEN):
                rows[-1] |= {"recall": recall(runtime, prompts, 3)["both"]}
            save(False)  # the time may run out

        add("float8 products alone", products, NO_ATTENTION)
        add(BUILT, whole, ())
        for scheme in (CHOSEN,) if arguments.quick else SCHEMES:
            with attending(scheme):
                add(scheme.name, products, NO_ATTENTION, scheme)
        layers = exact.config.transformer.num_layers
        for layer in (*range(layers), None):
            places.append({"layer": "all" if layer is None else str(layer)})
            seen.append(dict(places[-1]))
            able = [each for each in rollouts if layer is None or layer < read_config(each)["num_layers"]]
            for step, name in zip((0, 1, 2, 3, CONTEXT, None), _PASSES, strict=True):

                def where(index: int, now: int, layer: int | None = layer, step: int | None = step) -> bool:
                    return layer in (None, index) and step in (None, now)

                with attending(CHOSEN, where):
                    found = worst(able, "float32") if able else {}
                    places[-1][name] = max(
                        (found[kind] for kind in ("latents", "memory") if kind in found), default=None
                    )
                    seen[-1][name] = psnr(first_seconds(exact, 1), expected[:1])
    passed = all(row["bound"] <= 1 for row in rows if row["name"] in (CHOSEN.name, BUILT))
    return passed, save(passed)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="the small bundles, the chosen way and one prompt alone")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
