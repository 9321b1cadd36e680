"""Numbers that several sections of a recipe have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Ratio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
