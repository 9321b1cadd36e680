"""A stand-in for vLLM: the signatures of 0.24 over a torch model on the CPU.

They are those of vllm/entrypoints/llm.py, engine/arg_utils.py, sampling_params.py, outputs.py and logprobs.py; other
arguments are refused, as the library does. Its traps are kept: a prompt must leave room for a token that is written
behind it, the first token has no log-probability, logits are of 16 bits, answers hold the token that ended them, and
an LLM is ended through its engine core alone.
"""

import importlib.metadata

from .llm import LLM, Logprob, SamplingParams, TokensPrompt

__version__ = importlib.metadata.version("vllm")
__all__ = ["LLM", "Logprob", "SamplingParams", "TokensPrompt"]
