"""Calibration data: the mix, its shares, its report, and what a bad source is told."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import islice
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.base.errors import InputError
from trimtab.components.calibration import data, hub_datasets
from trimtab.recipe import Calibration, Source
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.text import token_windows

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(model):
    """The tiny model's tokenizer, with a chat template."""
    tokenizer = model_files.load_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    return tokenizer


def numbers(start: int, count: int) -> str:
    """Text in which every word occurs once, so that windows can be told apart."""
    return " ".join(str(n) for n in range(start, start + count))


def rows(start: int, count: int) -> list[dict]:
    return [
        {"text": f"row {n}", "n": n, "chat": [{"role": "user", "content": f"chat {n}"}]}
        for n in range(start, start + count)
    ]


@pytest.fixture
def write(tmp_path):
    """A function: writes a .txt from a text, a .jsonl from rows, and returns its path."""

    def write(name: str, content) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_text(content)
        return str(path)

    return write


def draw(tokenizer, source, samples: int = 4, **settings) -> data.Sample:
    return data.draw(Calibration.parse({"samples": samples, "length": LENGTH, "text": source, **settings}), tokenizer)


# --- what is drawn -------------------------------------------------------------------------------------------


def test_the_default_recipe_draws_what_it_always_drew(tokenizer):
    """The whole text in one call of the tokenizer, cut, and a random permutation: spelled out."""
    sample = data.draw(Calibration(), tokenizer)
    text = Path(token_windows.__file__).with_name("calibration.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    cut = torch.tensor(ids[: len(ids) // 512 * 512]).reshape(-1, 512)
    expected = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:8]]
    assert sample.tokens.dtype == torch.int64 and torch.equal(sample.tokens, expected)
    assert sample.text == "\n\n".join(tokenizer.batch_decode(expected))


def test_a_mix_holds_each_source_by_its_weight(tokenizer, write):
    first, second = write("first.txt", numbers(1000, 400)), write("second.jsonl", rows(5000, 100))
    sample = draw(tokenizer, [{"text": first, "weight": 3}, {"text": second}], samples=8)
    assert sample.tokens.shape == (8, LENGTH)
    assert ["row" in tokenizer.decode(window) for window in sample.tokens] == [False] * 6 + [True] * 2
    assert [(line["source"], line["samples"]) for line in sample.report["sources"]] == [(first, 6), (second, 2)]


def test_windows_do_not_overlap(tokenizer, write):
    """Every window of the text, drawn at once, is the text's beginning in another order."""
    path = write("all.txt", numbers(1000, 100))
    ids = tokenizer(Path(path).read_text(), add_special_tokens=False).input_ids
    sample = draw(tokenizer, path, samples=len(ids) // LENGTH)
    expected = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    assert sorted(sample.tokens.tolist()) == sorted(expected.tolist()) and sample.tokens.tolist() != expected.tolist()


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False), (-1, False)])
def test_the_seed_draws(seed, same, tokenizer, write):
    folder = Path(write("set/train.jsonl", rows(0, 400))).parent
    mix = [{"text": write("a.txt", numbers(0, 400))}, {"text": f"hf:{folder}"}]
    first, second = draw(tokenizer, mix).tokens, draw(tokenizer, mix, seed=seed).tokens
    assert [torch.equal(first[:2], second[:2]), torch.equal(first[2:], second[2:])] == [same, same]


def test_messages_are_written_with_the_chat_template(tokenizer, write):
    path = write("chats.jsonl", [{"messages": row["chat"]} for row in rows(0, 50)])
    assert "<user>chat " in draw(tokenizer, path, samples=20).text


# --- shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ([1], 8, [8]),
        ([3, 1], 8, [6, 2]),
        ([1, 1, 1], 8, [3, 3, 2]),  # equal remainders: the first come first
        ([0.7, 0.1, 0.2], 15, [11, 1, 3]),  # quotas 10.5, 1.5, 3: decimals are exact, not 0.1000000000000000055
        ([0.5, 0.3, 0.2], 5, [3, 1, 1]),  # quotas 2.5, 1.5, 1
        ([1, 1, 100], 3, [1, 1, 1]),
        ([100, 1], 4, [3, 1]),
        ([1, 2, 4], 2, [0, 1, 1]),  # fewer samples than sources: quotas 0.29, 0.57, 1.14
    ],
)
def test_shares(weights, samples, expected):
    assert data.shares(weights, samples) == expected


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_are_proportional_and_leave_no_source_out(weights, samples):
    counts = data.shares(weights, samples)
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [samples * weight / sum(exact) for weight in exact]
    assert sum(counts) == samples
    assert min(counts) >= (1 if samples >= len(weights) else 0)
    for count, quota in zip(counts, quotas, strict=True):
        assert count <= max(1, quota + 1) and count > quota - len(weights)


# --- the report ----------------------------------------------------------------------------------------------


def test_the_report(tokenizer, write):
    """Documents of 5, 10, 15 … 105 tokens: one token a digit, and the blank line of two between documents."""
    documents = ["7" * (5 * n - 2) for n in range(1, 21)] + ["7" * 105]
    path = write("known.jsonl", [{"text": document} for document in documents])
    report = draw(tokenizer, path, samples=2, length=100).report
    assert report == {
        "samples": 2,
        "length": 100,
        "tokens": 200,
        "vocabulary_coverage": report["vocabulary_coverage"],
        "document_tokens": {"p10": 15, "median": 55, "p90": 95},
        "sources": [
            {"source": path, "samples": 2, "documents": report["sources"][0]["documents"], "tokens_available": 1155}
        ],
    }
    assert report["vocabulary_coverage"] == pytest.approx(2 / 300)


