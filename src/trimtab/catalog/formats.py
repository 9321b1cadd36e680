"""The formats of weights and activations, as rows: how a layer is stored, how its numbers are found, who serves it.

What is served on which compute capability, and where that is said:

- `torch`: PyTorch's own kernels: `_scaled_mm` (FP8, 8.9 and later), `_int_mm`, on a CPU those of packed INT4 and
  INT8; on a GPU trimtab's for these (`runtime.kernels.matmul`), in bfloat16's instructions of 8.0 and later. The
  only back end for `mixed`: a MIXED_PRECISION checkpoint of INT4 and INT8 weights has no other reader, because
  TensorRT-LLM's matrix has no INT8 weights at all and vLLM reads no INT8 of ModelOpt.
- `trtllm`: the matrix of TensorRT-LLM's docs/source/features/quantization.md. sm120 (consumer Blackwell) has no W4A16
  AWQ there, sm100 and sm103 do. NVFP4 weights alone are read from 1.3.0rc20 on, by Marlin on Hopper (TensorRT-LLM
  #13476 and #14775) and on Blackwell. MXFP4 weights alone are read in mixtures of experts and nowhere else.
- `trtllm-legacy`: the support matrix of TensorRT-LLM 0.18 (INT8 and INT4 up to compute capability 9.0).
- `vllm`: FP8 from ModelOpt's unified checkpoint; INT4 once it is translated (`runtime.checkpoint.compressed_tensors`),
  which Marlin multiplies from Turing on, in BF16 from Ampere on, and so do FP4 weights alone
  (compressed_tensors_w4a16_nvfp4.py and _mxfp4.py there). (vLLM also runs FP8 files on Ampere, as weight-only
  Marlin kernels. That is another computation than the one that was calibrated, so trimtab does not offer it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from trimtab.catalog.backends import ANY, LAST, Range
from trimtab.catalog.numbers import NUMBERS, Number


class Limits(NamedTuple):
    """The most that a stored layer may differ from its source; gains are given by their distance from 1.

    `error` and `channel_error` are relative, of a layer and of an output channel; `channel_gain` is an output
    channel's, `block_gain` that of weights which share a scale. Each of these holds where all weights count alike, or
    where they count by what they add to the layer's outputs, as far as its inputs were measured: a layer may meet it in
    either way; of a block that adds less than others of its output channel the latter sees a smaller change.
    `input_gain` is an input channel's, and `inputs` the mean distance of all input channels, as root of the mean
    square, each counted by what it has up to the mean of all; these too may be met in either way.
    """

    error: float
    channel_error: float
    channel_gain: float
    input_gain: float
    inputs: float
    block_gain: float = math.inf


class Inputs(NamedTuple):
    """How a layer's input is rounded before it is multiplied: the type of the numbers, of `numbers.NUMBERS`; whether
    its scale is `static`, one for all inputs, set by calibration, or found for each `token` as it passes; and the
    numbers that share a scale of their own besides (0: none do)."""

    numbers: str
    scale: Literal["static", "token"] = "static"
    block: int = 0


@dataclass(frozen=True)
class Storage:
    """How a quantized layer stands in ModelOpt's unified checkpoint, and which product it is part of.

    Attributes:
        algorithm: `quant_algo` in hf_quant_config.json.
        modelopt: what ModelOpt's own functions call it.
        numbers: the type of the weights' numbers, of `numbers.NUMBERS`.
        scale: which weights share a `weight_scale`: the whole `tensor`, a `row`, a `group` of a row, as many as the
            recipe's `group_size` says, or a `block` of a row, as many as the format itself says.
        limits: of the integrity gate.
        block: weights of a block.
        scale_type: the type of `weight_scale`.
        second_scale: what `weight_scale_2` is: it multiplies the scales of the `blocks`, or is the scale at which the
            weights are `rounded` once more, to the numbers of the input, for the product; "" where there is none.
        inputs: how the layer's input is rounded; None leaves it in 16 bits.
        pre_quant_scale: whether a layer has a scale for the channels of its input, which stands in the norm before
            it or, where there is none, in its `pre_quant_scale`. TensorRT-LLM asks for one of ones, too.
        vllm: how vLLM reads the layer: `modelopt`, as it is (vllm/model_executor/layers/quantization/modelopt.py), or
            translated to `compressed-tensors`; "" where it does not.
        since: the first version of TensorRT-LLM that reads it, "" for all that read unified checkpoints.
    """

    algorithm: str
    modelopt: str
    numbers: str
    scale: Literal["tensor", "row", "group", "block"]
    limits: Limits
    block: int = 0
    scale_type: Literal["float32", "bfloat16", "e4m3", "e8m0"] = "float32"
    second_scale: Literal["", "blocks", "rounded"] = ""
    inputs: Inputs | None = None
    pre_quant_scale: bool = False
    vllm: Literal["", "modelopt", "compressed-tensors"] = ""
    since: str = ""

    @property
    def number(self) -> Number:
        """The type of the weights' numbers."""
        return NUMBERS[self.numbers]

    @property
    def bits(self) -> int:
        """Bits of a weight, without its scales."""
        return self.number.bits

    @property
    def in_groups(self) -> bool:
        """Whether a part of a row has a scale of its own."""
        return self.scale in ("group", "block")

    @property
    def shares_scale(self) -> bool:
        """Whether the layers that read the same input share a scale, because engines fuse them."""
        return self.scale == "tensor" or self.second_scale == "blocks"

    @property
    def has_plain_scales(self) -> bool:
        """Whether a stored number times its `weight_scale`, as it is stored, is the weight."""
        return not self.second_scale and self.scale_type != "e8m0"

    @property
    def product(self) -> tuple[str, str, Inputs | None]:
        """What a kernel must multiply: numbers, which of them share a scale, and how inputs are rounded."""
        return self.numbers, self.scale, self.inputs

    def bits_with_scales(self, group_size: int, in_features: float = math.inf) -> float:
        """Returns the bits of a weight and of its part of a scale, as planning counts them: a scale of a block has one
        byte, every other two; that of a row counts for nothing unless its inputs are given."""
        scale_bits = 8 if self.scale_type in ("e4m3", "e8m0") else 16
        return self.bits + scale_bits / {"group": group_size, "block": self.block}.get(self.scale, in_features)

    def bytes(self, out_features: int, in_features: int, group_size: int) -> float:
        """Returns the bytes of a layer, as `bits_with_scales` has them."""
        return out_features * in_features * self.bits_with_scales(group_size, in_features) / 8


