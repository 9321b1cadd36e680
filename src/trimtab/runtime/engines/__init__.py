"""The engines that judge and serve an export, behind one protocol.

| file | idea |
|---|---|
| `backends` | opens a built engine in the back end that its recipe names |
| `protocol` | what every engine is asked |
| `kept` | engines that stay open, so that an export is loaded once |
| `torch_engine` | the embedded engine on PyTorch |
| `by_block` | likelihoods of a model that no device holds |
| `scoring`, `batching` | how both score, and how what they score is packed |
| `answer_end` | where an answer may end early: behind a text that its reader stops at |
| `parallel`, `rank` | the same over several devices |
| `library`, `decode_time` | what engines of other libraries share |
| `trtllm`, `vllm_engine`, `vllm_plugin` | TensorRT-LLM and vLLM |
"""
