"""The site: every page has its place, links are adapted, and nothing is loaded from other hosts."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/build_site.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("echo_rt_site", ROOT / "docs" / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page(site: ModuleType, tmp_path: Path) -> None:
    site.stage(tmp_path / "docs")
    there = {str(path.relative_to(tmp_path / "docs")) for path in (tmp_path / "docs").rglob("*.md")}
    navigation = list(pages_of(yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(navigation) == len(set(navigation)) and set(navigation) == there


def text_of(page: Path) -> str:
    """Without code and comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as both the builders of the site and the forges that show the repository make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("place", ["the repository", "the site"])
def test_links_and_pictures_of_every_page_lead_somewhere(site: ModuleType, tmp_path: Path, place: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / page for page in site.PAGES), *(ROOT / "docs").rglob("*.md")]
    if place == "the site":
        site.stage(tmp_path)
        pages = list(tmp_path.rglob("*.md"))
    links, dead = 0, []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            file, _, anchor = target.partition("#")
            there = page.parent / file if file else page
            links += not target.startswith("https://")
            if not target.startswith("https://") and not (
                there.exists() and (not anchor or (there.suffix == ".md" and anchor in anchors_of(there)))
            ):
                dead.append(f"{page.name}: {target}")
    assert links > 50 and dead == []


@pytest.mark.parametrize(
    ("address", "text", "adapted"),
    [
        (None, "[a](../CONTRIBUTING.md#house-rules)", "[a](contributing.md#house-rules)"),
        (None, "[a](../bench/README.md), [b](examples/)", "[a](bench.md), [b](examples/README.md)"),
        (None, "[a](soak.md#figures) [b](https://arxiv.org/x) [c](#here)", None),
        (None, "see [the script](../bench/gpu.sh)", "see the script"),
        (
            "https://x.invalid",
            "[the script](../bench/gpu.sh)",
            "[the script](https://x.invalid/blob/HEAD/bench/gpu.sh)",
        ),
        (None, "```python\nf = table[name](../bench/gpu.sh)\n```", None),
        (None, "![picture](images/method-ids.svg)", None),
    ],
)
def test_links_of_a_page_are_adapted(site: ModuleType, address: str | None, text: str, adapted: str | None) -> None:
    found = site.adapted(text, Path("docs/embedding.md"), Path("embedding.md"), address)
    assert found == (text if adapted is None else adapted)


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.html", '<script src="https://cdn.invalid/x.js"></script>', 1),
        ("a.html", '<img src="//cdn.invalid/x.png"><img srcset="http://cdn.invalid/x.png 2x">', 2),
        (
            "a.html",
            '<link rel="preconnect" href="https://fonts.invalid"><style>@import "https://x.invalid";</style>',
            2,
        ),
        ("a.html", '<p style="background: url(https://x.invalid/y.png)">', 1),
        ("a/b.css", "a { background: url('https://x.invalid/y.png') } @import url(//x.invalid/z.css);", 2),
        ("a.svg", '<svg><image href="https://x.invalid/y.png"/></svg>', 1),
        (
            "a.html",
            '<a href="https://arxiv.org/x"></a><link rel="canonical" href="https://x.invalid"><img src="y.png">',
            0,
        ),
        ("a.css", "a { background: url(data:image/svg+xml,x) } /* https://x.invalid */", 0),
    ],
)
def test_what_pages_load_from_other_hosts_is_found(
    site: ModuleType, tmp_path: Path, name: str, text: str, count: int
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = site.loads_elsewhere(tmp_path)
    assert len(found) == count and all("invalid" in line for line in found), found
