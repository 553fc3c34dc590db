"""README.md and docs/: every key is there, every path exists, every snippet parses, every command composes.

The examples of docs/pruning.md are attached to resnet20, those of docs/extending.md make a run of two steps, and the
one of docs/speedup.md prunes a model.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from dist_compress import backends, compose, config, pruning, selection, strict
from dist_compress.blocks import NAMES
from dist_compress.config_list.checking import TARGETS
from dist_compress.errors import UserError
from dist_compress.method import Context
from dist_compress.projection import Projection
from dist_compress.pruning import setting
from dist_compress.target import Coupling, GroupLatency, Latencies
from dist_compress.training import checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
DURATION = {"float or str": "duration", "float or str or null": "duration or null"}
SHOWN = {"list[float | str]": "list of durations", "dict[str, typing.Any]": "mapping"}
STARTS = ("launch/run", "launch/sweep", "launch/multinode", "torchrun", "python -m dist_compress ", "sbatch")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page that are in one of the languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def rows(page: str) -> Iterator[list[str]]:
    """The cells of every table row of a page."""
    for line in page.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def shown(hint: Any) -> str:
    """A type as the tables write it."""
    name = strict.type_name(hint)
    name = DURATION.get(name, name)
    for long, short in SHOWN.items():
        name = name.replace(long, short)
    return re.sub(r"^list\[mapping\]$", "list of mappings", name)


def schema(cls: Any = config.Config, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, type, default) of every key that can be set, as the tables write them."""
    hints, default = get_type_hints(cls), cls()
    for name, hint in hints.items():
        full = f"{key}.{name}" if key else name
        if dataclasses.is_dataclass(hint):
            yield from schema(hint, full)
        else:
            value = getattr(default, name)
            yield full, shown(hint), value if isinstance(value, str) else json.dumps(value).replace('"', "")


def test_the_configuration_page_has_every_key_with_its_type_and_default():
    found = {row[0].strip("`"): tuple(row[1:3]) for row in rows(text("docs/config.md")) if len(row) == 4}
    own = [row for name in ("ddp", "fsdp", "deepspeed") for row in schema(backends.find(name)[1], "backend")]
    assert found == {key: (kind, default) for key, kind, default in [*schema(), *own]}


def test_a_missing_key_would_be_seen():
    page = re.sub(r"^\| `train.exact`.*\n", "", text("docs/config.md"), flags=re.MULTILINE)
    assert {key for key, *_ in schema()} - {row[0].strip("`") for row in rows(page)} == {"train.exact"}


def test_the_pruning_page_has_every_key_of_the_config_list():
    found = {row[0]: row for row in rows(text("docs/pruning.md"))}
    said = {key.strip("` ") for row in found for key in row.split(",")}
    assert said >= {*selection.SELECTORS, *selection.EXCLUDES, *TARGETS, *setting.Setting.keys(), *NAMES}
    for key in dataclasses.fields(setting.Setting):
        if key.name in ("min_sparse_ratio", "max_sparse_ratio", "granularity", "dependency_group_id", "apply_method"):
            assert found[f"`{key.name}`"][2] == str(key.default)


