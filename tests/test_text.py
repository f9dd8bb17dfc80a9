"""What messages show of names, values and errors."""

from __future__ import annotations

from nnunet_ssl.text import closest, dataset_number, did_you_mean, one_line, shorten, some_of, unwrap


def test_names() -> None:
    assert some_of(iter(["a", "b"])) == "a, b" and some_of([]) == ""
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some_of(map(str, range(12))).endswith("8, 9 and 2 more")


def test_numbers_of_datasets() -> None:
    assert dataset_number("Dataset901_LeftAtrium") == "901" == dataset_number("901")
    assert dataset_number("Dataset007_Tiny") == "7" and dataset_number("Dataset") == "Dataset"


def test_values() -> None:
    assert shorten("a") == "'a'"
    assert shorten(list(range(100)), 20) == "[0, 1, 2, 3, 4, 5..."
    assert len(shorten("x" * 78)) == len(shorten("x" * 79)) == 80


def test_long_texts() -> None:
    assert unwrap("Error(s):\n\tsize  mismatch\n") == "Error(s): size mismatch"
    assert unwrap("a " * 100, 10) == "a a a a..."


def test_errors() -> None:
    assert one_line(RuntimeError("report\n\nwhat happened\n")) == "what happened"
    assert one_line(ValueError("report\nwhat happened")) == "ValueError: what happened"
    assert one_line(MemoryError()) == "MemoryError"


def test_what_may_be_meant() -> None:
    known = ["ramp_length", "memory_mode"]
    assert closest("Ramp_Lenght", known) == "ramp_length" and closest("x", known) is None
    assert did_you_mean(["memorymode", "zzz", "ramp"], known) == " Did you mean memory_mode?"
    assert did_you_mean(["zzz"], known) == "" == did_you_mean([], known)
