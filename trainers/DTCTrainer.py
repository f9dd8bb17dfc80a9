"""DTC (Luo et al. 2021): signed distances that the network regresses should agree with its segmentation."""

from nnunet_ssl.methods.dtc import DTCTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(DTCTrainer))
