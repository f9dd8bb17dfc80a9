"""A checkpoint with the entries that nnssl writes (save_checkpoint of its AbstractBaseTrainer)."""

from __future__ import annotations

from typing import Any

from torch import nn


def nnssl_checkpoint(network: nn.Module, *, prefix: str = "encoder.", architecture: str = "ResEncL") -> dict[str, Any]:
    """Of a pretrained U-Net; nnssl's contrastive methods train an encoder alone, whose names have no prefix."""
    trained: Any = network if prefix else network.encoder

    def theirs(name: str) -> str:
        return prefix + name.removeprefix("encoder.")

    return {
        "network_weights": trained.state_dict(),
        "optimizer_state": {},
        "current_epoch": 1000,
        "init_args": {"configuration_name": "onemmiso", "fold": "all"},
        "trainer_name": "BaseMAETrainer",
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": architecture,
                "arch_kwargs": None,
                "arch_kwargs_requiring_import": None,
            },
            "pretrain_plan": {
                "dataset_name": "Dataset745_OpenMind",
                "plans_name": "nnsslPlans",
                "configurations": {
                    "onemmiso": {
                        "spacing": [1.0, 1.0, 1.0],
                        "normalization_schemes": ["ZScoreNormalization"],
                        "patch_size": [160, 160, 160],
                    }
                },
            },
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": [160, 160, 160],
            "key_to_encoder": theirs(network.key_to_encoder),
            "key_to_stem": theirs(network.key_to_stem),
            "keys_to_in_proj": [theirs(name) for name in network.keys_to_in_proj],
            "key_to_lpe": None,
        },
    }
