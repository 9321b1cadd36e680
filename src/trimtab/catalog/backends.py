"""The engines that serve, as rows. Which formats each serves where, the rows of `formats` and `kv_caches` say."""

from __future__ import annotations

from dataclasses import dataclass

#: A range of compute capabilities, first and last. ANY begins where bfloat16 has instructions of its own.
Range = tuple[tuple[int, int], tuple[int, int]]
LAST = (99, 0)
ANY: Range = ((8, 0), LAST)


@dataclass(frozen=True)
class Backend:
    """One engine.

    Attributes:
        name: as a recipe's `engine.backend` has it.
        module: its `open_engine` opens what was built for it (see `runtime.engines.backends.open_engine`).
        library: what people call the library that must be installed; "" for PyTorch, which always is.
        packages: whose versions shape what it computes.
        group_sizes: the weights of a row that may share a scale in grouped formats, the largest first.
        architectures: the models that it serves, by the name in config.json; empty for all.
        cpu: whether it runs without a GPU.
        emulates: whether it runs formats that it has no kernel for, slowly, by dequantising: enough to judge accuracy.
        switches_kv_cache: whether it can run an export with its KV cache in 16 bits, so that the KV cache can be judged
            apart from the weights.
        compiled: whether it serves engines that were compiled for one kind of GPU, in the place of a checkpoint.
        claims_gpu: whether it claims most of a GPU's memory for its KV cache: a second engine beside it finds none.
        kv_cache_alone: whether it reads a quantized KV cache beside weights that are not quantized.
        folds_scales: whether it fuses layers that read one input and reads no `pre_quant_scale` of theirs, so that such
            a scale must stand in the norm before them.
        clashes: pairs of a format and a KV cache that it serves apart, and not together.
    """

    name: str
    module: str
    library: str = ""
    packages: tuple[str, ...] = ("torch", "transformers")
    group_sizes: tuple[int, ...] = (128, 64, 32)
    architectures: tuple[str, ...] = ()
    cpu: bool = False
    emulates: bool = False
    switches_kv_cache: bool = False
    compiled: bool = False
    claims_gpu: bool = True
    kv_cache_alone: bool = True
    folds_scales: bool = False
    clashes: tuple[tuple[str, str], ...] = ()


_TENSORRT_LLM = ("tensorrt_llm", "tensorrt", "torch", "transformers")
#: By name. TensorRT-LLM's fine-grained INT4 kernels know two group sizes; PyTorch's and vLLM's know all three.
BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "torch", "trimtab.runtime.engines.parallel", packages=("torch", "transformers", "triton"),
            cpu=True, emulates=True, switches_kv_cache=True, claims_gpu=False,
        ),
        Backend(
            "trtllm", "trimtab.runtime.engines.trtllm", "TensorRT-LLM", _TENSORRT_LLM, group_sizes=(128, 64),
            folds_scales=True,
        ),
        Backend(
            "trtllm-legacy", "trimtab.runtime.engines.trtllm", "TensorRT-LLM", _TENSORRT_LLM, group_sizes=(128, 64),
            compiled=True,
            # TensorRT-LLM has one module for both.
            architectures=("LlamaForCausalLM", "MistralForCausalLM"),
            # TensorRT-LLM issue #1113: this pair asserts in the engine build.
            clashes=(("int8_wo", "fp8"),),
        ),
        # vLLM refuses a ModelOpt checkpoint that names no format of weights ("Missing 'quant_algo'").
        Backend(
            "vllm", "trimtab.runtime.engines.vllm_engine", "vLLM", ("vllm", "torch", "transformers"),
            kv_cache_alone=False,
        ),
    )
}  # fmt: skip
#: Those of TensorRT-LLM.
TENSORRT_LLM = tuple(name for name, row in BACKENDS.items() if row.library == "TensorRT-LLM")
#: Those that run a format by dequantising, where they have no kernel for it.
EMULATING = tuple(name for name, row in BACKENDS.items() if row.emulates)
