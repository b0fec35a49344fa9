"""``--set NAME=VALUE``: other facts of the rollout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from echo_rt.errors import ConfigError
from echo_rt.options import OVERRIDES


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """The names and values of all ``--set``; raises ``ConfigError``. Whether they fit is for the model to say."""
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in OVERRIDES or not equals:
            raise ConfigError(f"--set: expected NAME=VALUE with a NAME of {', '.join(OVERRIDES)}; got {text!r}")
        if name in overrides:
            raise ConfigError(f"--set: expected each NAME once, got {name} again with {text!r}")
        try:
            parsed = json.loads(f"[{value}]" if "," in value else value)
        except ValueError:
            raise ConfigError(f"--set: expected a number, a list of numbers, true or false; got {text!r}") from None
        # One step is a list of one.
        overrides[name] = [parsed] if name == "denoising_steps" and not isinstance(parsed, list) else parsed
    return overrides
