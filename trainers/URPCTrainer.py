"""URPC (Luo et al. 2022): predictions at several resolutions should agree, less where they are uncertain."""

from nnunet_ssl.methods.urpc import URPCTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(URPCTrainer))
