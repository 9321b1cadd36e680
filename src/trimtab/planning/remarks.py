"""What a recipe is good for besides: a goal's row names the one that is added to the reason of its recipes."""

from __future__ import annotations

from trimtab.model.hardware import GB, GPUS
from trimtab.model.memory import memory
from trimtab.planning.candidates import Kit
from trimtab.planning.checks import refusal
from trimtab.recipe import Recipe


def saved_devices(kit: Kit, recipe: Recipe) -> str:
    """Says that a recipe takes fewer devices than the unchanged model, or ""."""
    placed, _ = kit.place(recipe)
    whole = kit.unchanged
    if not placed or (whole and placed.engine.world_size >= whole.engine.world_size):
        return ""
    wanted = f"needs {whole.engine.world_size} devices" if whole else "does not fit"
    return f"the unchanged model {wanted}, so the devices saved serve replicas"


def smaller_gpu(kit: Kit, recipe: Recipe) -> str:
    """Says which smaller GPU serves the recipe too, at eight sequences of the goal's length, or ""."""
    longest = kit.facts.max_position_embeddings
    length = min(kit.goal.length or longest, longest)
    engine = recipe.engine.model_copy(update={"max_batch_size": 8, "max_seq_len": length})
    recipe = recipe.model_copy(update={"engine": engine})
    if kit.hardware.bandwidth:
        for gpu in sorted(GPUS.values(), key=lambda gpu: (gpu.memory_bytes, gpu.bandwidth)):
            smaller = gpu.memory_bytes < kit.hardware.memory_bytes
            if smaller and not refusal(recipe, gpu, kit.facts) and memory(kit.facts, recipe, gpu).fits:
                return f"a smaller GPU is enough: {gpu.name}, {gpu.memory_bytes // GB} GB"
    return ""


#: By the name that a goal's row has.
REMARKS = {remark.__name__: remark for remark in (saved_devices, smaller_gpu)}
