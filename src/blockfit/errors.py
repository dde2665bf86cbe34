"""The one exception that blockfit raises on purpose."""


class BlockfitError(ValueError):
    """Bad input, said in one sentence: what was wrong, where, and what to do.

    The command line prints it and exits with code 2; a traceback is shown only with ``--debug``.
    """


def first_line(error: Exception) -> str:
    """What an error of a library says in its first line, without a full stop; or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
