"""DTC (Luo et al. 2021): a segmentation made of regressed signed distances is to agree with the segmentation itself."""

from nnunet_ssl.methods.dtc import DTCTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(DTCTrainer))
