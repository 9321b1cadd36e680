"""The KFP face of the deploy gate."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def gate(state: str, released: dsl.Output[dsl.Model]) -> str:
    """Releases the accepted artifact; fails the run when there is none or its evidence does not hold.

    It reads the evidence again from the store, judges anew, and signs what it found.

    Args:
        state: The state after the last attempt, JSON.
        released: Names the released checkpoint, with the release's URI in its metadata.

    Returns:
        The URI of the release.
    """
    from trimtab.components.deployment.gate import run

    return run(state, released)
