"""The one exception for what the user can mend: shown once, without a traceback."""

import traceback


class UserError(ValueError):
    """Says the config key or module, the value, what is allowed and what to do."""


def raised_by(what: str, error: Exception) -> UserError:
    """The error for code of the user's own, named by `what`, that raised `error`."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        f"{what} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}). "
        "Mend it or its arguments; the traceback is in the rank's log."
    )
