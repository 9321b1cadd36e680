"""The KFP face of pruning."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def prune(
    state: str,
    checkpoint: dsl.Input[dsl.Model],
    calibration: dsl.Input[dsl.Dataset],
    pruned: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Zeroes weights, or removes whole blocks or parts of them; passes the model on when the recipe does not prune.

    Args:
        state: The URI of the attempt's document.
        checkpoint: The model to prune.
        calibration: What was measured of activations, for all methods but magnitude, and the tokens.
        pruned: Names the pruned checkpoint, an ordinary one of transformers.
        metrics: Parameters, share of zeros, blocks.

    Returns:
        The URI of the attempt's document with the pruned checkpoint.
    """
    from trimtab.stages import run

    return run("prune", state, pruned, metrics)
