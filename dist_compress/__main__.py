"""`python -m dist_compress ...` on one rank, `torchrun ... -m dist_compress ...` on several.

Exit codes, on every rank alike: 0; 1 when the run failed; 2 for what the user can mend (UserError); 75 when a
signal stopped it after a checkpoint. An error is shown once in the whole run, by the rank that met it first,
and is in the log of each rank that met it.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from types import FrameType
from typing import NoReturn

from dist_compress import compose
from dist_compress.config import Config
from dist_compress.errors import UserError

_YIELD_S = 1  # torchrun blames the first to exit and stops the others: not the one that only lost contact
_TOLD_BY_RANK_0_S = 15  # how long the other ranks wait for rank 0 to say what they all found
_LAST_WORDS_S = 2  # torchrun's SIGTERM: time to say which collective lost contact


def main() -> NoReturn:
    try:
        args = compose.parse(sys.argv[1:])
        if compose.wants_sweep(args):
            _refuse_sweep_of_ranks()
            from dist_compress.sweep import sweep

            sys.exit(sweep(args))
        if compose.wants_answer(args):
            if _env_rank() == 0:
                compose.hand_to_hydra(lambda config: None)
            sys.exit(0)
        config = compose.compose(args)
    except UserError as error:
        _exit_refused(error)
    _exit_flushed(_run(config))


def _run(config: Config) -> int:
    """Join the ranks, enter the folder, run. Collective. Returns the exit code."""
    from dist_compress import comm, run_folder

    for number in (signal.SIGTERM, signal.SIGUSR1):  # while it trains, they mean: stop after a checkpoint
        signal.signal(number, _exit_soon)
    try:
        comm.init(config.backend.timeout_s, _device())
        config = run_folder.enter(config)
        from dist_compress.run import run

        code = 0
        try:
            run(config)
        except SystemExit as stop:  # a signal, at a step boundary that the ranks agreed on
            code = stop.code if isinstance(stop.code, int) else 1
            if comm.rank() == 0:
                again = f"the same command with run_dir={config.run_dir} goes on from it"
                run_folder.console.say(f"stopped by a signal after a checkpoint; {again}")
        comm.shutdown()
        return code
    except BaseException as error:
        return _tell(error, config)


def _tell(error: BaseException, config: Config) -> int:
    """Show what ended this rank, unless another rank has shown it; keep it in this rank's log. The exit code. Local."""
    from dist_compress import comm, roll_call, run_folder

    trace = "".join(traceback.format_exception(error)).rstrip()
    lost_contact = isinstance(error, roll_call.LostContact) or roll_call.is_sign(error)
    if isinstance(error, UserError):
        text = f"error: {error}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"error: run_dir={config.run_dir}: {error}. Free space, then start the same command again."
    elif lost_contact:
        text = (
            f"error: {roll_call.hold(error)} With run_dir={config.run_dir} it goes on from its last checkpoint, if any."
        )
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    else:
        text = trace
    first = comm.claim("error")
    (run_folder.console.say if first else run_folder.console.note)(text)
    if text is not trace:
        run_folder.console.note(trace)
    if lost_contact or not first:
        time.sleep(_YIELD_S)
    return 2 if isinstance(error, UserError) else 1


def _device() -> str:
    import torch

    from dist_compress import comm

    if not torch.cuda.is_available():
        return "cpu"
    if comm.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"--nproc-per-node: local rank {comm.local_rank()} has no GPU of its own, there are "
            f"{torch.cuda.device_count()}. Start at most that many ranks, or hide the GPUs by "
            "CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    return "cuda"


def _env_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _refuse_sweep_of_ranks() -> None:
    if "WORLD_SIZE" in os.environ:
        command = ["python", "-m", "dist_compress", *sys.argv[1:]]
        if not any("launch.nproc_per_node" in argument for argument in command):
            command.append(f"launch.nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '2')}")
        raise UserError(
            "--multirun: a sweep starts a torchrun for each point and cannot run inside one. Use:\n  "
            + shlex.join(command)
        )


def _exit_refused(error: UserError) -> NoReturn:
    """All ranks found the same fault: rank 0 says it, and torchrun then stops the others."""
    if _env_rank() != 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(_TOLD_BY_RANK_0_S)  # still here: the fault is this rank's alone
    print(f"error: {error}", file=sys.stderr, flush=True)
    _exit_flushed(2)


def _exit_soon(signum: int, frame: FrameType | None) -> None:
    threading.Thread(target=_tell_who_is_gone, daemon=True).start()
    timer = threading.Timer(_LAST_WORDS_S, os._exit, (128 + signum,))
    timer.daemon = True
    timer.start()


def _tell_who_is_gone() -> None:
    """torchrun stops the others when a rank dies, also those that would not have noticed yet. Local."""
    from dist_compress import comm, roll_call, run_folder

    gone = roll_call.gone()  # at once: later the others have gone for the same signal
    time.sleep(_LAST_WORDS_S / 2)  # the main thread may have noticed and tell more
    if gone and comm.claim("error"):
        place = f" in {roll_call.here}" if roll_call.here.inside else ""
        run_folder.console.say(f"error: rank {comm.rank()} was told to stop{place}: {gone}.")


def _exit_flushed(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a process group that lost a rank would block at teardown
    sys.exit(0)


if __name__ == "__main__":
    main()
