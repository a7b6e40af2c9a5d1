"""``python -m fedexec``."""

import sys

from fedexec.cli import main

if __name__ == "__main__":
    sys.exit(main())