@dataclass(frozen=True)
class WeightFormat:
    """One format that a recipe may ask for.

    Attributes:
        name: as a recipe's `quantize.format` has it.
        storage: how its layers are stored; None where they are not quantized, or are stored in several ways.
        dtype: of everything that is not quantized.
        mixes: the formats of which it gives each layer one, the fewest bits first.
        keeps_plain: whether a mix may leave layers in 16 bits, too.
        channels: what finds the scale for the channels of a layer's input, which moves difficulty from the weights
            into the input or back: "" for none. Where the storage has no `pre_quant_scale`, layers have one whose norm
            or layer before can take it.
        rounding: `nearest`, or `gptq`, where each column makes up for the rounding of those before it.
        served: back end -> the compute capabilities, first and last, on which it has a kernel for it.
        cpu: the back ends that have a kernel for it on a CPU.
        harshness: how much it takes away, in an order that `adjust` compares by; of `mixed`, its bits say it.
        expect: what to expect of it, and who measured that.
    """

    name: str
    storage: Storage | None = None
    dtype: str = "bfloat16"
    mixes: tuple[str, ...] = ()
    keeps_plain: bool = False
    channels: Literal["", "awq", "smoothquant", "smooth"] = ""
    rounding: Literal["nearest", "gptq"] = "nearest"
    served: Mapping[str, Range] = field(default_factory=dict)
    cpu: tuple[str, ...] = ()
    harshness: float = 0.0
    expect: str = ""

    @cached_property
    def parts(self) -> tuple[WeightFormat, ...]:
        """The formats that a quantized layer may have: its own, or those that it mixes; none where it only casts."""
        return tuple(FORMATS[name] for name in self.mixes) or ((self,) if self.storage else ())

    @property
    def is_cast(self) -> bool:
        """Whether it only changes the type of the numbers."""
        return not self.parts

    @property
    def has_plain_rounding(self) -> bool:
        """Whether its layers may be rounded to nearest by the weights alone, and are read as well."""
        if self.storage is None:
            return False
        return not self.storage.pre_quant_scale or (not self.channels and self.rounding == "nearest")

    @property
    def is_four_bit_weight_only(self) -> bool:
        """Whether all its layers hold weights in four bits, and multiply them in 16."""
        return all(part.storage.bits == 4 for part in self.parts) and not (self.is_cast or self.rounds_inputs)

    @property
    def rounds_inputs(self) -> bool:
        """Whether it multiplies in few bits, too."""
        return any(part.storage.inputs for part in self.parts)

    @property
    def algorithm(self) -> str | None:
        """`quant_algo` of an export in it."""
        return "MIXED_PRECISION" if self.mixes else self.storage and self.storage.algorithm

    @property
    def bits(self) -> float:
        """Bits of a weight, with its block's scale where the format fixes the block; of a mix, its fewest."""
        if self.is_cast:
            return 32.0 if self.dtype == "float32" else 16.0
        return min(part.storage.bits + (8 / part.storage.block if part.storage.block else 0) for part in self.parts)


