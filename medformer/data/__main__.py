"""`python -m medformer.data inspect DIR` and `doctor`: as `medformer inspect` and `medformer doctor`."""

import sys

from medformer.commands import main

if __name__ == "__main__":
    sys.exit(main())
