"""What a run may spend, and what an hour costs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trimtab.base.user_document import UserDocument

Amount = Annotated[float, Field(gt=0)]


class Limits(UserDocument):
    """What a run may spend, its baseline included; it ends with the attempt that leaves too little for another.

    Example::

        gpu_hours: 4
        cost: 100
    """

    gpu_hours: Amount | None = None
    """Hours of one GPU that work may take, all stages together; not limited if absent."""
    cpu_hours: Amount | None = None
    """Hours of one busy core that work may take, all stages together; not limited if absent."""
    cost: Amount | None = None
    """What work may cost, in the currency of the cluster profile's `prices`, which it needs; not limited if absent."""


class Prices(UserDocument):
    """What an hour costs where the run works and the artifact serves.

    Example::

        gpu_hour: 2.5
        cpu_hour: 0.04
        currency: USD
    """

    gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    """An hour of one GPU, with its share of the machine around it."""
    cpu_hour: Annotated[float, Field(ge=0)] = 0.0
    """An hour of one core, where no GPU is used."""
    currency: Annotated[str, Field(min_length=1, max_length=8)] = "USD"
    """The currency of the prices, as it is shown."""

    @model_validator(mode="after")
    def _says_something(self) -> Prices:
        if not (self.gpu_hour or self.cpu_hour):
            raise ValueError("has neither gpu_hour nor cpu_hour; write such as {gpu_hour: 2.5, cpu_hour: 0.04}")
        return self
