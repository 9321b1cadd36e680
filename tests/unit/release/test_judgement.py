"""What the gate judges anew, and each way in which evidence could be made to say more than was measured."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from releases import Run

from trimtab.base import signing
from trimtab.loop import evidence
from trimtab.loop.evidence import CONFIRMATION, look_name
from trimtab.recipe import Acceptance
from trimtab.release import judgement
from trimtab.stages import signatures
from trimtab.store.local import blob_key


@pytest.fixture
def run(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return Run(store, tmp_path)


def refused(run: Run) -> str | None:
    run.evidence_tree = run.write()
    state = run.finished
    return judgement.refusal(run.store, state, state.history[-1])


def test_honest_evidence_is_enough(run):
    assert run.verdict.confirmed and refused(run) is None


def test_of_a_goal_that_is_timed(store, tmp_path):
    assert refused(Run(store, tmp_path, goal="lower_latency")) is None


# --- each a way to say more than was measured -----------------------------------------------------------------


def without_its_confirmation(run):
    for baseline in (True, False):
        del run.measured[look_name(CONFIRMATION, baseline)]


def without_half_of_its_confirmation(run):
    del run.measured[look_name(CONFIRMATION, baseline=True)]


def the_candidate_as_its_own_baseline(run):
    for look in (1, CONFIRMATION):
        run.measured[look_name(look, baseline=True)] = run.measured[look_name(look)]


def the_baseline_as_the_candidate(run):
    for look in (1, CONFIRMATION):
        run.measured[look_name(look)] = run.measured[look_name(look, baseline=True)]


def confirmed_on_the_items_of_the_look(run):
    for baseline in (True, False):
        run.measured[look_name(CONFIRMATION, baseline)] = run.measured[look_name(1, baseline)]


def of_items_that_suit_it(run):
    """Another span of the task's items than the plan dealt."""
    piece = run.subject.evaluation_of(1)
    piece.parameters["items"] = {task: [start, stop - 1] for task, (start, stop) in piece.parameters["items"].items()}
    run.measured[look_name(1)] = run.measure(piece, ratio=1.01)


def of_another_export(run):
    other = run.walk(run.state, weights=b"other weights").trees["export"]
    run.state = run.state.model_copy(update={"trees": {**run.state.trees, "export": other}})


def of_an_export_that_quantization_did_not_make(run):
    swapped = run.store.put_json("export", {"config": 1})
    run.state = run.state.model_copy(update={"trees": {**run.state.trees, "export": swapped}})


def of_an_engine_that_was_not_built_of_it(run):
    engine = run.state.baseline.engine
    run.state = run.state.model_copy(update={"trees": {**run.state.trees, "engine": engine}})


def useless(run):
    run.measured["integrity"] = run.measure(run.subject.integrity(), size=1.0)


def without_the_bytes_of_the_baseline(run):
    del run.measured["baseline-integrity"]


def that_began_to_repeat_itself(run):
    piece = run.subject.evaluation_of(1)
    answers = {name: run.store.read(run.measured[look_name(1)], name) for name in ("items.jsonl", "windows.json")}
    metrics = {"peak_memory_bytes": 1, "degenerate": 0.75, "decode_tokens_per_second": 9.0}
    metrics["throughput_tokens_per_second"] = 9.0
    run.measured[look_name(1)] = run.file(piece.stage, piece.parameters, piece.inputs, answers, metrics)


def judged_at_another_look(run):
    run.verdict = run.verdict.model_copy(update={"looks": 3})


def filed_as_rejected(run):
    run.verdict = run.verdict.model_copy(update={"outcome": "rejected"})


def of_an_unplanned_number_of_attempts(run):
    """Which asks less of the confirmation."""
    run.state = run.state.model_copy(update={"max_attempts": 1})


def without_environment(run):
    piece = run.subject.evaluation_of(1)
    files = {name: run.store.read(run.measured[look_name(1)], name) for name in ("items.jsonl", "windows.json")}
    key = run.store.manifest(run.measured[look_name(1)]).metadata["key"]
    folder = run.within / "old"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    run.measured[look_name(1)] = run.store.put(folder, kind=piece.stage.output, metadata={"key": key})


ATTACKS = [
    (without_its_confirmation, "the evidence lacks its confirmation"),
    (without_half_of_its_confirmation, "the evidence lacks its confirmation"),
    (the_candidate_as_its_own_baseline, "'baseline-look-1' is not what the plan asks for"),
    (the_baseline_as_the_candidate, "'look-1' is not what the plan asks for"),
    (confirmed_on_the_items_of_the_look, "'baseline-look-4' is not what the plan asks for"),
    (of_items_that_suit_it, "'look-1' is not what the plan asks for"),
    (of_another_export, "'engine' is not what the plan asks for"),
    (of_an_export_that_quantization_did_not_make, "'engine' is not what the plan asks for"),
    (of_an_engine_that_was_not_built_of_it, "'engine' is not what the plan asks for"),
    (useless, r"judged anew, the stored answers say: rejected, accurate but useless for fit_larger_model: \+0.0%"),
    (without_the_bytes_of_the_baseline, "the evidence lacks 'baseline-integrity'"),
    (that_began_to_repeat_itself, "judged anew, 75% of the continuations are empty or repeat themselves"),
    (judged_at_another_look, "the evidence says 3 looks, and the answers decide at look 1"),
    (filed_as_rejected, "the evidence says: rejected"),
    (of_an_unplanned_number_of_attempts, "the evidence has another max_attempts than its plan"),
    (without_environment, "'look-1' does not say in which environment it was made: run it again"),
]


