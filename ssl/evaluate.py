"""Does pretraining help? `medformer evaluate CHECKPOINT --task FILE`; the work is done in medformer/evaluation."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

from medformer.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
