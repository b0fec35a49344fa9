"""Docstrings as the site shows them. An extension of griffe, which mkdocstrings reads them with (mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

# In an indented section: "width, height: in pixels", with the lines that continue it.
_SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text>.*(?:\n(?P=indent) +.*)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):`~?([^`]+)`")


def _one_each(entry: re.Match[str]) -> str:
    return "\n".join(f"{entry['indent']}{name}:{entry['text']}" for name in entry["names"].split(", "))


class PlainDocstrings(griffe.Extension):
    """Sphinx's roles become code; an entry for several parameters becomes one for each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", _SEVERAL.sub(_one_each, obj.docstring.value))
