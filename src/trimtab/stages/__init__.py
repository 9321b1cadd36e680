"""The stages: what a recipe asks for, what a result is found by, how it is made, and what KFP shows of it.

| file | idea |
|---|---|
| `registry` | each stage as a row: when a recipe asks for it, what it reads, what it makes; the tasks |
| `keys` | what a result is found by, the environment that its stage declares included |
| `execution` | a result, from the store or from a child process |
| `usage` | what its work has used |
| `checkpoints` | what a stage has finished, kept in the store while it works |
| `signatures` | who measured it |
| `looks` | what is measured of an attempt, and on which trees |
| `accelerators` | how many devices each task needs, and what else, said beforehand |
| `face` | the body of a component |
"""

from trimtab.stages.accelerators import OPTIONAL, accelerators, forecast, machines, refuse_here
from trimtab.stages.execution import (
    Result,
    advance,
    cached,
    inputs_of,
    key_here,
    tree_of,
)
from trimtab.stages.face import describe_tree, log_metrics, model_facts, run
from trimtab.stages.keys import MEASURED, QUANTIZED, TENSORS, Environment
from trimtab.stages.registry import STAGES, TASKS, Stage, always, work_stage

__all__ = [
    "Environment",
    "MEASURED",
    "OPTIONAL",
    "QUANTIZED",
    "Result",
    "STAGES",
    "Stage",
    "TASKS",
    "TENSORS",
    "accelerators",
    "advance",
    "always",
    "cached",
    "describe_tree",
    "forecast",
    "inputs_of",
    "key_here",
    "log_metrics",
    "machines",
    "model_facts",
    "refuse_here",
    "run",
    "tree_of",
    "work_stage",
]
