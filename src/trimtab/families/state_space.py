"""Mamba's mixers by their configs: what they keep of a sequence, and the shapes of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from trimtab.families.parts import Config, Shape
from trimtab.families.recurrent import Recurrent, State

#: Bytes that the states of the tokens which a layer reads at once may take (`runtime.checkpoint.scans`).
ROOM = {"cpu": 2**28, "cuda": 2**31}


class _First(NamedTuple):
    """Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", by its sizes, its biases,
    and whether what it chooses by passes norms."""

    channels: int
    size: int
    kernel: int
    rank: int
    bias: bool
    conv_bias: bool
    norms: bool = False

    @property
    def state(self) -> State:
        return State(self.channels * self.kernel, self.channels * self.size)

    def shapes(self, hidden: int) -> dict[str, Shape]:
        channels, size, rank = self.channels, self.size, self.rank
        found: dict[str, Shape] = {
            "in_proj.weight": (2 * channels, hidden), "conv1d.weight": (channels, 1, self.kernel),
            "x_proj.weight": (rank + 2 * size, channels), "dt_proj.weight": (channels, rank),
            "dt_proj.bias": (channels,), "A_log": (channels, size), "D": (channels,),
            "out_proj.weight": (hidden, channels),
        }  # fmt: skip
        if self.conv_bias:
            found["conv1d.bias"] = (channels,)
        if self.bias:
            found |= {"in_proj.bias": (2 * channels,), "out_proj.bias": (hidden,)}
        if self.norms:
            found |= {"dt_layernorm.weight": (rank,), "b_layernorm.weight": (size,), "c_layernorm.weight": (size,)}
        return found


class _Second(NamedTuple):
    """Dao and Gu 2024, "Transformers are SSMs" (Mamba 2), by its sizes, its biases, and whether it has a norm."""

    channels: int
    heads: int
    groups: int
    size: int
    kernel: int
    in_bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    norm: bool = True

    @property
    def seen(self) -> int:
        """What the convolution goes over: the channels, and what writes the state and reads it."""
        return self.channels + 2 * self.groups * self.size

    @property
    def state(self) -> State:
        return State(self.seen * self.kernel, self.channels * self.size)

    def shapes(self, hidden: int) -> dict[str, Shape]:
        outputs = self.channels + self.seen + self.heads
        found: dict[str, Shape] = {
            "in_proj.weight": (outputs, hidden), "conv1d.weight": (self.seen, 1, self.kernel), "A_log": (self.heads,),
            "D": (self.heads,), "dt_bias": (self.heads,), "out_proj.weight": (hidden, self.channels),
        }  # fmt: skip
        biases = {"in_proj": (self.in_bias, outputs), "conv1d": (self.conv_bias, self.seen),
                  "out_proj": (self.out_bias, hidden)}  # fmt: skip
        found |= {f"{name}.bias": (size,) for name, (there, size) in biases.items() if there}
        return found | ({"norm.weight": (self.channels,)} if self.norm else {})


def of_mamba2(config: Config) -> _Second:
    bias, conv = config.get("use_bias", False), config.get("use_conv_bias", True)
    return _Second(
        int(config.get("expand", 2) * config["hidden_size"]),
        config.get("num_heads", 128),
        config.get("n_groups", 8),
        config.get("state_size", 128),
        config.get("conv_kernel", 4),
        bias, conv, bias,
    )  # fmt: skip


def of_nemotron(config: Config) -> _Second:
    heads, bias = config.get("mamba_num_heads", 128), config.get("use_bias", False)
    return _Second(
        heads * config.get("mamba_head_dim", 64),
        heads,
        config.get("n_groups", config.get("mamba_n_groups", 8)),
        config.get("ssm_state_size", 128),
        config.get("conv_kernel", 4),
        bias, config.get("use_conv_bias", True), bias,
    )  # fmt: skip


def of_bamba(config: Config) -> _Second:
    """A Mamba 2 under Bamba's names of its sizes, which Granite 4 has too."""
    bias = config.get("mamba_proj_bias", False)
    return _Second(
        int(config.get("mamba_expand", 2) * config["hidden_size"]),
        config.get("mamba_n_heads", 128),
        config.get("mamba_n_groups", 1),
        config.get("mamba_d_state", 256),
        config.get("mamba_d_conv", 4),
        bias, config.get("mamba_conv_bias", True), bias,
    )  # fmt: skip


def of_falcon_h1(config: Config) -> _Second:
    """As Bamba's, but it may have fewer channels than the block's width asks for, and no norm."""
    sizes = of_bamba(config)
    return sizes._replace(
        channels=config.get("mamba_d_ssm", 1024) or sizes.channels,
        out_bias=config.get("projectors_bias", False),
        norm=config.get("mamba_rms_norm", False),
    )


def of_mamba(config: Config) -> _First:
    hidden = config["hidden_size"]
    return _First(
        int(config.get("expand", 2) * hidden),
        config.get("state_size", 16),
        config.get("conv_kernel", 4),
        _rank(config.get("time_step_rank", "auto"), hidden),
        config.get("use_bias", False),
        config.get("use_conv_bias", True),
    )


def of_jamba(config: Config) -> _First:
    hidden = config["hidden_size"]
    return _First(
        config.get("mamba_expand", 2) * hidden,
        config.get("mamba_d_state", 16),
        config.get("mamba_d_conv", 4),
        _rank(config.get("mamba_dt_rank", "auto"), hidden),
        config.get("mamba_proj_bias", False),
        config.get("mamba_conv_bias", True),
        norms=True,
    )


def _rank(said: int | str, hidden: int) -> int:
    return math.ceil(hidden / 16) if said == "auto" else said


def mixer(module: str, sizes: Callable[[Config], _First | _Second], **settings: Any) -> Recurrent:
    """Returns a Mamba in a block, of the first kind or the second; `settings` are those of `Recurrent`."""

    def shapes(config: Config) -> dict[str, Shape]:
        return sizes(config).shapes(config["hidden_size"])

    return Recurrent(module, lambda config: sizes(config).state, shapes, holds_states=True, **settings)
