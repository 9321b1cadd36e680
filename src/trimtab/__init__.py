"""trimtab makes a language model smaller and faster, and releases it only when measurements say it is still as good.

    import trimtab

    for rung in trimtab.plan("model", goal="lower_latency", target="h100")["rungs"]:
        print(rung["title"], rung["why"])
    outcome = trimtab.run("model", recipe={"quantize": {"format": "int8_wo"}})
    print(outcome.release or outcome.error)

| name | what it is |
|---|---|
| `plan` | what a run would do: baseline, recipes in the order tried, what is left out |
| `run` | optimizes a model on this machine |
| `verify` | checks a release |
| `releases`, `pull`, `push`, `withdraw` | lists them, lays one into a folder, sends one to a registry, takes one back |
| `serve_config` | writes what serves an artifact, with TensorRT-LLM, vLLM or `trimtab serve` |
| `Recipe`, `Workload`, `Recorded`, `Evaluation`, `Rollout`, `Profile` | the documents that a user writes |
| `InputError`, `TrimtabError` | what is raised: of bad input, and of anything that is expected to happen |

Nothing is imported before it is used, and neither torch nor kfp before a run begins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.base.errors import InputError, TrimtabError
    from trimtab.components.deployment.rollout.settings import Rollout
    from trimtab.pipelines.api import plan, pull, releases, run, serve_config, verify, withdraw
    from trimtab.pipelines.pushing import push
    from trimtab.recipe import Recipe
    from trimtab.recipe.evaluation import Evaluation
    from trimtab.recipe.workload import Recorded, Workload
    from trimtab.stages.profile import Profile

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "InputError",
    "Profile",
    "Recipe",
    "Recorded",
    "Rollout",
    "TrimtabError",
    "Workload",
    "plan",
    "pull",
    "push",
    "releases",
    "run",
    "serve_config",
    "verify",
    "withdraw",
]

#: Where each name is from. A test compares this with what type checkers read above.
_FROM = {
    "Evaluation": "trimtab.recipe.evaluation",
    "InputError": "trimtab.base.errors",
    "Profile": "trimtab.stages.profile",
    "Recipe": "trimtab.recipe",
    "Recorded": "trimtab.recipe.workload",
    "Rollout": "trimtab.components.deployment.rollout.settings",
    "TrimtabError": "trimtab.base.errors",
    "Workload": "trimtab.recipe.workload",
    "plan": "trimtab.pipelines.api",
    "pull": "trimtab.pipelines.api",
    "push": "trimtab.pipelines.pushing",
    "releases": "trimtab.pipelines.api",
    "run": "trimtab.pipelines.api",
    "serve_config": "trimtab.pipelines.api",
    "verify": "trimtab.pipelines.api",
    "withdraw": "trimtab.pipelines.api",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'trimtab' has no attribute '{name}'")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