# The limits are measured on four blocks of SmolLM2-135M, and on a random model whose inputs are 64 wide, the worst of
# both: INT8 0.03, 0.07, 0.01, 0.04, 0.003; FP8 0.03, 0.04, 0.02, 0.03, 0.009, and by GPTQ, on all blocks, 0.03, 0.06,
# 0.05, 0.12, 0.005; four bits 0.29 (GPTQ), 0.43 (GPTQ), 0.08, 0.18, 0.04 and blocks from 0.73 to 1.18; INT4 by GPTQ in
# order, on all blocks of SmolLM2 grown to 7 billion parameters, 0.14, 0.28, 0.08, 0.34, 0.05 and blocks that change by
# 0.44. A row of INT8 with one dominant weight has an error of sqrt(in) / 440.
_EIGHT_BITS = Limits(0.2, 0.3, 0.05, 0.15, 0.03)
_FLOAT_EIGHT = Limits(0.06, 0.15, 0.06, 0.15, 0.03)
_FLOAT_EIGHT_GPTQ = _FLOAT_EIGHT._replace(channel_gain=0.1, input_gain=0.3)
_FOUR_BITS = Limits(0.5, 0.7, 0.2, 0.4, 0.08, 0.6)
#: Of 16 or 32 weights under a scale, GPTQ moves a larger part than of 64.
_FP4 = _FOUR_BITS._replace(block_gain=0.75)
#: Where inputs have four bits too, weights also make up for what rounding takes from these, which outputs on inputs
#: that are not rounded do not show: on SmolLM2 grown to 7 billion parameters 0.41, 0.13 and blocks from -0.05 to 1.92.
_FP4_INPUTS = _FP4._replace(input_gain=0.6, inputs=0.18, block_gain=1.25)

