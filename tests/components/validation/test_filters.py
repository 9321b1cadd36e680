"""A task that reads an answer in several ways, as gsm8k does, run by lm-eval on a tiny model: an item is one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab.components.validation import measure, tasks
from trimtab.components.validation.lm import EngineLM
from trimtab.errors import InputError
from trimtab.recipe import Engine
from trimtab.runtime.engine import TorchEngine

TASK = "two_ways"
ITEMS = 6
#: Every text is an exact match for the loose filter, none for the strict one.
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: {kind}
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "right"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 4}}
filter_list:
  - name: strict
    filter:
      - {{function: regex, regex_pattern: "(no such text)", fallback: wrong}}
      - {{function: take_first}}
  - name: loose
    filter:
      - {{function: regex, regex_pattern: "(no such text)", fallback: right}}
      - {{function: take_first}}
metric_list:
  - metric: {metric}
"""


def write(folder: Path, kind: str = "generate_until", metric: str = "exact_match") -> str:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"The river {n}"}) + "\n" for n in range(ITEMS)))
    (folder / f"{TASK}.yaml").write_text(YAML.format(name=TASK, data=data, kind=kind, metric=metric))
    return str(folder)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: filters -> the metrics and the items of four of the task's six items."""
    folder = tmp_path_factory.mktemp("filters")
    task_path, engine = write(folder), TorchEngine(tiny.write_model(folder / "model"), Engine(), device="cpu")

    def score(filters: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        parameters = {"tasks": [TASK], "task_path": task_path, "filters": filters, "items": {TASK: [1, 5]}}
        metrics = measure._score_items(EngineLM(engine, 2048, 8), parameters, folder)
        return metrics, [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]

    return score


@pytest.mark.parametrize(("filters", "score"), [({}, 0.0), ({TASK: "loose"}, 1.0), ({TASK: "strict"}, 0.0)])
def test_an_item_counts_once_by_the_stated_filter(filters, score, scored):
    metrics, items = scored(filters)
    assert metrics == {"items": 4, "accuracy": score, "truncated": 0}
    assert len({item["id"] for item in items}) == 4 and {item["score"] for item in items} == {score}


def test_the_items_of_a_task_are_counted_when_a_run_is_planned(tmp_path):
    assert tasks.sizes([TASK], write(tmp_path), {TASK: "loose"}) == {TASK: ITEMS}
    with pytest.raises(InputError, match=f"filters: '{TASK}' has no filter 'lose'; write strict or loose"):
        tasks.sizes([TASK], str(tmp_path), {TASK: "lose"})


def test_a_task_without_scores_of_single_items_is_refused_there(tmp_path):
    """Such as wikitext, which asks for the likelihood of whole documents."""
    task_path = write(tmp_path, "loglikelihood_rolling", "word_perplexity")
    with pytest.raises(InputError, match=f"tasks: '{TASK}' scores no single items .* name tasks of multiple choice"):
        tasks.sizes([TASK], task_path, {})
