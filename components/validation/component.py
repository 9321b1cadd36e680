"""The KFP face of validation."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def validate(
    state: str,
    engine: dsl.Input[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Judges the exported artifact in its engine against the baseline, with confidence intervals.

    Args:
        state: The URI of the attempt's document.
        engine: The built engine.
        report: The attempt's page: verdict, intervals, kernels, layers.
        metrics: Accuracy, recovery, that of the worst task, perplexity ratio, KL divergence, bytes, speed, memory.

    Returns:
        The URI of the attempt's document with the verdict.
    """
    from trimtab.components.validation.stage import run

    return run(state, report, metrics)
