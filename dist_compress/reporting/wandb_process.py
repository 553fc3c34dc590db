"""The process that talks to W&B, so that nothing W&B does (a slow network, an exit hook) can hold up the run.

Started by `tracker.py` as `python wandb_process.py START MODE`. START is a JSON file: {"init": arguments of
`wandb.init`, "start_s": limit of going online, "upload_s": limit of the upload at the end}. stdin brings one
JSON object a line, {"log": {...}, "step": n}, {"summary": {...}}, {"tables": {...}, "images": {...}} or {"finish":
true}; stdout answers with
{"warning": text}. Imports nothing of this package.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def _say(**message: Any) -> None:
    os.write(_ANSWERS, json.dumps(message).encode() + b"\n")


def _reachable(url: str) -> None:
    """Raise OSError when nobody answers at the host of the server. A proxy is trusted unseen."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    socket.create_connection((parts.hostname or "", port), timeout=5).close()


def _start(order: dict[str, Any], mode: Any) -> Any:
    import wandb

    if mode == "online":
        if not wandb.login(prompt=False):
            raise RuntimeError("no API key (run `wandb login`, or set WANDB_API_KEY)")
        _reachable(wandb.setup().settings.base_url)
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=order["start_s"],
        finish_timeout=order["upload_s"],
        x_stats_pid=os.getppid(),  # system metrics of the run, not of this helper
    )
    return wandb.init(mode=mode, resume="allow", settings=settings, **order["init"])


def _start_or_fall_back(file: Path, mode: str) -> Any:
    """The run; when going online fails, this process begins anew, offline, and never returns from here."""
    order = json.loads(file.read_text())

    def too_late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"no answer within {order['start_s']:g} s")

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, order["start_s"])
    try:
        return _start(order, mode)
    except Exception as error:  # anything: a logger must not decide over a run
        if mode != "online" or isinstance(error, ModuleNotFoundError):
            raise
        _say(warning=f"W&B cannot go online: {_short(error)}. The run is recorded offline.")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    os.environ.pop("WANDB_SERVICE", None)  # the service of the failed attempt may be stuck
    os.dup2(_ANSWERS, 1)
    os.execv(sys.executable, [sys.executable, __file__, str(file), "offline"])


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


def _serve(run: Any) -> None:
    """Carry messages to W&B until told to finish. The end of stdin without that word: the run crashed."""
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "log" in message:
            if message["step"] >= run.step:  # a resumed run repeats steps W&B has; it would warn at each
                run.log(message["log"], step=message["step"])
        elif "summary" in message:
            run.summary.update(message["summary"])
        elif "tables" in message:
            _show(run, message["tables"], message["images"])
        elif "finish" in message:
            run.finish(exit_code=0)
            return
    run.finish(exit_code=1)


def _show(run: Any, tables: dict[str, Any], images: dict[str, str]) -> None:
    """{name: [columns, rows]} and {name: file of a picture} as one panel each, at the step where the run stands."""
    import wandb

    panels: dict[str, Any] = {name: wandb.Image(file) for name, file in images.items()}
    panels |= {name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in tables.items()}
    if panels:
        run.log(panels, step=run.step)


def _give_up(text: str) -> None:
    _say(warning=text)
    os._exit(1)  # without W&B's exit hooks, which may wait for a network


def main() -> None:
    """Start, serve, finish. Any failure is one warning and the end of this process."""
    global _ANSWERS
    _ANSWERS = os.dup(1)  # W&B's own chatter on stdout and stderr goes to the log file
    os.dup2(2, 1)
    here = str(Path(__file__).parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]  # `import wandb` must not find our siblings
    try:
        run = _start_or_fall_back(Path(sys.argv[1]), sys.argv[2])
        _serve(run)
    except ModuleNotFoundError as error:
        _give_up(f"W&B is off: {error}. Install it (pip install wandb), or set logger.name=none.")
    except Exception as error:
        _give_up(f"W&B is off from here: {_short(error)}. metrics.jsonl has the same series.")


_ANSWERS = 1

if __name__ == "__main__":
    main()
