"""The KFP face of distillation."""

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def distill(
    state: str,
    checkpoint: dsl.Input[dsl.Model],
    distilled: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Trains the pruned student on the teacher's logits; passes the model on when the recipe does not distil.

    Before that, where the recipe asks for it, the teacher generates text and its logits are stored; each is a result
    of its own, which other attempts find.

    Args:
        state: The URI of the attempt's document; that names the teacher, the unpruned model.
        checkpoint: The student.
        distilled: Names the better of the student before and after.
        metrics: Steps and held-out loss before and after.

    Returns:
        The URI of the attempt's document with the distilled checkpoint.
    """
    from trimtab.stages import run

    return run("generate teach distill", state, distilled, metrics, shown="distill")
