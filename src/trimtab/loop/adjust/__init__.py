"""The next recipe: what the ladder and the history of verdicts leave to try, in the ladder's order.

| file | idea |
|---|---|
| `choice` | remedies first, then the ladder; and the sentence that says why |
| `rulings` | what a verdict rules out, for the whole run |
| `respects` | how recipes are compared for that |
| `remedies` | recipes made from a failed one |
| `prediction` | rungs of mixed precision that would fail, and are skipped |
"""

from trimtab.loop.adjust.choice import next_recipe
from trimtab.loop.adjust.prediction import predicted_ratio

__all__ = ["next_recipe", "predicted_ratio"]
