"""``python -m fedexec``."""

import sys

from fedexec._cli import main

if __name__ == "__main__":
    sys.exit(main())
