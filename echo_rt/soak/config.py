"""What a soak is asked to do, and the manifest that ties a folder to one soak."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echo_rt.errors import ConfigError
from echo_rt.options import TINY_VAE, WAN_VAE, MemoryMode, RuntimeOptions, check_overrides, check_seed
from echo_rt.utils.atomic_file import reason, write_whole
from echo_rt.utils.build_info import __version__

MANIFEST_FILE = "soak.json"
_FORMAT = 1
_SECONDS_OF_AN_HOUR = 3600.0
_LONGEST_INTERVAL = 3600.0  # a line's memory is bounded by the length of its interval
_NOT_IN_MANIFEST = ("out", "serve", "plots", "check", "keep_text_encoder")  # they may change: no block depends on them

# A limit, "auto" for the default of the device that the soak runs on, None for no promise.
Limit = float | Literal["auto"] | None
_ON_A_GPU = {"latency_ratio": 1.05, "latency_zscore": 10.0, "snapshot_stall": 2000.0}
# Names of limits that can be "auto", and of those that belong to other promises and cannot be off.
AUTO_LIMITS = tuple(_ON_A_GPU)
NEVER_OFF = ("warmup_blocks", "host_slack", "outliers")


@dataclass(frozen=True)
class Limits:
    """The thresholds of the promises; None leaves a promise out.

    ``warmup_blocks``: blocks at the start of every process, not judged by memory, latency and drift.
    ``device_growth``: bytes by which the device's memory may differ after warm-up. ``host_slope``: bytes per block by
    which the host's memory may grow, judged once the growth exceeds ``host_slack`` bytes, which an allocator keeps
    anyway. ``latency_ratio``: p99 / p50 of the block latency. ``latency_zscore``: robust standard deviations by which a
    block may be slower than the ones before it; a share of ``outliers`` of all blocks may be slower than that.
    ``snapshot_stall``: milliseconds for which a snapshot may hold up the stream. ``drift``: how far the latents' mean
    and standard deviation may move from those after warm-up, in units of that standard deviation. Limits on time are
    "auto": on for a GPU, off for a CPU, which is shared.
    """

    warmup_blocks: int = 10
    device_growth: float | None = 0.0
    host_slope: float | None = 1024.0
    host_slack: float = 32.0 * 2**20
    latency_ratio: Limit = "auto"
    latency_zscore: Limit = "auto"
    outliers: float = 0.001
    snapshot_stall: Limit = "auto"
    drift: float | None = None

    def __post_init__(self) -> None:
        _check_number("warmup_blocks", self.warmup_blocks, int)
        _check_number("outliers", self.outliers, float, most=1.0)
        for name in ("device_growth", "host_slope", "host_slack", "drift"):
            _check_number(name, getattr(self, name), float, optional=name not in NEVER_OFF)
        for name in AUTO_LIMITS:
            if getattr(self, name) != "auto":
                _check_number(name, getattr(self, name), float, least=1, optional=True)

    def resolved(self, device: str) -> Limits:
        """Replace every "auto" by the default of a ``device`` of this type, cuda or cpu."""
        auto = [name for name in AUTO_LIMITS if getattr(self, name) == "auto"]
        changes: dict[str, Any] = {name: _ON_A_GPU[name] if device == "cuda" else None for name in auto}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class SoakConfig(RuntimeOptions):
    """One soak. Raises :class:`ConfigError` for values that make no sense.

    Exactly one of ``blocks`` and ``hours`` says how long it is; ``hours`` are those of all its processes together.
    ``roll_back``: a block with NaN sends the stream back to a good state instead of ending it. ``block_seconds``: the
    longest that a block may take, None for no bound. The next prompt takes over every ``switch_every`` blocks, round
    and round. A line is written every ``interval`` seconds, every ``hash_every``-th block is hashed, and every
    ``snapshot_every`` blocks a snapshot is taken, of which the last ``keep`` stay. ``serve``: address and port for
    Prometheus. ``plots``: True requires them, None draws them where matplotlib is installed. The rest is as in
    :meth:`Runtime.from_pretrained`.
    """

    model: str
    out: str
    blocks: int | None = None
    hours: float | None = None
    vae: str = WAN_VAE
    overrides: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ("a red fox in the snow",)
    switch_every: int | None = None
    seed: int = 0
    interval: float = 10.0
    hash_every: int = 100
    snapshot_every: int | None = None
    keep: int = 3
    roll_back: bool = False
    block_seconds: float | None = None
    limits: Limits = field(default_factory=Limits)
    serve: tuple[str, int] | None = None
    plots: bool | None = None

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.hours is None):
            raise ConfigError("soak: expected one of --blocks and --hours, got " + ("none", "both")[bool(self.blocks)])
        for name in ("blocks", "switch_every", "snapshot_every"):
            _check_number(name, getattr(self, name), int, least=1, optional=True)
        for name in ("hash_every", "keep"):
            _check_number(name, getattr(self, name), int, least=1)
        for name in ("hours", "block_seconds"):
            _check_number(name, getattr(self, name), float, optional=True)
        _check_number("interval", self.interval, float, least=1e-9, most=_LONGEST_INTERVAL)
        if not isinstance(self.roll_back, bool):
            raise ConfigError(f"soak: --roll-back must be true or false, got {self.roll_back!r}")
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ConfigError(f"soak: --prompt: expected one or more with text, got {list(self.prompts)!r}")
        if (len(self.prompts) > 1) != (self.switch_every is not None):
            raise ConfigError(
                "soak: expected --switch-every N exactly where there are several --prompt; "
                f"got {len(self.prompts)} of them and --switch-every {self.switch_every or 'left out'}"
            )
        check_seed(self.seed)
        check_overrides(self.overrides, "soak: overrides")
        if self.memory is not None:
            MemoryMode.parse(self.memory)
        super().__post_init__()

    @property
    def folder(self) -> Path:
        """``out`` as a path."""
        return Path(self.out)

    def is_over(self, block: int, elapsed: float) -> bool:
        """Whether ``block`` blocks in ``elapsed`` seconds are the whole soak."""
        if self.blocks is not None:
            return block >= self.blocks
        assert self.hours is not None
        return elapsed >= self.hours * _SECONDS_OF_AN_HOUR

    def prompt_of(self, block: int) -> int:
        """Index of the prompt that ``block`` shows."""
        return 0 if self.switch_every is None else block // self.switch_every % len(self.prompts)

    def switches_at(self, block: int) -> bool:
        """Whether ``block`` begins with another prompt."""
        return self.switch_every is not None and block > 0 and block % self.switch_every == 0

    def settings(self) -> dict[str, Any]:
        """Everything that shapes the video or its verdicts, in plain JSON types, by name; files by absolute path."""
        made = dataclasses.asdict(self)
        for name in _NOT_IN_MANIFEST:
            del made[name]
        made |= {f"limits.{name}": value for name, value in made.pop("limits").items()}
        for name in ("model", "checkpoint", "lora", *([] if self.vae in (WAN_VAE, TINY_VAE) else ["vae"])):
            if made[name] is not None:
                made[name] = str(Path(made[name]).absolute())
        plain: dict[str, Any] = json.loads(json.dumps(made))
        return plain


def check_manifest(config: SoakConfig) -> dict[str, Any] | None:
    """Return the settings of the soak in ``out``, the same as ``config``'s or a shorter one's; None without a manifest.

    :class:`ConfigError` for another soak, naming what differs, and for a manifest that cannot be read.
    """
    path = config.folder / MANIFEST_FILE
    asked = config.settings()
    try:
        begun: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
        different = sorted(name for name in {*begun, *asked} if begun.get(name) != asked.get(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: expected the manifest of a soak, cannot read it: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: expected the manifest of a soak, found another file; name another --out") from None
    longer = different in (["blocks"], ["hours"]) and _exceeds(asked[different[0]], begun.get(different[0]))
    if different and not longer:
        listed = "; ".join(f"{name} was {begun.get(name)!r} and is {asked.get(name)!r}" for name in different)
        raise ConfigError(f"{config.out}: holds another soak, name another --out: {listed}")
    return begun


def _exceeds(length: object, before: object) -> bool:
    return isinstance(length, (int, float)) and isinstance(before, (int, float)) and length > before


def write_manifest(config: SoakConfig) -> None:
    """Tie ``out`` to this soak; raises ``OutputError``."""
    content = {"format": _FORMAT, "echo_rt": __version__, "config": config.settings()}
    write_whole(config.folder / MANIFEST_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _check_number(
    name: str, value: Any, kind: type, *, least: float = 0, most: float = math.inf, optional: bool = False
) -> None:
    if value is None and optional:
        return
    real = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not real or not least <= value <= most or value == math.inf:
        number = "an integer" if kind is int else "a number"
        expected = f"of {least:g} or more" if most == math.inf else f"in {least:g}..{most:g}"
        raise ConfigError(f"soak: --{name.replace('_', '-')} must be {number} {expected}, got {value!r}")
