"""What is asked of each format, and a stage's work with the settings of a test."""

from __future__ import annotations

from trimtab.components.quantization import work

#: Format -> bits a weight takes with its scales at most (64 features, groups of 32), relative error of a layer at most.
FORMATS = {
    "int8_wo": (8.6, 0.02),
    "int8_sq": (9.1, 0.05),
    "fp8": (8.6, 0.05),
    "fp8_gptq": (8.6, 0.05),
    "fp8_per_channel": (8.6, 0.05),
    "int4_rtn": (4.6, 0.2),
    "int4_awq": (4.9, 0.3),
    "int4_gptq": (4.9, 0.3),
    "w4a8_awq": (4.9, 0.3),
    "nvfp4": (4.6, 0.3),
    "nvfp4_wo": (4.6, 0.3),
    "mxfp4": (4.4, 0.3),
    "mxfp4_wo": (4.3, 0.3),
}


def quantize(model, folder, calibration=None, **settings):
    (folder / "output").mkdir(parents=True, exist_ok=True)
    trees = (tree and str(tree) for tree in (model, calibration, None))
    parameters = {"group_size": 32, **settings}
    return work.quantize(*trees, str(folder / "output"), str(folder / "scratch"), parameters)
