"""The loop: where a run stands, the documents that say so, and the decisions between its stages.

| file | idea |
|---|---|
| `state` | where a run stands, as decisions, stages and report read it |
| `documents` | the plan and the attempts as immutable documents in the store; between tasks travels the URI of one |
| `decisions` | the plan, what is refused before work begins, whether to go on, and with which recipe |
"""
