"""What a model's files say of its licence, as publishers write it."""

from __future__ import annotations

import json

import pytest

from trimtab.model.licence import licence_of, spdx_of, title

CARDS = [
    ("---\nlicense: apache-2.0\n---\ntext", {"id": "apache-2.0"}, "Apache-2.0"),
    ("---\r\nlicense: MIT\r\n---\r\n", {"id": "MIT"}, "MIT"),
    ("---\nlicense: [cc-by-4.0, mit]\n---\n", {"id": "cc-by-4.0"}, "CC-BY-4.0"),
    ("---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE\n---\n",
     {"id": "other", "name": "deepseek", "link": "LICENSE"}, "deepseek"),
    ("---\nlicense: llama3.1\n---\n", {"id": "llama3.1"}, "llama3.1"),
    ("no front matter, license: mit", {}, ""),
    ("---\nlicense: {a: b}\n---\n", {}, ""),
    ("---\n: [not yaml\n---\n", {}, ""),
    ("---\n- a list\n---\n", {}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("card", "licence", "name"), CARDS, ids=[name or card[:20] for card, _, name in CARDS])
def test_a_card(tmp_path, card, licence, name):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence and title(licence) == name
    assert spdx_of(licence) == (name if name[:1].isupper() else "")


def test_a_config_speaks_where_the_card_is_silent(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"license": "gemma"}))
    assert licence_of(tmp_path) == {"id": "gemma"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == {"id": "mit"}


def test_a_card_that_is_no_text_says_nothing(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert licence_of(tmp_path) == {}
