"""CPS (Chen et al. 2021): two networks that learn from each other's labels."""

from nnunet_ssl.methods.cps import CPSTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(CPSTrainer))
