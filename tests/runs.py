"""Made-up runs for the report: every outcome, extremes, and hostile text."""

from __future__ import annotations

from trimtab.judge import Beside, Confirmation, Damage, Interval, Measurements, TaskDamage, Verdict
from trimtab.judge.damage import PlaceDamage
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.store.tree import Tree

HOSTILE = '<script>alert("x")</script> | [x](javascript:1) \x1b[31m & \'"'


def tree(name: str, size: int = 0) -> Tree:
    digest = (name.encode().hex() * 64)[:64]
    return Tree(uri=f"s3://models/trimtab/trees/{digest}", digest=digest, bytes=size)


def interval(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def brief(
    recipe: dict,
    outcome: str,
    reason: str,
    *,
    failure: str | None = None,
    why: str = "",
    recovery: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    megabytes: float = 0,
    share: float = 1.0,
    decode: float = 0,
    peak: float = 0,
    seconds: dict[str, float] | None = None,
    beside: Measurements | None = None,
    **more,
) -> Brief:
    measured = Measurements(
        bytes=int(megabytes * 1e6),
        quantized_share=share,
        decode_tokens_per_second=decode,
        throughput_tokens_per_second=4.1 * decode,
        peak_memory_bytes=int(peak * 1e6),
        max_context_tokens=8192 if megabytes else 0,
    )
    quality = {}
    if recovery and ratio:
        quality = {
            "looks": 2,
            "items": 1000,
            "windows": 32,
            "accuracy": interval(0.66 * recovery[0], 0.029),
            "beside": Beside(accuracy=interval(0.66, 0.029), perplexity=25.9, measurements=beside),
            "recovery": interval(*recovery),
            "perplexity": 25.9 * ratio[0],
            "perplexity_ratio": interval(*ratio),
            "mcnemar_p": 0.0004 if recovery[0] < 0.9 else 0.213,
        }
    verdict = Verdict(
        outcome=outcome, failure_class=failure, reason=reason, measurements=measured, **{**quality, **more}
    )
    return Brief(recipe=Recipe.parse(recipe), why=why, verdict=verdict, seconds=seconds or {})


BASELINE = brief(
    {}, "baseline", "the model unchanged, which every attempt is compared with", megabytes=269.1, decode=27.2,
    peak=912, looks=1, items=400, windows=16, accuracy=interval(0.672, 0.046), perplexity=25.63,
    seconds={"engine": 6.1, "validate": 61.0},
)  # fmt: skip
INT4 = brief(
    {"quantize": {"format": "int4_rtn"}}, "rejected",
    "perplexity ratio 1.396 (1.352 to 1.440) is above the limit 1.1", failure="perplexity",
    why="the first rung of the ladder", recovery=(0.868, 0.051), ratio=(1.396, 0.044), megabytes=117.3, share=0.281,
    decode=54.8, peak=640, gain=0.564, seconds={"quantize": 21.4, "engine": 4.8, "validate": 58.3},
)  # fmt: skip
DOES_NOT_FIT = brief(
    {"prune": {"method": "depth", "blocks": 6}, "distill": {"tokens": 2_000_000}, "quantize": {"format": "int8_wo"}},
    "rejected", "distillation needs 7.9 GB (weights 0.5, optimizer 4.3, activations 3.1), the target has 5.0 GB",
    failure="does_not_fit",
    why="int4_rtn failed (perplexity): next is fewer blocks, which takes less away from each weight",
    seconds={"calibrate": 12.7, "prune": 3.2},
)  # fmt: skip
AWQ = brief(
    {"quantize": {"format": "int4_awq"}}, "rejected", "recovery 0.913 (0.889 to 0.937) is below the limit 0.95",
    failure="accuracy", why="depth failed (does_not_fit): next is int4_awq, which needs less memory",
    recovery=(0.913, 0.024), ratio=(1.181, 0.021), megabytes=119.9, share=0.284, decode=53.9, peak=655, gain=0.554,
    seconds={"calibrate": 0.0, "sensitivity": 44.0, "quantize": 9.0, "engine": 4.9, "validate": 59.9},
)  # fmt: skip
DAMAGE = Damage(
    confidence=0.943,
    tasks=(
        TaskDamage(task="antonyms", items=200, baseline=0.82, candidate=0.815, lost=4, gained=3,
                   recovery=interval(0.991, 0.04)),
        TaskDamage(task="geography", items=200, baseline=0.7, candidate=0.655, lost=12, gained=3,
                   recovery=interval(0.9, 0.062)),
        TaskDamage(task="arithmetic", tier="critical", limit=0.9, items=200, baseline=0.6, candidate=0.61, lost=2,
                   gained=4, recovery=interval(1.029, 0.04)),
        TaskDamage(task="sequences", tier="advisory", items=200, baseline=0.25, candidate=0.24, lost=9, gained=7),
    ),
    worst="geography",
    places=(
        PlaceDamage(first=1, last=63, perplexity_ratio=interval(1.061, 0.02)),
        PlaceDamage(first=64, last=255, perplexity_ratio=interval(1.042, 0.012)),
    ),
    kl=interval(0.0412, 0.0031),
    agreement=interval(0.914, 0.006),
)  # fmt: skip
ACCEPTED = brief(
    {"name": "mixed 6 bits", "quantize": {"format": "mixed", "effective_bits": 6}},
    "accepted",
    "recovery 0.986 (0.961 to 1.011) is at least 0.95 and perplexity ratio 1.047 (1.036 to 1.058) at most 1.1",
    why="int4_awq failed (accuracy): next is mixed 6 bits, which takes less away",
    recovery=(0.986, 0.025),
    ratio=(1.047, 0.011),
    megabytes=146.8,
    share=0.413,
    decode=49.1,
    peak=701,
    gain=1 - 146.8 / 269.1,
    damage=DAMAGE,
    confirmed=True,
    confirmation=Confirmation(
        items=960, windows=12, level=0.8, recovery=interval(0.979, 0.012), perplexity_ratio=interval(1.051, 0.008)
    ),
    seconds={"calibrate": 0.0, "sensitivity": 0.0, "quantize": 12.2, "engine": 5.2, "validate": 104.6},
).model_copy(update={"engine": tree("engine"), "evaluation": tree("evidence")})
UNDECIDED = brief(
    {"quantize": {"format": "int8_sq"}}, "indeterminate",
    "2000 items are too few to tell: recovery 0.955 (0.942 to 0.968) is not shown to be at least 0.95",
    failure="accuracy", why="the verdicts so far ask for eight bits", recovery=(0.955, 0.013), ratio=(1.082, 0.012),
    megabytes=163.0, share=0.51, decode=44.0, peak=731, seconds={"quantize": 11.0, "engine": 5.0, "validate": 160.0},
)  # fmt: skip


def state(*history: Brief, **fields) -> State:
    given = {
        "store": "s3://models/trimtab",
        "name": "SmolLM2-135M-Instruct",
        "goal": "fit_larger_model",
        "target": "cpu",
        "model": tree("model", 269_060_552),
        "baseline": BASELINE,
        "history": history,
        "attempt": len(history),
    }
    if history:
        last = history[-1]
        given |= {"recipe": last.recipe, "why": last.why, "verdict": last.verdict, "seconds": last.seconds}
    return State(**(given | fields))


RELEASED = state(
    INT4,
    DOES_NOT_FIT,
    AWQ,
    ACCEPTED,
    trees={"calibration": tree("calibration", 90_000), "export": tree("export", 146_800_000), "engine": tree("engine")},
)
NOTHING_ACCEPTED = state(INT4, UNDECIDED, max_attempts=2)
SPARSE = brief(
    {"prune": {"method": "sparsegpt", "pattern": "2:4"}}, "rejected",
    "accurate but useless for lower_latency: +0.4% faster decoding, less than the 5.0% asked for", failure="no_gain",
    why="a recipe of the user's", recovery=(0.981, 0.014), ratio=(1.061, 0.009), megabytes=269.1, decode=27.3,
    peak=915, gain=0.004, seconds={"prune": 71.0, "engine": 5.0, "validate": 58.0},
)  # fmt: skip
STUDENT = brief(
    {
        "prune": {"method": "depth", "blocks": 6},
        "distill": {"tokens": 10_000_000, "generate": 1_000_000},
        "quantize": {"format": "fp8", "kv_cache": "fp8"},
    },
    "accepted",
    "recovery 0.972 (0.957 to 0.987) is at least 0.95 and perplexity ratio 1.071 (1.063 to 1.079) at most 1.1",
    why="sparsegpt failed (no_gain): next is depth, which gains in another way",
    recovery=(0.972, 0.015),
    ratio=(1.071, 0.008),
    megabytes=121.3,
    share=0.5,
    decode=68.4,
    peak=702,
    gain=1.51,
    confirmed=True,
    seconds={"calibrate": 12.7, "prune": 3.2, "generate": 412.0, "teach": 96.5, "distill": 3120.8, "recalibrate": 11.9}
    | {"quantize": 8.8, "engine": 5.0, "validate": 101.2},
)
BROKEN = brief(
    {"quantize": {"format": "fp8"}}, "rejected", "the candidate's log-likelihood is not finite in 3 of 16 windows",
    failure="degenerate_output", megabytes=140, decode=30,
)  # fmt: skip
STAGE_FAILED = state(DOES_NOT_FIT)
DISTILLED = state(SPARSE, STUDENT, goal="lower_latency", target="h100")
NO_GAIN = state(SPARSE, goal="lower_latency")
#: As many attempts as a run may have, few of them apart, and names that nobody breaks for the reader.
LONG = state(
    *(
        brief(
            {"name": f"attempt_{n}{'_of_a_long_name' * (n % 4)}", "prune": {"method": "depth", "blocks": n}},
            "rejected",
            "recovery is below the limit 0.95",
            failure="kv_cache_accuracy",
            why=f"the recipe before it failed: next are {n} blocks",
            recovery=(0.94 + 0.001 * n, 0.02),
            ratio=(1.09 + 0.003 * n, 0.01),
            megabytes=120 + n,
            decode=50 + n % 3,
            peak=12_345,
            seconds={"prune": 1.0 * n, "engine": 5.0, "validate": 12_345.6},
        )
        for n in range(1, 11)
    ),
    name="an-organisation-with-a-long-name.and_a_model_whose_name_is_longer-Instruct-v0.3",
    store="s3://a-bucket-whose-name-is-as-long-as-a-name-of-one-may-be-at-all/and/a/prefix/below/it",
    max_attempts=10,
)
EXTREME = state(
    INT4.model_copy(
        update={
            "verdict": INT4.verdict.model_copy(
                update={
                    "perplexity_ratio": Interval(estimate=4800, low=0.0, high=float("inf")),
                    "recovery": Interval(estimate=-0.12, low=float("-inf"), high=float("inf")),
                }
            )
        }
    ),
    BROKEN,
)
BASELINE_FAILED = state(
    baseline=brief({}, "rejected", "weights need 160 GB, the target has 5", failure="does_not_fit"),
)
#: The unchanged model is larger than all devices of the target.
UNHELD = BASELINE.model_copy(
    update={
        "recipe": Recipe.parse({"engine": {"by_block": True}}),
        "verdict": BASELINE.verdict.model_copy(
            update={
                "reason": f"{BASELINE.verdict.reason}; speed and memory not measured: scored block by block, for "
                "nothing there holds it",
                "measurements": Measurements(bytes=141_107_412_992, by_block=True),
            }
        ),
    }
)
BLOCK_BY_BLOCK = state(
    ACCEPTED.model_copy(
        update={
            "verdict": ACCEPTED.verdict.model_copy(
                update={"beside": ACCEPTED.verdict.beside.model_copy(
                    update={"measurements": UNHELD.verdict.measurements}
                )}
            )
        }
    ),
    baseline=UNHELD,
    target="h100",
)  # fmt: skip
EMPTY = state(baseline=None)
STATES = {
    "released": RELEASED,
    "nothing accepted": NOTHING_ACCEPTED,
    "stage failed": STAGE_FAILED,
    "distilled": DISTILLED,
    "no gain": NO_GAIN,
    "long": LONG,
    "extreme": EXTREME,
    "baseline failed": BASELINE_FAILED,
    "no attempt": state(),
    "block by block": BLOCK_BY_BLOCK,
    "empty": EMPTY,
}
KERNELS = {
    **{f"model.layers.{i}.mlp.down_proj": {"kernel": "_weight_int8pack_mm", "emulated": False} for i in range(30)},
    **{f"model.layers.{i}.mlp.up_proj": {"kernel": "dequantise", "emulated": True} for i in range(7)},
}
LAYERS = [
    {"layer": f"model.layers.{i}.self_attn.q_proj", "relative_error": 0.01 * i, "cosine": 1 - 0.0005 * i}
    for i in range(30)
]
CALIBRATION = {
    "samples": 1024,
    "length": 2048,
    "tokens": 2_097_152,
    "vocabulary_coverage": 0.3456,
    "document_tokens": {"p10": 41, "median": 512, "p90": 7321},
    "sources": [
        {"source": "hf:owner/name train", "samples": 768, "documents": 612, "tokens_available": 6_300_000},
        {"source": "notes.txt", "samples": 256, "documents": 1, "tokens_available": 812_345},
    ],
}
#: The metrics of a training.
DISTILLATION = {
    "tokens": 10_027_008,
    "steps": 306,
    "heldout_loss_before": 3.4182,
    "heldout_loss_after": 0.4127,
    "improved": 1.0,
    "stopped_early": 0.0,
    "curve": {
        "train": [(32_768 * n, 0.35 + 3.2 * n**-0.6 * (1 + 0.15 * (-1) ** n)) for n in range(1, 307)],
        "heldout": [(0, 3.4182)] + [(32_768 * n, 0.38 + 3.0 * n**-0.7) for n in range(34, 307, 34)],
    },
}


def hostile(given: State) -> State:
    """The same run, with hostile text wherever people or other programs write."""

    def poison(brief: Brief) -> Brief:
        recipe = brief.recipe.model_copy(update={"name": HOSTILE})
        verdict = brief.verdict.model_copy(update={"reason": HOSTILE})
        return brief.model_copy(update={"recipe": recipe, "why": HOSTILE, "verdict": verdict})

    history = tuple(poison(brief) for brief in given.history)
    bad = Tree(uri=HOSTILE, digest=HOSTILE)
    return given.model_copy(
        update={
            "name": HOSTILE,
            "store": HOSTILE,
            "target": HOSTILE,
            "model": bad,
            "trees": {HOSTILE: bad},
            "history": history,
            "recipe": history[-1].recipe,
            "verdict": history[-1].verdict,
            "why": HOSTILE,
            "seconds": {HOSTILE: 3.0},
        }
    )
