"""The order of dependency, read off the tree: what may import what, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "echo_rt"
# Each line may import itself and the lines above it; what stands on one line may not import its neighbours.
LAYERS = (
    ("_C", "_ops", "errors"),
    ("config", "recipes", "chunk"),
    ("options",),
    ("utils",),
    ("ops",),
    ("autotune",),
    ("attention", "convolution"),
    ("weights",),
    ("model",),
    ("snapshot",),
    ("engine",),
    ("stream",),
    ("runtime",),
    ("output",),
    ("verify",),
    ("soak",),
    ("bench",),
    ("serve", "client"),
    ("cli",),
    ("__init__", "__main__"),
)


def modules() -> dict[str, Path]:
    """Dotted name below ``echo_rt`` -> file; a folder's own ``__init__`` goes by the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(name)] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """What it imports of the package, anywhere in the file: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("echo_rt.") for alias in node.names if "echo_rt." in alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "echo_rt":
            home = (node.module or "").removeprefix("echo_rt").lstrip(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}" if home else alias.name
                yield inner if inner in known or inner in ("_C", "_ops") else home or "__init__"


def edges() -> dict[str, set[str]]:
    """Module -> the modules that it imports, but for the ``__init__`` of its own folder."""
    known = modules()
    return {
        name: {other for other in imports(path, known) if other not in (name, name.rpartition(".")[0])}
        for name, path in known.items()
    }


def test_nothing_imports_what_stands_above_it() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for name, others in edges().items():
        own = name.split(".")[0]
        for other in others:
            top = other.split(".")[0]
            if own != top and layer[top] >= layer[own]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_there_are_no_circles() -> None:
    found, done, open_path = edges(), set(), []

    def visit(name: str) -> None:
        assert name not in open_path, " -> ".join([*open_path[open_path.index(name) :], name])
        if name in done:
            return
        open_path.append(name)
        for other in sorted(found.get(name, ())):
            visit(other)
        open_path.pop()
        done.add(name)

    for name in found:
        visit(name)


def test_every_module_has_its_layer_and_the_top_is_small() -> None:
    tops = {name.split(".")[0] for name in modules()}
    assert tops <= {name for names in LAYERS for name in names}
    alone = [name for name, path in modules().items() if path.parent == PACKAGE]
    assert len(alone) <= 12, alone
