"""Which line of the user's code a failure comes from."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, str(Path(__file__).parent)))


def users_line(error: BaseException | None = None) -> str:
    """ "file.py:12: `x.view(2, 3)`": the innermost line that is neither torch's nor ours, of an error or of the call.

    "" when there is none.
    """
    frames = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((*_NOT_THE_USERS, "<")):
            return f"{frame.filename}:{frame.lineno}: `{frame.line}`"
    return ""


def blame(error: BaseException, module: str, op: str | None) -> str:
    """ "module 'fc' (op linear, net.py:12: `self.fc(x)`): RuntimeError: ..."."""
    details = ", ".join(filter(None, (f"op {op}" if op else "", users_line(error))))
    return f"module {module!r}{f' ({details})' if details else ''}: {type(error).__name__}: {error}"
