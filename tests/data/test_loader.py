"""Unlabeled batches: views share their spatial sample, workers differ, memory stays flat."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from multiprocessing import get_context  # conftest.py has another in its place during tests

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import gaussian_filter

from nnunet_ssl.data.cutmix import CutMix
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, unlabeled_workers
from nnunet_ssl.data.predicted_foreground import Aim, PredictedForeground, subsampled
from nnunet_ssl.data.unlabeled_cases import UnlabeledCase
from nnunet_ssl.data.views import UnlabeledViews

SHAPE = (20, 40, 44)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[UnlabeledCase]:
    folder = tmp_path_factory.mktemp("preprocessed")
    rng = np.random.RandomState(0)
    for index in range(4):
        image = gaussian_filter(rng.normal(size=SHAPE), 3)[None].astype(np.float32)
        image /= image.std()
        mask = np.zeros((1, *SHAPE), dtype=np.int16)
        mask[:, :, :10] = -1
        nnUNetDatasetBlosc2.save_case(
            image, mask, {}, str(folder / f"case_{index}"), chunks=(1, *SHAPE), blocks=(1, 10, 20, 22)
        )
    return [UnlabeledCase(f"case_{index}", folder, "imagesUn") for index in range(4)]


def make_loader(
    cases, patch=(12, 24, 24), batch_size=3, mask=False, cutmix=None, foreground=None, share=0.33
) -> UnlabeledDataLoader:
    rotation = (-0.3, 0.3)
    dummy_2d = len(patch) == 3 and max(patch) / patch[0] > 3
    transforms = nnUNetTrainer.get_training_transforms(
        patch, rotation, None, tuple(range(len(patch))), dummy_2d, use_mask_for_norm=[mask]
    )
    initial = [int(size * 1.2) for size in patch]
    labeled = nnUNetDataLoader(
        UnlabeledDataset(cases), batch_size, initial, patch, LabelManager({"background": 0, "a": 1}, None),
        transforms=transforms,
    )  # fmt: skip
    return UnlabeledDataLoader(
        labeled,
        UnlabeledDataset(cases),
        batch_size,
        views=UnlabeledViews(
            transforms, strong=2, normalization_schemes=["ZScoreNormalization"], intensity_properties={}
        ),
        cutmix=cutmix or CutMix(),
        foreground=foreground,
        foreground_share=share,
    )


@pytest.mark.parametrize("patch", [(12, 24, 24), (4, 32, 24), (24, 32)])
def test_batch_has_the_views_of_the_documented_shapes(cases, patch):
    batch = next(make_loader(cases, patch))
    assert batch["weak"].shape == (3, 1, *patch) and batch["weak"].dtype == torch.float32
    assert [view.shape for view in batch["strong"]] == [(3, 1, *patch)] * 2
    assert [boxes.shape for boxes in batch["boxes"]] == [(3, len(patch), 2)] * 2
    assert sorted(batch["partner"].tolist()) == [0, 1, 2]
    assert all(partner != own for own, partner in enumerate(batch["partner"].tolist()))
    assert all(key.startswith("imagesUn/case_") for key in batch["keys"])


def test_strong_views_are_the_weak_ones_with_other_intensities(cases):
    torch.manual_seed(0)
    np.random.seed(0)
    loader = make_loader(cases)
    same_place, differ = [], []
    for _ in range(10):
        batch = next(loader)
        for weak, s1, s2 in zip(batch["weak"], *batch["strong"], strict=True):
            # Only intensities change: bright stays bright, voxel by voxel. Another place has a correlation of ~0.
            same_place += [np.corrcoef(weak.flatten(), s.flatten())[0, 1] for s in (s1, s2) if weak.std() > 0]
            differ.append(not torch.equal(s1, s2))
    assert np.median(same_place) > 0.9 and min(same_place) > 0.4
    assert np.mean(differ) > 0.8


def test_weak_view_has_voxel_values_of_the_case(cases):
    torch.manual_seed(3)
    loader = make_loader(cases)
    loader.views.spatial.transforms = [t for t in loader.views.spatial.transforms if "Mirror" in type(t).__name__]
    values = np.concatenate([UnlabeledDataset(cases).load_case(f"imagesUn/case_{i}")[0][:].ravel() for i in range(4)])
    weak = next(loader)["weak"].numpy()
    inside = weak[weak != 0]
    assert np.isin(inside, values).all() and inside.size > 0


def test_voxels_outside_the_mask_are_zero_in_every_view(cases):
    torch.manual_seed(0)
    loader = make_loader(cases, mask=True)
    loader.views.spatial.transforms = []
    image = torch.ones(1, 6, 8, 8)
    segmentation = torch.zeros(1, 6, 8, 8, dtype=torch.int16)
    segmentation[:, :, :4] = -1
    for _ in range(10):
        weak, strong, _ = loader.views(image.clone(), segmentation.clone())
        for view in (weak, *strong):
            assert (view[:, :, :4] == 0).all() and (view[:, :, 4:] != 0).any()


def test_the_segmentation_reaches_the_views_where_they_need_it(cases):
    loader = make_loader(cases, mask=True)
    assert loader.views.needs_segmentation and not make_loader(cases).views.needs_segmentation
    loader.views.spatial.transforms = []
    seen = [next(loader)["weak"] for _ in range(6)]
    # The cases have no voxel that is 0 but where their mask is below 0, a quarter of the image.
    assert 0.1 < torch.cat(seen).eq(0).float().mean() < 0.9


def test_each_strong_view_has_boxes_of_its_own(cases):
    np.random.seed(0)
    loader = make_loader(cases, cutmix=CutMix(probability=1.0))
    first, second = next(loader)["boxes"]
    assert not torch.equal(first, second)
    assert len({tuple(box.flatten().tolist()) for box in first}) == 3


def test_crops_come_from_everywhere_and_are_mirrored(cases):
    torch.manual_seed(0)
    np.random.seed(0)
    loader = make_loader(cases[:1], patch=(8, 16, 16), batch_size=4)
    image = torch.from_numpy(loader._data.load_case("imagesUn/case_0")[0][:])
    # Every voxel of the image tells where it lies, so a crop does too.
    index = torch.arange(image.numel()).view(image.shape)
    position = torch.stack([(index // stride) % size for size, stride in zip(SHAPE, (1760, 44, 1), strict=True)])[:, 0]
    loader._data.load_case = lambda key: (position.float().numpy(), None, None)
    loader.views.spatial.transforms = [t for t in loader.views.spatial.transforms if "Mirror" in type(t).__name__]
    batches = torch.cat([next(loader)["weak"] for _ in range(30)])
    centre = batches[:, :, 4:-4, 8:-8, 8:-8].flatten(2).mean(2)
    assert (centre.std(0) > torch.tensor([1.0, 3.0, 3.0])).all()
    rising = (batches[:, 2, 4, 8, -1] > batches[:, 2, 4, 8, 0]).float().mean()
    assert 0.25 < rising < 0.75


def test_every_case_comes_up(cases):
    loader = make_loader(cases, batch_size=4)
    assert {key for _ in range(20) for key in next(loader)["keys"]} == {f"imagesUn/case_{i}" for i in range(4)}


def test_cases_of_both_sources_may_share_a_name(cases):
    other = UnlabeledCase("case_0", cases[0].folder, "imagesTr")
    assert UnlabeledDataset([*cases, other]).identifiers[0] == "imagesTr/case_0"
    assert len(UnlabeledDataset([*cases, other]).identifiers) == 5


def foreground_at(cases, voxel, rare=True) -> PredictedForeground:
    """The second of two classes at one voxel of every case."""
    foreground = PredictedForeground(UnlabeledDataset(cases).identifiers, 2)
    for case in cases:
        foreground.put(f"imagesUn/{case.identifier}", Aim(1, np.asarray(voxel)))
    foreground.rare = [1] if rare else []
    return foreground


@pytest.mark.parametrize(
    ("patch", "voxel"), [((8, 16, 16), (10, 17, 30)), ((4, 32, 24), (3, 20, 20)), ((24, 32), (9, 21, 20))]
)
def test_patches_are_centered_on_predicted_foreground(cases, patch, voxel):
    loader = make_loader(cases, patch, foreground=foreground_at(cases, voxel), share=1.0, batch_size=4)
    loader.views.spatial.transforms = [t for t in loader.views.spatial.transforms if "Spatial" not in type(t).__name__]
    loader.patch_size = loader.final_patch_size
    batch = next(loader)
    assert [(aim.structure, *aim.voxel) for aim in batch["aims"]] == [(1, *voxel)] * 4
    middle = batch["coordinates"].flatten(2).mean(2)
    assert (middle - torch.tensor(voxel)).abs().max() <= 2


def test_the_share_of_patches_that_are_centered(cases):
    np.random.seed(0)
    loader = make_loader(cases, (8, 16, 16), foreground=foreground_at(cases, (10, 17, 30)), batch_size=4)
    aims = [aim.structure for _ in range(75) for aim in next(loader)["aims"]]
    assert 0.25 < np.mean(np.equal(aims, 1)) < 0.41 and set(aims) == {-1, 1}


@pytest.mark.parametrize("voxel", [(0, 0, 0), (19, 39, 43), (1000, 5, 43)])
def test_voxels_at_the_border_and_beyond(cases, voxel):
    loader = make_loader(cases, foreground=foreground_at(cases, voxel), share=1.0)
    assert next(loader)["weak"].std() > 0.1


def test_without_a_rare_class_nothing_changes(cases):
    batches = []
    for foreground in (None, foreground_at(cases, (3, 4, 5), rare=False)):
        np.random.seed(5)
        torch.manual_seed(5)
        batches.append(next(make_loader(cases, foreground=foreground)))
    assert batches[0].keys() == batches[1].keys() and "aims" not in batches[1]
    assert torch.equal(batches[0]["weak"], batches[1]["weak"])


@pytest.mark.parametrize("patch", [(12, 24, 24), (4, 32, 24), (24, 32)])
def test_coordinates_are_those_of_the_voxels_of_the_weak_view(cases, patch):
    np.random.seed(1)
    torch.manual_seed(1)
    loader = make_loader(cases[:1], patch, foreground=foreground_at(cases[:1], (10, 20, 20)), batch_size=6)
    # An image whose voxels say where they lie.
    axes = torch.meshgrid(*(torch.arange(size) for size in SHAPE), indexing="ij")
    loader._data.load_case = lambda key: (torch.stack(axes).float().numpy(), None, None)
    loader.views.strong = 0
    loader.cutmix = None
    same = []
    for _ in range(5):
        batch = next(loader)
        for weak, coordinates in zip(batch["weak"], batch["coordinates"], strict=True):
            seen = subsampled(weak)
            inside = ((coordinates > 1) & (coordinates < torch.tensor(SHAPE).view(3, *[1] * len(patch)) - 2)).all(0)
            same += (seen - coordinates).abs().amax(0)[inside].lt(1e-3).tolist()
    assert len(same) > 300 and np.mean(same) > 0.95


def use_start_method(method, monkeypatch) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    context = get_context(method)
    module = sys.modules[NonDetMultiThreadedAugmenter.__module__]
    for name in ("Process", "Queue", "Event"):
        monkeypatch.setattr(module, name, getattr(context, name))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_see_what_training_has_found(cases, method, monkeypatch):
    use_start_method(method, monkeypatch)
    foreground = PredictedForeground(["imagesUn/case_0"], 1)
    loader = make_loader(cases[:1], (8, 16, 16), 2, foreground=foreground, share=1.0)
    workers = NonDetMultiThreadedAugmenter(loader, None, 1, num_cached=1, wait_time=0.002)
    try:
        assert "aims" not in next(workers)
        foreground.rare = [0]
        foreground.put("imagesUn/case_0", Aim(0, np.asarray([9, 20, 30])))
        later = [next(workers) for _ in range(10)][-1]
    finally:
        workers._finish()
    assert [(aim.structure, *aim.voxel) for aim in later["aims"]] == [(0, 9, 20, 30)] * 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_draw_differently(cases, method, monkeypatch):
    use_start_method(method, monkeypatch)
    loader = make_loader(cases[:1], patch=(12, 24, 24), batch_size=2)
    workers = NonDetMultiThreadedAugmenter(loader, None, 2, num_cached=4, wait_time=0.002)
    try:
        batches = [next(workers) for _ in range(6)]
    finally:
        workers._finish()
    flat = [batch["weak"].numpy().tobytes() for batch in batches]
    assert len(set(flat)) == len(flat)


def test_torch_state_is_seeded_anew_in_every_worker(cases):
    loader = make_loader(cases)
    copy = pickle.loads(pickle.dumps(loader))
    state = torch.get_rng_state()
    next(copy)
    own = torch.initial_seed()
    copy._seeded_in = -1  # as in a process that did not make the loader
    torch.set_rng_state(state)
    next(copy)
    assert torch.initial_seed() != own


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs, or there is none")
def test_memory_is_constant_over_1000_draws(cases):
    import resource

    loader = make_loader(cases, batch_size=2, patch=(8, 16, 16))
    for _ in range(200):
        next(loader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        next(loader)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KiB on Linux; one batch of these patches is 49 KiB


@pytest.mark.parametrize(
    ("labeled", "cores", "expected"),
    [(12, 12, 6), (12, 29, 6), (12, 30, 12), (1, 2, 1), (1, 64, 1), (2, 4, 1), (2, 5, 2), (0, 1, 0), (0, 64, 0)],
)
def test_few_cores_halve_the_unlabeled_workers(labeled, cores, expected):
    assert unlabeled_workers(labeled, cores) == expected
