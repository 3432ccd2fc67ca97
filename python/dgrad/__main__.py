"""`python -m dgrad`: see cli.py."""

import sys

from dgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
