"""The error of bad input: one message that says what is wrong, where, and how to mend it."""

from collections.abc import Iterable


class InputError(ValueError):
    """A user's config, file, dataset or model cannot be used. Tools print it without a traceback."""


def one_line(error: Exception) -> str:
    """The message of an error of someone else's code, in one line; of a KeyError without its quotes."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def abbreviated(names: Iterable, most: int = 4) -> str:
    """The first of ``names``, for a message, and how many more there are.

    Examples::
        >>> abbreviated("abcde", most=3)
        'a, b, c and 2 more'
    """
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
