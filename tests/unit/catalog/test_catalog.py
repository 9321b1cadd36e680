"""Rows that refer to each other, and to what computes with them."""

import pytest

from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.formats import FORMATS, STORAGES
from trimtab.catalog.goals import DEFAULT_GOAL, GOALS
from trimtab.catalog.kv_caches import KV_CACHES, of_scheme
from trimtab.catalog.numbers import NUMBERS
from trimtab.judge import Measurements
from trimtab.planning.remarks import REMARKS
from trimtab.planning.techniques import TECHNIQUES
from trimtab.recipe import Engine, Recipe


@pytest.mark.parametrize("row", [*FORMATS.values(), *KV_CACHES.values()], ids=lambda row: row.name)
def test_who_serves_a_format_is_a_back_end(row):
    assert row.served.keys() <= BACKENDS.keys()
    assert all(first <= last for first, last in row.served.values())


def test_a_cpu_serves_with_back_ends_that_run_there():
    assert all(BACKENDS[name].cpu for row in FORMATS.values() for name in row.cpu)


def test_pairs_that_clash_are_formats():
    pairs = [pair for row in BACKENDS.values() for pair in row.clashes]
    assert all(form in FORMATS and kv_cache in KV_CACHES for form, kv_cache in pairs)


def test_formats_that_are_stored_alike_share_one_row():
    rows = [row for row in FORMATS.values() if row.storage]
    assert all(STORAGES[row.storage.algorithm] is row.storage for row in rows)


@pytest.mark.parametrize("name", STORAGES)
def test_a_storage_can_be_stored(name):
    row = STORAGES[name]
    numbers = {row.numbers, *([row.inputs.numbers] if row.inputs else [])}
    assert numbers <= NUMBERS.keys()
    assert (row.block > 0) is (row.scale == "block")
    assert (row.limits.block_gain < float("inf")) is row.in_groups
    assert row.second_scale != "rounded" or row.inputs, "weights are rounded to the numbers of the input"


def test_a_mix_is_of_stored_formats_with_the_fewest_bits_first():
    for row in FORMATS.values():
        bits = [FORMATS[name].storage.bits for name in row.mixes]
        assert bits == sorted(bits), "memory.weight_bytes shares its weights between the first and the last"
        assert not bits or (bits[0], bits[-1]) == (4, 8), "effective_bits of a recipe lie between them"
        assert len({FORMATS[name].storage for name in row.mixes}) == len(bits), "a layer's storage tells its format"


def test_only_what_quantizes_has_a_harshness():
    for row in FORMATS.values():
        assert (row.harshness > 0) is (row.storage is not None), row.name


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_may_ask_for_each(name):
    bits = ", effective_bits: 6" if FORMATS[name].mixes else ""
    assert Recipe.parse(f"quantize: {{format: {name}{bits}}}").weight_format == name


@pytest.mark.parametrize("name", KV_CACHES)
def test_a_recipe_may_ask_for_each_kv_cache(name):
    assert Recipe.parse(f"quantize: {{format: bf16, kv_cache: {name}}}").kv_cache_format == name


@pytest.mark.parametrize("name", BACKENDS)
def test_a_recipe_may_ask_for_each_back_end(name):
    assert Engine.parse(f"backend: {name}").backend == name


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ({"type": "float", "num_bits": 8, "dynamic": False}, "FP8"),
        ({"type": "float", "num_bits": 4}, None),
        ("NVFP4", None),
        (None, None),
    ],
)
def test_a_scheme_of_config_json_names_a_kv_cache(scheme, name):
    assert of_scheme(scheme) == name


@pytest.mark.parametrize("row", GOALS.values(), ids=lambda row: row.name)
def test_a_goal_asks_for_techniques_or_formats_and_is_measured(row):
    assert set(row.techniques) <= TECHNIQUES.keys() | FORMATS.keys()
    assert len(set(row.techniques)) == len(row.techniques)
    measured = getattr(Measurements, row.measure.name, None)
    assert row.measure.name in Measurements.model_fields or isinstance(measured, property)
    assert row.remark in ("", *REMARKS) and row.least_batch <= row.batch
    assert bool(row.instead) is row.measure.computed, "a plan refuses what nothing gains, and says what to write"


def test_what_names_a_technique_names_no_format():
    assert not TECHNIQUES.keys() & FORMATS.keys()


def test_every_technique_and_remark_has_a_goal():
    assert TECHNIQUES.keys() <= {name for row in GOALS.values() for name in row.techniques}
    assert REMARKS.keys() <= {row.remark for row in GOALS.values()}
    assert DEFAULT_GOAL in GOALS
