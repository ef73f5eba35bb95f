"""A store of scans: `medformer prepare --out STORE DATASET=DIR`; the work is done in medformer/data/store."""

import sys

from medformer.data.store.build import main

if __name__ == "__main__":
    sys.exit(main())
