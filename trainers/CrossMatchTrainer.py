"""CrossMatch (Zhao et al. 2024): pseudo-labels under image and feature perturbations of different strength."""

from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(CrossMatchTrainer))
