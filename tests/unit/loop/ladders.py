"""Ladders of rungs, and attempts that ended in some way."""

from trimtab.judge import FAILURE_CLASSES, Interval, Verdict
from trimtab.loop.adjust import next_recipe
from trimtab.loop.state import Brief
from trimtab.planning.matrix import Rung
from trimtab.recipe import Recipe


def rung(text: str) -> Rung:
    return Rung(recipe=Recipe.parse(text), why="because")


def quantized(*formats: str) -> list[Rung]:
    """Rungs by format: 'fp8', 'fp8+kv', 'fp8+nvfp4', 'mixed 6'; '+kv' is the KV cache in FP8."""
    rungs = []
    for text in formats:
        form, _, kv_cache = text.partition("+")
        form, _, bits = form.partition(" ")
        quantize = {"format": form, "kv_cache": {"": "none", "kv": "fp8"}.get(kv_cache, kv_cache)}
        if bits:
            quantize["effective_bits"] = float(bits)
        rungs.append(Rung(recipe=Recipe.parse({"quantize": quantize}), why="because"))
    return rungs


def student(blocks: int, tokens: int = 1000, form: str = "fp8") -> Rung:
    return rung(
        f"{{prune: {{method: depth, blocks: {blocks}}}, distill: {{tokens: {tokens}}}, "
        f"quantize: {{format: {form}}}}}"
    )


def trained_with_rounding(tokens: int = 1000) -> Rung:
    return rung(f"{{distill: {{tokens: {tokens}, quantization_aware: true}}, quantize: {{format: int4_rtn}}}}")


def narrow(sizes: str, tokens: int = 1000) -> Rung:
    return rung(f"{{prune: {{method: width, {sizes}}}, distill: {{tokens: {tokens}}}, quantize: {{format: fp8}}}}")


def failed(recipe: Rung | Recipe, cause: str, ratio: float | None = None) -> Brief:
    """An attempt that ended so; `cause` is a failure class or an outcome."""
    rejected = cause in FAILURE_CLASSES
    verdict = Verdict(
        outcome="rejected" if rejected else cause,
        failure_class=cause if rejected else None,
        reason="for the test",
        perplexity_ratio=Interval(estimate=ratio, low=ratio - 0.01, high=ratio + 0.01) if ratio else None,
    )
    return Brief(recipe=recipe.recipe if isinstance(recipe, Rung) else recipe, verdict=verdict)


DEMO = quantized(
    "int4_rtn", "int4_awq", "mixed 5", "mixed 5.5", "mixed 6", "mixed 6.5", "mixed 7", "int8_wo"
)  # fmt: skip
KV = quantized("fp8+nvfp4", "int8_sq+int8", "fp8+kv", "int8_wo+kv", "int8_wo")
H100 = [
    *quantized("fp8+kv", "fp8", "int4_awq"),
    student(8),
    student(4),
    rung("quantize: {format: fp8, exclude: [lm_head, '*.down_proj']}"),
]


def title_after(rungs, *history) -> str | None:
    found, sentence = next_recipe(rungs, history)
    assert sentence and "\n" not in sentence
    return found and found.recipe.title
