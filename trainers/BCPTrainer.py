"""BCP (Bai et al. 2023): bidirectional copy-paste between labeled images and images labeled by a teacher."""

from nnunet_ssl.methods.bcp import BCPTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(BCPTrainer))
