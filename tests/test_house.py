"""The layout: who may import whom, and how long files and functions may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_dali", "modeling_vipant", "trainers", "datasets_scripts", "examples")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# What a package may import of the others. The commands of the models are thin and may reach further.
ALLOWED = {
    "modeling_dali": (),
    "modeling_vipant": ("modeling_dali",),
    "datasets_scripts": ("modeling_dali.audio_io",),
    "trainers": ("modeling_dali", "modeling_vipant", "datasets_scripts"),
    "examples": ("modeling_dali", "modeling_vipant", "datasets_scripts", "trainers"),
}
COMMANDS = ("modeling_vipant.cli", "modeling_dali.convert_original", "modeling_vipant.convert_original")


def imported(module: str, everywhere: bool = True) -> set[str]:
    """Modules of the project that a module names in its imports; or, not `everywhere`, those that load with it: the
    ones at its top level, and the packages around them, whose `__init__.py` Python runs first.
    """
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports the module, `from module import name` the module before the name.
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    if not everywhere:
        around = {name[:end] for name in found for end, letter in enumerate(name) if letter == "."}
        found |= {name for name in around if not inside(module, name)}
    return {name for name in found if name in FILES and name != module}


def packages(module: str) -> set[str]:
    """Packages that a module imports, of the project or not, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def inside(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_there_is_no_circle_of_imports():
    graph = {module: imported(module, everywhere=False) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package):
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        if inside(module, package) and module not in COMMANDS
        for other in sorted(imported(module))
        if not inside(other, package, *ALLOWED[package])
    ]
    assert not wrong


@pytest.mark.parametrize(("room", "others"), [("dali", ["vipant"]), ("vipant", ["dali"]), (None, ["dali", "vipant"])])
def test_rooms_of_the_trainers_do_not_know_each_other(room, others):
    """And what both share knows neither; the command trees name modules in words."""
    for module in FILES:
        shared = inside(module, "trainers") and not inside(module, "trainers.dali", "trainers.vipant")
        if inside(module, f"trainers.{room}") or (room is None and shared):
            for other in imported(module):
                assert not inside(other, *(f"trainers.{name}" for name in others)), f"{module} imports {other}"


@pytest.mark.parametrize("room", ["trainers.losses", "trainers.metrics"])
def test_losses_and_metrics_know_no_model(room):
    for module in FILES:
        if inside(module, room):
            assert all(inside(other, room) for other in imported(module)), module
            assert "transformers" not in packages(module), module


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    text = FILES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name}, line {node.lineno}"
