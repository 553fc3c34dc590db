"""The shape of the house: which module may import which, one home for each thing, file length."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_compress"

# Top to bottom: a module imports only from lower lines, and modules of one line never import each other.
LAYERS = [
    ["__main__", "node"],
    ["sweep", "own_loop"],
    ["compose", "run_folder", "own_folder"],
    ["run"],
    ["one_shot", "explain"],
    ["outcome", "cost_file", "answers", "building"],
    ["training", "export", "reporting"],
    ["pruning", "quantization", "distillation", "speedup", "backends", "models"],
    ["method"],
    ["config_list"],
    ["call_sites"],
    ["sites"],
    ["parts", "initial"],
    ["projection", "exchange", "statistic", "tracing", "slices", "gradient_norm"],
    ["layout"],
    ["fingerprint", "target", "selection", "blocks", "linear_form", "calling", "comm", "compiling"],
    ["duration", "hashing", "functions", "moments", "recompute", "roll_call"],
    ["config", "multihead"],
    ["schema"],
    ["strict", "forwards"],
    ["errors"],
]
LEVEL = {name: -i for i, names in enumerate(LAYERS) for name in names}
COLLECTIVE = re.compile(
    r"^(all_reduce|all_gather|all_to_all|broadcast|reduce|reduce_scatter|gather|scatter|barrier|send|recv|isend"
    r"|irecv|monitored_barrier)(_|$)"
)
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "conf" not in p.relative_to(PACKAGE).parts)


def name_of(path: Path) -> str:
    """The layer a file belongs to: the folder or file right under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(importer: str, imported: str) -> str:
    """Why module `imported` is out of reach of `importer`; "" when it is not."""
    if importer == imported or importer == "__init__":
        return ""
    if imported not in LEVEL:
        return f"{imported} has no place in LAYERS"
    if LEVEL[importer] == LEVEL[imported]:
        return f"{importer} and {imported} are of one level"
    return f"{imported} is above {importer}" if LEVEL[imported] > LEVEL[importer] else ""


def test_the_rule_finds_what_it_is_for():
    assert forbidden("pruning", "speedup") == "pruning and speedup are of one level"
    assert forbidden("comm", "training") == "training is above comm"
    assert not forbidden("run", "pruning") and not forbidden("training", "config")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        if package == "dist_compress" and rest:
            why = forbidden(name_of(path), rest.partition(".")[0])
            assert not why or not _is_module(rest.partition(".")[0]), f"{path.name} imports {imported}: {why}"


def _is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def collectives(text: str) -> list[int]:
    """Lines that call a collective of torch.distributed, by any name it was imported under."""
    tree, aliases, direct = ast.parse(text), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom):
            if node.module == "torch":
                aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
            elif (node.module or "").startswith("torch.distributed"):
                direct |= {a.asname or a.name for a in node.names if COLLECTIVE.match(a.name)}
    aliases |= {"torch.distributed"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if (isinstance(call.func, ast.Name) and call.func.id in direct)
        or (
            isinstance(call.func, ast.Attribute)
            and COLLECTIVE.match(call.func.attr)
            and ast.unparse(call.func.value) in aliases
        )
    ]


def test_the_finder_of_collectives_finds_them():
    assert collectives("import torch.distributed as dist\ndist.all_reduce(x)") == [2]
    assert collectives("import torch\ntorch.distributed.barrier()") == [2]
    assert collectives("from torch.distributed import broadcast as b, all_gather\nall_gather(x)") == [2]
    assert collectives("from dist_compress import comm\ncomm.all_reduce(x)") == []


def test_only_comm_calls_collectives():
    assert collectives((PACKAGE / "comm.py").read_text())
    found = {str(p): collectives(p.read_text()) for p in SOURCES if p.name != "comm.py"}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("library", "homes"),
    [("omegaconf", {"config.py"}), ("hydra", {"compose.py", "sweep.py"}), ("wandb", {"reporting"})],
)
def test_a_library_has_one_home(library, homes):
    for path in SOURCES:
        named = {name for name in imports(path) if not name.startswith(("hydra.utils.", "hydra.errors."))}
        if any(name.partition(".")[0] == library for name in named):  # hydra.utils: instantiates a _target_
            assert homes & set(path.relative_to(PACKAGE).parts), f"{path} imports {library}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_go(path):
    text = path.read_text()
    limit = 200 if path.name == "loop.py" else 400
    assert len(text.splitlines()) <= limit
    assert not text or ast.get_docstring(ast.parse(text)), "a module says what it is"
    assert path.name not in ("utils.py", "util.py", "helpers.py", "common.py"), "name it by what it does"
    assert text.isascii()


def test_every_method_has_a_test_file():
    for path in PACKAGE.glob("*/methods/*.py"):
        if path.name != "__init__.py":
            folder, test = ROOT / "tests" / path.parts[-3], f"test_{path.name}"
            found = (folder / test).exists() or (folder / "methods" / test).exists()
            assert found, f"{path.relative_to(ROOT)} has no test file"


def test_conf_holds_yaml_only_and_no_group_without_a_section():
    sections = {field.name for field in _fields()} | {"recipe"}
    for path in (ROOT / "conf").rglob("*"):
        if path.is_file():
            assert path.suffix == ".yaml", f"{path}: Hydra reads this folder by its path"
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"}
    assert groups <= sections


def _fields():
    import dataclasses

    from dist_compress.config import Config

    return dataclasses.fields(Config)
