"""The base of all methods: nnU-Net's trainer with an unlabeled stream. Methods import it from ``nnunet_ssl.api``."""
