"""The KFP face of the engine build."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def build_engine(
    state: str,
    export: dsl.Input[dsl.Model],
    engine: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Makes the export servable, then loads it as validation will and lets it score and write a few tokens.

    Args:
        state: The URI of the attempt's document.
        export: The exported checkpoint.
        engine: Names the built engine.
        metrics: Layers, emulated layers, bytes of the weights in memory.

    Returns:
        The URI of the attempt's document with the engine.
    """
    from trimtab.stages import run

    return run("engine", state, engine, metrics)
