"""What a soak is asked to do, and the manifest by which a later process knows that it is asked the same."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from echo_rt.errors import ConfigError
from echo_rt.options import (
    TINY_VAE,
    WAN_VAE,
    MemoryMode,
    RuntimeOptions,
    check_overrides,
    check_seed,
    lora_files,
    lora_text,
)
from echo_rt.utils.atomic_file import reason, write_whole

MANIFEST_FILE = "soak.json"
_FORMAT = 1
_SECONDS_OF_AN_HOUR = 3600.0
_LONGEST_INTERVAL = 3600.0  # what is gathered for a line is bounded by the length of its interval

# A limit, "auto" for the default of the device that the soak runs on, None for no promise.
Limit = float | Literal["auto"] | None
_ON_A_GPU = {"latency_ratio": 1.05, "latency_zscore": 10.0, "snapshot_stall": 2000.0}
# Of Limits: those that can be "auto", and those that are part of other promises and cannot be off.
AUTO_LIMITS = tuple(_ON_A_GPU)
NEVER_OFF = ("warmup_blocks", "host_slack", "outliers")


@dataclass(frozen=True)
class Limits:
    """The thresholds of the promises; None leaves a promise out.

    ``warmup_blocks``: blocks at the start of every process that are not judged by memory, latency and drift.
    ``device_growth``: bytes by which the device's memory may differ after warm-up. ``host_slope``: bytes a block by
    which the host's may grow, judged once the growth exceeds ``host_slack`` bytes, which an allocator keeps anyway.
    ``latency_ratio``: p99 / p50 of the block latency. ``latency_zscore``: how many robust standard deviations a block
    may take longer than the ones before it; a share of ``outliers`` of all blocks may take longer than that.
    ``snapshot_stall``: milliseconds for which a snapshot may hold up the stream. ``drift``: how far the latents' mean
    and standard deviation may move from those after warm-up, in units of that standard deviation. What is judged by the
    clock is "auto": on for a GPU, off for a CPU, which is shared.
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
        _whole("warmup_blocks", self.warmup_blocks, least=0)
        for name in ("device_growth", "host_slope", "host_slack", "drift"):
            _number(name, getattr(self, name), least=0.0, optional=name != "host_slack")
        _number("outliers", self.outliers, least=0.0, most=1.0)
        for name in _ON_A_GPU:
            value = getattr(self, name)
            if value != "auto":
                _number(name, value, least=1.0, optional=True)

    def resolved(self, device: str) -> Limits:
        """With every "auto" replaced by what holds for a ``device`` of this type, cuda or cpu."""
        auto = [name for name in _ON_A_GPU if getattr(self, name) == "auto"]
        changes: dict[str, Any] = {name: _ON_A_GPU[name] if device == "cuda" else None for name in auto}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class SoakConfig(RuntimeOptions):
    """One soak. Raises :class:`ConfigError` for what cannot be.

    Exactly one of ``blocks`` and ``hours`` says how long it is; ``hours`` are those of all its processes together.
    ``roll_back``: a block that is not finite sends the stream back to a good state, else it ends it. A block may take
    ``block_seconds``, None for no bound. Prompts follow one another every ``switch_every`` blocks, round and round. A
    line is written every ``interval`` seconds, every ``hash_every``-th block is hashed, every ``snapshot_every`` blocks
    a snapshot is taken, of which the last ``keep`` stay. ``serve``: address and port for Prometheus. ``plots``: True
    wants them, None takes them where matplotlib is. The rest is as in :meth:`Runtime.from_pretrained`.
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
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        if self.lookahead is not None:
            _whole("lookahead", self.lookahead, least=0)
        _whole("hash_every", self.hash_every, least=1)
        _whole("keep", self.keep, least=1)
        _number("hours", self.hours, least=0.0, optional=True)
        _number("interval", self.interval, least=0.0)
        _number("block_seconds", self.block_seconds, least=0.0, optional=True)
        if not isinstance(self.roll_back, bool):
            raise ConfigError(f"soak: --roll-back must be true or false, got {self.roll_back!r}")
        if not 0 < self.interval <= _LONGEST_INTERVAL:
            raise ConfigError(f"soak: --interval must be in 0..{_LONGEST_INTERVAL:g} seconds, got {self.interval:g}")
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
        """Whether it has its length when ``block`` blocks were made in ``elapsed`` seconds."""
        if self.blocks is not None:
            return block >= self.blocks
        assert self.hours is not None
        return elapsed >= self.hours * _SECONDS_OF_AN_HOUR

    def prompt_of(self, block: int) -> int:
        """Which of the prompts ``block`` shows."""
        return 0 if self.switch_every is None else block // self.switch_every % len(self.prompts)

    def switches_at(self, block: int) -> bool:
        """Whether ``block`` begins with another prompt."""
        return self.switch_every is not None and block > 0 and block % self.switch_every == 0

    def facts(self) -> dict[str, Any]:
        """All that shapes the video or its judgement, in plain JSON types, by name; files by their whole path."""
        facts = dataclasses.asdict(self)
        for name in ("out", "serve", "plots", "check", "keep_text_encoder"):  # where it lies and who looks on
            del facts[name]
        facts |= {f"limits.{name}": value for name, value in facts.pop("limits").items()}
        # One LoRA at full strength by its path alone, as soaks before there could be several have it.
        loras = [lora_text(path.absolute(), strength) for path, strength in lora_files(self.lora)]
        facts["lora"] = loras if len(loras) > 1 else next(iter(loras), None)
        files = ["model", "checkpoint"] + ([] if self.vae in (WAN_VAE, TINY_VAE) else ["vae"])
        for name in files:
            if facts[name] is not None:
                facts[name] = str(Path(facts[name]).absolute())
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain


class Begun(Enum):
    """What ``out`` holds of a soak: nothing; its manifest; that of the same soak, which was to end earlier."""

    NOT = "not begun"
    SAME = "begun"
    SHORTER = "begun, shorter"


def check_manifest(config: SoakConfig) -> Begun:
    """What has been begun in ``out``.

    :class:`ConfigError` where it is another soak, naming what differs, or cannot be read.
    """
    path = config.folder / MANIFEST_FILE
    facts = config.facts()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Begun.NOT
    except (OSError, UnicodeDecodeError) as error:
        problem = reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: expected the manifest of a soak, cannot read it: {problem}") from None
    try:
        there = json.loads(text)["config"]
        different = sorted(name for name in {*there, *facts} if there.get(name) != facts.get(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: expected the manifest of a soak, came something else; name another --out") from None
    if different in (["blocks"], ["hours"]) and _exceeds(facts[different[0]], there.get(different[0])):
        return Begun.SHORTER
    if different:
        listed = "; ".join(f"{n} was {there.get(n)!r} and is {facts.get(n)!r}" for n in different)
        raise ConfigError(f"{config.out}: holds another soak, name another --out: {listed}")
    return Begun.SAME


def _exceeds(length: object, before: object) -> bool:
    return isinstance(length, (int, float)) and isinstance(before, (int, float)) and length > before


def write_manifest(config: SoakConfig, version: str) -> None:
    """Make ``out`` this soak's; raises ``OutputError``."""
    content = {"format": _FORMAT, "echo_rt": version, "config": config.facts()}
    write_whole(config.folder / MANIFEST_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _option(name: str) -> str:
    """As a user of the command line knows it."""
    return f"--{name.replace('_', '-')}"


def _whole(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"soak: {_option(name)} must be an integer of {least} or more, got {value!r}")


def _number(name: str, value: object, *, least: float, most: float = math.inf, optional: bool = False) -> None:
    if value is None and optional:
        return
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type, operator]
        expected = f"of {least:g} or more" if most == math.inf else f"in {least:g}..{most:g}"
        raise ConfigError(f"soak: {_option(name)} must be a number {expected}, got {value!r}")
