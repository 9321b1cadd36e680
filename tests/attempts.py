"""Recipes of whole attempts, and trees of one file to begin them with."""

DISTILL = "{tokens: 99, generate: 9, stored_logits: 8}"
FULL = f"{{prune: {{method: depth, blocks: 1}}, distill: {DISTILL}, quantize: {{format: mixed, effective_bits: 6}}}}"
ALL = ["calibrate", "prune", "generate", "teach", "distill", "recalibrate", "sensitivity", "quantize", "engine"]


def put(store, folder, content: str):
    """Returns a checkpoint in the store: a folder with one file of this content."""
    place = folder / "put" / content
    place.mkdir(parents=True, exist_ok=True)
    (place / "file").write_text(content)
    return store.put(place, kind="checkpoint")
