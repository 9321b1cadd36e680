"""Trains a pruned student on its teacher's logits, with a gate of its own."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from trimtab.base import child, progress
from trimtab.base.errors import Failure, InputError, StageError
from trimtab.components.distillation.objective.objective import Objective
from trimtab.components.distillation.objective.teacher import StoredLogits
from trimtab.components.distillation.text import data
from trimtab.components.distillation.training import data_parallel, sharding
from trimtab.components.distillation.training.optimization import schedule
from trimtab.components.distillation.training.resume import Curve
from trimtab.components.distillation.training.training import Training, heldout_loss
from trimtab.components.distillation.weights.masks import KeptZeros
from trimtab.components.distillation.weights.movement import Movement
from trimtab.components.distillation.weights.reparametrization import Reparametrization, Together, stored_weight
from trimtab.model import linear_layers
from trimtab.model.facts import inspect
from trimtab.planning import checks
from trimtab.recipe import Distillation, MovementPruning, Quantization, files
from trimtab.runtime.checkpoint import model_files as checkpoints

#: Points of the training loss in the picture.
MOST_POINTS = 100


def distill(
    checkpoint: str,
    model: str,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
    generated: str | None = None,
    teacher_logits: str | None = None,
) -> dict[str, Any]:
    """Distils, in as many processes as the recipe says; returns and raises what `train` does."""
    folders = {"checkpoint": checkpoint, "model": model, "generated": generated, "teacher_logits": teacher_logits}
    arguments = {**folders, "output": output, "scratch": scratch, "parameters": parameters}
    count = parameters.get("processes", 1)
    if count == 1:
        return train(**arguments)
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps(arguments), encoding="utf-8")
    if not data_parallel.launch(count, ["--request", str(request), "--answer", str(answer)]) and not answer.exists():
        raise StageError(f"distill: one of {count} processes ended without an answer; see its log above")
    done = child.done(json.loads(answer.read_text(encoding="utf-8")))
    shutil.rmtree(scratch, ignore_errors=True)
    return {**done.value, **({"peak_gpu_bytes": done.peak_gpu_bytes} if done.peak_gpu_bytes else {})}


def train(
    checkpoint: str,
    model: str,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
    generated: str | None = None,
    teacher_logits: str | None = None,
) -> dict[str, Any]:
    """Distils and writes the better of the student before and after, by held-out loss; in every process of a group.

    Narrow data can make a student worse; then the untrained one is returned and `improved` is 0. A GPU computes in
    bfloat16, with a float32 master of each weight; a CPU in float32. `distillation.json` has the losses of every step
    in `train` and of every evaluation in `heldout`, with steps, tokens and learning rates, for the picture of the page.

    Args:
        generated, teacher_logits: the trees of the stages `generate` and `teach`, where the recipe has them.

    Returns:
        steps, tokens, heldout_loss_before, heldout_loss_after (distillation loss in nats a token), improved,
        stopped_early; `curve`, {"train", "heldout"} with pairs of tokens and loss to draw; `zeros`, the share of
        zeros in the linear layers, of a student that is pruned while it trains.

    Raises:
        Failure: `training_diverged`, a loss that is not finite; names the step.
        InputError: too little text; a student with other tokens than its teacher, or more parameters.
    """
    own = {name: value for name, value in files.without(parameters).items() if name != "weights"}
    settings = Distillation.model_validate(own)
    _check_batch(settings)
    student, tokenizer = _loaded(Path(checkpoint))
    _check_pair(Path(checkpoint), Path(model), tokenizer)
    windows = data.read(tokenizer, settings.texts, settings.length, Path(generated) if generated else None)
    batches = data.Batches(windows.training, settings)
    change = _change(parameters.get("weights", {}), Path(checkpoint))
    change.attach(student)
    _share_out(student)
    change.watch(student)
    teacher = teacher_of(Path(model), teacher_logits, windows, student.device)
    objective = Objective(student, teacher, settings)
    before = heldout_loss(objective, windows.heldout)
    curve = Training(objective, windows.heldout, batches, settings, Path(scratch), change).run()
    after = heldout_loss(objective, windows.heldout)
    measures = change.measures()
    improved = after < before
    stopped = len(curve.train) < batches.steps
    unchanged = change.untrained_is_an_answer and not improved
    kept = _kept(student, change, Path(checkpoint), unchanged)
    if kept is not None:
        outcome = "; the student is kept as it was" if unchanged else ""
        progress.report("distill", f"held-out loss {before:.4f} before, {after:.4f} after{outcome}")
        checkpoints.save(kept.bfloat16(), Path(output), Path(checkpoint))
        told = _told(curve, batches, settings, before, after, improved)
        (Path(output) / "distillation.json").write_text(json.dumps(told), encoding="utf-8")
        if data_parallel.count() == 1:
            shutil.rmtree(scratch, ignore_errors=True)
    return {
        "steps": len(curve.train),
        "tokens": len(curve.train) * batches.tokens_per_step,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "improved": float(improved),
        "stopped_early": float(stopped),
        "curve": _drawn(curve, batches.tokens_per_step, before),
        **measures,
    }


def teacher_of(model: Path, stored: str | None, windows: data.Windows, device: torch.device) -> Any:
    """Returns the teacher on the device that trains: the model, or its logits where they were stored."""
    if stored:
        return StoredLogits(Path(stored), windows.all, device)
    teacher, _ = _loaded(model)
    teacher.requires_grad_(False)
    _share_out(teacher)
    return teacher


def _loaded(folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer; where several processes train, on its way to being shared out among them."""
    if data_parallel.count() == 1:
        return checkpoints.load_for_measuring(folder)
    return checkpoints.load(folder, torch.bfloat16 if torch.cuda.is_available() else torch.float32, as_stored=True)


