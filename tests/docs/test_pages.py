"""The pages that people read: short where they begin, whole, and true to the schemas and the files that they name."""

from __future__ import annotations

import importlib.util
import re

import build_site
import fields
import links
import pytest

from trimtab.catalog.formats import FORMATS
from trimtab.catalog.goals import GOALS
from trimtab.families import BY_TYPE
from trimtab.model.hardware import TARGETS
from trimtab.pipelines.documents import DOCUMENTS

README = links.ROOT / "README.md"


def test_the_readme_is_short_and_says_early_what_has_not_run():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    (place,) = [number for number, line in enumerate(lines) if line == "## What is proven, and what has not run"]
    assert place < 50 and "TensorRT-LLM and Kubernetes could not be run" in lines[place + 2]


def test_every_link_leads_somewhere():
    assert not links.broken()


@pytest.mark.parametrize("link", ("none.md", "there.md#nothing", "#nothing", "../outside.md"))
def test_a_link_that_leads_nowhere_is_named(tmp_path, link):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("# There\n\n## `two` words\n")
    page = tmp_path / "README.md"
    page.write_text("# A page\n[a](docs/there.md#two-words) [b](#a-page) [c](https://example.org) `[d](none)`\n")
    assert links.broken(tmp_path) == []
    page.write_text(f"# A page\n[a]({link.replace('there', 'docs/there')})\n")
    (fault,) = links.broken(tmp_path)
    assert fault.startswith("README.md: ") and "there is no such" in fault


def test_the_site_has_every_page():
    """What the navigation names is there, and no page of docs is left out of it."""
    named = set(re.findall(r": ([\w/.-]+\.md)$", (links.ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {path for path in (links.ROOT / "docs").rglob("*.md")} <= {links.ROOT / name for name in named}
    gathered = build_site.gathered()
    assert {links.ROOT / name for name in named} <= gathered and all(path.is_file() for path in gathered)
    assert links.ROOT / "components/calibration/README.md" in gathered  # by a link alone


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra [docs]")
@pytest.mark.slow
def test_the_site_is_built():
    """mkdocs is strict: it fails where a page, a link or a heading is missing."""
    assert build_site.main() == 0
    assert "<h1" in (links.ROOT / "build/site/docs/recipes.html").read_text()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_reference_is_what_make_docs_would_write(name):
    page = fields.REFERENCE / f"{name}.md"
    assert page.read_text() == fields.page(DOCUMENTS[name]), "stale: run make docs"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_reference_has_every_field(name):
    text, schema = fields.page(DOCUMENTS[name]), DOCUMENTS[name].schema
    for section in (schema, *schema.get("$defs", {}).values()):
        for field, about in section.get("properties", {}).items():
            assert f"| `{field}` | " in text
            assert " ".join(about.get("description", "").split()).replace("|", "&#124;") in text


def test_a_stale_reference_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fields, "REFERENCE", tmp_path)
    assert fields.main(["--check"]) == 1
    assert "recipe.md is stale: run make docs" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert fields.main([]) == 0 and fields.main(["--check"]) == 0


def test_pages_name_what_there_is():
    readme, formats = README.read_text(), (links.ROOT / "docs/formats.md").read_text()
    assert all(f"`{name}`" in readme for name in (*GOALS, *TARGETS))
    assert all(f"`{name}`" in formats for name in FORMATS)
    architectures = (links.ROOT / "docs/architectures.md").read_text()
    table = "\n".join(line for line in architectures.splitlines() if line.startswith("| "))
    assert not set(BY_TYPE) - set(re.findall(r"`(\w+)`", table))
    count = f"{len(BY_TYPE)} model types"
    assert count in architectures and count in readme