def test_the_pruning_page_has_every_method_and_its_options():
    page = text("docs/pruning.md")
    folder = importlib.import_module("dist_compress.pruning.methods")
    for module in pkgutil.iter_modules(folder.__path__):
        options = importlib.import_module(f"{folder.__name__}.{module.name}").Options
        for name in (module.name, *(field.name for field in dataclasses.fields(options))):
            assert f"`{name}`" in page, name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_and_links_exist(page: Path):
    said = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", said, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose):
        if not link.startswith(("http", "#")):
            target, _, anchor = link.partition("#")
            assert (page.parent / target).exists(), link
            assert not anchor or anchor in anchors((page.parent / target).read_text(encoding="utf-8")), link
    roots = "conf|dist_compress|docs|launch|slurm|benchmarks|tests"
    for path in re.findall(rf"`((?:{roots})/[^`\s]*)", prose):
        placeholder = re.search(r"\.\.\.|\b(GROUP|OPTION|NAME)\b", path)  # such as conf/GROUP/OPTION.yaml
        assert placeholder or (ROOT / path).exists() or Path(path) in unpacked(), path


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_snippets_parse(page: Path):
    said = page.read_text(encoding="utf-8")
    for block in blocks(said, "python"):
        ast.parse(block)
    for block in blocks(said, "yaml"):
        yaml.safe_load(block)
    for block in blocks(said, "json"):
        json.loads(block)


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command line of a page that starts a run."""
    lines = [line for b in blocks(page, "sh", "bash", "console", "") for line in b.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)]:
        line = re.sub(r"^\s*\$ ", "", line).strip()
        bare = re.sub(r"^(\w+=\S* +)+", "", line)
        if bare.startswith(STARTS) and " " in bare and "..." not in bare:
            yield shlex.split(bare, comments=True)


def arguments(words: list[str], folder: Path) -> list[str]:
    """What reaches dist_compress of a command line, with placeholders filled and the first point of a sweep."""
    if words[0] in ("torchrun", "python"):
        assert words[words.index("-m") + 1] == "dist_compress", words
        words = words[words.index("-m") + 2 :]
    else:
        words = words[1:]
        while words and words[0].startswith("--") and words[0].partition("=")[0] in ("--nodes", "--gpus-per-node"):
            words = words[1:]
        words = [word for word in words if word != "slurm/train.sbatch"]
    filled = [re.sub(r"\b(FOLDER|FILE)\b", str(folder), word) for word in words if word != "--multirun"]
    return [re.sub(r"\bN\b", "2", re.sub(r"^([\w.]+=)([^\[,]+),.*", r"\1\2", word)) for word in filled]


def test_commands_are_found_and_wrong_ones_refused(tmp_path: Path):
    page = "Say `launch/run +recipe=smoke trian.epochs=2`.\n```sh\nA=1 torchrun -m dist_compress seed=1,2 # hm\n```\n"
    [second, first] = [arguments(words, tmp_path) for words in commands(page)][::-1]
    assert (first, second) == (["seed=1"], ["+recipe=smoke", "trian.epochs=2"])
    with pytest.raises(UserError, match="trian: no such key"):
        compose.compose(compose.parse(second))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_compose(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unpack(tmp_path)  # what docs/extending.md has the reader write
    monkeypatch.chdir(tmp_path)
    for words in commands(page.read_text(encoding="utf-8")):
        args = compose.parse(arguments(words, tmp_path))
        if not compose.wants_answer(args):
            compose.compose(args)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_recipes_and_options_of_groups_exist(page: Path):
    said = page.read_text(encoding="utf-8")
    own = {f"{path.parent.name}={path.stem}" for path in unpacked()}
    groups = "|".join(folder.name for folder in compose.CONF.iterdir() if folder.is_dir())
    for group, option in re.findall(rf"(?<![\w./-])\+?({groups})=([a-z]\w*)", said):
        assert (compose.CONF / group / f"{option}.yaml").exists() or f"{group}={option}" in own, f"{group}={option}"


# docs/pruning.md


@pytest.fixture(scope="module")
def coupling() -> Coupling:
    from dist_compress import speedup
    from dist_compress.models.resnet_cifar import resnet20

    return speedup.coupling(resnet20(), (torch.randn(2, 3, 32, 32),))


@pytest.mark.parametrize("number", range(len(blocks(text("docs/pruning.md"), "yaml"))))
def test_pruning_examples_find_something_to_prune(number: int, coupling: Coupling, tmp_path: Path):
    from dist_compress.models.resnet_cifar import resnet20

    (tmp_path / "recipe").mkdir()
    example = blocks(text("docs/pruning.md"), "yaml")[number]
    (tmp_path / "recipe/example.yaml").write_text(f"# @package _global_\n{example}")
    composed = compose.compose(compose.parse([f"--config-dir={tmp_path}", "+recipe=example"]))
    model = resnet20()
    [pruner] = pruning.build(composed)
    assert isinstance(pruner, pruning.Pruner)
    example = ((torch.randn(2, 3, 32, 32),), {})
    composed.pruning.search.evaluations = min(composed.pruning.search.evaluations, 3)
    free = [g for g in coupling.groups if not g.blocked]
    rows = [GroupLatency(g.name, g.num_units, (1, g.num_units), (8.5, 10.0)) for g in free]
    whole = sum(g.num_units for g in free)
    measured = Latencies(tuple(rows), GroupLatency("", whole, (len(free), whole), (2.0, 10.0)))
    given = (example, measured, lambda num_samples: {"loss": 1.0})
    pruner.attach(Context(composed, model, Projection(model), coupling, 4, 100, 10.0, *given))
    for step in pruner.schedule:
        if pruner.listeners and step:  # data comes before a decision
            pruner._listen(step - 1)
            model(torch.randn(4, 3, 32, 32)).sum().backward()
            pruner.after_backward(step - 1, 0)
        pruner.decide(step)
    for group in pruner.results()["groups"]:
        assert abs(group["given"] - group["asked"]) < 0.05, group
    for limit in pruner.results()["limits"]:
        assert 0.7 * limit["asked"] < limit["predicted"] <= limit["asked"]


# docs/extending.md


def unpacked() -> dict[Path, str]:
    """The files that the reader of docs/extending.md writes: blocks behind a line that is a path."""
    found = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", text("docs/extending.md"), re.MULTILINE | re.DOTALL)
    return {Path(path): block for path, block in found}


def unpack(folder: Path) -> None:
    for path, block in unpacked().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(block)


WITH_FILES_OF_THE_READER = """
import dist_compress, dist_compress.backends as backends, dist_compress.export as export
backends.__path__.append("dist_compress/backends")
export.__path__.append("dist_compress/export")
from dist_compress.__main__ import main
try:
    main()
