"""A tiny model with a tokenizer, and tasks that it answers well: for tests that run real stages in seconds."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

SENTENCES = (
    "The river runs past the old mill and under the stone bridge.",
    "A small boat carries apples, bread and salt to the market.",
    "In winter the children walk to school along the frozen lake.",
    "She reads a letter from her brother, who lives by the sea.",
    "When the rain stops, the farmer opens the gate and calls the dog.",
)
TASK = "tiny_choice"
_CHOICES = 4
_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_model(
    folder: Path, layers: int = 2, hidden: int = 64, seed: int = 0, family: str = "llama", adds_bos: bool = False
) -> Path:
    """Writes a model with random weights in bfloat16 and a byte-level tokenizer of 300 tokens.

    Args:
        family: transformers' model type. A Llama ties its embeddings, the others do not.
        adds_bos: whether the tokenizer writes BOS before a text, as Llama's, Mistral's and Gemma's do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(adds_bos)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        initializer_range=0.1,  # large enough that the model prefers some continuations clearly
        tie_word_embeddings=family == "llama",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, model: Path, items: int = 200, wrong: int = 10) -> Path:
    """Writes the lm-eval task `TASK`: the right answer is what the model prefers, but not in one of `wrong` items."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    words = sorted({word.strip(".,").lower() for sentence in SENTENCES for word in sentence.split()})
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{TASK}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for number in range(items):
            context = " ".join(["The", *draw.sample(words, 4)])
            choices = draw.sample(words, _CHOICES)
            scores = _log_likelihoods(network, tokenizer, context, [f" {choice}" for choice in choices])
            best = scores.index(max(scores))
            answer = (best + 1) % _CHOICES if number % wrong == 0 else best
            file.write(json.dumps({"context": context, "choices": choices, "answer": answer}) + "\n")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(name=TASK, data=data.absolute()), encoding="utf-8")
    return folder


def _tokenizer(adds_bos: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _log_likelihoods(network: Any, tokenizer: Any, context: str, continuations: list[str]) -> list[float]:
    """Of all continuations in one pass: a pad behind a text changes nothing before it."""
    import torch

    start = len(tokenizer(context).input_ids)
    rows = [tokenizer(context + continuation).input_ids for continuation in continuations]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        scores = network(tokens).logits.log_softmax(-1)
    return [sum(float(scores[n, i - 1, row[i]]) for i in range(start, len(row))) for n, row in enumerate(rows)]


def write_kv_cache(
    source: Path, folder: Path, algorithm: str, k_scale: float | dict[str, float], v_scale: float | dict[str, float]
) -> Path:
    """Copies a model or an export and gives it a quantized KV cache: one pair of scales, or one an attention layer."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".k_proj.weight") for name in tensors if name.endswith(".k_proj.weight")]
    for part, scale in (("k", k_scale), ("v", v_scale)):
        for layer in layers:
            value = scale[layer] if isinstance(scale, dict) else scale
            tensors[f"{layer}.{part}_proj.{part}_scale"] = torch.tensor(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "hf_quant_config.json"
    document = json.loads(path.read_text()) if path.exists() else {"quantization": {"quant_algo": None}}
    document["quantization"]["kv_cache_quant_algo"] = algorithm
    path.write_text(json.dumps(document))
    return folder
