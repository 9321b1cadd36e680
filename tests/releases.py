"""Answers that a model gave, filed in a store, and a release that was made of them: what tests of evidence share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trimtab import evidence, signing, statement
from trimtab.evidence import CONFIRMATION, look_name
from trimtab.recipe import Recipe
from trimtab.state import State
from trimtab.store import Store, Tree
from trimtab.verdict import Verdict
from trimtab.verification import verify

ITEMS, WINDOWS = 300, 16


def scores_in(store: Store, within: Path) -> Callable[..., Tree]:
    """Returns a function: files what a model scored at a look, `lost` of its right answers turned wrong."""
    count = iter(range(1000))

    def put(look: int, lost: float = 0.0, ratio: float = 1.0, items: int = ITEMS, windows: int = WINDOWS) -> Tree:
        folder = within / f"scored-{next(count)}"
        folder.mkdir()
        span = range((look - 1) * ITEMS, (look - 1) * ITEMS + items)
        rows = [
            {"id": f"item/{n}", "score": float(n % 5 != 0 and n % 100 >= lost * 100), "chance": 0.25} for n in span
        ]
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        nll = [100 * (3 + np.log(ratio) + 0.01 * np.cos(n)) for n in range(windows)]
        document = {"start": (look - 1) * WINDOWS, "nll": nll, "tokens": [100] * windows}
        (folder / "windows.json").write_text(json.dumps(document))
        return store.put(folder, kind="evaluation", metadata={"n": folder.name})

    return put


class Released:
    """A store with a release in it, signed by `gate`, and what an attacker would do to it."""

    def __init__(self, store, scored, folder: Path, lost: float = 0.0, weights: bytes = bytes(range(256)) * 4):
        self.store, self.folder = store, folder
        public, _ = signing.generate(folder / "gate")
        self.gate, self.key = signing.signer({signing.KEY: str(folder / "gate")}), signing.public_key(public)
        (folder / "export").mkdir()
        (folder / "export" / "config.json").write_text("{}")
        (folder / "export" / "model.safetensors").write_bytes(weights)
        export = store.put(folder / "export", kind="export", metadata={"limit": 1e-05})
        self.engine = store.put_json("engine", {"settings": {}})
        measured = {}
        for look in (1, CONFIRMATION):
            measured |= {look_name(look, baseline=True): scored(look), look_name(look): scored(look, lost, 1.01)}
        state = State(store=store.uri, goal="lower_latency", target="cpu", model=export, recipe=Recipe())
        accepted = evidence.judge_looks(store, measured, state.recipe, 1)
        self.verdict = evidence.confirm(store, measured, state.recipe, accepted, 5) if not lost else accepted
        self.evidence_tree = evidence.write(store, state, self.verdict, export, measured)
        self.evidence = evidence.read(store, self.evidence_tree)
        self.uri = store.release("tiny", self.record)

    def record(self, version: str) -> dict:
        return self.signed(self.statement(version))

    def statement(self, version: str) -> statement.Statement:
        said = self.verdict.to_dict()
        return statement.make("tiny", version, self.evidence, self.evidence_tree, self.engine, said)

    def signed(self, said: statement.Statement, by: object = "gate") -> dict:
        return statement.release_record(signing.seal(statement.payload(said), self.gate if by == "gate" else by))

    def verify(self, uri: str = "", **options):
        return verify(self.store, uri or self.uri, [self.key], **options)

    def file(self, record: dict, name: str = "tiny") -> str:
        """Files a record as whoever may write to the store could."""
        return self.store.release(name, record)

    @property
    def files(self) -> list[Path]:
        root = Path(self.folder / "store")
        return sorted(path for path in root.rglob("*") if path.is_file())


def file_release(store: Store, state: State, export: Tree) -> str:
    """Releases an export as the accepted attempt of a state, unsigned and without answers, and returns the URI."""
    accepted = Verdict(outcome="accepted", reason="good")
    filed = evidence.write(store, state, accepted, export, {})
    document = evidence.read(store, filed)

    def record(version: str) -> dict:
        said = statement.make(state.name, version, document, filed, None, accepted.to_dict())
        return statement.release_record(signing.seal(statement.payload(said), None))

    return store.release(state.name, record)
