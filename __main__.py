"""`python -m vlmpruner`: see `launcher.py`."""

import sys

from vlmpruner.launcher import main  # by its name: this file also lies at the root of a repo


if __name__ == "__main__":
    sys.exit(main())
