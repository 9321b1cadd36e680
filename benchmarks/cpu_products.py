"""Products on this CPU, in each format and by the number of rows, as a multiple of the time of float32's `F.linear`.

Run: python benchmarks/cpu_products.py [--quick] [--hot] [--settings native avx2 default] [--seconds 60]

Every format's layer is one that the torch engine would build here. A setting is a processor as PyTorch and its
libraries are told to see it: `native`; `avx2`, without AVX-512 and instructions for bfloat16, as most desktops are; and
`default`, for which PyTorch has no vector code at all. The aim is 1.3 at most.

Weights are cold: they come from memory, as in a model, whose every step reads all layers before it comes back to the
first. So there are as many copies of each layer as make all of them together twice as large as the processor's last
cache, called one after the other, and float32's weight costs the four bytes a number that it costs a model in float32.
Inputs are warm, as what the layer before has just written. `--hot` calls one copy over and over, whose weight stays in
the cache if it fits: what a layer costs beside reading its weight, and the truth for a model as small as the cache.

Formats and float32 take turns of five calls, or fewer that last long. The first is not counted if there are more: it
brings back kernels and buffers that a model's layer finds as the one before left them. A time is that of a call in the
fastest turn, of processor time where one thread computes: so another busy process disturbs little.

Prints a table a setting, and all ratios as JSON on the last line.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

SETTINGS: dict[str, dict[str, str]] = {
    "native": {},
    # oneDNN, MKL and FBGEMM ask the processor themselves: without MKL's, float32 would be measured with AVX-512.
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
             "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
#: Outputs and inputs: gate and up, and down, of a model of 135 million parameters; a square of one of 8 billion.
SHAPES = ((3072, 576), (576, 1536), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
QUICK_SHAPES, QUICK_ROWS = SHAPES[:2], (1, 16, 512)
#: A format of a recipe, and the group size of a layer in it.
FORMATS = {"int8_wo": 0, "int8_sq": 0, "int4_rtn": 64, "fp8": 0, "fp8_per_channel": 0, "w4a8_awq": 64, "nvfp4": 16}
AIM = 1.3
#: All copies of all layers of a shape are so many times the last cache: with 2.5 times as many no time changed.
CACHES = 2
#: Bytes of a last cache that the system does not tell, and the most that all copies may have.
USUAL_CACHE, MOST = 64 << 20, 2 << 30
#: A turn ends after so many counted calls, of layers that a model has one after the other, or after so many seconds.
CALLS, TURN = 4, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, 1, 16 and 512 rows; under a minute in all")
    parser.add_argument("--hot", action="store_true", help="one copy of each layer, whose weight stays in the cache")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["native", "avx2"])
    parser.add_argument("--seconds", type=float, help="for each setting; 12 with --quick, else 120")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in a setting's own process
    options = parser.parse_args()
    options.seconds = options.seconds or (12 if options.quick else 120)
    if options.here:
        print(json.dumps(measure(options)))
        return 0
    found = {}
    for name in options.settings:
        flags = [*["--quick"] * options.quick, *["--hot"] * options.hot]
        command = [sys.executable, __file__, "--here", "--seconds", str(options.seconds), *flags]
        done = subprocess.run(command, env={**os.environ, **SETTINGS[name]}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        found[name] = json.loads(done.stdout.splitlines()[-1])
        tell(name, found[name])
    print(json.dumps(found))
    return 0


def tell(setting: str, found: dict[str, Any]) -> None:
    print(f"\n{setting}: {found['arithmetic']}, {found['threads']} threads; {found['weights']}")
    rows = sorted({count for line in found["ratios"] for count in line["rows"]}, key=int)
    print(f"{'shape':<14}{'format':<18}" + "".join(f"{count:>8}" for count in rows))
    for line in found["ratios"]:
        cells = "".join(f"{line['rows'].get(count, float('nan')):>8.2f}" for count in rows)
        print(f"{line['shape']:<14}{line['format']:<18}{cells}")
    print(f"largest {found['largest']:.2f}, median {found['median']:.2f}; {len(found['above'])} above {AIM}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the ratios in this process's setting."""
    import torch

    from trimtab.runtime.linear import cpu_products

    shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if options.quick else (SHAPES, ROWS)
    seconds = options.seconds / len(shapes) / len(rows)
    lines: list[dict[str, Any]] = []
    copies = []
    with torch.inference_mode():
        for shape in shapes:
            layers = make_layers(*shape)
            copies.append(1 if options.hot else copies_beyond_cache(layers))
            layers = {name: [copy.deepcopy(layer) for _ in range(copies[-1])] for name, layer in layers.items()}
            table = {name: {} for name in layers}
            for count in rows:
                times = take_turns(layers, torch.randn(count, shape[1]), seconds)
                for name in layers:
                    table[name][str(count)] = round(times[name] / times["float32"], 2)
            name_of = f"{shape[0]} x {shape[1]}"
            lines += [{"shape": name_of, "format": n, "rows": r} for n, r in table.items() if n != "float32"]
    ratios = {f"{line['format']} {line['shape']} with {count} rows {ratio}": ratio
              for line in lines for count, ratio in line["rows"].items()}  # fmt: skip
    return {
        "arithmetic": cpu_products.describe(),
        "threads": torch.get_num_threads(),
        "weights": "hot" if options.hot else f"cold, {copies} copies against {last_cache() >> 20} MiB of cache",
        "ratios": lines,
        "largest": max(ratios.values()),
        "median": statistics.median(ratios.values()),
        "above": [name for name, ratio in ratios.items() if ratio > AIM],
    }


