"""The KFP face of calibration."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def calibrate(
    state: str,
    checkpoint: dsl.Input[dsl.Model],
    calibration: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    stages: str = "calibrate",
) -> str:
    """Measures the model's activations on calibration text, once a model.

    Args:
        state: The URI of the attempt's document.
        checkpoint: The model to measure (named, not carried: the tree is in the store).
        calibration: Names the calibration tree: tokens, statistics of each layer's input, block influence.
        metrics: Samples, tokens and vocabulary coverage.
        stages: The stages to run, separated by spaces: 'calibrate' before pruning, 'recalibrate' and more after it.

    Returns:
        The URI of the attempt's document with the calibration tree.
    """
    from trimtab.stages import run

    return run(stages, state, calibration, metrics)
