"""The one exception that blockfit raises on purpose."""


class BlockfitError(ValueError):
    """Bad input, said in one sentence: what was wrong, where, and what to do.

    The command line prints it and exits with code 2; a traceback is shown only with ``--debug``.
    """
