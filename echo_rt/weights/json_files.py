"""``config.json`` files: read as one object, with messages that name the file and the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from echo_rt.errors import ConfigError, WeightsError
from echo_rt.utils.wording import one_line, type_of
from echo_rt.weights.files import read_head

T = TypeVar("T")

_DEFAULTS_KEY = "echo_rt"


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in ``path``; ``what`` says for messages what file was expected there.

    Errors: ``WeightsError`` for a file that is missing or is no JSON object.
    """
    if not path.exists():
        raise WeightsError(f"{path}: expected {what}, found no file")
    read_head(path)
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: expected {what}, came no JSON ({one_line(error)})") from error
    if not isinstance(parsed, dict):
        raise WeightsError(f"{path}: expected {what} as a JSON object, came {type_of(parsed)}")
    return parsed


def require(source: Mapping[str, Any], path: Path, *names: str) -> list[Any]:
    """The values of fields that must be there, in the order asked for; ``WeightsError`` names those that are not."""
    missing = [name for name in names if name not in source]
    if missing:
        raise WeightsError(f"{path}: expected the fields {', '.join(names)}, found no {', '.join(missing)}")
    return [source[name] for name in names]


def expect(source: Mapping[str, Any], path: Path, what: str, **values: tuple[Any, ...]) -> None:
    """Raises ``WeightsError`` where a field is there and has none of the values that ``what`` can have."""
    for name, allowed in values.items():
        if name in source and source[name] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise WeightsError(f"{path}: expected {what} ({name} {wanted}), came {name} {json.dumps(source[name])}")


def build(make: Callable[..., T], path: Path, /, **fields: Any) -> T:
    """``make(**fields)``, a config whose own checks then speak of ``path``; lists become tuples.

    Errors: ``WeightsError`` for fields that are no numbers or that a model cannot have.
    """
    for name, value in fields.items():
        if not all(isinstance(number, (int, float)) for number in (value if isinstance(value, list) else [value])):
            raise WeightsError(f"{path}: expected {name} to be a number or a list of numbers, came {json.dumps(value)}")
    try:
        return make(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    except TypeError as error:
        raise WeightsError(f"{path}: expected the sizes of a model, came fields of another type ({error})") from error


def read_defaults(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The object ``echo_rt`` of a transformer's config: how its video is rolled out; empty where there is none."""
    defaults = config.get(_DEFAULTS_KEY, {})
    if not isinstance(defaults, dict):
        raise WeightsError(f'{path}: expected "{_DEFAULTS_KEY}" to be an object, came {type_of(defaults)}')
    return dict(defaults)
