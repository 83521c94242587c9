"""`python -m pixart_rt` is `pixart-rt`."""

import sys

from pixart_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
