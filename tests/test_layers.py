"""Imports point down: every import between our own modules is read with `ast` and held against the table of layers."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # bottom first; a module may import from its own layer and from those before it
    ["pallas_kernels"],
    ["fastjax.errors", "fastjax.elsewhere", "fastjax.compile_cache"],
    ["fastjax.parallel", "fastjax.distributed"],
    ["fastjax.models", "fastjax.lora"],
    ["fastjax.weights"],
    ["fastjax.train", "fastjax.generate", "fastjax.data"],
    ["fastjax.api", "fastjax"],
    ["fastjax.cli", "fastjax.demo", "fastjax.__main__"],
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
STRANGERS = {
    "pallas_kernels": {"flax", "transformers", "huggingface_hub", "safetensors", "optax", "orbax"},
    "fastjax": {"torch", "peft", "bitsandbytes"},
}


def unit_of(module: str) -> str:
    """The entry of the table a module falls under; `fastjax` alone is its `__init__`, so a new folder has none."""
    return "pallas_kernels" if module.split(".")[0] == "pallas_kernels" else ".".join(module.split(".")[:2])


def imports_of(path: Path, module: str) -> set[str]:
    """Absolute names of everything a file imports, at any depth of nesting."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(base + [node.module] * bool(node.module))
            found |= {f"fastjax.{alias.name}" for alias in node.names} if source == "fastjax" else {source}
    return found


def edges() -> set[tuple[str, str, str]]:
    """(importing module, its unit, imported name) of every file of the two packages."""
    found = set()
    for path in sorted([*ROOT.glob("fastjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found |= {(module, unit_of(module), name) for name in imports_of(path, module)}
    return found


def test_every_module_has_a_layer():
    assert {unit for _, unit, _ in edges()} <= set(LEVEL), "a new folder: give it a place in LAYERS"


def ours(name: str) -> bool:
    return name.split(".")[0] in ("fastjax", "pallas_kernels")


def test_imports_point_down():
    # A name taken from `fastjax` that is no listed unit (`from fastjax import SFTConfig`) comes from its `__init__`.
    upward = [(m, n) for m, u, n in edges() if ours(n) and LEVEL.get(unit_of(n), LEVEL["fastjax"]) > LEVEL[u]]
    assert not upward


def test_no_circles_between_folders():
    graph: dict[str, set[str]] = {}
    for _, unit, name in edges():
        if ours(name) and unit_of(name) != unit:
            graph.setdefault(unit, set()).add(unit_of(name))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_packages_know_nothing_of_strangers():
    met = [(m, n) for m, _, n in edges() if n.split(".")[0] in STRANGERS[m.split(".")[0]]]
    assert not met
