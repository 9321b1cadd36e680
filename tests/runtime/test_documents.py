"""Documents: what a file may hold, and what a bad line is told."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trimtab.errors import InputError
from trimtab.runtime import documents, text

BUILTIN = text.CALIBRATION_TEXT
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of which only the chat template matters."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0})), chat_template=template)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return with_template(TEMPLATE)


def write(folder, *lines, name="data.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(x, ensure_ascii=False) if not isinstance(x, str) else x for x in lines))
    return str(path)


def test_a_text_file_is_one_document(tmp_path):
    assert documents.read(write(tmp_path, "one", "", "two", name="a.txt"), BUILTIN) == ["one\n\ntwo"]


def test_each_line_is_a_document(tokenizer, tmp_path):
    path = write(tmp_path, {"text": "one"}, "", {"text": " "}, {"messages": CHAT}, {"text": "both", "messages": CHAT})
    assert documents.read(path, BUILTIN, tokenizer) == ["one", "<user>Hi?\n<assistant>Yes.\n", "both"]
    assert text.read_text(path, BUILTIN, tokenizer) == "one\n\n<user>Hi?\n<assistant>Yes.\n\n\nboth"


def test_separators_of_unicode_do_not_end_a_line(tmp_path):
    path = write(tmp_path, {"text": "one\u2028line\x85of text"}, {"text": "two"})
    assert documents.read(path, BUILTIN) == ["one\u2028line\x85of text", "two"]


def test_the_builtin_text_is_not_a_file():
    (builtin,) = documents.read("builtin", BUILTIN)
    assert builtin.startswith("Two kinds of volcano")


BAD = [
    ("{", 'must be a JSON object with a field "text" (a string) or "messages"'),
    ('["text"]', "must be a JSON object with a field"),
    ('{"txt": "x"}', "must be a JSON object with a field"),
    ('{"text": null}', "must be a JSON object with a field"),
    ('{"text": [{"role": "user", "content": "x"}]}', "must be a JSON object with a field"),
    ('{"messages": "x"}', "must be a JSON object with a field"),
    ('{"messages": []}', 'holds []; it must be a string, or a list of {"role": …, "content": …}'),
    ('{"messages": [{"role": "user"}]}', 'holds [{"role": "user"}]; it must be'),
    ('{"messages": [{"role": "user", "content": ["x"]}]}', "it must be a string, or a list of"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_a_malformed_line_is_named(line, message, tokenizer, tmp_path):
    path = write(tmp_path, {"text": "good"}, "", line)
    with pytest.raises(InputError) as caught:
        documents.read(path, BUILTIN, tokenizer, "calibrate.text")
    assert str(caught.value).startswith(f"calibrate.text: line 3 of '{path}' ") and message in str(caught.value)


def test_messages_need_a_chat_template(tokenizer, tmp_path):
    path = write(tmp_path, {"messages": CHAT})
    with pytest.raises(InputError, match="line 1 of .* tokenizer has no chat template; write them out as text"):
        documents.read(path, BUILTIN, with_template(None))
    with pytest.raises(InputError, match='line 1 of .* which are not read here; write "text"'):
        documents.read(path, BUILTIN)


def test_a_template_may_refuse_messages(tmp_path):
    strict = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="line 1 of .* chat template refuses: roles must alternate"):
        documents.read(write(tmp_path, {"messages": CHAT}), BUILTIN, strict)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "is not a file; write 'builtin' or the path"),
        ("empty.txt", b" \n", "is empty"),
        ("empty.jsonl", b'{"text": ""}\n', "is empty"),
        ("latin.txt", "Käse".encode("latin-1"), r"cannot be read \(.*utf-8.*\); write the path of a UTF-8 file"),
    ],
)
def test_a_bad_file(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents.read(str(tmp_path / name), BUILTIN)
