"""DeepSpeed, imported when it is wanted, quiet, on the process group of comm.py and without anything to compile."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch.distributed as dist
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError

_joined: Any = None  # the process group that DeepSpeed uses


def load() -> Any:
    """The module `deepspeed`, ready for `initialize`. Raises UserError where it is not installed. Local."""
    global _joined
    if comm.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(comm.local_rank()))
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"backend=deepspeed: DeepSpeed cannot be imported ({error}). Install it: "
            "pip install 'dist_compress[deepspeed]', or choose backend=fsdp, which needs nothing more."
        ) from None
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # by its own calls
    deepspeed.utils.logger.setLevel("ERROR")  # its warnings are about options that it is given here
    # It would compile a fast all-reduce for inference on CPUs before its first collective, and a build that was killed
    # leaves a lock on which all later runs wait for ever. Training never calls it.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    if _joined is not dist.group.WORLD:  # the group of an earlier run is gone
        groups: Any = importlib.import_module("deepspeed.utils.groups")
        groups._release_process_group_references(group=None)
        vars(importlib.import_module("deepspeed.comm.comm"))["cdb"] = None
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        groups._WORLD_GROUP = _joined = dist.group.WORLD
        offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
        offload._register_deepspeed_module.__defaults__[0][0] = 0  # it numbers modules, and compares the numbers
        deepspeed.zero.Init.param_id = 0
    # A flag of the process: an earlier engine with autocast may have set it.
    vars(importlib.import_module("deepspeed.runtime.torch_autocast"))["TORCH_AUTOCAST_INITIALIZED"] = False
    return deepspeed


def forget(model: nn.Module) -> None:
    """Drop what ZeRO-3 keeps of a model for as long as the process lives, and what it leaves on its modules. Local."""
    for module in model.modules():
        for name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining"):
            vars(module).pop(name, None)
    stack = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
