"""What a soak is asked to do, and the manifest that ties a folder to one soak."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echo_rt.errors import ConfigError
from echo_rt.options import (
    DEMO_PROMPT,
    WAN_VAE,
    MemoryMode,
    RuntimeOptions,
    absolute_model,
    check_overrides,
    check_seed,
    is_name,
    lora_text,
)
from echo_rt.utils.atomic_file import read_plain, reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.number import Number
from echo_rt.utils.wording import printable

MANIFEST_FILE = "soak.json"
_SHOWN = 3  # settings in which a soak differs from that of its folder
_NOT_IN_MANIFEST = ("out", "serve", "plots", "check", "keep_text_encoder")  # they may change: no block depends on them


@dataclass(frozen=True)
class Setting(Number):
    """A number that a user may choose, as ``--help`` describes it; ``on_gpu``: what "auto" means there."""

    metavar: str = ""
    meaning: str = ""
    on_gpu: float | None = None


def settings_of(config: Any) -> dict[str, tuple[Setting, Any]]:
    """Return the numbers among the fields of :class:`Limits` or :class:`SoakConfig`, with their defaults, by name."""
    return {one.name: (one.metadata["setting"], one.default) for one in dataclasses.fields(config) if one.metadata}


def _setting(default: Any, kind: type[int] | type[float], metavar: str, meaning: str, **more: Any) -> Any:
    setting = Setting(kind, metavar=metavar, meaning=meaning, **more)
    return field(default=default, metadata={"setting": setting})


def _limit(default: Any, metavar: str, meaning: str, **more: Any) -> Any:
    words = {"off": None} | ({"auto": "auto"} if default == "auto" else {})
    return _setting(default, float, metavar, meaning, words=words, **more)


def _check_settings(config: Any) -> None:
    for name, (setting, default) in settings_of(config).items():
        value = getattr(config, name)
        if not (setting.allows(value) or (value is None and default is None)):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"soak: {option} must be {setting.expected}, got {value!r:.40}")


@dataclass(frozen=True)
class Limits:
    """The thresholds of the promises; None leaves a promise out. "auto" leaves limits on time out on a CPU."""

    warmup_blocks: int = _setting(10, int, "N", "first blocks of a process, which the limits below ignore")
    device_growth: float | None = _limit(0.0, "BYTES", "largest change of the device's memory after warm-up")
    host_slope: float | None = _limit(1024.0, "BYTES", "largest growth of the host's memory per block")
    host_slack: float = _setting(32.0 * 2**20, float, "BYTES", "growth of the host's memory that --host-slope ignores")
    latency_ratio: float | Literal["auto"] | None = _limit(
        "auto", "X", "largest p99/p50 of the block latency", least=1, on_gpu=1.05
    )
    latency_zscore: float | Literal["auto"] | None = _limit(
        "auto", "Z", "z-score of the latency from which a block is an outlier", least=1, on_gpu=10.0
    )
    outliers: float = _setting(0.001, float, "SHARE", "largest share of blocks that are outliers", most=1)
    snapshot_stall: float | Literal["auto"] | None = _limit(
        "auto", "MS", "longest delay of the stream by a snapshot", least=1, on_gpu=2000.0
    )
    drift: float | None = _limit(None, "X", "largest change of the latents' statistics, in standard deviations")

    def __post_init__(self) -> None:
        _check_settings(self)

    def resolved(self, device: str) -> Limits:
        """Replace every "auto" by the default of a ``device`` of this type, cuda or cpu."""
        auto = [(name, setting) for name, (setting, _) in settings_of(self).items() if getattr(self, name) == "auto"]
        changes: dict[str, Any] = {name: setting.on_gpu if device == "cuda" else None for name, setting in auto}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class SoakConfig(RuntimeOptions):
    """One soak. Raises :class:`ConfigError` for values that make no sense.

    Exactly one of ``blocks`` and ``hours`` says how long it is. ``roll_back``: a block with NaN sends the stream back
    to a good state instead of ending it. ``serve``: address and port for Prometheus. ``plots``: True requires them,
    None draws them where matplotlib is installed. The rest is as in :meth:`Runtime.from_pretrained`.
    """

    model: str | Path
    out: str
    vae: str = WAN_VAE
    overrides: Mapping[str, Any] = field(default_factory=dict)
    hours: float | None = _setting(None, float, "H", "end after H hours of streaming, of all processes", positive=True)
    blocks: int | None = _setting(None, int, "N", "end after N blocks", least=1)
    prompts: tuple[str, ...] = (DEMO_PROMPT,)
    switch_every: int | None = _setting(None, int, "N", "blocks after which the next prompt takes over", least=1)
    seed: int = 0
    snapshot_every: int | None = _setting(None, int, "N", "blocks between two snapshots; default: none", least=1)
    keep: int = _setting(3, int, "K", "number of snapshots kept", least=1)
    roll_back: bool = False
    block_seconds: float | None = _setting(
        None, float, "S", "end when a block takes longer; default: no limit", positive=True
    )
    # An interval bounds the memory of its line.
    interval: float = _setting(10.0, float, "S", "seconds of streaming per line of figures", positive=True, most=3600.0)
    hash_every: int = _setting(100, int, "N", "hash every Nth block", least=1)
    limits: Limits = field(default_factory=Limits)
    serve: tuple[str, int] | None = None
    plots: bool | None = None

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.hours is None):
            raise ConfigError("soak: expected one of --blocks and --hours, got " + ("none", "both")[bool(self.blocks)])
        _check_settings(self)
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
        blocks, hours = self.blocks, self.hours
        return (blocks is not None and block >= blocks) or (hours is not None and elapsed >= 3600 * hours)

    def prompt_of(self, block: int) -> int:
        """Index of the prompt that ``block`` shows."""
        return 0 if self.switch_every is None else block // self.switch_every % len(self.prompts)

    def switches_at(self, block: int) -> bool:
        """Whether ``block`` begins with another prompt."""
        return self.switch_every is not None and block > 0 and block % self.switch_every == 0

    def settings(self) -> dict[str, Any]:
        """Everything that shapes the video or its verdicts, in plain JSON types, by name.

        Files by absolute path; the model in the package, and one that has an id of the hub, by its name.
        """
        made = dataclasses.asdict(self.absolute()) | {"model": absolute_model(self.model)}
        made = {name: value for name, value in made.items() if name not in _NOT_IN_MANIFEST}
        made |= {f"limits.{name}": value for name, value in made.pop("limits").items()}
        # One LoRA at full strength by its path alone, as soaks before there could be several have it.
        loras = [lora_text(path, strength) for path, strength in made["lora"] or ()]
        made["lora"] = loras if len(loras) > 1 else next(iter(loras), None)
        return dict(json.loads(json.dumps(made)))


@dataclass(frozen=True)
class _Manifest:
    config: dict[str, Any]
    format: Literal[1] = 1


def check_manifest(config: SoakConfig) -> dict[str, Any] | None:
    """Return the settings of the soak in ``out``, the same as ``config``'s or a shorter one's; None without a manifest.

    :class:`ConfigError` for another soak, naming what differs, and for a manifest that cannot be read.
    """
    path = config.folder / MANIFEST_FILE
    asked = config.settings()
    expected = f"{path}: expected the manifest of a soak; name another --out"
    try:
        begun = read_json(read_plain(path), _Manifest, expected, ConfigError).config
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{expected}: cannot read it: {reason(error)}") from None
    # Earlier versions wrote the model in the package, and one of the hub, as a path in the folder that they ran in.
    was, model = str(begun.get("model")), asked["model"]
    if is_name(model) and was.endswith(f"{os.sep}{model}"):
        there = any(os.path.exists(f"{was}/{name}") for name in ("config.json", "model_index.json"))
        begun["model"] = was if there else model
    different = sorted(name for name in {*begun, *asked} if begun.get(name) != asked.get(name))
    length = "blocks" if config.hours is None else "hours"
    before = begun.get(length)
    longer = different == [length] and isinstance(before, (int, float)) and before < asked[length]
    if different and not longer:
        pairs = ((printable(name), begun.get(name), asked.get(name)) for name in different[:_SHOWN])
        changes = [f"{name:.40} was {was!r:.250} and is {value!r:.250}" for name, was, value in pairs]
        changes += [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        found = "a soak can be made longer, not shorter" if different == [length] else "holds another soak"
        raise ConfigError(f"{config.out}: {found}, name another --out: {'; '.join(changes)}")
    return begun


def write_manifest(config: SoakConfig) -> None:
    """Tie ``out`` to this soak; raises ``OutputError``."""
    content = {"format": 1, "echo_rt": __version__, "config": config.settings()}
    write_whole(config.folder / MANIFEST_FILE, (json.dumps(content, indent=2) + "\n").encode())
