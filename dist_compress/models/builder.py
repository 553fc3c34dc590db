"""Models by source and name: CIFAR ResNets, torchvision, timm, Hugging Face, or a callable of the user's.

A new source is one function `(config, num_classes, vocab_size, whole) -> nn.Module` in `_SOURCES`. Nothing is
downloaded: pretrained weights come through `model.weights`, or with the local folder of a Hugging Face model.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.config import ModelConfig
from dist_compress.errors import UserError, raised_by
from dist_compress.models import resnet_cifar
from dist_compress.models.weights import refuse_unfit

log = logging.getLogger(__name__)


def build(
    config: ModelConfig, num_classes: int, seed: int, vocab_size: int | None = None, whole: bool = False
) -> nn.Module:
    """The model of `config` on the CPU, in training mode, initialised from `seed`. Local.

    `num_classes`: those of the data; `config.num_classes` goes before it. `vocab_size`: how many tokens the data has,
    None if it has none; `config.kwargs.vocab_size` goes before it.
    Equal weights on every rank for an equal seed; the caller's random state is left alone. `config.weights`
    is not read here (see `load_weights`). `whole`: a folder with weights must have all of them, a classifier's too.
    Raises UserError for an unknown source, name or argument, and for weights in a folder that do not fit.
    """
    num_classes = config.num_classes or num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.target is not None:
            return _from_target(config, num_classes)
        source = _SOURCES.get(config.source)
        if source is None:
            raise UserError(
                f"model.source={config.source!r}: no such source of models. Choose {', '.join(_SOURCES)}, "
                "or name a callable of your own with model._target_."
            )
        return source(config, num_classes, vocab_size, whole).train()


def has_weights(config: ModelConfig) -> bool:
    """Whether the model comes with weights of its own: a local folder of Hugging Face's that holds them. Local."""
    return config.source == "hf" and any(Path(config.name).expanduser().glob("*.safetensors"))


def describe(config: ModelConfig, model: nn.Module, shrunk: Iterable[str] = ()) -> dict[str, Any]:
    """`config` as plain data from which `build` makes this architecture on any machine, without weights.

    A Hugging Face model read from a local folder is described by its own full configuration, not by the path; `shrunk`:
    the (dotted) fields of it that followed a shrink, for which the dense values are told.
    """
    if config.target is None and config.source == "hf":
        full: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr]
        dense = _hf_config(config, _import_extra(config, "transformers"), 2, None).to_dict() if shrunk else {}
        for field in shrunk:
            *path, name = field.split(".")
            inner, outer = full, dense
            for part in path:
                inner, outer = inner[part], outer[part]
            inner[name] = outer[name]
        left_out = ("model_type", "transformers_version", "_name_or_path")
        kwargs = {k: v for k, v in full.items() if k not in left_out}
        config = replace(config, name=full["model_type"], kwargs=kwargs)
    return asdict(replace(config, weights=None))


def _from_cifar(config: ModelConfig, num_classes: int, vocab_size: int | None, whole: bool) -> nn.Module:
    _check_name(config, [name for name, _ in inspect.getmembers(resnet_cifar, inspect.isfunction)])
    factory = getattr(resnet_cifar, config.name)
    return _call(config, lambda: factory(num_classes=num_classes, **config.kwargs))


def _from_torchvision(config: ModelConfig, num_classes: int, vocab_size: int | None, whole: bool) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    _check_name(config, models.list_models())
    kwargs: dict[str, Any] = {"num_classes": num_classes, "weights": None, **config.kwargs}
    if "weights_backbone" in inspect.signature(models.get_model_builder(config.name)).parameters:
        kwargs.setdefault("weights_backbone", None)
    if config.name in ("googlenet", "inception_v3"):
        kwargs.setdefault("init_weights", True)  # what they do anyway, without the warning
    return _call(config, lambda: models.get_model(config.name, **kwargs))


def _from_timm(config: ModelConfig, num_classes: int, vocab_size: int | None, whole: bool) -> nn.Module:
    timm = _import_extra(config, "timm")
    _check_name(config, timm.list_models())
    kwargs = {"num_classes": num_classes, **config.kwargs}
    return _call(config, lambda: timm.create_model(config.name, pretrained=False, **kwargs))


def _from_hf(config: ModelConfig, num_classes: int, vocab_size: int | None, whole: bool) -> nn.Module:
    transformers = _import_extra(config, "transformers")
    hf_config = _hf_config(config, transformers, num_classes, vocab_size)
    if Path(config.name).expanduser().is_dir():
        return _from_hf_folder(config, transformers, hf_config, whole)
    return _hf_call(config, lambda: getattr(transformers, _HEADS[config.head]).from_config(hf_config))


def _hf_config(config: ModelConfig, transformers: ModuleType, num_classes: int, vocab_size: int | None) -> Any:
    """The configuration that transformers builds from."""
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.name={config.name!r}: the folder has no config.json. Give one that save_pretrained wrote."
            )
        arguments = {**_hf_settings(config, num_classes), "local_files_only": True, **config.kwargs}
        return _hf_call(config, lambda: transformers.AutoConfig.from_pretrained(folder, **arguments))
    if folder.is_absolute() or config.name.startswith("."):
        raise UserError(f"model.name={config.name!r}: no such folder. Give a folder with config.json, or a model_type.")
    _check_name(config, list(transformers.CONFIG_MAPPING.keys()))
    default = transformers.AutoConfig.for_model(config.name)
    unknown = [key for key in config.kwargs if not hasattr(default, key)]
    if unknown:  # a configuration of transformers takes any key in silence
        known = sorted(default.to_dict())
        raise UserError(f"model.kwargs: {config.name!r} has no {', '.join(unknown)}. It has: {', '.join(known)}.")
    sizes = _hf_settings(config, num_classes)
    if vocab_size is not None and hasattr(default, "vocab_size"):
        sizes["vocab_size"] = vocab_size
    kwargs = {**sizes, **config.kwargs}
    return _hf_call(config, lambda: transformers.AutoConfig.for_model(config.name, **kwargs))


