#!/usr/bin/env bash
# What is measured on a GPU each round, in parts that can run beside each other; each part writes its log and exit code.
# Run in benchmarks/: PYTHON=python bash on_gpu.sh PART... with MODEL (a folder with SmolLM2-135M-Instruct), DATA (a
# folder with wikitext2_valid.txt and blimp/), OUT (for logs), ROOM (a folder with 100 GB of room) and, if there is one,
# OTHERS (the Python of an environment with other people's tools, see others.py).
set -u
PYTHON=${PYTHON:-python}
TEXT=(--text "$DATA/wikitext2_valid.txt" --blimp "$DATA/blimp")
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"

part() {
    case $1 in
    formats)
        "$PYTHON" quality.py --model "$MODEL" "${TEXT[@]}" --samples 64 --seeds 3 --jobs "${JOBS:-8}" --formats \
            int4_gptq "int4_gptq, at once" "int4_gptq, asymmetry 1" nvfp4 "nvfp4, at once" nvfp4_wo "nvfp4_wo, at once" \
            mxfp4_wo "mxfp4_wo, at once" int8_sq int4_awq fp8 fp8_gptq ${OTHERS:+--others "$OTHERS"}
        ;;
    mixed)
        "$PYTHON" quality.py --model "$MODEL" "${TEXT[@]}" --samples 64 --seeds 3 --jobs "${JOBS:-6}" --no-plain --formats \
            "mixed, 5.0 bits" "mixed_gpu, 5.0 bits" "mixed_gpu, 5.5 bits" "mixed_gpu, 6.0 bits"
        ;;
    harms) "$PYTHON" harm.py --model "$MODEL" --text "$DATA/wikitext2_valid.txt" --samples 64 --windows 16 ;;
    trained) "$PYTHON" distillation.py --model "$MODEL" "${TEXT[@]}" --rows activations_aware --generate-seconds 60 ;;
    scale)
        "$PYTHON" scale.py --model "$MODEL" --grown "$ROOM/8B" --shape 8B --caps none 10 --scratch "$ROOM" \
            --text "$DATA/wikitext2_valid.txt" ${STAGES:+--stages $STAGES}
        ;;
    attempts)
        "$PYTHON" scale.py --model "$MODEL" --grown "$ROOM/8B" --shape 8B --stages --attempts ${FORMATS:-fp8 int4_gptq} \
            --text "$DATA/wikitext2_valid.txt" --scratch "$ROOM"
        ;;
    order)
        "$PYTHON" quality.py --model "$ROOM/8B" --text "$DATA/wikitext2_valid.txt" --samples 64 --seeds 1 \
            --jobs "${JOBS:-4}" --no-plain --formats \
            fp8 fp8_gptq int4_awq int4_gptq nvfp4_wo nvfp4 "mixed_gpu, 5.0 bits"
        ;;
    families)
        for clothes in ${CLOTHES:-mixtral falcon_h1}; do
            "$PYTHON" clothes.py "$MODEL" "$ROOM/$clothes" $clothes
            "$PYTHON" scale.py --grown "$ROOM/$clothes" --stages --attempts ${FORMATS:-fp8 int4_gptq} \
                --text "$DATA/wikitext2_valid.txt" --scratch "$ROOM"
        done
        ;;
    gate) "$PYTHON" integrity.py --folder "$ROOM" ;;
    clothes) "$PYTHON" families.py --model "$MODEL" --families --clothes llama mixtral qwen2_moe falcon_h1 ;;
    vllm)
        for clothes in mixtral qwen2_moe; do
            PYTHONPATH=${VLLM:-} "$PYTHON" vllm_agreement.py --model "$MODEL" --clothes $clothes "${TEXT[@]}" --pairs 25 \
                --windows 24 --samples 8 --formats bf16 fp8 int4_awq int4_gptq --out "$OUT/vllm-$clothes.jsonl"
        done
        ;;
    tests)
        (cd .. && "$PYTHON" -m pytest -p no:cacheprovider -n 6 tests/runtime/test_cuda.py tests/runtime/measure \
            tests/runtime/linear tests/components/validation/test_likeness.py tests/components/quantization \
            tests/components/calibration)
        ;;
    esac
}

for name in "$@"; do
    SECONDS=0
    part "$name" >"$OUT/$name.log" 2>&1
    echo "$name ended with $? after $SECONDS s" | tee -a "$OUT/parts.log"
done
