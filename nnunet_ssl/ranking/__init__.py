"""Unlabeled cases ranked by how far several models agree on them: ``nnunet-ssl rank``."""
