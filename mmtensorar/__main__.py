"""`python -m mmtensorar VERB` is `mmtensorar VERB`."""

import sys

from mmtensorar.cli import main

if __name__ == "__main__":
    sys.exit(main())
