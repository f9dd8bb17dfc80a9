"""The benchmark datasets, by the name that ``nnunet-ssl convert`` takes."""

from __future__ import annotations

from nnunet_ssl.data.conversion.acdc import ACDC
from nnunet_ssl.data.conversion.brats19 import BRATS19
from nnunet_ssl.data.conversion.isic2018 import ISIC2018
from nnunet_ssl.data.conversion.left_atrium import LEFT_ATRIUM
from nnunet_ssl.data.conversion.pancreas import PANCREAS
from nnunet_ssl.data.conversion.source_dataset import SourceDataset

BENCHMARKS: dict[str, SourceDataset] = {
    "la": LEFT_ATRIUM,
    "pancreas": PANCREAS,
    "acdc": ACDC,
    "brats19": BRATS19,
    "isic2018": ISIC2018,
}
