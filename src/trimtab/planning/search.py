"""Recipe and serving plan chosen together for a workload, by speeds that were measured (`catalog.decode_speeds`).

Of devices, batch, format of the KV cache and recipe the tables decide what they know:

- batch: in every table more sequences at once decode more tokens a second, so an engine takes as many as the workload
  has and the devices hold (`planning.engine`);
- devices: where one holds the model two decoded 0.83 of its tokens, at batch 1 and at 8 (benchmarks/results/h200.md),
  so an engine has no more than hold the workload (`planning.engine`). How the worlds of a model that is too large for
  one device compare, no table says;
- KV cache: no table has an engine with one in 8 bits, so the goal's techniques decide;
- recipe: the faster of those that the tables know at that batch is tried before the slower.

The attempt then measures what was chosen, beside the unchanged model, and the verdict goes by that alone. Where no
table speaks for a model, target and back end, everything is as the goal's row says.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab import families
from trimtab.catalog.decode_speeds import LEAST_GROUP, SIZES, TABLES, Table
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import Hardware
from trimtab.recipe import GROUPED_FORMATS, Recipe

#: The tables are of one run each: what is nearer than this keeps the order of the goal's row.
CLEARLY = 1.05


def table_for(facts: ModelFacts, recipe: Recipe, hardware: Hardware) -> Table | None:
    """Returns the table that speaks for a placed recipe; None where none does."""
    like = not facts.experts and not facts.recurrent_blocks and SIZES[0] <= facts.parameters <= SIZES[1]
    same = like and not recipe.prune and recipe.engine.world_size == 1
    return TABLES.get((hardware.name, recipe.engine.backend)) if same else None


def times_unchanged(facts: ModelFacts, recipe: Recipe, hardware: Hardware) -> float | None:
    """Returns how many times the unchanged model's tokens a placed recipe decodes; None where no table says."""
    table, quantize = table_for(facts, recipe, hardware), recipe.quantize
    if table is None or quantize is None or quantize.exclude_sensitive:
        return None
    if set(quantize.exclude) - {families.named(facts.model_type).head}:
        return None
    if quantize.format in GROUPED_FORMATS and quantize.group_size < LEAST_GROUP:
        return None
    return table.times(quantize.format, recipe.engine.max_batch_size)


def faster_first(recipes: Sequence[Recipe], facts: ModelFacts, hardware: Hardware) -> list[tuple[int, str]]:
    """Returns the places of placed recipes in the order to try them, each with what a table says of it or "".

    A recipe that no table knows keeps its place. The others share theirs: one goes before those that it is `CLEARLY`
    faster than.
    """
    times = {place: times_unchanged(facts, recipe, hardware) for place, recipe in enumerate(recipes)}
    known: list[int] = []
    for place in (place for place in times if times[place]):
        at = len(known)
        while at and times[place] > CLEARLY * times[known[at - 1]]:
            at -= 1
        known.insert(at, place)
    following = iter(known)
    order = [next(following) if times[place] else place for place in times]
    return [(place, _told(times[place], recipes[place], hardware)) for place in order]


def _told(times: float | None, recipe: Recipe, hardware: Hardware) -> str:
    if not times:
        return ""
    where = f"an 8B model on one {hardware.name} with {recipe.engine.backend}"
    return f"{times:.2f} times the unchanged tokens/s at batch {recipe.engine.max_batch_size}, as measured of {where}"
