"""Does pretraining help? A checkpoint against the same model from scratch on labelled cases, with intervals."""
