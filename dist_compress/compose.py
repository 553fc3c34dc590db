"""From the command line to a checked `Config`: Hydra composes conf/ and the user's folder, config.py checks.

Every rank composes for itself and gets the same; nothing is written and no process group is needed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser  # no public way to Hydra's own flags
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dist_compress import config
from dist_compress.errors import UserError

CONF = Path(__file__).resolve().parent / "conf"  # a link to the top-level conf/, or its copy in the wheel
HYDRA_VERSION = "1.3"  # whose behaviour is asked for


def parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own flags, and `overrides`. Raises UserError on an unknown flag."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        if "--local_rank" in message:
            message += " is what DeepSpeed's launcher adds: give it --no_local_rank, or use torchrun"
        raise UserError(f"{message}. Flags: python -m dist_compress --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)
    if args.config_path:
        raise UserError(f"--config-path={args.config_path}: add your folder with --config-dir instead.")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir}: no such folder.")
    return args


def wants_sweep(args: argparse.Namespace) -> bool:
    return bool(args.multirun) or "hydra.mode=MULTIRUN" in args.overrides


def wants_answer(args: argparse.Namespace) -> bool:
    """A question about the configuration, to be answered by Hydra, instead of a run."""
    return bool(args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)


def hand_to_hydra(task: Any) -> None:
    """Let Hydra read sys.argv and do what it says: answer a question, or sweep over `task(config)`."""
    _register_schema()
    hydra.main(config_path=str(CONF), config_name="config", version_base=HYDRA_VERSION)(task)()


def compose(args: argparse.Namespace) -> config.Config:
    """The config that the flags and overrides ask for. Raises UserError with the full key."""
    for override in args.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith("hydra.") and key != "hydra.searchpath":
            raise UserError(f"{override}: Hydra only composes a run; its folder is run_dir=, see --help.")
    _register_schema()
    _UserFolder.folder = args.config_dir and Path(args.config_dir).resolve()
    Plugins.instance().register(_UserFolder)
    with initialize_config_dir(str(CONF), version_base=HYDRA_VERSION, job_name="dist_compress"):
        try:
            composed = hydra_compose(args.config_name or "config", overrides=args.overrides)
        except MissingConfigException as error:
            raise _missing(error) from None
        except yaml.YAMLError as error:  # names the file and the line
            raise UserError(f"A configuration file is no YAML: {error}") from None
        except HydraException as error:
            key = getattr(error.__cause__, "full_key", None)
            if key:
                raise config.unknown_key(key) from None
            override = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
            raise UserError(f"{override}{error}") from None
    checked = config.load(composed)
    for override in args.overrides:
        _refuse_without_effect(override, checked)
    return checked


def _refuse_without_effect(override: str, checked: config.Config) -> None:
    """A key of a section whose `_target_` decides instead. Raises UserError."""
    key, _, value = override.lstrip("+~").partition("=")
    section, _, name = key.partition(".")
    target = getattr(getattr(checked, section, None), "target", None)
    own = name.partition(".")[0] in getattr(getattr(checked, section, None), "__dataclass_fields__", ())
    if target and own and key not in ("model.weights", "model.num_classes") and name.partition(".")[0] != "target":
        raise UserError(
            f"{key}={value}: has no effect beside {section}._target_={target['_target_']}, which is called with the "
            f"keys that `{section}` itself does not have. Remove it, or rename the argument of your callable."
        )


def _register_schema() -> None:
    """The defaults of every key, as plain values: types and ranges are checked once, on the whole."""
    ConfigStore.instance().store("schema", asdict(config.Config()))


class _UserFolder(SearchPathPlugin):
    """Has the user's folder searched after conf/, also for the main config: Hydra's API takes one folder."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder:
            search_path.append("--config-dir", f"file://{self.folder}")


def _missing(error: MissingConfigException) -> UserError:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if not group or not error.options:
        return UserError(f"{error.missing_cfg_file}: no such YAML file in {CONF} or --config-dir.")
    return UserError(f"{group}={name}: no such {group}. Available: {', '.join(error.options)}.")
