"""Which rank a collective waits for, and what that rank does instead. Calls no collective; all of it is local.

While all goes well nothing is sent: a rank only notes, by `here(name)`, which collective of comm.py it is in. When one
fails because a rank is missing, the ranks that waited hold a roll call through the store. Each writes down where it is,
the first asks for the others, and a thread of every rank, which looks every `POLL_S` whether it is asked, answers for a
rank that is stuck elsewhere, with its stack. The first makes one message of the answers, which all of them raise.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch.distributed as dist

POLL_S = 2.0  # how often a rank looks whether it is asked
_ANSWER_S = 3.0  # beyond POLL_S: how long an answer may take
_NOTICE_S = 0.2  # a connection may break before its process has quite ended
_NUM_FRAMES = 8
_NUM_STORIES = 8
_PACKAGE = os.path.dirname(__file__) + os.sep
_SIGNS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|connectFullMesh|remote process", re.IGNORECASE
)


class LostContact(RuntimeError):
    """A collective ended because a rank was missing. The text names both and is the same on every rank that waited."""


def is_sign(error: BaseException) -> bool:
    """Whether `error` is how torch says that another rank is gone or late; a data loader may time out as well."""
    text = str(error)
    ours = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())
    return ours and _SIGNS.search(text) is not None


class Here:
    """Where this rank is among the collectives of comm.py: `with here("all_reduce"): ...`, which raises LostContact
    when a rank is missing. Notes code and place and formats nothing: one or two microseconds."""

    __slots__ = ("number", "name", "function", "caller", "at", "inside")

    def __init__(self) -> None:
        self.number = 0  # collectives entered since the group began
        self.name = ""
        self.function: CodeType | None = None  # of comm.py, the outermost
        self.caller: CodeType | None = None
        self.at = 0  # in the code of the caller; its line is found when somebody asks
        self.inside = False

    def __call__(self, name: str) -> Here:
        frame: FrameType | None = sys._getframe(1)
        comm = frame.f_code.co_filename
        while frame is not None and frame.f_code.co_filename == comm:
            self.function, frame = frame.f_code, frame.f_back
        self.caller, self.at = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
        self.number, self.name = self.number + 1, name
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and is_sign(error):
            raise LostContact(hold(error)) from error  # still inside
        self.inside = False

    def __str__(self) -> str:
        """E.g. "on_rank0 (broadcast_object), called at run.py:88"."""
        function = getattr(self.function, "co_qualname", self.function and self.function.co_name)
        name = self.name if function == self.name else f"{function} ({self.name})"
        code, at = self.caller, self.at
        if code is None:  # a thread of torch
            return name
        lines = [line for start, end, line in code.co_lines() if start <= at < end]
        return f"{name}, called at {_short(code.co_filename)}:{lines[0] if lines else '?'}"


class _RollCall:
    """The part of one rank in the roll call of its group."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = _own_connection(store), rank, world_size, timeout_s
        self.store.set(f"place/{rank}", json.dumps([_machine(), os.getpid(), socket.gethostname()]))
        self.answered, self.lock = False, threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="roll call", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while not self.ended.wait(POLL_S):
            try:
                if self.store.check(["roll_call/asked"]):
                    frame = sys._current_frames().get(threading.main_thread().ident or 0)
                    return self._answer(traceback.extract_stack(frame) if frame else [])
            except RuntimeError:  # the host of the store has ended
                return

    def _answer(self, stack: list[traceback.FrameSummary], failed: str = "") -> None:
        """Say once where this rank is. `failed`: the collective outside of comm.py that it waited for."""
        with self.lock:
            if self.answered:
                return
            self.answered = True
            shown = [f"{_short(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in stack[-_NUM_FRAMES:]]
            answer = {"number": here.number, "last": str(here), "in": str(here) if here.inside else failed}
            self.store.set(f"roll_call/at/{self.rank}", json.dumps(answer | {"stack": shown}))

    def hold(self, error: BaseException) -> str:
        """The message about `error`: of the rank that asked first, for all that wait."""
        where = str(here) if here.inside else _innermost(error)
        self._answer(traceback.extract_tb(error.__traceback__), where)
        if self.store.add("roll_call/asked", 1) > 1:
            deadline = time.monotonic() + POLL_S + 2 * _ANSWER_S
            while time.monotonic() < deadline:
                if self.store.check(["roll_call/text"]):
                    return self.store.get("roll_call/text").decode()
                time.sleep(0.05)
        text = self._text(where)
        self.store.set("roll_call/text", text)
        return text

    def _text(self, where: str) -> str:
        time.sleep(_NOTICE_S)
        deadline = time.monotonic() + POLL_S + _ANSWER_S
        answers: dict[int, dict[str, Any]] = {}
        while not (gone := self.gone()) and len(answers) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            answers |= self._answers(set(range(self.world_size)) - answers.keys())
        if gone:
            return f"rank {self.rank} lost contact with another rank in {where}: {gone}."
        stories: dict[str, list[int]] = {}
        for r in range(self.world_size):
            if story := self._story(answers[r], where) if r in answers else self._silence(r):
                stories.setdefault(story, []).append(r)
        missing = _list(sorted(r for ranks in stories.values() for r in ranks))
        head = f"rank {self.rank} waited in vain in {where}"
        if not missing:
            return f"{head}. All ranks are in it: what they send does not fit, or the network between them failed."
        if here.inside:
            head += f" (collective {here.number} of the run); missing: {missing}."
        else:
            head += f", which does not tell who is missing. The others: {missing}."
        lines = [f"  {_list(ranks)}: {story}" for story, ranks in list(stories.items())[:_NUM_STORIES]]
        hint = f"If a rank is only slow, raise backend.timeout_s ({self.timeout_s:g})."
        return "\n".join([head, *lines, hint])

    def _answers(self, ranks: set[int]) -> dict[int, dict[str, Any]]:
        there = [r for r in sorted(ranks) if self.store.check([f"roll_call/at/{r}"])]
        return {r: json.loads(self.store.get(f"roll_call/at/{r}")) for r in there}

    def _silence(self, r: int) -> str:
        if not self.store.check([f"place/{r}"]):
            return "has not started"
        _, process, host = json.loads(self.store.get(f"place/{r}"))
        why = "it or its machine is gone, or it is stuck in code that lets no other thread run"
        return f"no answer from process {process} on {host}: {why}"

    def _story(self, answer: dict[str, Any], where: str) -> str:
        """What a rank does instead of the collective that this one is in; "" when it is in it."""
        number = answer["number"]
        if answer["in"]:
            return "" if (number, answer["in"]) == (here.number, where) else f"in collective {number}, {answer['in']}"
        last = f"its last was {number}, {answer['last']}" if number else "it has called none so far"
        return "\n    ".join([f"in no collective of comm.py ({last}) but at", *answer["stack"]])

    def gone(self) -> str:
        """The ranks of this machine whose process has ended, in words, or ""."""
        ours, gone = _machine(), []
        for r in range(self.world_size):
            if r != self.rank and self.store.check([f"place/{r}"]):
                machine, process, _ = json.loads(self.store.get(f"place/{r}"))
                if machine == ours and not _lives(process):
                    gone.append(f"rank {r} (process {process})")
        return f"{', '.join(gone)} on {socket.gethostname()} is gone" if gone else ""


here = Here()
_roll_call: _RollCall | None = None


def start(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
    """From now on this rank counts its collectives and answers when it is asked where it is."""
    global _roll_call
    stop()
    here.number, here.inside = 0, False
    _roll_call = _RollCall(store, rank, world_size, timeout_s)


@atexit.register  # a thread inside torch must not see the interpreter end
def stop() -> None:
    global _roll_call
    if _roll_call is not None:
        _roll_call.ended.set()
        _roll_call.thread.join(1.0)
    _roll_call = None


def hold(error: BaseException) -> str:
    """The one message about a lost contact: the collective, which ranks did not come, and where they are. Takes some
    seconds at the most."""
    if isinstance(error, LostContact):
        return str(error)
    where = here if here.inside else _innermost(error)
    if _roll_call is None:
        return f"lost contact with another rank in {where}: {error}"
    try:
        return _roll_call.hold(error)
    except RuntimeError:
        lost = f"rank {_roll_call.rank} lost contact with another rank in {where}"
        return f"{lost}: the store of the run is gone, and rank 0 or its torchrun with it."


def gone() -> str:
    """The ranks of this machine whose process has ended, in words, or ""."""
    try:
        return _roll_call.gone() if _roll_call else ""
    except RuntimeError:
        return ""


def _own_connection(store: dist.Store) -> dist.Store:
    """A client of the same store that the main thread does not block by waiting for a key."""
    base = store
    while isinstance(base, dist.PrefixStore):
        base = base.underlying_store
    clone = getattr(store, "clone", None)  # not in older torch
    return store if clone is None or isinstance(base, dist.FileStore) else clone()  # a file has no connection


def _innermost(error: BaseException) -> str:
    """The collective of torch that failed and the line of ours that led there, of an error outside comm.py."""
    place = collective = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(_PACKAGE):
            place = f"{_short(frame.filename)}:{frame.lineno}"
        elif frame.filename.endswith("distributed_c10d.py"):
            collective = frame.name
    return f"{collective or 'a collective of torch'}, called at {place or 'no line of dist_compress'}"


def _short(path: str) -> str:
    return path.removeprefix(_PACKAGE) if path.startswith(_PACKAGE) else os.path.basename(path)


def _list(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""


def _machine() -> str:
    """What ranks have in common that see each other's processes: not the name, which containers may share."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return boot.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return socket.gethostname()


def _lives(process: int) -> bool:
    """Whether a process of this machine runs; one that ended and is not yet collected does not."""
    try:
        os.kill(process, 0)
    except OSError:
        return False
    try:
        with open(f"/proc/{process}/stat") as stat:  # pid (name) state ..
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:  # no /proc: not Linux
        return True