# One layout, whichever way the numbers were found: of FP8 and of INT4 there are several.
_INT8 = Storage("W8A16", "int8_wo", "int8", "row", _EIGHT_BITS)
_INT8_INPUTS = Storage(
    "W8A8_SQ_PER_CHANNEL", "int8_sq", "int8", "row", _EIGHT_BITS, inputs=Inputs("int8"), pre_quant_scale=True
)
_FP8 = Storage("FP8", "fp8", "e4m3", "tensor", _FLOAT_EIGHT_GPTQ, inputs=Inputs("e4m3"), vllm="modelopt")
_FP8_TOKENS = Storage(
    "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pc_pt", "e4m3", "row", _FLOAT_EIGHT, inputs=Inputs("e4m3", "token"),
    vllm="modelopt",
)  # fmt: skip
_INT4 = Storage(
    "W4A16_AWQ", "int4_awq", "int4", "group", _FOUR_BITS, scale_type="bfloat16", pre_quant_scale=True,
    vllm="compressed-tensors",
)  # fmt: skip
_INT4_FP8 = Storage(
    "W4A8_AWQ", "w4a8_awq", "int4", "group", _FOUR_BITS, scale_type="bfloat16", second_scale="rounded",
    inputs=Inputs("e4m3"), pre_quant_scale=True,
)  # fmt: skip
_NVFP4 = Storage(
    "NVFP4", "nvfp4", "e2m1", "block", _FP4_INPUTS, block=16, scale_type="e4m3", second_scale="blocks",
    inputs=Inputs("e2m1", block=16), vllm="modelopt",
)  # fmt: skip
_NVFP4_WEIGHTS = Storage(
    "W4A16_NVFP4", "w4a16_nvfp4", "e2m1", "block", _FP4, block=16, scale_type="e4m3", second_scale="blocks",
    vllm="compressed-tensors", since="1.3.0rc20",
)  # fmt: skip
_MXFP4 = Storage(
    "W4A8_MXFP4_FP8", "w4a8_mxfp4_fp8", "e2m1", "block", _FP4, block=32, scale_type="e8m0",
    inputs=Inputs("e4m3"),
)  # fmt: skip
#: ModelOpt 0.47 packs such layers and has no name for them; this is TensorRT-LLM's own.
_MXFP4_WEIGHTS = Storage(
    "W4A16_MXFP4", "W4A16_MXFP4", "e2m1", "block", _FP4, block=32, scale_type="e8m0", vllm="compressed-tensors"
)

_TORCH = ("torch",)
_EVERYWHERE = {"torch": ANY, "trtllm": ANY, "trtllm-legacy": ANY, "vllm": ANY}
_INT8_SERVED = {"torch": ANY, "trtllm-legacy": ((8, 0), (9, 0))}
_INT4_SERVED = {"torch": ANY, "trtllm": ((8, 0), (10, 3)), "trtllm-legacy": ((8, 0), (9, 0)), "vllm": ANY}
_FROM_ADA: Range = ((8, 9), LAST)
_FROM_BLACKWELL: Range = ((10, 0), LAST)
_BENCHMARK = "(NVIDIA ModelOpt examples/benchmark.md: Llama-3.1-8B on H200)"
_SMOL = "(SmolLM2-135M under ModelOpt 0.47)"

