"""The KFP faces of the deploy gate, and of the rollout to a cluster behind it."""

from typing import NamedTuple

from kfp import dsl

from trimtab.components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def gate(state: str, released: dsl.Output[dsl.Model]) -> str:
    """Releases the accepted artifact; fails the run when there is none or its evidence does not hold.

    It reads the evidence again from the store, judges anew, and signs what it found.

    Args:
        state: The URI of the last attempt's document.
        released: Names the released checkpoint, with the release's URI in its metadata.

    Returns:
        The URI of the release.
    """
    from trimtab.components.deployment.gate import run

    return run(state, released)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def roll_out(
    release: str,
    rollout: str,
    run: str,
    story: dsl.Output[dsl.Markdown],
    compared: dsl.Output[dsl.Metrics],
    registry: str = "",
) -> NamedTuple("RolledOut", Output=str, told=str):
    """Serves the release on KServe where that is asked for: a canary, a comparison, promotion or rollback.

    Between the comparison and the promotion it waits for a person's approval where the rollout says so. What was not
    rolled back is entered in the Model Registry, where one is named.

    Args:
        release: The URI of the release.
        rollout: How to serve it, YAML or JSON; empty to serve it nowhere.
        run: The id of the run, under which those who watch it are told.
        story: What happened, with the commands that approved or refused.
        compared: Prompts, the share answered otherwise than before, and seconds.
        registry: The Kubeflow Model Registry to enter the release in, http(s)://host[:port]; empty for none.

    Returns:
        Output: 'serves', 'rolled_back' or 'not_asked'.
        told: How it ended, in a sentence.
    """
    from collections import namedtuple

    from trimtab.components.deployment.rollout.delivery import run as deliver

    return namedtuple("RolledOut", ["Output", "told"])(
        *deliver(release, rollout, run, story, compared, registry)
    )


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def fail_rollout(told: str):
    """Fails the run whose release was rolled back, behind the task whose page says why.

    Args:
        told: Why it does not serve.
    """
    from trimtab.base.errors import NotReleased

    raise NotReleased(told)
