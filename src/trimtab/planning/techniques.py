"""The techniques that goals are made of, a function each: the recipes that it offers, the most ambitious first.

Which goal asks for which, and in what order, its row of `catalog.goals` says; a goal names a format where that is the
whole technique. A technique that has nothing to offer on a target, a back end or a model yields nothing.

Unstructured sparsity is never one: today's engines gain no speed by it (ModelOpt #1974, vllm#36799), and the stored
tensors stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trimtab.planning.candidates import Candidate, Kit
from trimtab.planning.remarks import REMARKS, smaller_gpu


def candidates(kit: Kit) -> Iterator[Candidate]:
    """Yields the recipes that the kit's goal asks for, in its order, with the reason of each."""
    for name in kit.goal.techniques:
        for recipe, why in TECHNIQUES[name](kit) if name in TECHNIQUES else [kit.quantized(name)]:
            remark = REMARKS[kit.goal.remark](kit, recipe) if kit.goal.remark else ""
            yield recipe, f"{why}; {remark}" if remark else why


def eight_bits(kit: Kit) -> Iterator[Candidate]:
    """Each eight-bit format, with the KV cache in FP8 where that is served, then without; and by GPTQ, where there is a
    format of that: as fast, and nearer to the model."""
    for form in kit.eights:
        if kit.kv:
            yield kit.quantized(form, kv=True)
        yield kit.quantized(form)
        if f"{form}_gptq" in kit.formats:
            yield kit.quantized(f"{form}_gptq")


def eight_bits_or_kv_cache(kit: Kit) -> Iterator[Candidate]:
    """Eight bits; where no such format of weights is served, the KV cache alone."""
    yield from eight_bits(kit)
    if not kit.eights and kit.kv:
        yield from kv_cache_alone(kit)


def kv_cache_alone(kit: Kit) -> Iterator[Candidate]:
    """The KV cache in FP8, and nothing else."""
    yield kit.quantized("bf16", kv=True)


def four_bit_floats(kit: Kit) -> Iterator[Candidate]:
    """NVFP4 where it is computed in, with the KV cache in FP8 where that is served, then without."""
    if "nvfp4" in kit.formats:
        if kit.kv:
            yield kit.quantized("nvfp4", kv=True)
        yield kit.quantized("nvfp4")


def four_bit_float_weights(kit: Kit) -> Iterator[Candidate]:
    """NVFP4 weights that meet activations in 16 bits, where they are served."""
    if "nvfp4_wo" in kit.formats:
        yield kit.quantized("nvfp4_wo")


def cheapest_int4(kit: Kit) -> Iterator[Candidate]:
    """INT4 by AWQ; by rounding alone, which costs nothing, where mixed precision is tried after it."""
    yield kit.quantized("int4_rtn" if "mixed" in kit.formats else "int4_awq")


def int4_if_short(kit: Kit) -> Iterator[Candidate]:
    """INT4 where eight bits leave no room for the whole context."""
    if kit.is_short:
        yield kit.quantized("int4_awq", kv=kit.kv)


def int4_unless_short(kit: Kit) -> Iterator[Candidate]:
    """INT4 where eight bits leave room for the whole context."""
    if not kit.is_short:
        yield kit.quantized("int4_awq", kv=kit.kv)


def int4_for_smaller_gpu(kit: Kit) -> Iterator[Candidate]:
    """INT4, slow at large batches: only where eight bits are not served, or do not make a smaller GPU enough."""
    recipe, why = kit.quantized("int4_awq")
    best = next(eight_bits(kit), None)
    if best is None or (smaller_gpu(kit, recipe) and not smaller_gpu(kit, best[0])):
        yield recipe, why


def trained_nvfp4(kit: Kit) -> Iterator[Candidate]:
    """NVFP4 of the whole model trained with the rounding of weights and activations."""
    yield from kit.trained("nvfp4")


def trained_int4(kit: Kit) -> Iterator[Candidate]:
    """INT4 of the whole model trained with the rounding."""
    yield from kit.trained("int4_rtn")


def mixed_5_bits(kit: Kit) -> Iterator[Candidate]:
    """Mixed precision by sensitivity, of 5 bits on average: of the formats that the target serves by layer."""
    yield kit.quantized(kit.mix, bits=5)


def mixed_6_bits(kit: Kit) -> Iterator[Candidate]:
    """The same, of 6 bits."""
    yield kit.quantized(kit.mix, bits=6)


def mixed_7_bits(kit: Kit) -> Iterator[Candidate]:
    """The same, of 7 bits."""
    yield kit.quantized(kit.mix, bits=7)


def mixed_in_less_time(kit: Kit) -> Iterator[Candidate]:
    """FP4 activations for as many layers as it takes to compute in two fifths of BF16's time, half of what FP8 leaves
    to FP4: where the target multiplies FP4."""
    if "mixed_fp4" in kit.formats:
        yield kit.quantized("mixed_fp4", kv=kit.kv, bits=6, max_time=0.4)


def students(kit: Kit) -> Iterator[Candidate]:
    """Smaller models that the whole one teaches."""
    yield from kit.students()


def students_unless_mixed(kit: Kit) -> Iterator[Candidate]:
    """Students; where mixed precision is served it is as small and needs no training."""
    if kit.mix not in kit.formats:
        yield from students(kit)


def safest_eight_bits(kit: Kit) -> Iterator[Candidate]:
    """The eight-bit format that loses least, without what loses most."""
    if kit.eights:
        safest = next((form for form in ("int8_wo", "fp8_gptq") if form in kit.formats), kit.eights[0])
        yield kit.quantized(safest, keep_down=True)


def safest_four_bits(kit: Kit) -> Iterator[Candidate]:
    """INT4 without what loses most, where no eight-bit format is served."""
    if not kit.eights:
        yield kit.quantized("int4_awq", keep_down=True)


#: By the name that a goal's row has. Any other name there is a format's.
TECHNIQUES: dict[str, Callable[[Kit], Iterator[Candidate]]] = {
    technique.__name__: technique
    for technique in (
        eight_bits, eight_bits_or_kv_cache, kv_cache_alone, four_bit_floats, four_bit_float_weights,
        cheapest_int4, int4_if_short, int4_unless_short, int4_for_smaller_gpu, trained_nvfp4, trained_int4,
        mixed_5_bits, mixed_6_bits, mixed_7_bits, mixed_in_less_time, students, students_unless_mixed,
        safest_eight_bits, safest_four_bits,
    )
}  # fmt: skip