#: By name, in the order in which messages list them.
FORMATS = {
    row.name: row
    for row in (
        WeightFormat("fp32", dtype="float32", served=_EVERYWHERE, cpu=_TORCH),
        WeightFormat("fp16", dtype="float16", served=_EVERYWHERE, cpu=_TORCH),
        WeightFormat("bf16", served=_EVERYWHERE, cpu=_TORCH, expect="weights unchanged"),
        WeightFormat(
            "int8_wo", _INT8, served=_INT8_SERVED, cpu=_TORCH, harshness=1.0,
            expect=f"INT8 weights: perplexity ratio 1.002 {_SMOL}; on two CPU cores 45 tokens/s, 27 in BF16",
        ),
        WeightFormat(
            "int8_sq", _INT8_INPUTS, channels="smoothquant", served=_INT8_SERVED, cpu=_TORCH, harshness=3.0,
            expect=f"INT8 weights and activations: perplexity ratio 1.095 {_SMOL}; 1 to 3 % less accurate on "
            "Llama-3.1 (arXiv 2411.02355)",
        ),
        WeightFormat(
            "fp8", _FP8, served=dict.fromkeys(_EVERYWHERE, _FROM_ADA), harshness=2.0,
            expect=f"FP8 is 1.41x as fast at batch 1, 1.30x at 64, and loses 1.50 % of MMLU {_BENCHMARK}",
        ),
        WeightFormat(
            "fp8_gptq", _FP8, rounding="gptq", served=dict.fromkeys(_EVERYWHERE, _FROM_ADA), harshness=1.8,
            expect="FP8, each column making up for the rounding of those before it: perplexity ratio 1.014, 1.033 "
            "without (SmolLM2-135M; `benchmarks/quality.py`)",
        ),
        WeightFormat(
            "fp8_per_channel", _FP8_TOKENS, served={"torch": _FROM_ADA, "trtllm": ((9, 0), (9, 0))}, harshness=1.5
        ),
        WeightFormat(
            "int4_rtn", _INT4, served=_INT4_SERVED, cpu=_TORCH, harshness=10.0,
            expect=f"the fewest bits, by rounding alone: perplexity ratio 1.396 {_SMOL}",
        ),
        WeightFormat(
            "int4_awq", _INT4, channels="awq", served=_INT4_SERVED, cpu=_TORCH, harshness=9.0,
            expect=f"INT4 with scales found on activations: perplexity ratio 1.266 {_SMOL}; 1.33x as fast at "
            f"batch 1, 0.75x at 8, and loses 5.66 % of MMLU {_BENCHMARK}",
        ),
        WeightFormat(
            "int4_gptq", _INT4, channels="awq", rounding="gptq", served=_INT4_SERVED, cpu=_TORCH, harshness=8.0,
            expect="INT4, each column making up for the rounding of those before it: half of the rise of "
            "log-perplexity that AWQ leaves (SmolLM2-135M; `benchmarks/quality.py`)",
        ),
        WeightFormat(
            "w4a8_awq", _INT4_FP8, channels="awq", harshness=9.5,
            served={"trtllm": ((8, 9), (10, 3)), "trtllm-legacy": ((8, 9), (9, 0))},
        ),
        WeightFormat(
            "nvfp4", _NVFP4, channels="smooth", rounding="gptq", served={"trtllm": _FROM_BLACKWELL}, harshness=9.5,
            expect="FP4 weights and activations: 93.8 % of Llama-3.1-8B's accuracy is kept by rounding alone "
            "(arXiv 2509.23202)",
        ),
        WeightFormat(
            "nvfp4_wo", _NVFP4_WEIGHTS, channels="awq", rounding="gptq", harshness=7.5,
            served={"trtllm": ((9, 0), (10, 3)), "vllm": ANY},
            expect="FP4 weights, activations in 16 bits: the least that four bits lose (SmolLM2-135M; "
            "`benchmarks/quality.py`)",
        ),
        WeightFormat("mxfp4", _MXFP4, rounding="gptq", served={"trtllm": _FROM_BLACKWELL}, harshness=10.0),
        WeightFormat(
            "mxfp4_wo", _MXFP4_WEIGHTS, channels="awq", rounding="gptq", served={"vllm": ANY}, harshness=9.2,
            expect="the format of gpt-oss' experts, for all layers",
        ),
        WeightFormat(
            "mixed", mixes=("int4_gptq", "int8_wo"), served={"torch": ANY}, cpu=_TORCH,
            expect=f"INT4 where the model bears it, INT8 elsewhere: perplexity ratio 1.09 at 5.5 bits {_SMOL}",
        ),
        # To nearest, FP8 loses as much as NVFP4 weights alone do (30.4 and 30.5 of 29.5 in SmolLM2's perplexity); by
        # GPTQ less than half as much (29.9), and layers that do not bear even that stay in BF16.
        WeightFormat(
            "mixed_gpu", mixes=("nvfp4_wo", "int4_gptq", "fp8_gptq"), keeps_plain=True,
            served={"trtllm": ((9, 0), (10, 3)), "vllm": _FROM_ADA},
            expect="four bits where the model bears them, FP8 or BF16 elsewhere (SmolLM2-135M; "
            "`benchmarks/quality.py`)",
        ),
        WeightFormat(
            "mixed_fp4", mixes=("nvfp4", "nvfp4_wo", "fp8_gptq"), keeps_plain=True,
            served={"trtllm": ((10, 0), (10, 3))},
            expect="FP4 activations where the model bears them, for the time that `max_time` allows",
        ),
    )
}  # fmt: skip
#: How layers are stored, by `quant_algo`.
STORAGES = {row.storage.algorithm: row.storage for row in FORMATS.values() if row.storage}
