"""Semi-supervised training for nnU-Net v2.

Importing this package is light: it does not import torch. Each method lives in :mod:`nnunet_ssl.methods`.
"""

__version__ = "0.1.0"
