"""An lm-eval model over a trimtab engine."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from trimtab import progress
from trimtab.errors import InputError
from trimtab.runtime.engine import Engine


class EngineLM(TemplateLM):
    """Answers lm-eval's requests with any engine that has `loglikelihood` and `generate`."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.engine.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        progress.report("validate", f"scoring {len(requests)} answers")
        return self.engine.loglikelihood([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        raise InputError(
            "tasks: a task asks for the likelihood of whole documents; trimtab measures perplexity by itself, "
            "name tasks of multiple choice or generation"
        )

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        answers = []
        for request in progress.track(requests, "validate", "generating answers", len(requests)):
            context, options = request.args
            tokens = self.engine.generate([self.tok_encode(context)], options.get("max_gen_toks", 128))[0]
            answers.append(
                _cut(self.engine.tokenizer.decode(tokens, skip_special_tokens=True), options["until"])
            )
        return answers


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
