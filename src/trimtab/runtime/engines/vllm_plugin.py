"""vLLM's plugin for INT4 layers whose input is multiplied by a `pre_quant_scale`: see
`checkpoint.compressed_tensors`.

vLLM calls `register` in each of its processes (the entry point in `vllm.general_plugins`), so `vllm serve` reads such a
checkpoint wherever trimtab is installed beside vLLM 0.24. Everything but the product with the scale is vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.parameter import RowvLLMParameter

from trimtab.runtime.checkpoint.compressed_tensors import SCALED, SCALED_LAYERS


def register() -> None:
    """Makes vLLM know the `quant_method`: importing this module has done it."""


@register_quantization_config(SCALED)
class ScaledInt4Config(CompressedTensorsConfig):
    """compressed-tensors, with some layers' inputs scaled."""

    def get_name(self) -> str:
        return SCALED

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if isinstance(layer, LinearBase) and self._scaled(prefix):
            return ScaledInt4LinearMethod(self)
        return method

    def _scaled(self, prefix: str) -> bool:
        """Whether the layer, or the first of those that vLLM fused into it, has a scale: then all have the same."""
        parent, _, name = prefix.rpartition(".")
        first = self.packed_modules_mapping.get(name, [name])[0]
        return f"{parent}.{first}" in self.config[SCALED_LAYERS]


@register_weight_loader_v2_supported_method
class ScaledInt4LinearMethod(CompressedTensorsLinearMethod):
    """A layer of compressed-tensors behind `x * pre_quant_scale`."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip
        scale = torch.empty(input_size_per_partition, dtype=params_dtype)
        loader = extra_weight_attrs["weight_loader"]
        layer.register_parameter("pre_quant_scale", RowvLLMParameter(data=scale, input_dim=0, weight_loader=loader))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        layer.pre_quant_scale = torch.nn.Parameter(layer.pre_quant_scale.data, requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(layer, x * layer.pre_quant_scale, bias)
