"""``python -m fedexec``."""

import sys

from fedexec._cli import entry

if __name__ == "__main__":
    sys.exit(entry())
