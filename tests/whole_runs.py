"""What tests of whole runs share: runs that end without a word. Imported on every rank of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Killed(BaseException):
    """Nothing in the product catches it to clean up."""


@contextmanager
def killed_in(owner: type, method: str, when: Callable[[Any], bool]) -> Iterator[None]:
    """A run inside ends without a word as soon as `method` of `owner` is called and `when(self)` holds; what it wrote
    is all that stays."""
    original = getattr(owner, method)

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(self):
            raise Killed
        return original(self, *args, **kwargs)

    setattr(owner, method, dying)
    try:
        yield
    except Killed:
        pass
    finally:
        setattr(owner, method, original)


@contextmanager
def killed_at(step: int | None) -> Iterator[None]:
    """... once `step` steps are done; None: it does not."""
    from dist_compress.training.loop import Trainer

    with killed_in(Trainer, "_one_step", lambda trainer: trainer.step == step):
        yield
