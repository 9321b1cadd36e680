"""What a run is for: the goals that a ladder of recipes is planned for."""

from __future__ import annotations

from typing import Literal

Goal = Literal["lower_latency", "higher_throughput", "fit_larger_model", "long_context", "lower_cost"]
GOALS: tuple[str, ...] = Goal.__args__
