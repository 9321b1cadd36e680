"""Builds the site: `make site`. Pages keep their places in the repository, so that a link works here and there alike.

What mkdocs.yml names in its navigation is gathered with all that it links to, page by page, in build/pages; mkdocs
makes build/site of that and fails where a link leads nowhere.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from links import ROOT, links

PAGES = ROOT / "build" / "pages"


def gathered(root: Path = ROOT) -> set[Path]:
    """Returns the files that the navigation names, and all that can be reached from them."""
    named = re.findall(r": ([\w/.-]+\.md)$", (root / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    left, found = [root / name for name in named], set()
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".md":
            targets = [(path.parent / link.partition("#")[0]).resolve() for link in links(path)]
            left += [target for target in targets if target != path.parent]
    return found


def main() -> int:
    """Gathers the pages and has mkdocs build them."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in sorted(gathered()):
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
