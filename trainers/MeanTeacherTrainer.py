"""Mean teacher (Tarvainen and Valpola 2017): agreement with a moving average of the weights under noise."""

from nnunet_ssl.methods.mean_teacher import MeanTeacherTrainer
from nnunet_ssl.trainer.variants import training_length_variants

globals().update(training_length_variants(MeanTeacherTrainer))
