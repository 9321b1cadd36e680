"""The KFP face of quantization."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def quantize(
    state: str,
    checkpoint: dsl.Input[dsl.Model],
    calibration: dsl.Input[dsl.Dataset],
    export: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Writes a unified checkpoint as ModelOpt exports it; passes the model on when the recipe does not quantize.

    Args:
        state: The URI of the attempt's document.
        checkpoint: The model to quantize.
        calibration: What was measured of the model (named, not carried: the trees are in the store).
        export: Names the exported checkpoint.
        metrics: Bytes, effective bits.

    Returns:
        The URI of the attempt's document with the export.
    """
    from trimtab.stages import run

    return run("quantize", state, export, metrics)
