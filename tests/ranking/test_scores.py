"""Agreement, entropy and verdicts, against transcriptions of their definitions voxel by voxel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nnunet_ssl.data.queue import FIRST, LOOK, RELIABLE, StructureRow
from nnunet_ssl.ranking import scores as module
from nnunet_ssl.ranking.scores import (
    LabeledRange,
    Scores,
    components,
    disagreement_map,
    entropy_map,
    judge,
    pairwise_dice,
    score,
    volumes,
)

LABELS = {"organ": 1, "all": [1, 2], "never": 5}


def maps(count: int, shape=(3, 5, 7), seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng([seed, one]).integers(0, 3, shape).astype(np.uint8) for one in range(count)]


def naive_dice(label_maps, values) -> float:
    of_pairs = []
    for one, other in itertools.combinations(label_maps, 2):
        common = total = 0
        for a, b in zip(one.ravel(), other.ravel(), strict=True):
            common += a in values and b in values
            total += (a in values) + (b in values)
        of_pairs.append(1.0 if total == 0 else 2 * common / total)
    return sum(of_pairs) / len(of_pairs)


@pytest.mark.parametrize("chunk", [2**20, 8])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_pairwise_dice_is_that_of_the_definition(monkeypatch, count, chunk) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    label_maps = maps(count)
    found = pairwise_dice(label_maps, LABELS)
    assert found == pytest.approx(
        {"organ": naive_dice(label_maps, {1}), "all": naive_dice(label_maps, {1, 2}), "never": 1.0}
    )


def test_two_empty_models_agree_and_one_empty_model_does_not() -> None:
    empty, full = np.zeros((1, 4, 4), np.uint8), np.ones((1, 4, 4), np.uint8)
    assert pairwise_dice([empty, empty], {"organ": 1}) == {"organ": 1.0}
    assert pairwise_dice([empty, full], {"organ": 1}) == {"organ": 0.0}
    assert pairwise_dice([empty, full, full], {"organ": 1}) == {"organ": pytest.approx(1 / 3)}


def test_one_model_has_no_agreement() -> None:
    assert math.isnan(pairwise_dice(maps(1), {"organ": 1})["organ"])


def test_disagreement_is_where_any_model_differs() -> None:
    label_maps = maps(3)
    expected = [len({one[index] for one in label_maps}) > 1 for index in np.ndindex(label_maps[0].shape)]
    assert disagreement_map(label_maps).ravel().tolist() == expected
    assert disagreement_map(label_maps).dtype == np.uint8
    assert not disagreement_map([label_maps[0]] * 2).any()


def random_probabilities(channels: int, *, classes: bool) -> np.ndarray:
    drawn = np.random.default_rng(channels).random((channels, 2, 3, 4)).astype(np.float32) ** 3
    return drawn / drawn.sum(axis=0) if classes else drawn


@pytest.mark.parametrize("channels", [2, 4])
def test_entropy_of_classes(channels) -> None:
    probabilities = random_probabilities(channels, classes=True)
    found = entropy_map(probabilities, regions=False)
    for index in np.ndindex(found.shape):
        expected = -sum(float(p) * math.log(p) for p in probabilities[(slice(None), *index)]) / math.log(channels)
        assert found[index] == pytest.approx(expected, abs=1 / 2048 + 1e-6)


def test_entropy_of_regions_is_the_mean_of_binary_entropies() -> None:
    probabilities = random_probabilities(3, classes=False)
    found = entropy_map(probabilities, regions=True)
    for index in np.ndindex(found.shape):
        bits = [
            -p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in map(float, probabilities[(slice(None), *index)])
        ]
        assert found[index] == pytest.approx(sum(bits) / 3, abs=1 / 2048 + 1e-6)


def test_entropy_is_zero_to_one_and_survives_half_precision() -> None:
    certain = np.zeros((3, 1, 1, 2), np.float32)
    certain[0] = 1
    assert not entropy_map(certain, regions=False).any()
    assert not entropy_map(certain, regions=True).any()
    assert (entropy_map(np.full((3, 1, 1, 2), 1 / 3, np.float32), regions=False) == 1).all()
    assert (entropy_map(np.full((3, 1, 1, 2), 0.5, np.float32), regions=True) == 1).all()
    found = entropy_map(random_probabilities(4, classes=True), regions=False)
    assert found.dtype == np.float32
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))


def test_volumes_are_in_milliliters() -> None:
    label_map = np.zeros((4, 10, 10), np.uint8)
    label_map[:2, :5, :10] = 1
    label_map[3, 0, 0] = 2
    assert volumes(label_map, LABELS, (2.0, 3.0, 5.0)) == pytest.approx({"organ": 3.0, "all": 3.03, "never": 0.0})


def test_a_two_dimensional_image_is_a_millimeter_thick() -> None:
    label_map = np.ones((1, 10, 10), np.uint8)
    assert volumes(label_map, {"organ": 1}, (999.0, 1.0, 1.0)) == pytest.approx({"organ": 0.1})


def test_components_touch_at_corners() -> None:
    label_map = np.zeros((3, 3, 6), np.uint8)
    label_map[0, 0, 0] = label_map[1, 1, 1] = 1
    label_map[0, 0, 4] = 2
    assert components(label_map, 1) == 1
    assert components(label_map, [1, 2]) == 2
    assert components(label_map, 7) == 0


def test_a_case_is_measured_by_all_that_any_model_found() -> None:
    first, second = np.zeros((1, 1, 4), np.uint8), np.zeros((1, 1, 4), np.uint8)
    first[0, 0, 1], second[0, 0, 2] = 1, 1
    entropy = np.array([[[0.1, 0.2, 0.4, 0.8]]], np.float32)
    found = score(first, [first, second], entropy, {"organ": 1}, (1, 10, 10))
    assert found.entropy == pytest.approx(0.3)
    assert found.structures == {"organ": StructureRow(0.0, pytest.approx(0.1), 1)}
    nothing = np.zeros_like(first)
    assert math.isnan(score(nothing, [nothing, nothing], entropy, {"organ": 1}, (1, 1, 1)).entropy)


RANGES = {"organ": LabeledRange(2.0, 4.0), "tumor": LabeledRange(0.0, 1.0)}


def verdict(organ: float, tumor: float, *, organ_ml: float = 3.0, tumor_ml: float = 0.5, models: int = 2):
    found = Scores(0.1, {"organ": StructureRow(organ, organ_ml, 1), "tumor": StructureRow(tumor, tumor_ml, 1)})
    return judge(found, RANGES, reliable=0.9, first=0.7, models=models)


@pytest.mark.parametrize(
    ("arguments", "expected", "said"),
    [
        ({"organ": 0.95, "tumor": 0.9}, RELIABLE, "agree: Dice 0.93"),
        ({"organ": 0.9, "tumor": 0.9}, RELIABLE, "agree"),
        ({"organ": 0.95, "tumor": 0.8}, LOOK, "Dice 0.88, lowest for tumor (0.80)"),
        ({"organ": 0.95, "tumor": 0.4}, FIRST, "Dice 0.68, lowest for tumor (0.40)"),
        ({"organ": 1.0, "tumor": 0.4}, LOOK, "lowest for tumor"),
        ({"organ": 0.7, "tumor": 0.7}, LOOK, "disagree"),
        ({"organ": 1.0, "tumor": 1.0, "organ_ml": 0.0}, LOOK, "organ is missing, which every labeled case has"),
        ({"organ": 1.0, "tumor": 1.0, "tumor_ml": 0.0}, RELIABLE, "agree"),
        ({"organ": 1.0, "tumor": 1.0, "organ_ml": 6.1}, LOOK, "organ is large: 6.1 ml, labeled cases have 2 to 4"),
        ({"organ": 1.0, "tumor": 1.0, "organ_ml": 6.0}, RELIABLE, "agree"),
        ({"organ": 1.0, "tumor": 1.0, "organ_ml": 1.3}, LOOK, "organ is small"),
        ({"organ": 0.1, "tumor": 0.1, "organ_ml": 0.0}, FIRST, "organ is missing"),
        ({"organ": math.nan, "tumor": math.nan, "models": 1}, LOOK, "one model alone"),
    ],
)
def test_verdicts(arguments, expected, said) -> None:
    found, reason = verdict(**arguments)
    assert found == expected
    assert said in reason


def test_one_structure_far_apart_is_looked_at_though_the_mean_is_high() -> None:
    structures = {str(index): StructureRow(1.0, 1.0, 1) for index in range(9)} | {"small": StructureRow(0.5, 1.0, 1)}
    assert judge(Scores(0.1, structures), {}, reliable=0.9, first=0.7, models=3) == (
        LOOK, "the models disagree on small: Dice 0.50")  # fmt: skip
