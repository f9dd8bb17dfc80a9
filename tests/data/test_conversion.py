"""Benchmark datasets: small files laid out as each official download, converted, and read as nnU-Net reads them."""

from __future__ import annotations

import json
import locale
import multiprocessing
import multiprocessing.pool
from pathlib import Path
from types import SimpleNamespace

import pytest
from downloads import DOWNLOADS, stamps
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities import utils

from nnunet_ssl.cli.convert import DATASETS
from nnunet_ssl.data.conversion import BENCHMARKS, convert_dataset, write_folds


@pytest.fixture(autouse=True)
def same_locale():
    """Writing DICOM files sets the process's locale to C, and later tests read what is not ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "nnUNet_raw" / "Dataset042_Benchmark"


def test_the_command_offers_these_datasets() -> None:
    assert DATASETS == tuple(BENCHMARKS) == tuple(DOWNLOADS)


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_nnunet_accepts_the_dataset(kind, tmp_path, raw, monkeypatch) -> None:
    report = convert_dataset(kind, DOWNLOADS[kind](tmp_path / "download"), raw, labeled="1")
    assert report.failed == [] and report.written == len(report.train) + len(report.test)
    # In threads: new processes would each import torch first.
    threads = multiprocessing.pool.ThreadPool
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=threads))
    monkeypatch.setattr(utils, "Pool", threads)
    verify_dataset_integrity(str(raw), num_processes=1)
    assert not list(raw.glob(".unfinished"))


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_test_cases_are_in_no_fold(kind, tmp_path, raw) -> None:
    report = convert_dataset(kind, DOWNLOADS[kind](tmp_path / "download"), raw, labeled="2")
    file, folds = write_folds(kind, raw, tmp_path / "preprocessed", report.train, labeled="2", seed=0)
    assert json.loads(file.read_text()) == folds and len(folds) == 5
    for fold in folds:
        assert sorted(case for cases in fold.values() for case in cases) == sorted(report.train)
        assert len({BENCHMARKS[kind].group(case) for case in fold["train"]}) == 2
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(report.train)
    assert not set(report.train) & set(report.test)
    labels = {file.name.split(".")[0] for file in (raw / "labelsTr").iterdir()}
    assert labels == set(report.train), "labels stay; the fold's list hides them"


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_second_run_writes_nothing(kind, tmp_path, raw) -> None:
    source = DOWNLOADS[kind](tmp_path / "download")
    first = convert_dataset(kind, source, raw, labeled="1")
    before = {name: stamp for name, stamp in stamps(raw).items() if name != "dataset.json"}
    second = convert_dataset(kind, source, raw, labeled="1")
    assert (second.train, second.test, second.written) == (first.train, first.test, 0)
    assert {name: stamp for name, stamp in stamps(raw).items() if name != "dataset.json"} == before
