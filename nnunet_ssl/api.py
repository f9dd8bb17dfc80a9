"""All that the author of a method needs, from one import.

A method is a class derived from :class:`SemiSupervisedTrainer`, settings derived from :class:`SemiSupervisedSettings`
or :class:`TeacherSettings`, and a thin module that nnU-Net finds. docs/how-to/write-a-method.md writes one. Names that
are listed here keep their meaning within a major version; everything else may change.
"""

from nnunet_ssl.compiled import fused
from nnunet_ssl.data.cutmix import CutMix, box_mask, paste, random_boxes
from nnunet_ssl.data.labeled_targets import LabeledTarget
from nnunet_ssl.data.noise import clipped_noise
from nnunet_ssl.data.signed_distance import SignedDistanceMaps, of_all_structures, signed_distance_map
from nnunet_ssl.distributed import gather_over_ranks, mean_over_ranks, num_processes, sum_over_ranks
from nnunet_ssl.errors import MethodError, UserError
from nnunet_ssl.losses.adaptive_threshold import AdaptiveThreshold
from nnunet_ssl.losses.components import largest_components
from nnunet_ssl.losses.contrastive import info_nce
from nnunet_ssl.losses.dice import masked_dice_loss
from nnunet_ssl.losses.probabilities import (
    consistency,
    consistency_mse,
    entropy,
    entropy_of_probabilities,
    foreground_probabilities,
    probabilities,
    sharpen,
)
from nnunet_ssl.losses.pseudo_labels import PseudoLabel, coverage, members, pseudo_label
from nnunet_ssl.losses.ramps import gaussian_ramp_up
from nnunet_ssl.losses.supervised import (
    dice_and_cross_entropy,
    dice_of_logits,
    masked_cross_entropy,
    voxelwise_cross_entropy,
)
from nnunet_ssl.networks.architectures import UNet
from nnunet_ssl.networks.decoders import another_decoder, another_network, interpolating_decoder
from nnunet_ssl.networks.heads import BoundaryHead, PlainHead, coarse_grid, unit_length
from nnunet_ssl.networks.passes import Outputs
from nnunet_ssl.networks.streams import Stream, StreamOutput
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.settings import (
    CutMixSettings,
    SemiSupervisedSettings,
    TeacherSettings,
    ramp_length_setting,
    setting,
)
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.batches import LabeledBatch, UnlabeledBatch, Views
from nnunet_ssl.trainer.variants import training_length_variants

__all__ = [
    "AdaptiveThreshold",
    "BoundaryHead",
    "CutMix",
    "CutMixSettings",
    "LabeledBatch",
    "LabeledTarget",
    "MethodError",
    "Outputs",
    "PlainHead",
    "PseudoLabel",
    "SemiSupervisedSettings",
    "SemiSupervisedTrainer",
    "SignedDistanceMaps",
    "Stream",
    "StreamOutput",
    "TeacherSettings",
    "TrainingNetwork",
    "UNet",
    "UnlabeledBatch",
    "UserError",
    "Views",
    "another_decoder",
    "another_network",
    "box_mask",
    "clipped_noise",
    "coarse_grid",
    "consistency",
    "consistency_mse",
    "coverage",
    "dice_and_cross_entropy",
    "dice_of_logits",
    "entropy",
    "entropy_of_probabilities",
    "foreground_probabilities",
    "fused",
    "gather_over_ranks",
    "gaussian_ramp_up",
    "info_nce",
    "interpolating_decoder",
    "largest_components",
    "masked_cross_entropy",
    "masked_dice_loss",
    "mean_over_ranks",
    "members",
    "num_processes",
    "of_all_structures",
    "paste",
    "probabilities",
    "pseudo_label",
    "ramp_length_setting",
    "random_boxes",
    "setting",
    "sharpen",
    "signed_distance_map",
    "sum_over_ranks",
    "training_length_variants",
    "unit_length",
    "voxelwise_cross_entropy",
]
