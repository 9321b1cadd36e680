"""A stand-in for `trtllm-build`: its arguments, its checks, and engines that are copies of the ranks."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from trimtab.catalog.contracts.arguments import tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for name, argument in tables("trtllm_build")["Build"].items():
        if argument.type == "flag":
            parser.add_argument(f"--{name}", action="store_true")
        else:
            kind = int if argument.type.startswith("int") else str
            choices = argument.values or None
            parser.add_argument(f"--{name}", type=kind, default=argument.default, choices=choices)
    arguments = parser.parse_args()
    checkpoint, output = Path(arguments.checkpoint_dir), Path(arguments.output_dir)
    config = json.loads((checkpoint / "config.json").read_text())
    quantization, world = config["quantization"], config["mapping"]["world_size"]
    if arguments.use_fp8_context_fmha == "enable" and quantization["kv_cache_quant_algo"] != "FP8":
        sys.exit("[TRT-LLM] [E] AssertionError: FP8 Paged Context FMHA only works with fp8 quantization workflow")
    if quantization["quant_algo"] == "W8A16" and quantization["kv_cache_quant_algo"] == "FP8":
        sys.exit("[TRT-LLM] [E] error: int8_wo with an FP8 KV cache")
    if arguments.max_input_len > arguments.max_seq_len:
        sys.exit("[TRT-LLM] [E] error: max_input_len is larger than max_seq_len")
    if arguments.input_timing_cache:
        Path(arguments.input_timing_cache).read_bytes()
    output.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        shutil.copyfile(checkpoint / f"rank{rank}.safetensors", output / f"rank{rank}.engine")
    document = {"version": "1.2.1", "pretrained_config": config, "build_config": vars(arguments)}
    (output / "config.json").write_text(json.dumps(document))
    Path(arguments.output_timing_cache).write_bytes(b"timings")


if __name__ == "__main__":
    main()
