"""Transformer-in-Transformer: tokens that hold tokens, any number of levels, in 2D and 3D."""

from medformer.tnt.config import TNTConfig, TNTLevel
from medformer.tnt.model import TNT
from medformer.tnt.timm_weights import tnt_base, tnt_from_timm, tnt_small

__all__ = ["TNT", "TNTConfig", "TNTLevel", "tnt_base", "tnt_from_timm", "tnt_small"]
