"""How fast vLLM decodes: a Llama of the shape of 8B with random weights, which `decode.py` times in the torch engine.

Run: python benchmarks/vllm_decode.py [--formats NAME ...] [--batches N ...] [--out FILE] [--quick]

Tokens a second of all sequences together, 256 after prompts of 128, medians of three. Every format is timed in a
process of its own. Rows are printed, and added to --out as JSON lines, as soon as they are found; one that fails says
why and leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import apart
from decode import NEW_TOKENS, PROMPT_TOKENS, REPEATS
from machine import log, versions
from random_model import EIGHT_BILLION

from trimtab.runtime.checkpoint import compressed_tensors
from trimtab.runtime.engines import backends, decode_time

_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
#: Format -> `quantization_config`, as exports in it have it.
FORMATS = {
    "bf16": None,
    "fp8": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
            "producer": {"name": "modelopt", "version": "0.47.0"}},
    "int4": {"quant_method": compressed_tensors.PLAIN, "format": "pack-quantized", "ignore": ["lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}}},
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "fp8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--out", type=Path, help="a file of JSON lines, which is added to")
    parser.add_argument("--quick", action="store_true", help="two blocks, batch 1")
    options = parser.parse_args()
    if options.quick:
        options.batches = [1]
    apart.tell({"versions": versions() | backends.versions()}, options.out)
    for form in options.formats:
        found = apart.call("vllm_decode:decode", form=form, batches=options.batches, quick=options.quick)
        apart.tell({"decode": form, **found}, options.out)
    return 0


def decode(form: str, batches: list[int], quick: bool) -> dict[str, Any]:
    """Returns vLLM's tokens a second, by batch, for a model that is a config alone."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has asked for a GPU already
    from vllm import LLM, SamplingParams, TokensPrompt

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
              "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
              "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **EIGHT_BILLION}  # fmt: skip
    if quick:
        config["num_hidden_layers"] = 2
    if FORMATS[form]:
        config["quantization_config"] = FORMATS[form]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        started = time.perf_counter()
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=PROMPT_TOKENS + NEW_TOKENS + 2,
            max_num_seqs=max(batches), max_num_batched_tokens=8192, gpu_memory_utilization=0.5,
            enable_prefix_caching=False,
        )  # fmt: skip
        loaded = time.perf_counter() - started

        def write(prompts: list[list[int]], tokens: int) -> None:
            parameters = SamplingParams(temperature=0.0, detokenize=False, max_tokens=tokens, ignore_eos=True)
            llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)

        found: dict[str, Any] = {"load_seconds": round(loaded, 1), "tokens_per_second": {}, "all": {}}
        for batch in batches:
            speeds = decode_time.speeds(write, config["vocab_size"], batch, PROMPT_TOKENS, NEW_TOKENS, REPEATS)
            found["tokens_per_second"][str(batch)] = round(statistics.median(speeds), 1)
            found["all"][str(batch)] = [round(speed, 1) for speed in speeds]
            log(f"{form} batch {batch}: {found['tokens_per_second'][str(batch)]:,.0f} tokens/s")
        llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    sys.exit(main())
