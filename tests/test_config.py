"""What a command line becomes, and what is refused: each message names the key and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pytest

from dist_compress import compose, config
from dist_compress.config import Config
from dist_compress.errors import UserError


def composed(*arguments: str) -> Config:
    return compose.compose(compose.parse(list(arguments)))


def test_defaults_of_the_groups_are_those_of_the_schema_where_they_say_nothing():
    got = composed()
    assert got.train == Config().train and got.pruning == Config().pruning
    assert (got.model.name, got.data.source, got.optim.kwargs["momentum"]) == ("resnet20", "digits", 0.9)


@pytest.mark.parametrize("group", ["model", "data", "optim", "backend", "pruning", "logger", "task"])
def test_every_option_of_a_group_passes_the_schema(group):
    options = [path.stem for path in (compose.CONF / group).glob("*.yaml")]
    assert options
    for option in options:
        composed(f"{group}={option}")


@pytest.mark.parametrize("recipe", [path.stem for path in (compose.CONF / "recipe").glob("*.yaml")])
def test_every_recipe_passes_the_schema_and_the_command_line_has_the_last_word(recipe):
    got = composed(f"+recipe={recipe}", "train.max_steps=7", "pruning.sparse_ratio=0.25", "model=resnet56")
    assert (got.train.max_steps, got.pruning.sparse_ratio, got.model.name) == (7, 0.25, "resnet56")


REFUSED = {
    "recipe": (["+recipe=resnet"], "recipe=resnet: no such recipe. Available: bert_distill, bert_"),
    "group": (["backend=dpp"], "backend=dpp: no such backend. Available: ddp"),
    "key": (["train.max_stps=4"], "train.max_stps: no such key. Did you mean train.max_steps?"),
    "key with +": (["+train.max_stps=4"], "train.max_stps: no such key. Did you mean train.max_steps?"),
    "key with ++": (["++train.max_stps=4"], "Did you mean train.max_steps?"),
    "section": (["trian.max_steps=4"], "trian: no such key. Did you mean train?"),
    "wrong place": (["+max_steps=4"], "Did you mean train.max_steps?"),
    "free mapping": (["model.kwargs.width=4"], "Add it with +model.kwargs.width="),
    "no group": (["modle=resnet20"], "Did you mean model?"),
    "ratio": (["pruning.sparse_ratio=1.5"], "pruning.sparse_ratio=1.5: must be at least 0 and below 1."),
    "int": (["train.max_steps=many"], "train.max_steps='many': expected int or null, got str."),
    "fraction": (["train.max_steps=1.5"], "train.max_steps=1.5: expected int or null, got float."),
    "bool": (["train.exact=1"], "train.exact=1: expected bool or null, got int."),
    "bool as number": (["optim.lr=true"], "optim.lr=True: expected float, got bool."),
    "null": (["optim.lr=null"], "optim.lr=None: expected float"),
    "in a list": (["data.mean=[a]"], "data.mean[0]='a': expected float, got str."),
    "no list": (["data.mean=0.5"], "data.mean=0.5: expected list[float]"),
    "scalar for section": (["train=4"], "train=4: expected a section with the keys max_steps, epochs"),
    "nan": (["optim.lr=nan"], "optim.lr=nan: must be at least 0."),
    "steps": (["train.max_steps=-1"], "train.max_steps=-1: must be at least 0."),
    "timeout": (["backend.timeout_s=0"], "backend.timeout_s=0.0: must be above 0."),
    "choice": (["pruning.compute=flops"], "Available: channels, params, macs, latency."),
    "batch": (["train.global_batch_size=65"], "train.micro_batch_size=32"),
    "stages": (["pruning.stages=[{}]"], "pruning.stages is reserved"),
    "interpolation": (["run_dir=${nowhere}"], "run_dir: Interpolation key 'nowhere' not found"),
    "sweep without flag": (["seed=1,2"], "--multirun"),
    "hydra": (["hydra.run.dir=x"], "hydra.run.dir=x: Hydra only composes a run; its folder is run_dir="),
    "flag": (["--nonsense"], "unrecognized arguments: --nonsense"),
    "no folder": (["--config-dir=nowhere"], "--config-dir=nowhere: no such folder."),
    "grammar": (["seed=["], "seed=["),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    arguments, said = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        composed(*arguments)
    assert said in str(refusal.value)


def test_a_users_folder_adds_recipes_and_is_held_to_the_schema(tmp_path):
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe/mine.yaml"
    recipe.write_text("# @package _global_\ndefaults:\n  - smoke\ntrain:\n  max_steps: 3\n")
    assert composed(f"--config-dir={tmp_path}", "+recipe=mine").train.max_steps == 3
    recipe.write_text("# @package _global_\ntrain:\n  max_stps: 3\n")
    with pytest.raises(UserError, match="train.max_stps: no such key. Did you mean train.max_steps?"):
        composed("+recipe=mine", f"--config-dir={tmp_path}", "seed=1")
    recipe.write_text("# @package _global_\ntrain:\n  max_steps: [3\n")
    with pytest.raises(UserError, match=r"(?s)is no YAML: .*mine.yaml\", line 3"):
        composed("+recipe=mine", f"--config-dir={tmp_path}")


def test_a_users_folder_may_hold_the_main_config(tmp_path):
    (tmp_path / "main.yaml").write_text("defaults:\n  - config\n  - _self_\ntrain:\n  max_steps: 3\n")
    assert composed(f"--config-dir={tmp_path}", "--config-name=main").train.max_steps == 3


@pytest.mark.parametrize("section", ["model", "data", "task"])
def test_a_callable_of_the_users_takes_the_keys_that_the_section_lacks(section):
    got = composed(f"+{section}._target_=mine.build", f"+{section}.width=4")
    assert getattr(got, section).target == {"_target_": "mine.build", "width": 4}
    with pytest.raises(UserError, match=f"{section}.width: no such key"):
        composed(f"+{section}.width=4")


def test_yaml_and_back_is_the_same_config():
    arguments = ["run_dir=a b", "+model._target_=mine.build", "optim.warmup=3epochs"]
    got = composed("+recipe=resnet_prune", *arguments)
    assert config.from_yaml(config.to_yaml(got)) == got


def test_durations_are_fractions_or_texts():
    assert composed("optim.warmup=0").optim.warmup == 0.0
    assert composed("optim.warmup=120steps").optim.warmup == "120steps"
    assert composed("optim.milestones=[0,0.5,3epochs]").optim.milestones == [0.0, 0.5, "3epochs"]


@dataclass
class Options:
    needed: int
    weights: list[float] = field(default_factory=list)


def test_merge_takes_a_methods_options():
    merged = config.merge(Options, {"needed": 2, "weights": [1, 0.5]}, "pruning.options")
    assert asdict(merged) == {"needed": 2, "weights": [1.0, 0.5]}
    with pytest.raises(UserError, match="weihgts: no such key. Did you mean pruning.options.weights"):
        config.merge(Options, {"weihgts": []}, "pruning.options")
    with pytest.raises(UserError, match="pruning.options: missing 1 required positional argument: 'needed'"):
        config.merge(Options, {}, "pruning.options")


@pytest.mark.parametrize("override", ["data.mean=[0.1]", "data.root=/x"])
def test_a_key_that_a_callable_never_sees_is_refused(override):
    from dist_compress import compose

    with pytest.raises(UserError, match=r"has no effect beside data\._target_=pkg\.mine"):
        compose.compose(compose.parse(["+data._target_=pkg.mine", override]))
    compose.compose(compose.parse(["+data._target_=pkg.mine", "+data.mine=3"]))
    compose.compose(compose.parse(["+model._target_=pkg.net", "model.weights=x.safetensors"]))
