"""The links of the project's Markdown: what each leads to, and whether that is there.

A link is right when its file or folder exists and, behind a #, when that file has a heading of that name. Names are
those that a forge and mkdocs both make of a heading, so the same link works in the repository and on the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Folders whose pages are people's to read. `build` and environments are not the project's.
_FOLDERS = ("docs", "examples", "components", "pipelines", "benchmarks", "images", "manifests", "notebooks")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)


def pages(root: Path = ROOT) -> list[Path]:
    """Returns every page of the project."""
    return sorted([*root.glob("*.md"), *(path for name in _FOLDERS for path in (root / name).rglob("*.md"))])


def links(page: Path) -> Iterator[str]:
    """Yields where the links of a page lead, as they are written; addresses of other sites are left out."""
    text = _CODE.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))
    yield from (link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link))


def anchors(page: Path) -> set[str]:
    """Returns the names of a page's headings."""
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        if name.isascii() and "--" not in name:  # of others a forge and mkdocs make two names
            found.add(name)
    return found


def broken(root: Path = ROOT) -> list[str]:
    """Returns 'page: link: why' of each link that leads nowhere."""
    faults = []
    for page in pages(root):
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            where = f"{page.relative_to(root)}: {link}"
            if not target.is_relative_to(root) or not target.exists():
                faults.append(f"{where}: there is no such file")
            elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
                faults.append(f"{where}: there is no such heading")
    return faults
