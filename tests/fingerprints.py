"""What a redesign must not change, as one JSON of hashes and signatures: ``python tests/fingerprints.py [OLD.json]``.

Prints the fingerprints of this checkout; with OLD.json, those of another commit, it prints what differs and exits with
1. They are: the tensors of the small golden bundles on both backends, 60 blocks of a tiny model's stream with a prompt
switch, a snapshot and a rollback, the signatures of all that is public, and the help of every command. Only public
names are used, so the same file runs on commits before and after.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("generate", "soak", "bench", "verify", "tiny", "doctor")
GOLDEN = (("torch", "float32"), ("torch", "bfloat16"), ("emulated", "bfloat16"), ("emulated", "float16"))


def command(*words: str) -> str:
    """What a command of this checkout prints; it may fail, which is part of what it does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "echo_rt", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.stdout


def digest(*parts: bytes) -> str:
    """One hash of all parts."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def golden(folder: Path) -> Iterator[tuple[str, str]]:
    for bundle in sorted(path.parent for path in (ROOT / "tests" / "golden").glob("*/config.json")):
        for backend, dtype in GOLDEN:
            dump = folder / f"{backend}-{dtype}"
            command("verify", str(bundle), "--backend", backend, "--dtype", dtype, "--dump", str(dump))
            actual = dump / bundle.name / "actual.safetensors"
            yield f"golden {bundle.name} {backend} {dtype}", digest(actual.read_bytes())


@contextlib.contextmanager
def one_bad_step(number: int) -> Iterator[None]:
    """The ``number``-th denoising step of this process makes NaN."""
    (reference,) = (
        module
        for name, module in list(sys.modules.items())
        if name.startswith("echo_rt") and name.endswith("reference") and hasattr(module, "flow_step")
    )
    right, calls = reference.flow_step, 0

    def wrong(x: Any, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        right(x, *rest)
        if calls == number:
            x.fill_(float("nan"))

    reference.flow_step = wrong
    try:
        yield
    finally:
        reference.flow_step = right


def blocks(stream: Any, count: int) -> Iterator[bytes]:
    for _ in range(count):
        chunk = next(stream)
        yield chunk.frames.numpy().tobytes() + chunk.latents.numpy().tobytes()


def stream(folder: Path) -> Iterator[tuple[str, str]]:
    import echo_rt

    model = folder / "tiny"
    command("tiny", str(model))
    for memory in ("evolve", "prior", "off"):
        with echo_rt.Runtime.from_pretrained(
            model, checkpoint=model / "echo_infinity.pt", ema=True, device="cpu", memory=memory, lookahead=1
        ) as runtime:
            state = folder / f"{memory}.safetensors"
            with runtime.stream("a red fox in the snow", seed=7) as live:
                made = [*blocks(live, 20)]
                live.set_prompt("the fox dives into a lake")
                made += blocks(live, 20)
                live.snapshot().save(state)
                made += blocks(live, 20)
            yield f"stream {memory}", digest(*made)
            with runtime.resume(echo_rt.Snapshot.load(state)) as live:
                yield f"stream {memory} resumed", digest(*blocks(live, 20))
            yield f"snapshot {memory}", str(sorted(echo_rt.Snapshot.load(state).tensors))
            guard = echo_rt.Guard(policy="roll_back", keep_every=5)
            with one_bad_step(70), runtime.stream("a red fox in the snow", seed=7, guard=guard) as live:
                yield f"stream {memory} rolled back", digest(*blocks(live, 30), str(live.rollbacks).encode())


def signatures() -> Iterator[tuple[str, str]]:
    import echo_rt

    for name in echo_rt.__all__:
        public = getattr(echo_rt, name)
        if not callable(public):
            continue
        if not issubclass(public if isinstance(public, type) else object, Exception):
            yield f"signature {name}", str(inspect.signature(public))
        for member, value in inspect.getmembers(public) if isinstance(public, type) else ():
            if member.startswith("_") or not str(getattr(value, "__module__", "")).startswith("echo_rt"):
                continue
            if callable(value):
                yield f"signature {name}.{member}", str(inspect.signature(value))


def fingerprints() -> dict[str, str]:
    """All of them, by name."""
    with tempfile.TemporaryDirectory() as folder:
        found = dict(golden(Path(folder)))
        found.update(stream(Path(folder)))
    found.update(signatures())
    found.update({f"help {name}": command(name, "--help") for name in COMMANDS})
    return found


def main(old: str | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    found = fingerprints()
    if old is None:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(Path(old).read_text(encoding="utf-8"))
    differing = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    for name in differing:
        print(f"{name}\n  before: {before.get(name)}\n  now:    {found.get(name)}")
    print(f"{len(found) - len(differing)} of {len(found)} fingerprints as before")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
