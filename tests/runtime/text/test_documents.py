"""Documents: what a file may hold, and what a bad line is told."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trimtab.base.errors import InputError
from trimtab.runtime.text import documents, token_windows

BUILTIN = token_windows.CALIBRATION_TEXT
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
    assert token_windows.read_text(path, BUILTIN, tokenizer) == "one\n\n<user>Hi?\n<assistant>Yes.\n\n\nboth"


def test_separators_of_unicode_do_not_end_a_line(tmp_path):
    path = write(tmp_path, {"text": "one\u2028line\x85of text"}, {"text": "two"})
    assert documents.read(path, BUILTIN) == ["one\u2028line\x85of text", "two"]


def test_the_builtin_text_is_not_a_file():
    (builtin,) = documents.read("builtin", BUILTIN)
    assert builtin.startswith("Two kinds of volcano")


TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }} " + (
    "{{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}{% if tools %}({{ tools[0].name }}){% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
ASKED = {"role": "user", "content": "Rain?"}

#: Name of the file, its bytes or its value as JSON, and the documents in it.
READ = [
    ("a.json", [{"text": "one"}, {"text": "two"}], ["one", "two"]),
    ("a.json", ["one", "two"], ["one", "two"]),
    ("a.json", {"text": "one"}, ["one"]),
    ("a.json", b'[\n  {"text": "one"},\n  {"messages": [{"role": "user", "content": "x"}]}\n]\n', ["one", "<user>x"]),
    ("a.json", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),  # JSON lines by another name
    ("A.JSONL", b'{"text": "one"}\n', ["one"]),
    ("a.ndjson", b'{"text": "one"}\n', ["one"]),
    ("a.jsonl", b'"one"\n', ["one"]),
    ("a.csv", b'id,text\n1,one\n2,"two, with ""commas"" and\na line"\n', ["one", 'two, with "commas" and\na line']),
    ("a.csv", b"text\r\none\r\n\r\ntwo\r\n", ["one", "two"]),
    ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000]),  # csv's own limit is 131,072
    ("a.tsv", b"text\tid\none, two\t1\n", ["one, two"]),
    # the mark that Windows writes before UTF-8
    ("a.txt", b"\xef\xbb\xbfone", ["one"]),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}', ["one"]),
    ("a.json", b'\xef\xbb\xbf["one"]', ["one"]),
    ("a.csv", b"\xef\xbb\xbftext\none\n", ["one"]),
    # half of a pair is no character; both halves are one
    ("a.jsonl", b'{"text": "a\\ud83d b"}', ["a\ufffd b"]),
    ("a.jsonl", b'{"text": "a\\ud83d\\ude00 b"}', ["a\U0001f600 b"]),
    ("a.json", b'[{"messages": [{"role": "user", "content": "\\ude00"}]}]', ["<user>\ufffd"]),
    # content in parts, null, and what tables of datasets fill with null
    ("a.json", [{"messages": [{"role": "user", "content": PARTS}]}], ["<user>ab"]),
    ("a.json", [{"messages": [ASKED, {"role": "assistant", "content": None}]}], ["<user>Rain?<assistant>"]),
    ("a.json", [{"messages": [{**ASKED, "tool_calls": None, "name": None}]}], ["<user>Rain?"]),
    # tool calls, with arguments as a text of JSON or as a mapping, and with or without null content
    ("a.json", [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}],
     ['<user>Rain?<assistant>[weather {"city": "Ulm"}]']),
    ("a.json", [{"messages": [{"role": "bot", "tool_calls": [{"function": {"name": "a", "arguments": {"b": 1}}}]}]}],
     ['<bot>[a {"b": 1}]']),
    ("a.json", [{"messages": [{"role": "assistant", "tool_calls": [{"name": "a"}]}]}], ["<assistant>[a {}]"]),
    ("a.json", [{"messages": [ASKED], "tools": [{"name": "weather"}]}], ["<user>Rain?(weather)"]),
    ("a.json", [{"messages": [ASKED], "tools": '[{"name": "weather"}]'}], ["<user>Rain?(weather)"]),
    ("a.json", [{"messages": [ASKED], "tools": None}], ["<user>Rain?"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), READ)
def test_what_is_read(name, content, expected, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert documents.read(str(path), BUILTIN, with_template(TOOLS)) == expected
    documents.check(str(path), "calibrate.text")


#: What cannot be read, and what is said of it; always with a next step.
REFUSED = [
    ("a.json", b'{"a": 1}', "the record of .* must be a JSON object with a field \"text\""),
    ("a.json", b'[{"text": "one"}, {"txt": "two"}]', "entry 2 of .* must be a JSON object with a field \"text\""),
    ("a.json", b"[[1, 2]]", "entry 1 of .* must be a JSON object with a field \"text\""),
    ("a.json", b"plain text, named wrongly", "is no JSON .*; write a list of records .*, or name a text file .txt"),
    ("a.json", b'[{"text": "one"},', "is no JSON .*; write a list of records or records on lines"),
    ("a.json", b"[]", "is empty; write the path of a file with text in it"),
    ("a.json", b"[" * 100_000, "is no JSON .*; write a list of records"),
    ("a.csv", b"id,body\n1,one\n", "has no column 'text' in its first line, which has 'id, body'; name the column so"),
    ("a.csv", b"id;text\n1;one\n", "has no column 'text' in its first line, which has 'id;text'; name the column so"),
    ("a.csv", b"", "has no column 'text' in its first line, which has nothing; name the column so"),
    ("a.csv", b"id,text\n1\n", "has 1 columns in line 2, too few for 'text'; add them"),
    ("a.csv", b'text\n"one\n', "is no CSV: line 2: unexpected end of data; write quotes around a text"),
    ("a.csv", b"text\n", "is empty; write the path of a file with text in it"),
    ("a.parquet", b"PAR1", "is no file of text; write its rows as .jsonl .* text: 'hf:/"),
    ("a.jsonl.gz", b"\x1f\x8b", "is no file of text; write its rows as .jsonl"),
    ("a.txt", "one".encode("utf-16"), "cannot be read .*; write the path of a UTF-8 file, such as `iconv"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
     r"line 1 of .* holds parts of a message that are no text \(image_url\); leave them out"),
    ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}',
     'holds "tool_calls" in .*; each must be {"type": "function"'),
    ("a.jsonl", b'{"messages": [{"role": "bot", "tool_calls": "weather"}]}', 'holds "tool_calls" in .*; each must be'),
    ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]}',
     'holds a tool call whose arguments are no JSON: "{"'),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": {"text": "x"}}]}', "it must be a string, or a list of"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (
        lambda: documents.read(str(path), BUILTIN, with_template(TOOLS), "calibrate.text"),
        lambda: documents.check(str(path), "calibrate.text"),
    ):
        with pytest.raises(InputError, match=f"^calibrate.text: (?s:.*){message}"):
            read()


def test_a_folder_is_a_dataset(tmp_path):
    with pytest.raises(InputError, match="is a folder; write hf: before it where it is a dataset, or write 'bui"):
        documents.check(str(tmp_path), "calibrate.text")


def test_a_template_that_leaves_tool_calls_out(tokenizer, tmp_path):
    """What the model would learn of is missing in the text: nobody would see it."""
    path = write(tmp_path, {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]})
    with pytest.raises(InputError, match="line 1 of .* holds tool calls, which the model's chat template leaves out"):
        documents.read(path, BUILTIN, tokenizer)


def test_tools_that_are_none(tokenizer, tmp_path):
    path = write(tmp_path, {"messages": [ASKED], "tools": "weather"})
    with pytest.raises(InputError, match='holds "tools" "weather"; they must be a list of JSON objects'):
        documents.read(path, BUILTIN, tokenizer)


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