def _share_out(model: Any) -> None:
    if data_parallel.count() > 1:
        sharding.shard(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _kept(student: Any, change: Reparametrization, checkpoint: Path, unchanged: bool) -> Any:
    """What is written, in the process that writes it, None in others: the student, or what it was before."""
    if data_parallel.count() == 1:
        change.finish(student)
        if not unchanged:
            return student
    plain = checkpoints.load(checkpoint, torch.bfloat16)[0] if data_parallel.rank() == 0 else None
    if not unchanged:
        sharding.copy_into(plain, student, stored_weight)
    return plain


def _check_batch(settings: Distillation) -> None:
    """Checks that processes get as many windows each: torchrun may have started others than the recipe knows."""
    parts = settings.gradient_accumulation * data_parallel.count()
    if settings.batch_size % parts:
        raise InputError(
            f"distill.batch_size: {settings.batch_size} windows in {settings.gradient_accumulation} parts, which "
            f"{data_parallel.count()} processes do not divide; write a multiple of {parts}"
        )


def _check_pair(student: Path, teacher: Path, tokenizer: Any) -> None:
    """Checks that a teacher can teach this student; reads no weights."""
    ours, theirs = inspect(student), inspect(teacher)
    if ours.vocab_size != theirs.vocab_size or tokenizer.get_vocab() != checkpoints.load_tokenizer(teacher).get_vocab():
        raise InputError(
            f"distill: the student has other tokens ({ours.vocab_size:,}) than its teacher ({theirs.vocab_size:,}), so "
            f"their logits cannot be compared; distil from a model with the same tokenizer"
        )
    if ours.parameters > theirs.parameters:
        raise InputError(
            f"distill: the student has {ours.parameters:,} parameters, more than its teacher's {theirs.parameters:,}; "
            f"name the smaller model as the student"
        )


def _drawn(curve: Curve, tokens_per_step: int, before: float) -> dict[str, list[tuple[int, float]]]:
    """The curve in at most a hundred points of the training loss, each the mean of as many steps."""
    run = math.ceil(len(curve.train) / MOST_POINTS)
    parts = [(start, curve.train[start : start + run]) for start in range(0, len(curve.train), run)]
    return {
        "train": [((start + len(part)) * tokens_per_step, statistics.fmean(part)) for start, part in parts],
        "heldout": [(0, before), *((taken * tokens_per_step, loss) for taken, loss in curve.heldout)],
    }


def _told(
    curve: Curve, batches: data.Batches, settings: Distillation, before: float, after: float, improved: bool
) -> dict[str, Any]:
    """What distillation.json says; losses in nats a token."""
    shares = (schedule(s, batches.steps, settings.schedule, settings.warmup) for s in range(len(curve.train)))
    return {
        "tokens_per_step": batches.tokens_per_step,
        "steps": batches.steps,
        "train": curve.train,
        "learning_rate": [settings.learning_rate * share for share in shares],
        "heldout": [[0, before], *map(list, curve.heldout)],
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "best": curve.best,
        "improved": improved,
    }


def _change(weights: dict[str, Any], checkpoint: Path) -> Reparametrization:
    """What the recipe wants of the student's weights while they train: zeros first, then rounding."""
    changes: list[Reparametrization] = []
    if weights.get("keep_zeros"):
        changes.append(KeptZeros())
    if "movement" in weights:
        changes.append(Movement(MovementPruning.model_validate(weights["movement"])))
    if "rounded" in weights:
        from trimtab.components.distillation.weights.quantization_aware import QuantizationAware  # imports ModelOpt

        quantize, facts = Quantization.model_validate(weights["rounded"]), inspect(checkpoint)
        if reason := checks.check_packing(quantize, facts):
            raise Failure("unsupported", reason)
        rounded = {layer.name for layer in linear_layers.quantized_layers(facts, quantize)}
        changes.append(QuantizationAware(quantize, rounded, weights.get("rounded_inputs", False)))
    return Together(changes)
