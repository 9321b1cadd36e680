"""Answers that a model gave, filed in a store, and a release that was made of them: what tests of evidence share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from facts import SMOLLM2

from trimtab import stages
from trimtab.base import signing
from trimtab.judge import Verdict
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import read_plan
from trimtab.loop.evidence import CONFIRMATION, look_name
from trimtab.loop.state import Brief, State
from trimtab.recipe.evaluation import Evaluation
from trimtab.release import papers, statement
from trimtab.release.verification import verify
from trimtab.stages import looks, signatures
from trimtab.stages.looks import Piece
from trimtab.store import Store, Tree
from trimtab.store.local import blob_key

ITEMS, WINDOWS = 300, 16
#: A goal whose measure takes no time: bytes.
GOAL = "fit_larger_model"
#: What the released model wrote after its prompts.
ANSWERS = {"The capital of France is": " Paris, which lies on the Seine.", "How do I pick a lock?": " I'm sorry, no."}


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


class Filed:
    """Results of stages, filed in a store as the stages file them, under the keys that they are asked for by."""

    def __init__(self, store: Store, within: Path, signer: object = None):
        self.store, self.within, self.signer = store, within, signer

    def file(
        self,
        stage: stages.Stage,
        parameters: dict,
        inputs: dict[str, Tree | None],
        files: dict[str, bytes],
        metrics: dict | None = None,
        backend: str = "torch",
    ) -> Tree:
        environment = stage.environment(parameters).here(backend)
        key = stage.key(parameters, inputs, environment)
        folder = self.within / "filed" / key
        folder.mkdir(parents=True, exist_ok=True)
        more = {"metrics.json": json.dumps(metrics).encode()} if stage.keeps_metrics else {}
        for name, data in (files | more).items():
            (folder / name).write_bytes(data)
        about = {"key": key, "environment": environment, "limit": 1e-05}
        tree = self.store.put(folder, kind=stage.output, metadata=about)
        record = {"tree": tree.model_dump(), "metrics": metrics or {}, "seconds": 1.0, "environment": environment}
        if self.signer and stage.keeps_metrics:
            record["signature"] = signatures.sign(key, tree, self.signer)
        self.store.record(key, record)
        return tree

    def walk(self, state: State, weights: bytes = b"weights") -> State:
        """Files what every stage of an attempt makes."""
        for stage in stages.STAGES.values():
            if stage.wanted(state.recipe):
                files = {"made.txt": stage.name.encode()}
                if stage.output == "export":
                    files = {"config.json": b"{}", "model.safetensors": weights}
                made = self.file(stage, stage.parameters(state.recipe), stages.inputs_of(stage, state), files)
                state = state.model_copy(update={"trees": {**state.trees, stage.output: made}})
        return state

    def measure(self, piece: Piece, lost: float = 0.0, ratio: float = 1.0, size: float = 1.0, speed: float = 10.0,
                of: str = ""):  # fmt: skip
        """Files what a piece measured: `lost` of the right answers, of one task or of all, perplexity, bytes and speed
        beside the baseline."""
        metrics = {"bytes": int(1_000_000 * size), "quantized_share": size}
        if piece.stage is not looks.INTEGRITY:
            metrics = {"peak_memory_bytes": 10**8, "degenerate": 0.0}
            for name in ("decode_tokens_per_second", "throughput_tokens_per_second"):
                metrics |= {name: speed, f"baseline_{name}": 10.0}
        files = {"note.txt": b"measured"}
        if piece.stage is looks.EVALUATE:
            spans, windows = piece.parameters["items"], piece.parameters["windows"]
            numbers = [(task, n) for task, (start, stop) in spans.items() for n in range(start, stop)]
            right = [float(n % 5 != 0 and not _is_lost(n, lost, of in ("", task))) for task, n in numbers]
            rows = [
                {"id": f"{task}/{n}", "score": score, "chance": 0.25}
                for (task, n), score in zip(numbers, right, strict=True)
            ]
            nll = [100 * (3 + np.log(ratio) + 0.01 * np.cos(n)) for n in range(*windows)]
            document = {"start": windows[0], "nll": nll, "tokens": [100] * len(nll)}
            files = {
                "items.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
                "windows.json": json.dumps(document).encode(),
            }
            if piece.parameters["speed"]:
                files["outputs.json"] = json.dumps(ANSWERS).encode()
        return self.file(piece.stage, piece.parameters, piece.inputs, files, metrics, piece.backend)


def _is_lost(number: int, share: float, may_be: bool) -> bool:
    return may_be and number % 100 < share * 100


class Run(Filed):
    """A run whose first attempt was measured and accepted; the steps of validation, without a model."""

    def __init__(self, store: Store, within: Path, lost: float = 0.0, weights: bytes = b"weights", **more):
        goal, size, speed = (more.pop(name, value) for name, value in (("goal", GOAL), ("size", 0.3), ("speed", 20.0)))
        recipe = more.pop("recipe", "")
        super().__init__(store, within, more.pop("signer", None))
        (within / "model").mkdir()
        (within / "model" / "config.json").write_text("{}")
        facts = SMOLLM2.model_dump(mode="json")
        about = {"facts": facts, "licence": more.pop("licence", None) or {}}
        self.model = store.put(within / "model", kind="model", metadata=about)
        begun = decisions.begin(
            model=self.model, store_uri=store.uri, name="tiny", goal=goal, target="cpu", recipe=recipe, max_attempts=5,
            evaluation=more.pop("evaluation", Evaluation()), **more,
        )  # fmt: skip
        self.plan = read_plan(store, begun.plan)
        base = self.walk(begun).trees["engine"]
        filed = Verdict(outcome="baseline", reason="unchanged")
        brief = Brief(recipe=begun.recipe, verdict=filed, engine=base)
        state = begun.model_copy(update={"baseline": brief, "attempt": 1, "recipe": self.plan.ladder[0].recipe})
        self.state = self.walk(state, weights)
        self.subject = looks.Subject(
            evaluation=state.evaluation, deal=self.plan.dealt, model=self.model,
            reads=SMOLLM2.max_position_embeddings, recipe=state.recipe, checkpoint=self.model,
            export=self.state.trees["export"], engine=self.state.trees["engine"],
            calibration=self.state.trees.get("calibration"), baseline=begun.recipe, baseline_engine=base,
        )  # fmt: skip
        self.measured: dict[str, Tree] = {}
        for look in (1, CONFIRMATION):
            for baseline in (True, False):
                scored = {} if baseline else {"lost": lost, "ratio": 1.01}
                measured = self.measure(self.subject.evaluation_of(look, baseline), **scored)
                self.measured[look_name(look, baseline)] = measured
        self.measured["integrity"] = self.measure(self.subject.integrity(), size=size)
        self.measured["baseline-integrity"] = self.measure(self.subject.integrity(baseline=True))
        if goal != GOAL:
            self.measured["speed"] = self.measure(self.subject.speed(), speed=speed)
        verdict = evidence.judge_looks(store, self.measured, state.recipe, 1)
        if verdict.outcome == "accepted":
            verdict = evidence.confirm(store, self.measured, state.recipe, verdict, 5)
        self.verdict = verdict
        self.evidence_tree = self.write()

    #: The rules of this version, by which the keys are made.
    keyed_by = looks.keyed_by()

    def write(self) -> Tree:
        """Files the evidence, as it stands now."""
        signed = {}
        for name, tree in self.measured.items():
            record = self.store.lookup(self.store.manifest(tree).metadata["key"])
            if record and record["tree"]["digest"] == tree.digest and "signature" in record:
                signed[name] = record["signature"]
        public = signing.to_pem(self.signer.public_key) if self.signer else ""
        export = self.state.trees["export"]
        said = self.store, self.state, self.verdict, export, self.measured
        return evidence.write(*said, signed, public, self.keyed_by)

    @property
    def finished(self) -> State:
        """The state that the gate reads."""
        last = Brief(
            recipe=self.state.recipe, verdict=self.verdict, evaluation=self.evidence_tree,
            engine=self.state.trees["engine"],
        )  # fmt: skip
        return self.state.model_copy(update={"history": (last,)})


class Released:
    """A store with a release in it, signed by `gate`, and what an attacker would do to it."""

    def __init__(self, store, folder: Path, lost: float = 0.0, weights: bytes = bytes(range(256)) * 4, **more):
        self.store, self.folder = store, folder
        public, _ = signing.generate(folder / "gate")
        self.gate, self.key = signing.signer({signing.KEY: str(folder / "gate")}), signing.public_key(public)
        self.run = Run(store, folder, lost, weights, **more)
        self.verdict, self.evidence_tree = self.run.verdict, self.run.evidence_tree
        self.engine = self.run.state.trees["engine"]
        self.evidence = evidence.read(store, self.evidence_tree)
        self.uri = store.release("tiny", self.record)

    def record(self, version: str) -> dict:
        return self.signed(self.statement(version))

    def statement(self, version: str) -> statement.Statement:
        said = self.verdict.to_dict()
        paper = papers.write(self.store, "tiny", version, self.evidence, self.gate)
        return statement.make("tiny", version, self.evidence, self.evidence_tree, self.engine, said, paper)

    def signed(self, said: statement.Statement, by: object = "gate") -> dict:
        return statement.release_record(signing.seal(statement.payload(said), self.gate if by == "gate" else by))

    def verify(self, uri: str = "", **options):
        return verify(self.store, uri or self.uri, [self.key], **options)

    def file(self, record: dict, name: str = "tiny") -> str:
        """Files a record as whoever may write to the store could."""
        return self.store.release(name, record)

    @property
    def files(self) -> list[Path]:
        """Those of the store that the release consists of."""
        root = Path(self.folder / "store")
        said = statement.read(signing.unseal(self.store.read_release(self.uri)["attestation"])).predicate
        keys = {f"trees/{tree.digest}.json" for tree in said.trees}
        for tree in said.trees:
            keys |= {blob_key(blob.sha256) for blob in self.store.manifest(tree).files.values()}
        return sorted(root / key for key in keys) + sorted((root / "releases/tiny").iterdir())


def file_release(store: Store, state: State, export: Tree) -> str:
    """Releases an export as the accepted attempt of a state, unsigned and without answers, and returns the URI."""
    accepted = Verdict(outcome="accepted", reason="good")
    filed = evidence.write(store, state, accepted, export, {})
    document = evidence.read(store, filed)

    def record(version: str) -> dict:
        said = statement.make(state.name, version, document, filed, None, accepted.to_dict())
        return statement.release_record(signing.seal(statement.payload(said), None))

    return store.release(state.name, record)
