"""A stand-in for TensorRT-LLM: its documented signatures over a torch model on the CPU.

The signatures are those of tests/unittest/api_stability/references_committed/ in NVIDIA's repository; every argument
that stands in none of them is refused, as the library does. Its traps are kept: with block reuse a prompt's logits
begin behind what an earlier prompt shares, prompts that are read in chunks have the last chunk's logits, and what is
longer than `max_input_len` is cut without a word.
"""

import importlib.metadata

from .llm import LLM, SamplingParams

__version__ = importlib.metadata.version("tensorrt_llm")
__all__ = ["LLM", "SamplingParams"]
