"""The error of bad input: one message that says what is wrong, where, and how to mend it."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A user's config, file, dataset or model cannot be used. Tools print it without a traceback."""
