"""Trainings of several trainers on equal terms, and what they show: ``nnunet-ssl benchmark``."""
