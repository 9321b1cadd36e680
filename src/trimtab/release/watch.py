"""Whether a service still answers as the release that it serves did when it was judged.

Prompts of recorded traffic are not kept, so a service is asked what validation asked: the fixed prompts whose answers
stand in the release's evidence. A longer text parts for good where one token ties and falls the other way, so texts are
compared by how far they begin alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from trimtab.base import signing
from trimtab.base.errors import InputError
from trimtab.loop.evidence import look_name
from trimtab.release import statement
from trimtab.release.shelf import located
from trimtab.stages.execution import METRICS
from trimtab.store import Store
from trimtab.store.address import split_release

#: The file of the first look that has the answers, {prompt: text}.
ANSWERS = "outputs.json"
#: How refusals begin, in lower case: what chat models say instead of an answer.
REFUSALS = (
    "i can't", "i can’t", "i cannot", "i'm sorry", "i’m sorry", "i am sorry", "sorry, ", "i'm not able",
    "i am not able", "i'm unable", "i am unable", "as an ai", "i won't", "i won’t",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What a release answered when it was judged: texts by prompt, and tokens a second at batch 1."""

    release: str
    answers: Mapping[str, str]
    tokens_per_second: float


@dataclass(frozen=True)
class Answer:
    """What a service answers to one prompt: None where it did not, the tokens of it, and the seconds that it took."""

    text: str | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Tolerance:
    """How far a service may be from its release.

    `agreement` is the least share of the texts that must begin alike, `slowdown` how many times as slow it may answer,
    `refusals` the share of the prompts that it may refuse beyond what the release did.
    """

    agreement: float = 0.5
    slowdown: float = 3.0
    refusals: float = 0.2

    def __post_init__(self) -> None:
        for name, low, high in (("agreement", 0, 1), ("slowdown", 1, None), ("refusals", 0, 1)):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                span = f"{low} to {high}" if high is not None else f"{low} or more"
                raise InputError(f"{name}: {value:g} is not valid; write {span}")


@dataclass(frozen=True)
class Observation:
    """A service beside its release. `agreement` is the mean share of a text that begins alike, `identical` the share of
    texts that are the same, `slowdown` the release's tokens a second over the service's (0 where none were counted),
    `refused` and `refused_before` shares of the prompts, `unanswered` prompts. `drifts` says in sentences what is
    beyond the tolerance.
    """

    agreement: float
    identical: float
    slowdown: float
    refused: float
    refused_before: float
    unanswered: int
    drifts: tuple[str, ...]


def expected(store: Store, release: str, keys: Sequence[object] = ()) -> Expected:
    """Reads what a release answered, out of its signed statement and the store.

    Args:
        release: its URI, name/version, or a name for its newest.
        keys: the public keys of which one must have signed it; a signature is not checked without any.

    Raises:
        NotVerified: it is not signed by one of them.
        InputError: there is no such release, or its evidence has no answers.
    """
    uri = located(store, release)
    said = statement.read(signing.unseal(store.read_release(uri).get("attestation"), keys)).predicate.evidence
    measured = said["measured"].get(look_name(1))
    tree = measured and store.tree(measured["digest"])
    if tree is None or ANSWERS not in store.manifest(tree).files:
        raise InputError(f"release: {uri} has no answers in its evidence; release it anew with this version of trimtab")
    answers = json.loads(store.read(tree, ANSWERS))
    speed = json.loads(store.read(tree, METRICS)).get("decode_tokens_per_second", 0.0)
    return Expected("/".join(split_release(uri)[1:]), answers, speed)


def observe(wanted: Expected, found: Mapping[str, Answer], tolerance: Tolerance) -> Observation:
    """Compares a service's answers with the release's.

    Args:
        found: an answer for each prompt of the release.
    """
    pairs = [(text, found[prompt]) for prompt, text in wanted.answers.items()]
    told = [(before, answer) for before, answer in pairs if answer.text is not None]
    agreement = sum(alike(before, answer.text) for before, answer in told) / len(pairs)
    seconds, tokens = (sum(getattr(answer, name) for _, answer in told) for name in ("seconds", "tokens"))
    slowdown = wanted.tokens_per_second * seconds / tokens if tokens else 0.0
    refused = sum(is_refusal(answer.text) for _, answer in told) / len(pairs)
    before = sum(is_refusal(text) for text, _ in pairs) / len(pairs)
    silent = len(pairs) - len(told)
    identical = sum(text.strip() == answer.text.strip() for text, answer in told) / len(pairs)
    drifts = []
    if silent:
        drifts.append(f"{silent} of {len(pairs)} prompts got no answer")
    if agreement < tolerance.agreement:
        drifts.append(f"{agreement:.0%} of the texts begins alike, less than {tolerance.agreement:.0%}")
    if slowdown > tolerance.slowdown:
        drifts.append(f"it answers {slowdown:.1f} times as slowly, more than {tolerance.slowdown:g}")
    if refused - before > tolerance.refusals:
        drifts.append(f"it refuses {refused:.0%} of the prompts, and the release {before:.0%}")
    return Observation(agreement, identical, slowdown, refused, before, silent, tuple(drifts))


def alike(first: str, second: str) -> float:
    """Returns the share of the longer text over which both begin alike; 1 for two that are empty."""
    first, second = first.strip(), second.strip()
    longer = max(len(first), len(second))
    return len(commonprefix([first, second])) / longer if longer else 1.0


def is_refusal(text: str) -> bool:
    """Whether a text begins as a refusal does."""
    return text.strip().lower().startswith(REFUSALS)


def exposition(wanted: Expected, seen: Observation, at: float) -> str:
    """Returns what is seen in Prometheus' text format.

    Args:
        at: when, in seconds since 1970.
    """
    name, version = wanted.release.rsplit("/", 1)
    rows = (
        ("agreement", "Mean share of an answer that begins as the release's did", seen.agreement),
        ("identical", "Share of the answers that are the release's", seen.identical),
        ("slowdown", "Tokens a second of the release over those of the service", seen.slowdown),
        ("refused", "Share of the prompts that the service refuses", seen.refused),
        ("refused_before", "Share of the prompts that the release refused", seen.refused_before),
        ("unanswered", "Prompts without an answer", seen.unanswered),
        ("drift", "1 where the service is beyond its tolerance", int(bool(seen.drifts))),
        ("watched_timestamp_seconds", "When the service was last asked", at),
    )
    lines = []
    for metric, text, value in rows:
        full = f"trimtab_release_{metric}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge"]
        lines.append(f'{full}{{release="{name}",version="{version}"}} {value:.10g}')
    return "\n".join([*lines, ""])
