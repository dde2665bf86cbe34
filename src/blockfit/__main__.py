"""``python -m blockfit`` is the ``blockfit`` command."""

from blockfit.cli import main

if __name__ == "__main__":
    main()