except SystemExit:  # 0: with any other code the process has ended
    assert sum(p.numel() for p in dist_compress.load("run", trust=True).parameters()) > 0
"""


def test_extensions_make_a_run(tmp_path: Path):
    """Methods, schedule, data, task, model, export format, backend and recipe of the reader's, in two steps."""
    unpack(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    words = ["--config-dir=mine/conf", "+recipe=mine", "train.max_steps=2", "run_dir=run", "logger=none"]
    words += ["backend=flat", "export=[safetensors,program]"]
    line = [sys.executable, "-c", WITH_FILES_OF_THE_READER, *words]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["backend"] == "flat" and summary["params/after"] < summary["params/before"]
    assert summary["export/program/max_rel_diff"] <= 1e-6 and "confident/after" in summary
    assert (tmp_path / "run/program.pt2").exists()


# docs/operations.md


def test_the_keys_that_may_change_on_resuming_are_those_of_the_check():
    said = text("docs/operations.md").partition("may change, and these keys: ")[2].partition(". Another")[0]
    assert sorted(re.findall(r"`([\w.]+)`", said)) == sorted(checkpoint._FREE)


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_program():
    sources = [path.read_text() for path in (ROOT / "dist_compress").rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # literals that go on in the next line
    table = text("docs/operations.md").partition("| message |")[2]
    messages = [quoted for row in rows(table) for quoted in re.findall(r"`([^`]+)`", row[0])]
    assert len(messages) > 15
    for message in messages:
        for part in re.split(r"\.\.\.|\[|\]|nan$", message):
            assert part.strip(" :.") in source or message.startswith("Missing"), message  # OmegaConf's


# docs/own_loop.md


def test_the_plain_loop_runs():
    exec(compile(blocks(text("docs/own_loop.md"), "python")[0], "docs/own_loop.md", "exec"), {})


# docs/speedup.md


def test_speedup_examples_run(capsys: pytest.CaptureFixture[str]):
    page, names = text("docs/speedup.md"), {}
    for block in blocks(page, "python"):
        exec(compile(block, "docs/speedup.md", "exec"), names)
        said = capsys.readouterr().out
        assert not said or f"It prints `{said.strip()}`" in page or said in blocks(page, "text"), said


def test_the_speedup_page_lists_the_models_that_are_tested():
    [listed] = re.findall(r"^- `resnet20`.*?\n\n", text("docs/speedup.md"), re.MULTILINE | re.DOTALL)
    tested = re.findall(r'^    "(\w+)": \(', text("tests/speedup/test_models.py"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", listed) == tested


def test_the_speedup_page_has_every_reason():
    page, reasons = text("docs/speedup.md"), []
    for path in (ROOT / "dist_compress/speedup").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        takers = ("pin", "pin_all", "setdefault", "grow")
        said = [call.args for call in calls if getattr(call.func, "attr", "") in takers]
        for node in (argument for arguments in said for argument in arguments):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            reasons += [max(fixed, key=len)] if fixed and " " in max(fixed, key=len) else []
    assert len(reasons) > 15
    for reason in reasons:
        assert re.split("[,;]", reason)[0].strip() in page, reason
