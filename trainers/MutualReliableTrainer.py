"""Mutual learning with reliable pseudo labels (Su et al. 2024): two decoders teach each other where reliable."""

from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(MutualReliableTrainer))
