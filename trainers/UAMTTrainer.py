"""UA-MT (Yu et al. 2019): a mean teacher whose student learns only where the teacher is certain."""

from nnunet_ssl.methods.uamt import UAMTTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(UAMTTrainer))
