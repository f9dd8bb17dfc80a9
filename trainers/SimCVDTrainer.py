"""SimCVD (You et al. 2022): distillation from a moving average on boundary-aware features under dropout."""

from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(SimCVDTrainer))
