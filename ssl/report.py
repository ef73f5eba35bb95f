"""A page of what a checkpoint sees: `medformer report CHECKPOINT SCAN...`; the work is done in medformer/page."""

import sys

from medformer.page.command import main

if __name__ == "__main__":
    sys.exit(main())
