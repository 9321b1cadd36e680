"""An lm-eval model over a trimtab engine: asks it what lm-eval's own `HFLM` would ask transformers.

So a figure means here what it means in lm-eval: the tokenizer adds what it adds to a text, an empty context is the
tokenizer's BOS, and what is too long loses its beginning. tests/components/validation/test_lm.py compares the two.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from trimtab.base import progress
from trimtab.base.errors import InputError
from trimtab.runtime.engines.protocol import Engine
from trimtab.runtime.text import token_windows

#: Tokens of an answer where a task names no number: HFLM's.
MAX_GEN_TOKS = 256
#: Prompts are given to the engine in parts of this many of its batches: progress is told between two parts.
BATCHES_AT_ONCE = 4
#: What a task may say of an answer that is the likeliest anyway, and the values that change nothing of it.
_INERT = {"top_p": None, "top_k": None, "min_p": None, "num_beams": (1,), "use_cache": None}


class EngineLM(TemplateLM):
    """Answers lm-eval's requests with any engine that has `loglikelihood` and `generate`.

    Args:
        engine: the engine.
        max_length: the most tokens of a request and its answer together. HFLM does not count the last token of an
            answer that is given, an engine does: for those, HFLM's `max_length` is this less one.
        batch: how many prompts the engine continues at once.

    `truncated` counts the requests that have lost their beginning.
    """

    def __init__(self, engine: Engine, max_length: int, batch: int):
        super().__init__()
        self.engine, self.max_length, self.batch = engine, max_length, batch
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begins = self.engine.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else begins

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return token_windows.encode(self.engine.tokenizer, string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        progress.report("validate", f"scoring {len(requests)} answers")
        return self.engine.loglikelihood([self._fitting(context, answer) for _, context, answer in requests])

    def _fitting(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Takes from the context's beginning what is too much."""
        room = self.max_length - len(answer)
        if room < 1:
            raise InputError(
                f"engine.max_seq_len: an answer to choose has {len(answer)} tokens, and a token must stand before it; "
                f"write at least {len(answer) + 1} instead of {self.max_length}"
            )
        self.truncated += len(context) > room
        return context[-room:], answer

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        raise InputError(
            "tasks: a task asks for the likelihood of whole documents; trimtab measures perplexity by itself, "
            "name tasks of multiple choice or generation"
        )

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Returns the greedy answer to each (context, options), cut before the first text to stop at.

        Raises:
            InputError: a task asks for something else than the likeliest answer, or for more tokens than the engine
                has.
        """
        prompts: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        stops = []
        ends = self.engine.tokenizer.decode(self.eot_token_id)
        for number, request in enumerate(requests):
            context, options = request.args
            wanted = _greedy(options)
            most = wanted["max_gen_toks"]
            room = self.max_length - most
            if room < 1:
                raise InputError(
                    f"engine.max_seq_len: a task asks for answers of up to {most} tokens; write more than {most} "
                    f"instead of {self.max_length}, or name another task"
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            self.truncated += len(tokens) > room
            prompts[most].append((number, tokens[-room:]))
            stops.append(handle_stop_sequences(wanted.get("until"), eos=ends))
        answers = self._continue(prompts, stops)
        return [
            postprocess_generated_text(answers[number], until, think_end_token=None)
            for number, until in enumerate(stops)
        ]

    def _continue(self, prompts: dict[int, list[tuple[int, list[int]]]], stops: list[list[str]]) -> dict[int, str]:
        """Returns the text after each numbered prompt, of which those with the same number of new tokens go together;
        prompts of like length go into one batch, and the longest go first, so that too little memory shows early."""
        answers: dict[int, str] = {}
        part = BATCHES_AT_ONCE * self.batch
        for most, asked in prompts.items():
            asked = sorted(asked, key=lambda prompt: -len(prompt[1]))
            for start in range(0, len(asked), part):
                progress.report("validate", "generating answers", len(answers), len(stops))
                numbers, tokens = zip(*asked[start : start + part], strict=True)
                written = self.engine.generate(list(tokens), most, [stops[number] for number in numbers])
                for number, answer in zip(numbers, written, strict=True):
                    answers[number] = self.engine.tokenizer.decode(answer, skip_special_tokens=True)
        return answers


def _greedy(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a generation as lm-eval normalizes them; refuses those of any other than the likeliest."""
    wanted = normalize_gen_kwargs(options, MAX_GEN_TOKS)
    if wanted.pop("do_sample") or wanted.pop("temperature", 0):
        raise InputError(
            "tasks: a task asks for answers drawn at random (do_sample, temperature); trimtab judges the likeliest "
            "answer, name another task or set do_sample: false in its generation_kwargs"
        )
    for name, value in wanted.items():
        known = name in ("until", "max_gen_toks") or (name in _INERT and value in (_INERT[name] or (value,)))
        if not known:
            raise InputError(
                f"tasks: a task asks for answers with {name}: {value!r}, which the engines do not have; name another "
                "task or remove it from its generation_kwargs"
            )
    return wanted
