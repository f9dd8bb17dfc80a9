"""UniMatch (Yang et al. 2023): consistency of strong views and perturbed features with a weak view; also FixMatch."""

from nnunet_ssl.methods.unimatch import UniMatchTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(UniMatchTrainer))
