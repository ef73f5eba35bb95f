"""nnU-Net v2 from weights of medformer: nnU-Net's data, augmentation and evaluation, our backbone and dense head.

Copy or link this file into nnU-Net's folder of trainers, `nnunetv2/training/nnUNetTrainer/`, and run

    MEDFORMER_WEIGHTS=run/model.safetensors nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerMedformer

`nnUNetv2_predict` needs the variable too. The backbone takes what nnU-Net gives: (z, y, x), each channel normalised.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler  # pyright: ignore[reportMissingImports]
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

import medformer
from medformer.evaluation.dense import DenseHead


class Segmenter(nn.Module):
    """Voxels to logits of every class."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, DenseHead(backbone, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x, self.backbone.get_intermediate_layers(x, self.head.layers))


class nnUNetTrainerMedformer(nnUNetTrainer):
    """AdamW at a transformer's rate, no deep supervision."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.enable_deep_supervision, self.initial_lr, self.weight_decay = False, 3e-4, 5e-2

    @staticmethod
    def build_network_architecture(*args: Any, **options: Any) -> nn.Module:
        channels, classes = (
            args[3:5] if len(args) > 4 else (options["num_input_channels"], options["num_output_channels"])
        )
        if "MEDFORMER_WEIGHTS" not in os.environ:
            raise ValueError("nnUNetTrainerMedformer: set MEDFORMER_WEIGHTS to a file that medformer.save wrote")
        backbone: Any = medformer.load(os.environ["MEDFORMER_WEIGHTS"])
        if backbone.config.in_channels != channels:
            raise ValueError(
                f"nnUNetTrainerMedformer: {backbone.config.in_channels} channels of the weights must be {channels}"
            )
        return Segmenter(backbone, classes)

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimiser, PolyLRScheduler(optimiser, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is one output."""
