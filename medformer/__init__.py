"""Backbones for 3D and 2D medical images. See README.md."""
