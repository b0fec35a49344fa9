"""Build the site into build/site and check that its pages load nothing from other hosts: ``make site``.

The pages are the Markdown files of docs/ and those of :data:`PAGES`, which lie beside what they describe. They are
copied to build/docs with their links adapted; mkdocs (or Zensical) builds them from there, as mkdocs.yml says.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TOOLS = (Path(__file__).name, "docstrings.py", "mkdocs.yml")
# File of the repository -> its page.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "bench.md",
    "bench/nsight/README.md": "nsight.md",
    "training/README.md": "training.md",
}
# Tag -> attributes whose address a browser loads; a link's `href` waits for a click, and is not among them.
LOADED = {
    **dict.fromkeys(("audio", "embed", "iframe", "script", "track"), ("src",)),
    **dict.fromkeys(("img", "source"), ("src", "srcset")),
    "image": ("href", "xlink:href"),
    "link": ("href",),
    "object": ("data",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}  # relations of <link>
ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)


def repository() -> str | None:
    """The repository's public address, if pyproject.toml names one."""
    found = re.search(r'^Repository = "(.+?)/?"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return None if found is None else found[1]


def adapted(text: str, source: Path, page: Path, address: str | None) -> str:
    """The Markdown of ``source`` for ``page`` (both relative): links to pages lead to pages, others to the repository.

    Where the repository has no ``address``, a link to a file that is no page becomes its text.
    """

    def adapt(link: re.Match[str]) -> str:
        target, hash_sign, anchor = link[2].partition("#")
        there = Path(os.path.normpath(source.parent / target))
        if not target or ELSEWHERE.match(link[2]) or not (ROOT / there).exists():
            return link[0]
        if (ROOT / there).is_dir() and (ROOT / there / "README.md").exists():
            there /= "README.md"
        if str(there) in PAGES:
            of_docs = PAGES[str(there)]
        elif there.parts[0] == "docs" and (ROOT / there).is_file():
            of_docs = str(Path(*there.parts[1:]))
        else:
            return link[1] if address is None else f"[{link[1]}]({address}/blob/HEAD/{there})"
        return f"[{link[1]}]({os.path.relpath(of_docs, page.parent)}{hash_sign}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    parts[::2] = [re.sub(r"(?<!!)\[([^][]+)\]\(([^)\s]+)\)", adapt, part) for part in parts[::2]]
    return "".join(parts)


def stage(folder: Path) -> None:
    """Make ``folder`` anew, with every page."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("__pycache__", ".*", *_TOOLS))
    address = repository()
    sources = {str(path.relative_to(ROOT)): path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    for source, page in (sources | PAGES).items():
        text = (ROOT / source).read_text(encoding="utf-8")
        (folder / page).write_text(adapted(text, Path(source), Path(page), address), encoding="utf-8")


class Loads(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and set(values.get("rel", "").split()) <= NOT_LOADED:
            return
        addresses = [values[name] for name in LOADED.get(tag, ()) if name in values]
        self.found += [f"<{tag}> {address}" for address in addresses if ELSEWHERE.match(address)]
        self.found += loads_of_css(values.get("style", ""))


def loads_of_css(text: str) -> list[str]:
    """What a style sheet loads from elsewhere."""
    addresses = re.findall(r"(?:url\(|@import\s+(?!url))\s*[\"']?([^\"')\s]+)", text)
    return [f"url({address})" for address in addresses if ELSEWHERE.match(address)]


def loads_elsewhere(folder: Path) -> list[str]:
    """Everything that the pages and style sheets in ``folder`` load from other hosts, a line each."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".html", ".svg"):
            page = Loads()
            page.feed(text := path.read_text(encoding="utf-8"))
            styles = re.findall(r"<style.*?</style>", text, re.DOTALL)
            found += [f"{path}: {one}" for one in (*page.found, *loads_of_css(" ".join(styles)))]
        elif path.suffix == ".css":
            found += [f"{path}: {one}" for one in loads_of_css(path.read_text(encoding="utf-8"))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", choices=("mkdocs", "zensical"), default="mkdocs")
    options = parser.parse_args()
    stage(ROOT / "build" / "docs")
    options_of_both = ["build", "--strict", "--clean", "--config-file", "docs/mkdocs.yml"]
    builder = [sys.executable, "-m", options.builder, *options_of_both]
    # Material prints what its makers think of the next mkdocs.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    if code := subprocess.run(builder, cwd=ROOT, env=environment).returncode:
        sys.exit(code)
    found = loads_elsewhere(ROOT / "build" / "site")
    if found:
        sys.exit("\n".join((*found, "build_site.py: error: pages load from other hosts")))


if __name__ == "__main__":
    main()