def copies_beyond_cache(layers: dict[str, nn.Module]) -> int:
    """Returns how many copies of these layers are together `CACHES` times the last cache, or `MOST` bytes."""
    size = sum(tensor.nbytes for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers()))
    return max(2, min(-(-CACHES * last_cache() // size), MOST // size))


def last_cache() -> int:
    """Returns the bytes of the largest cache that a core of this processor reads through."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=USUAL_CACHE)


def make_layers(outputs: int, inputs: int) -> dict[str, nn.Module]:
    """Returns layers by name: float32, the unquantized one of a model, and one of each format."""
    import torch
    from torch import nn

    from trimtab.recipe import Quantization
    from trimtab.runtime.checkpoint.layer_layout import layout_of
    from trimtab.runtime.linear import choice, cpu_products

    plain = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    model = nn.ModuleList([plain])
    cpu_products.use(model)
    found: dict[str, nn.Module] = {"float32": nn.Linear(inputs, outputs, bias=False), "bf16": model[0]}
    for form, group in FORMATS.items():
        layout = layout_of(form, Quantization(format=form, **({"group_size": group} if group == 64 else {})))
        found[form] = choice.build(random_layer(layout, outputs, inputs), None, torch.device("cpu"))
    return found


def random_layer(layout: Any, outputs: int, inputs: int) -> Any:
    """A layer whose numbers are drawn at random."""
    import torch

    from trimtab.runtime.checkpoint.layer_layout import Quantized

    storage, group = layout.storage, layout.group_size
    size = {"out": (outputs // 2, inputs), "in": (outputs, inputs // 2), "": (outputs, inputs)}[storage.number.packed]
    weight = torch.randint(256, size, dtype=torch.uint8)
    if layout.dtype == torch.int8:
        weight = weight.view(torch.int8)
    elif layout.dtype != torch.uint8:
        weight = torch.randn(size).to(layout.dtype)
    scale = torch.full((outputs, inputs // group) if group else (outputs,), 0.01)
    if storage.scale_type == "e4m3":
        scale = scale.to(torch.float8_e4m3fn)
    one = torch.tensor(0.03)
    given = one if "input_scale" in layout.scales else None
    second = one if "weight_scale_2" in layout.scales else None
    return Quantized(layout, weight, scale[0] if storage.scale == "tensor" else scale, given, weight_scale_2=second)


def take_turns(layers: dict[str, list[nn.Module]], x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Returns the seconds of a call of each in so many seconds altogether, and at least three rounds."""
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    inputs = {name: x if name == "float32" else x.bfloat16() for name in layers}
    for name, copies in layers.items():
        copies[-1](inputs[name])  # loads kernels
    found = dict.fromkeys(layers, float("inf"))
    following = {name: itertools.cycle(copies) for name, copies in layers.items()}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        for name in layers:
            started, ends = clock(), []
            while len(ends) <= CALLS and (not ends or ends[-1] < started + TURN):
                next(following[name])(inputs[name])
                ends.append(clock())
            first = ends[0] if len(ends) > 1 else started
            found[name] = min(found[name], (ends[-1] - first) / max(1, len(ends) - 1))
        rounds += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