@pytest.mark.parametrize(("attack", "reason"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
def test_what_was_not_measured_so_is_refused(run, attack, reason):
    attack(run)
    assert re.search(reason, refused(run) or "")


def test_a_confirmation_that_failed(run):
    run.measured[look_name(CONFIRMATION)] = run.measure(run.subject.evaluation_of(CONFIRMATION), lost=0.4, ratio=1.01)
    assert "the stored answers say: rejected, not confirmed on fresh items" in refused(run)


def test_tiers_are_judged_anew(store, tmp_path):
    """Most of one critical task is gone, which all tasks together would hardly show."""
    run = Run(store, tmp_path, recipe="accept: {critical: {trimtab_geography: 0.7}}")
    assert run.verdict.confirmed and refused(run) is None
    worse = {"lost": 0.6, "ratio": 1.01, "of": "trimtab_geography"}
    run.measured[look_name(1)] = run.measure(run.subject.evaluation_of(1), **worse)
    assert "the stored answers say: rejected, recovery of trimtab_geography" in refused(run)
    run.measured[look_name(1)] = run.measure(run.subject.evaluation_of(1), ratio=1.01)
    run.measured[look_name(CONFIRMATION)] = run.measure(run.subject.evaluation_of(CONFIRMATION), **worse)
    assert "rejected, not confirmed on fresh items: recovery of trimtab_geography" in refused(run)


def test_limits_that_no_rung_has(run):
    run.state = run.state.model_copy(
        update={"recipe": run.state.recipe.model_copy(update={"accept": Acceptance(min_recovery=0.5)})}
    )
    assert refused(run) == "the evidence has other limits (accept) than its plan"


def test_the_cache_of_a_node_is_not_believed(run):
    """Every task that runs there may write it: answers altered there turned a rejection into a release."""
    piece = run.subject.evaluation_of(1)
    good = run.store.read(run.measured[look_name(1)], "items.jsonl")
    run.measured[look_name(1)] = run.measure(piece, lost=0.4, ratio=1.01)
    cached = run.store.get(run.measured[look_name(1)]) / "items.jsonl"
    cached.parent.chmod(0o755)
    cached.unlink()
    cached.write_bytes(good)
    assert "judged anew, the stored answers say: rejected" in refused(run)


def test_altered_answers_in_the_store_itself(run):
    checksum = run.store.manifest(run.measured[look_name(1)]).files["items.jsonl"].sha256
    path = run.within / "store" / blob_key(checksum)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"0.0", b"1.0"))
    with pytest.raises(Exception, match="items.jsonl.* is corrupted in the store"):
        refused(run)


NAMES = ["look-1", "baseline-look-1", "look-4", "baseline-look-4", "integrity", "baseline-integrity"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(st.permutations(NAMES))
def test_pieces_filed_under_each_others_names(run, order):
    mine = dict(run.measured)
    run.measured = {name: mine[other] for name, other in zip(NAMES, order, strict=True)}
    assert (refused(run) is None) == (order == NAMES)
    run.measured = mine


def test_the_gate_takes_no_evidence_of_another_version(run):
    run.keyed_by = "another"
    assert refused(run) == "the evidence was made by another version of trimtab: run it again"


def test_a_later_version_still_judges_an_earlier_release_anew(run):
    """It makes keys by other rules: what was asked it takes from the gate, what was answered it judges itself."""
    run.keyed_by = "another"
    assert judgement.judge_anew(run.store, evidence.read(run.store, run.write())) is None
    run.measured[look_name(1)] = run.measure(run.subject.evaluation_of(1), lost=0.4, ratio=1.01)
    document = evidence.read(run.store, run.write())
    assert "judged anew, the stored answers say: rejected" in judgement.judge_anew(run.store, document)


# --- who measured ---------------------------------------------------------------------------------------------


@pytest.fixture
def signed(store, tmp_path, monkeypatch):
    """A run whose validation signs, and a gate that was given the public half of its key."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    public, _ = signing.generate(tmp_path / "validation")
    monkeypatch.setenv(signing.VALIDATION_PUBLIC, public.read_text())
    return Run(store, tmp_path, signer=signing.signer({signing.KEY: str(tmp_path / "validation")}))


def test_signed_answers(signed):
    assert refused(signed) is None
    assert set(evidence.read(signed.store, signed.evidence_tree)["signatures"]) == set(signed.measured)


def answers_of_somebody_else(run):
    """Under the right key, as whoever may write to the store can file them."""
    piece, signer = run.subject.evaluation_of(1), run.signer
    run.signer = None
    run.measured[look_name(1)] = run.measure(piece, ratio=1.005)
    run.signer = signer


def evidence_without_signatures(run):
    run.signer = None


def evidence_signed_by_another(run):
    signing.generate(run.within / "attacker")
    run.signer = signing.signer({signing.KEY: str(run.within / "attacker")})


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (answers_of_somebody_else, "'look-1' is not validation's"),
        (evidence_without_signatures, "the answers are not signed with the key of validation"),
        (evidence_signed_by_another, "the answers are not signed with the key of validation"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_answers_that_validation_did_not_sign(signed, attack, reason):
    attack(signed)
    assert reason in refused(signed)


def test_envelopes_filed_under_each_others_names(signed):
    tree = signed.write()
    document = evidence.read(signed.store, tree)
    names = document["signatures"]
    names["look-1"], names["look-4"] = names["look-4"], names["look-1"]
    assert "'look-1' is not validation's" in judgement.judge_anew(signed.store, document)


def test_validation_takes_only_what_it_has_signed_for_found(signed):
    key = signed.store.manifest(signed.measured["look-1"]).metadata["key"]
    record = signed.store.lookup(key)
    assert signatures.is_signed(record, key, signed.signer.public_key)
    answers_of_somebody_else(signed)
    assert not signatures.is_signed(signed.store.lookup(key), key, signed.signer.public_key)
