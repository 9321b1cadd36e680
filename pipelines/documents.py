"""The documents that a user writes, by the names that the commands have for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.base import user_document
from trimtab.base.user_document import UserDocument
from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.recipe import Recipe
from trimtab.recipe import workload as workloads
from trimtab.recipe.evaluation import Evaluation
from trimtab.recipe.workload import Recorded, Workload
from trimtab.stages.profile import Profile


@dataclass(frozen=True)
class UsersOwn:
    """A document that a user writes: what it is for, and the kinds that it may be of, the usual one first."""

    name: str
    purpose: str
    kinds: tuple[type[UserDocument], ...]

    @property
    def schema(self) -> dict[str, Any]:
        """Its JSON schema, with a description of every field."""
        return user_document.json_schema(*self.kinds, title=self.name)

    @property
    def example(self) -> str:
        """An example that is valid, YAML."""
        return user_document.example(self.kinds[0])

    def parse(self, source: str | Mapping[str, Any]) -> UserDocument:
        """Reads one.

        Raises:
            InputError: names the field, the value and the remedy.
        """
        return workloads.parse(source) if self.kinds[0] is Workload else self.kinds[0].parse(source)


DOCUMENTS = {
    document.name: document
    for document in (
        UsersOwn("recipe", "what is done to a model", (Recipe,)),
        UsersOwn("workload", "what an engine is sized for", (Workload, Recorded)),
        UsersOwn("evaluation", "what is measured of a model", (Evaluation,)),
        UsersOwn("rollout", "how a release is served in a cluster", (Rollout,)),
        UsersOwn("profile", "what a cluster offers the stages", (Profile,)),
    )
}
