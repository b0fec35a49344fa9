"""Kernels by the names that the sources give them."""

from __future__ import annotations

import re

_PREFIXES = re.compile(r"\((?:anonymous namespace)\)::|<unnamed>::|\becho::")


def short_name(demangled: str) -> str:
    """Without return type, our own namespaces and parameters: ``flow_step_kernel<__half>``."""
    name = _PREFIXES.sub("", demangled).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        # "(int)8" among the template's arguments is no list of parameters.
        if letter == "(" and depth == 0 and place > 0:
            return name[:place]
    return name
