"""The one exception for what the user can mend: shown once, without a traceback."""


class UserError(ValueError):
    """Says the config key or module, the value, what is allowed and what to do."""
