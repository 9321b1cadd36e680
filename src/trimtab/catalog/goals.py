"""What a run is for, as rows: the goals that a ladder of recipes is planned for, and what is measured for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """A measurement that decides whether an attempt gained anything.

    Attributes:
        name: the field or property of `judge.Measurements`.
        words: a gain of it, as in "12 % fewer bytes".
        less_is_better: whether the gain is the share that is saved; else it is what there is more of.
        per_device: whether the share of one device counts: devices that are saved serve something else.
        timed: whether it is a speed, which is measured again beside the unchanged model before it counts.
        computed: whether a plan knows it, from the model and the memory of the target: a 0 of it says that there is no
            room, not that nobody measured, and a goal that no recipe comes closer to is refused.
    """

    name: str
    words: str
    less_is_better: bool = False
    per_device: bool = True
    timed: bool = False
    computed: bool = False


BYTES = Measure("bytes", "fewer bytes", less_is_better=True, per_device=False)
CONTEXT = Measure("max_context_tokens", "longer context", computed=True)
DECODING = Measure("decode_tokens_per_second", "faster decoding", timed=True)
#: Of a token, by the ledger's measure: hours of devices, whatever an hour costs.
COST = Measure(
    "device_seconds_per_million_tokens", "cheaper tokens", less_is_better=True, per_device=False, timed=True
)
THROUGHPUT = Measure("throughput_tokens_per_second", "more throughput", timed=True)


@dataclass(frozen=True)
class Goal:
    """One goal. Engines are sized for it where the user names no workload.

    Attributes:
        name: as users write it.
        measure: what is compared with the unchanged model.
        techniques: what is tried, in this order: names of functions of `planning.techniques`, or of formats.
        batch: the most sequences that an engine serves at a time; a plan goes down to `least_batch` for want of memory.
        length: the most tokens of a sequence; 0 is the model's own.
        step_tokens: the most tokens of one step.
        least_batch: below it more devices are taken.
        chunked_prefill: whether a prompt may be read in several steps, so that `step_tokens` stays what it is.
        busy: whether arithmetic bounds it, so that formats that also compute in 8 bits come before those that do not.
        at_batch_1: whether four-bit weights alone, which gain speed by reading less, are served one sequence at a time.
        kv_cache: whether a smaller KV cache is any gain, so that techniques ask for one.
        remark: what is added to the reason of a recipe: the name of a function of `planning.remarks`, or "".
        instead: what to write where the unchanged model has all of a computed measure that there is.
    """

    name: str
    measure: Measure
    techniques: tuple[str, ...]
    batch: int
    length: int
    step_tokens: int = 8192
    least_batch: int = 1
    chunked_prefill: bool = False
    busy: bool = False
    at_batch_1: bool = False
    kv_cache: bool = True
    remark: str = ""
    instead: str = ""


#: By name, in the order in which users are offered them.
GOALS = {
    row.name: row
    for row in (
        Goal(
            "lower_latency", DECODING, batch=8, length=4096, at_batch_1=True,
            techniques=(
                "eight_bits", "four_bit_floats", "int4_awq", "int4_gptq", "four_bit_float_weights", "trained_nvfp4",
                "trained_int4", "mixed_5_bits", "students", "safest_eight_bits", "safest_four_bits",
            ),
        ),
        Goal(
            # No INT4: at batch 64 it reaches 0.83x of BF16 (benchmark.md).
            "higher_throughput", THROUGHPUT, batch=256, length=4096, step_tokens=16384, least_batch=16,
            chunked_prefill=True, busy=True, remark="saved_devices",
            techniques=(
                "eight_bits_or_kv_cache", "four_bit_floats", "trained_nvfp4", "mixed_in_less_time", "students",
                "safest_eight_bits",
            ),
        ),
        Goal(
            # NVFP4 keeps 93.8 % of Llama-3.1-8B's accuracy after rounding alone (`catalog.formats`), so INT4 stands
            # beside it. GPTQ begins with AWQ's scales and takes the same bytes; AWQ stands before it where nothing else
            # on the ladder runs the model for its rounding, which takes minutes for a large one. NVFP4 weights alone
            # lose less than INT4 and take a scale for each 16; MXFP4's are larger and lose more than INT4, so nobody is
            # offered them.
            "fit_larger_model", BYTES, batch=8, length=2048, kv_cache=False,
            techniques=(
                "nvfp4", "cheapest_int4", "int4_gptq", "four_bit_float_weights", "trained_nvfp4", "trained_int4",
                "mixed_5_bits", "mixed_6_bits", "mixed_7_bits", "safest_four_bits", "students_unless_mixed", "fp8",
                "fp8_gptq", "int8_wo",
            ),
        ),
        Goal(
            # The memory that INT4 frees goes into context; where eight bits reach the end of it, INT4 only risks.
            "long_context", CONTEXT, batch=4, length=0, chunked_prefill=True,
            techniques=("int4_if_short", "eight_bits", "int4_unless_short", "kv_cache_alone"),
            instead="'higher_throughput' to serve more requests at a time, or a smaller target",
        ),
        Goal(
            "lower_cost", COST, batch=128, length=4096, least_batch=16, chunked_prefill=True, busy=True,
            remark="smaller_gpu",
            techniques=(
                "eight_bits", "four_bit_floats", "trained_nvfp4", "mixed_in_less_time", "int4_for_smaller_gpu",
                "students", "safest_eight_bits", "safest_four_bits",
            ),
        ),
    )
}  # fmt: skip
#: The type of a field that names one.
GoalName = Literal[tuple(GOALS)]
#: That of a run whose user names none.
DEFAULT_GOAL = "fit_larger_model"
