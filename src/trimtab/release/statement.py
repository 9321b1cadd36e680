"""The statement that a release carries: what was measured of which artifact, by whom released and until when.

The form is in-toto's Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md). The
subject is the artifact: a tree's digest is the SHA-256 of its manifest, which names the SHA-256 of every file.
"""

from __future__ import annotations

import json
import os
import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from trimtab.base import signing
from trimtab.base.errors import InputError, NotVerified
from trimtab.base.schema import Document
from trimtab.store.tree import Tree

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "trimtab:release/v1"

#: Days for which a statement holds unless TRIMTAB_SIGNATURE_DAYS says otherwise.
VALID_DAYS = "TRIMTAB_SIGNATURE_DAYS"
VALID_DAYS_DEFAULT = 365

#: Two machines' clocks may differ by this much.
SKEW = timedelta(minutes=5)


class Predicate(Document):
    """What is said of the artifact.

    `name` and `version` are the release's and `nonce` this statement's own: a statement says nothing of another
    release. `evidence` is the document of that name, as it is stored in the tree `evidence_tree`. `image` is the
    container image of the gate, where its environment names one; `papers` the tree of what other tools read.
    """

    name: str
    version: str
    nonce: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    issued: AwareDatetime
    expires: AwareDatetime
    evidence_tree: Tree
    evidence: dict[str, Any]
    engine: Tree | None
    verdict: dict[str, Any]
    image: str | None
    papers: Tree | None = None

    @property
    def artifact(self) -> Tree:
        return Tree.model_validate(self.evidence["export"])

    @property
    def measured(self) -> dict[str, Tree]:
        """The stored answers by name, as in the evidence."""
        return {name: Tree.model_validate(tree) for name, tree in self.evidence["measured"].items()}

    @property
    def trees(self) -> tuple[Tree, ...]:
        """What a release consists of: the artifact, its engine, the evidence, the plan and the answers it rests on."""
        engine = (self.engine,) if self.engine else ()
        plan = (Tree.model_validate(self.evidence["plan"]),) if self.evidence.get("plan") else ()
        papers = (self.papers,) if self.papers else ()
        return (self.artifact, *engine, self.evidence_tree, *plan, *papers, *self.measured.values())


class Subject(Document):
    name: str
    digest: dict[Literal["sha256"], str]


class Statement(Document):
    """An in-toto Statement v1 with trimtab's predicate."""

    type: Annotated[Literal[STATEMENT], Field(alias="_type")] = STATEMENT
    subject: tuple[Subject]
    predicateType: Literal[PREDICATE] = PREDICATE  # in-toto's name
    predicate: Predicate


def make(
    name: str,
    version: str,
    evidence: dict[str, Any],
    evidence_tree: Tree,
    engine: Tree | None,
    verdict: dict[str, Any],
    papers: Tree | None = None,
) -> Statement:
    """Returns the statement of one release, issued now.

    Raises:
        InputError: TRIMTAB_SIGNATURE_DAYS is not a number of days.
    """
    issued = datetime.now(UTC).replace(microsecond=0)
    predicate = Predicate(
        name=name,
        version=version,
        nonce=secrets.token_hex(16),
        issued=issued,
        expires=issued + timedelta(days=_valid_days()),
        evidence_tree=evidence_tree,
        evidence=evidence,
        engine=engine,
        verdict=verdict,
        image=os.environ.get("TRIMTAB_IMAGE"),
        papers=papers,
    )
    subject = Subject(name=f"{name}/{version}", digest={"sha256": predicate.artifact.digest})
    return Statement(subject=(subject,), predicate=predicate)


def payload(statement: Statement) -> bytes:
    """Returns the bytes that are signed."""
    return json.dumps(statement.model_dump(mode="json", by_alias=True), sort_keys=True).encode()


def read(data: bytes) -> Statement:
    """Reads what `payload` wrote.

    Raises:
        NotVerified: it is not a statement of trimtab, or contradicts itself.
    """
    try:
        statement = Statement.model_validate(json.loads(data))
        predicate = statement.predicate
        predicate.trees  # noqa: B018, raises where one is not named as it must be
        expected = Subject(name=f"{predicate.name}/{predicate.version}", digest={"sha256": predicate.artifact.digest})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        raise NotVerified(f"its statement is not one that trimtab writes ({first})") from None
    if statement.subject != (expected,):
        raise NotVerified("its statement is of another artifact than its evidence")
    return statement


def check_time(predicate: Predicate, now: datetime, max_age: timedelta | None = None) -> None:
    """Refuses a statement that does not hold now.

    Raises:
        NotVerified: expired, older than `max_age`, or issued in the future.
    """
    if predicate.issued > now + SKEW:
        raise NotVerified(f"its statement is issued in the future, {predicate.issued:%Y-%m-%d %H:%M} UTC")
    if predicate.expires <= now:
        raise NotVerified(f"its statement expired on {predicate.expires:%Y-%m-%d %H:%M} UTC: release it anew")
    if max_age is not None and now - predicate.issued > max_age:
        age, most = (now - predicate.issued) / timedelta(days=1), max_age / timedelta(days=1)
        raise NotVerified(f"its statement is {age:.1f} days old, more than {most:g}: release it anew")


def release_record(envelope: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a release, all of it drawn from its envelope: nothing in it is unproven.

    Raises:
        NotVerified: the envelope's payload is not a statement.
    """
    predicate = read(signing.unseal(envelope)).predicate
    return {
        "model": predicate.evidence["model"],
        "artifact": predicate.evidence["export"],
        "engine": predicate.engine.model_dump() if predicate.engine else None,
        "evidence": predicate.evidence_tree.model_dump(),
        "recipe": predicate.evidence["recipe"],
        "goal": predicate.evidence["goal"],
        "target": predicate.evidence["target"],
        "verdict": predicate.verdict,
        **({"papers": predicate.papers.model_dump()} if predicate.papers else {}),
        "signed_by": signing.sealed_by(envelope),
        "attestation": envelope,
    }


def _valid_days() -> float:
    text = os.environ.get(VALID_DAYS, "") or str(VALID_DAYS_DEFAULT)
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= 36_500:
        raise InputError(f"{VALID_DAYS}: '{text}' is not valid; write a number of days, such as {VALID_DAYS_DEFAULT}")
    return days
