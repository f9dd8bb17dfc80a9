"""Benchmark datasets of semi-supervised segmentation, from their official downloads to nnU-Net's layout."""

from nnunet_ssl.data.conversion.convert import ConversionReport, convert_dataset
from nnunet_ssl.data.conversion.datasets import BENCHMARKS
from nnunet_ssl.data.conversion.folds import write_folds

__all__ = ["BENCHMARKS", "ConversionReport", "convert_dataset", "write_folds"]
