"""What other people's tools make of a model, for `quality.py --others PYTHON`.

The Python is that of an environment of theirs, for they pin other versions than trimtab:
`pip install torch llmcompressor auto-round` makes it.

Run: PYTHON others.py MODEL TOKENS TOOL FORMAT [--rounds 200]

TOKENS is a safetensors file with `calibration` and `heldout`, int64 [windows, length] each. Prints one JSON object: the
perplexity of the held-out windows in the tool's own emulation, with activations rounded where the format rounds them,
and the seconds that quantizing took.
"""

import argparse
import json
import math
import time
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
#: Format -> the scheme's name in both tools; INT4 is written out, with trimtab's group size.
SCHEMES = {"int4": "W4A16", "nvfp4": "NVFP4", "nvfp4_wo": "NVFP4A16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("format", choices=SCHEMES)
    parser.add_argument("--rounds", type=int, default=200, help="AutoRound's steps a block; 200 are its default")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = load_file(options.tokens)
    started = time.perf_counter()
    made = TOOLS[options.tool](model, tokenizer, tokens["calibration"], options)
    seconds = time.perf_counter() - started
    print(json.dumps({"perplexity": perplexity(made.to(device), tokens["heldout"]), "seconds": round(seconds, 1)}))


def gptq(model: Any, tokenizer: Any, calibration: torch.Tensor, options: argparse.Namespace) -> Any:
    """llm-compressor's GPTQ, with its own defaults."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    if options.format == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        how: dict[str, Any] = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}
    else:
        how = {"targets": "Linear", "scheme": SCHEMES[options.format]}
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(ignore=["lm_head"], **how),
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
    )
    return model


def auto_round(model: Any, tokenizer: Any, calibration: torch.Tensor, options: argparse.Namespace) -> Any:
    """AutoRound's sign gradients, with its own defaults."""
    from auto_round import AutoRound

    size = {"group_size": GROUP} if options.format == "int4" else {}
    tool = AutoRound(
        model,
        tokenizer,
        scheme=SCHEMES[options.format],
        dataset=[row[None] for row in calibration],
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        iters=options.rounds,
        **size,
    )
    return tool.quantize()[0]


TOOLS = {"llm-compressor": gptq, "AutoRound": auto_round}


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Returns the perplexity of windows, int64 [windows, length], of all tokens but each one's first."""
    total = 0.0
    for window in windows.to(model.device):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


if __name__ == "__main__":
    main()
