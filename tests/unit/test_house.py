"""The house: which room may import which, told from the imports themselves; and what keeps a file readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trimtab
import trimtab.components
import trimtab.pipelines

#: The floors from the ground up, each with its rooms in that order: a room imports from those before it and from
#: the floors below. The rooms of the components stand side by side; none imports another.
ROOMS = {
    "trimtab": (
        "base", "catalog", "recipe", "store", "families", "model", "serving", "judge", "planning", "loop", "stages",
        "release", "report",
    ),
    "trimtab.runtime": (
        "text", "checkpoint", "rounding", "kernels", "kv_cache", "linear", "parallel", "decoder", "measure",
        "service", "engines",
    ),
    "trimtab.components": (),
    "trimtab.pipelines": ("cluster", "commands"),
}  # fmt: skip
FLOORS = tuple(ROOMS)
#: What every room of the components may import of its floor.
SHARED = {"", "images"}
#: Libraries that have no place among decisions; `kfp` and `modelopt` none in tensor code that rooms share either.
HEAVY = {"torch", "transformers", "kfp", "modelopt", "lm_eval", "tensorrt_llm", "vllm", "triton"}
#: What a user opens: `import trimtab` and `python -m trimtab` hand on what the top floor offers, and do nothing else.
DOORS = {"trimtab", "trimtab.__main__"}
MAX_LINES = 350


def floor_of(module: str) -> str:
    return next(floor for floor in reversed(FLOORS) if module == floor or module.startswith(f"{floor}."))


def room_of(module: str) -> str:
    """The room that a module stands in; "" for what stands in none, such as `trimtab.pipelines.optimize`."""
    floor = floor_of(module)
    first = module.removeprefix(floor).lstrip(".").partition(".")[0]
    alone = modules().get(f"{floor}.{first}")
    return "" if alone and alone.name != "__init__.py" else first


def refusal(importer: str, imported: str) -> str | None:
    """Why a module may not import another, or None."""
    if importer in DOORS:
        return None
    here, there = floor_of(importer), floor_of(imported)
    if FLOORS.index(there) > FLOORS.index(here):
        return f"{importer} imports {imported} from a higher floor"
    a, b = room_of(importer), room_of(imported)
    if here != there or a == b or not a or not b:
        return None
    if here == "trimtab.components":
        return None if b in SHARED else f"{importer} imports {imported}: one room another"
    rooms = ROOMS[here]
    if a not in rooms or b not in rooms:
        return f"{importer} imports {imported}, and {a if a not in rooms else b} has no place in ROOMS"
    return f"{importer} imports {imported}: an arrow up" if rooms.index(b) > rooms.index(a) else None


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in (trimtab.pipelines, trimtab.components, trimtab):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((package.__name__, *(parts[:-1] if parts[-1] == "__init__" else parts)))
            found.setdefault(name, path)
    return found


@cache
def imports(module: str, inside_functions: bool = True) -> frozenset[str]:
    """What a module of trimtab imports, as full names: of trimtab the modules, of others the package."""
    return frozenset(_imports(ast.parse(modules()[module].read_text()), inside_functions))


def _imports(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not inside_functions:
            continue  # nothing is imported there when the program runs
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(node, inside_functions)


def ours(module: str, inside_functions: bool = True) -> Iterator[str]:
    return (name for name in sorted(imports(module, inside_functions)) if name in modules() and name != module)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("trimtab.store.tree", "trimtab.loop.state"),
        ("trimtab.base.errors", "trimtab.runtime.text.windows"),
        ("trimtab.components.pruning.work", "trimtab.components.quantization.gptq"),
        ("trimtab.runtime.text.windows", "trimtab.runtime.engines.protocol"),
        ("trimtab.attic.trunk", "trimtab.base.errors"),
        ("trimtab.base", "trimtab.pipelines.api"),
    ],
)
def test_an_arrow_up_is_told(importer, imported):
    assert refusal(importer, imported)


def test_every_import_runs_downwards():
    found = [refusal(module, name) for module in modules() for name in ours(module)]
    assert not [reason for reason in found if reason]


def test_no_files_import_each_other_in_a_circle():
    # What is imported inside a function is imported later, so it closes no circle; `__init__` speaks for its room.
    graph = {name: set(ours(name, inside_functions=False)) for name, path in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_decisions_need_no_tensor_library_and_no_kfp():
    light = [module for module in modules() if floor_of(module) == "trimtab"]
    found = {module: {name.partition(".")[0] for name in imports(module)} & HEAVY for module in light}
    assert not {module: names for module, names in found.items() if names}


def test_nothing_lies_flat_at_the_root():
    root = Path(trimtab.__file__).parent
    assert sorted(path.name for path in root.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_a_file_is_something_one_can_hold_in_the_head():
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert not {module: length for module, length in lengths.items() if length > MAX_LINES}
    assert sorted(lengths.values())[len(lengths) // 2] < 120


def test_every_room_says_what_it_is():
    packages = [module for module, path in modules().items() if path.name == "__init__.py"]
    assert not [module for module in packages if not ast.get_docstring(ast.parse(modules()[module].read_text()))]
