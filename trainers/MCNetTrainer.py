"""MC-Net+ (Wu et al. 2022): three decoders that upsample differently learn each other's sharpened predictions."""

from nnunet_ssl.methods.mcnet import MCNetTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(MCNetTrainer))
