"""``python -m blockfit`` is the ``blockfit`` command."""

from blockfit.commands.app import main

if __name__ == "__main__":
    main()
