"""LLM over serialized engines, which the stand-in of `trtllm-build` writes: in 16 bits, weights alone rounded."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from . import llm
from .recombine import recombine

if importlib.metadata.version("tensorrt_llm") > "1.3.0rc20":
    raise ModuleNotFoundError("the TensorRT back end was removed")


class LLM(llm.LLM):
    def _load(self, folder: Path) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        document = json.loads((folder / "config.json").read_text())
        config, build = document["pretrained_config"], document["build_config"]
        self._step, self._longest = build["max_num_tokens"], build["max_input_len"]
        self._logits = build["gather_context_logits"]
        network = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                vocab_size=config["vocab_size"],
                max_position_embeddings=config["max_position_embeddings"],
                rms_norm_eps=config["norm_epsilon"],
                rope_parameters={"rope_type": "default", "rope_theta": config["rotary_base"]},
                tie_word_embeddings=False,
            )
        )
        network = network.to(torch.bfloat16)
        tensors = recombine(folder, "rank{}.engine")
        network.load_state_dict({n: _float(n, tensors) for n in tensors if n.endswith(".weight")})
        return network.eval()

    def generate(self, inputs: Any, sampling_params: Any = None, use_tqdm: bool = True) -> Any:
        if sampling_params.return_context_logits and not self._logits:
            raise ValueError("need to build engine with --gather_context_logits")
        return super().generate(inputs, sampling_params, use_tqdm)


def _float(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    weight, module = tensors[name], name.removesuffix(".weight")
    scale = tensors.get(f"{module}.weights_scaling_factor")
    if scale is None:
        return weight
    if scale.dim() == 2:  # INT4: two rows a byte, the first in the low nibble
        low, high = weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4
        rows = torch.stack([low, high], 1).flatten(0, 1).int()
        weight = torch.where(rows > 7, rows - 16, rows)
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    elif scale.numel() > 1:
        scale = scale[:, None]
    weight = weight.float() * scale
    before = tensors.get(f"{module}.prequant_scaling_factor")
    return weight if before is None else weight * before.float()
