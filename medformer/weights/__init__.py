"""Weights of the world: public encoders into the networks of medformer. See misc/docs/weights.md.

2D weights become 3D ones by inflation: a kernel is repeated along z and divided by its depth, so that a volume that
does not change along z gives what the image gives; positions are repeated along z. Where a model has other input
channels, kernels are summed over theirs and shared equally by the new ones: a grey scan gives what the grey picture
gave.
"""

from medformer.weights.origin import Origin
from medformer.weights.pretrained import layouts, load_pretrained, load_resnet, load_vit

__all__ = ["Origin", "layouts", "load_pretrained", "load_resnet", "load_vit"]