_HEADS = {  # the class of transformers that builds a model with this head
    "image_classification": "AutoModelForImageClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}


def _hf_settings(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """What a configuration of transformers is told unless `model.kwargs` says otherwise. No cache of keys and values:
    sequences are whole here, so it would be filled for nothing."""
    return {"use_cache": False} if config.head == "causal_lm" else {"num_labels": num_classes}


def _from_hf_folder(config: ModelConfig, transformers: ModuleType, hf_config: Any, whole: bool) -> nn.Module:
    """With the folder's weights if any. Unless `whole`, a classifier that it does not have is made new, and said."""
    folder = Path(config.name).expanduser()
    auto = getattr(transformers, _HEADS[config.head])
    if not list(folder.glob("*.safetensors")):
        if list(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"model.name={config.name!r}: the folder holds pickled weights only. Save it as safetensors, "
                "or delete the .bin files to start from random weights."
            )
        return _hf_call(config, lambda: auto.from_config(hf_config))
    if torch.get_default_device().type == "meta":  # where weights have no values
        return _hf_call(config, lambda: auto.from_config(hf_config))
    how = {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True}
    model, info = _hf_call(
        config, lambda: auto.from_pretrained(folder, config=hf_config, output_loading_info=True, **how)
    )
    shapes = {name: f"{name} (folder {[*held]}, model {[*own]})" for name, held, own in info["mismatched_keys"]}
    unfit: dict[str, Iterable[str]] = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": shapes,
    }
    apart = set() if whole or config.head == "causal_lm" else {n for names in unfit.values() for n in names}
    apart = {name for name in apart if _is_of_head(model, name)}
    refuse_unfit(
        f"model.name={config.name!r}: the weights in this folder do not fit {type(model).__name__}",
        {way: [shapes.get(n, n) for n in sorted(names) if n not in apart] for way, names in unfit.items()},
        f"Take a folder whose config.json and weights belong together, with what model.head={config.head} needs, leave "
        "sizes out of model.kwargs, or remove its .safetensors to start from random weights.",
    )
    new = sorted(apart.difference(info["unexpected_keys"]))
    if new and comm.rank() == 0:
        log.warning("model.name=%r: a new classifier, for the folder has none that fits: %s", config.name, new)
    return model


def _is_of_head(model: Any, name: str) -> bool:
    """Whether a tensor lies outside of the network that all heads share, or in its pooler."""
    first = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return first == "pooler" or first not in {own.partition(".")[0] for own in model.base_model.state_dict()}


def _from_target(config: ModelConfig, num_classes: int) -> nn.Module:
    """Calls the user's callable as Hydra would. One that has a parameter `num_classes` is told it."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    assert config.target is not None
    name = config.target.get("_target_")
    try:
        factory = instantiate({**config.target, "_convert_": "all", "_partial_": True})
    except InstantiationException as error:
        raise UserError(f"model._target_={name!r}: {error}") from error
    kwargs = dict(config.kwargs)
    if "num_classes" in _parameters(factory.func) and "num_classes" not in factory.keywords:
        kwargs.setdefault("num_classes", num_classes)
    try:
        model = factory(**kwargs)
    except UserError:
        raise
    except Exception as error:
        raise raised_by(f"model._target_={name!r} with {kwargs}", error) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model._target_={name!r}: returned a {type(model).__name__}, not a torch.nn.Module.")
    return model.train()


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some builtins have none
        return ()


_SOURCES: dict[str, Callable[[ModelConfig, int, int | None, bool], nn.Module]] = {
    "cifar": _from_cifar,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hf,
}


def _check_name(config: ModelConfig, choices: Iterable[str]) -> None:
    choices = list(choices)
    if config.name in choices:
        return
    close = difflib.get_close_matches(config.name, choices, n=5, cutoff=0.5)
    raise UserError(
        f"model.name={config.name!r}: {config.source} has no such model. "
        f"{'Close: ' if close else 'Some of them: '}{', '.join(close or sorted(choices)[:12])}."
    )


def _import_extra(config: ModelConfig, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.source={config.source!r} needs {name}, which is not installed: pip install 'dist_compress[models]'."
        ) from error


def _call(config: ModelConfig, factory: Callable[[], Any]) -> Any:
    """A factory that does not take the arguments it is given is the user's `model.kwargs`."""
    try:
        return factory()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.kwargs={config.kwargs!r}: {config.source} model {config.name!r} refuses: {error}"
        ) from error


def _hf_call(config: ModelConfig, factory: Callable[[], Any]) -> Any:
    """Transformers tells what is wrong with a folder or a model type by ValueError, OSError and KeyError."""
    try:
        return factory()
    except (TypeError, ValueError, OSError, KeyError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model.name={config.name!r}: no {config.head.replace('_', ' ')} model of Hugging Face's: {message[0]}"
        ) from error
