"""`python -m medformer`, and `torchrun ... -m medformer pretrain`: the command `medformer`."""

import sys

from medformer.commands import main

if __name__ == "__main__":
    sys.exit(main())