def test_documents_used_are_those_that_the_samples_touch(tokenizer, write):
    path = write("digits.jsonl", [{"text": "7" * 14}] * 10 + [{"text": "7" * 16}])
    assert draw(tokenizer, path, samples=3, length=16).report["sources"][0]["documents"] == 3
    assert draw(tokenizer, path, samples=2, length=48).report["sources"][0]["documents"] == 6


def test_more_sources_than_samples(tokenizer, write):
    mix = [{"text": write(f"{n}.txt", numbers(0, 100)), "weight": n} for n in (1, 2, 4)]
    report = draw(tokenizer, mix, samples=2).report
    assert [line["samples"] for line in report["sources"]] == [0, 1, 1]
    assert report["sources"][0] == {"source": mix[0]["text"], "samples": 0, "documents": 0, "tokens_available": 0}


# --- named datasets ------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(write):
    """`hf:` and a local folder of 3,000 rows in two splits; rows 0, 10, 20 … have no text."""
    train = [{**row, "text": None if row["n"] % 10 == 0 else row["text"]} for row in rows(0, 3000)]
    write("set/train.jsonl", train)
    return f"hf:{Path(write('set/test.jsonl', rows(9000, 50))).parent}"


def test_a_dataset_is_a_source(tokenizer, dataset):
    report = draw(tokenizer, dataset).report
    (line,) = report["sources"]
    assert line["source"] == f"{dataset} train" and line["samples"] == 4


def test_only_as_much_as_is_needed_is_read(tokenizer, dataset):
    (line,) = draw(tokenizer, dataset).report["sources"]
    assert data.READ_AHEAD * 4 * LENGTH <= line["tokens_available"] < data.READ_AHEAD * 4 * LENGTH + 20


def test_the_rows_are_drawn_from_all_over_the_buffer(tokenizer, dataset):
    def first(seed: int) -> list[int]:
        stream = hub_datasets.stream(Source(text=dataset), tokenizer, seed)
        return [int(document.split()[1]) for document in islice(stream, 200)]

    found = first(0)
    assert found == first(0) != first(1)
    assert len(set(found)) == 200 and max(found) > 500 and found != sorted(found)
    assert not [n for n in found if n % 10 == 0], "rows without text are passed over"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"split": "test"}, "row 90"), ({"field": "chat"}, "<user>chat "), ({"config": "default"}, "row ")],
)
def test_split_field_and_config(settings, told, tokenizer, dataset):
    assert told in draw(tokenizer, [{"text": dataset, **settings}], samples=12).text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "txt"}, "' has no field 'txt'; write field: one of text, n, chat"),
        ({"field": "n"}, "field 'n' of .* holds [0-9]+; it must be a string, or a list of"),
        ({"split": "validation"}, "cannot be loaded: Bad split: validation. Available splits: .*'train', 'test'"),
        ({"config": "en"}, "cannot be loaded: BuilderConfig 'en' not found"),
        ({"text": "hf:/no/folder"}, "the dataset 'hf:/no/folder train' cannot be loaded"),
        ({"split": "test"}, "test': [0-9]+ tokens give [0-9]+ windows of 16, 200 are needed"),
    ],
)
def test_a_bad_dataset(settings, message, tokenizer, dataset):
    with pytest.raises(InputError, match=rf"calibrate.text: .*{message}"):
        draw(tokenizer, [{"text": dataset, **settings}], samples=200)


def test_a_hub_that_cannot_be_reached(tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'hf:owner/none train' cannot be loaded: Couldn't .* write hf:owner/name"):
        draw(tokenizer, "hf:owner/none")


def test_code_of_a_dataset_never_runs(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    write("code/train.jsonl", rows(0, 100))
    write("code/code.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot be loaded: .*scripts are no longer supported"):
        draw(tokenizer, f"hf:{tmp_path / 'code'}")
    assert not (tmp_path / "ran").exists()


# --- bad sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("7", "1 token gives 0 windows of 16, 2 are needed; give more text, fewer samples or a shorter length"),
        ("7" * 33, None),
        ("7" * 31, "31 tokens give 1 windows of 16, 2 are needed"),
    ],
)
def test_the_source_that_is_too_short_is_named(content, message, tokenizer, write):
    long, short = write("long.txt", numbers(0, 200)), write("short.txt", content)
    mix = [{"text": long}, {"text": short}]
    if message is None:
        assert len(draw(tokenizer, mix).tokens) == 4
        return
    with pytest.raises(InputError) as caught:
        draw(tokenizer, mix)
    assert f"calibrate.text: '{short}': {message}" in str(caught.value)


def test_a_malformed_line_is_named(tokenizer, write):
    path = write("bad.jsonl", [*rows(0, 3), {"txt": "x"}])
    with pytest.raises(InputError, match=rf"calibrate.text: line 4 of '{path}' must be a JSON object"):
        draw(tokenizer, path)
