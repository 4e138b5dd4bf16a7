"""FerKD: what each band does to labels, how labels come back from the top K, and who is mixed with whom.

Letters: N images, V stored crops of each, B images of a batch, R crops of each, C classes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Data, Mix, MultiCrop, Samples, cutmix, load_data, mixup_or_cutmix
from limbeck.errors import UserError
from limbeck.labels import HARD, IMPORTANT, UNINFORMATIVE
from limbeck.methods.classification.ferkd import (
    FerKD,
    bands_of,
    calibrated_label,
    calibration_shares,
    crop_scores,
    ferkd,
    label_score,
    partners,
    recover_label,
)
from limbeck.models import TopK, load_model
from limbeck.teachers import CropReader, Frozen, Stored, StoredCrops, fill
from limbeck.train import Optimizer, Stage, StreamSettings, Trainer, Workspace

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
C, V, SIZE = 10, 6, 8


def logits(seed: int, *shape: int, classes: int = C) -> Tensor:
    return torch.randn(*shape, classes, generator=torch.Generator().manual_seed(seed)) * 3


# -- labels ----------------------------------------------------------------------------------------------------------


@several
@given(seed=seeds, k=st.integers(1, C))
def test_every_recovered_label_is_a_distribution(seed, k):
    kept = TopK.of(logits(seed, 5, 4), k)
    for how in ("marginal_smoothing", "marginal_renorm", "smoothing", "hard"):
        label = recover_label(kept, how)
        assert label.shape == (5, 4, C) and (label >= 0).all()
        torch.testing.assert_close(label.sum(-1), torch.ones(5, 4))
        assert torch.equal(label.argmax(-1), kept.ids[..., 0])


@several
@given(seed=seeds, k=st.integers(1, C - 1))
def test_marginal_smoothing_keeps_the_top_k_exactly_and_spreads_the_rest_evenly(seed, k):
    p, kept = logits(seed, 6).softmax(-1), TopK.of(logits(seed, 6), k)
    label = recover_label(kept)
    torch.testing.assert_close(label.gather(-1, kept.ids), p.gather(-1, kept.ids))
    others = label.scatter(-1, kept.ids, torch.nan)
    expected = (1 - p.gather(-1, kept.ids).sum(-1)) / (C - k)
    for row, value in zip(others, expected, strict=True):
        torch.testing.assert_close(row[~row.isnan()], value.expand(C - k), rtol=1e-3, atol=1e-6)


@several
@given(seed=seeds, k=st.integers(1, C))
def test_renorm_is_zero_outside_the_top_k_and_keeps_their_proportions(seed, k):
    p, kept = logits(seed, 6).softmax(-1), TopK.of(logits(seed, 6), k)
    label = recover_label(kept, "marginal_renorm")
    outside = torch.ones(6, C).scatter(-1, kept.ids, 0).bool()
    assert not label[outside].any()
    top = p.gather(-1, kept.ids)
    torch.testing.assert_close(label.gather(-1, kept.ids), top / top.sum(-1, keepdim=True))


def test_smoothing_keeps_one_class_and_hard_puts_everything_on_it():
    p = torch.tensor([0.1, 0.6, 0.25, 0.05])
    kept = TopK.of(p.log(), 3)
    torch.testing.assert_close(recover_label(kept, "smoothing"), torch.tensor([0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3]))
    assert recover_label(kept, "hard").tolist() == [0, 1, 0, 0]


@several
@given(seed=seeds)
def test_all_classes_kept_give_the_full_distribution(seed):
    whole = logits(seed, 7)
    for how in ("ori", "marginal_smoothing", "marginal_renorm"):
        torch.testing.assert_close(recover_label(TopK.of(whole, C), how), whole.softmax(-1))


@several
@given(seed=seeds, k=st.integers(1, C))
def test_the_score_is_what_the_recovered_label_gives_the_class(seed, k):
    kept = TopK.of(logits(seed, 30), k)
    label = torch.arange(30) % C
    expected = recover_label(kept).gather(-1, label[:, None])[:, 0]
    torch.testing.assert_close(label_score(kept, label), expected, rtol=1e-3, atol=1e-6)
    assert (label_score(kept, label) <= 1).all()


@several
@given(classes=st.integers(2, 30), share=st.floats(0, 0.99))
def test_a_calibrated_label_sums_to_1_and_its_largest_entry_is_the_class(classes, share):
    epsilon, label = share * (1 - 1 / classes), torch.arange(classes)
    target = calibrated_label(label, classes, epsilon)
    torch.testing.assert_close(target.sum(-1), torch.ones(classes))
    torch.testing.assert_close(target.diagonal(), torch.full((classes,), 1 - epsilon))
    others = target[~torch.eye(classes).bool()]
    torch.testing.assert_close(others, torch.full_like(others, epsilon / (classes - 1)))
    assert torch.equal(target.argmax(-1), label)


# -- bands -----------------------------------------------------------------------------------------------------------


def test_quantiles_drop_and_calibrate_the_shares_that_are_asked_for():
    score = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    band = bands_of(score, "quantile", 0.05, 0.15, 0.95)
    shares = [float((band == each).float().mean()) for each in (UNINFORMATIVE, HARD, IMPORTANT)]
    assert shares == pytest.approx([0.1, 0.1, 0.8], abs=1e-3)
    assert score[band == HARD].max() <= score[band == IMPORTANT].min()  # the calibrated are the low tail


@pytest.mark.parametrize("thresholds", ["absolute", "quantile"])
def test_limits_of_0_0_1_keep_every_crop_and_label(thresholds):
    score = torch.cat([torch.rand(50, 4), torch.tensor([[0.0, 1.0, 0.5, 1.0]])])
    assert (bands_of(score, thresholds, 0, 0, 1) == IMPORTANT).all()


@several
@given(seed=seeds, low=st.floats(0, 1), middle=st.floats(0, 1), top=st.floats(0, 1), versions=st.integers(1, 5))
@pytest.mark.parametrize("thresholds", ["absolute", "quantile"])
def test_every_image_keeps_a_crop(thresholds, seed, low, middle, top, versions):
    score = torch.rand(20, versions, generator=torch.Generator().manual_seed(seed))
    assert (bands_of(score, thresholds, low, middle, max(low, top)) != UNINFORMATIVE).any(1).all()


# -- mixing ----------------------------------------------------------------------------------------------------------


@several
@given(seed=seeds, images=st.integers(1, 6), num_crops=st.integers(2, 6))
def test_selfmix_never_crosses_images_and_no_crop_meets_itself(seed, images, num_crops):
    torch.manual_seed(seed)
    partner = partners(images, num_crops, within_image=True)
    own = torch.arange(images * num_crops)
    assert torch.equal(partner // num_crops, own // num_crops)
    assert not (partner == own).any()
    assert torch.equal(partner.sort().values, own)


@several
@given(seed=seeds, smoothing=st.sampled_from([0.0, 0.1]))
def test_labels_that_depend_on_the_image_alone_stay_under_selfmix_but_not_under_cutmix(seed, smoothing):
    torch.manual_seed(seed)
    target = calibrated_label(torch.arange(6).repeat_interleave(4), C, smoothing)

    def mixed(within_image: bool) -> tuple[Mix, Tensor]:
        mix = mixup_or_cutmix(24, (9, 9), partner=partners(6, 4, within_image=within_image))
        return mix, mix.labels(target)

    torch.testing.assert_close(mixed(True)[1], target)
    mix, changed = mixed(False)
    crosses = (mix.partner // 4 != torch.arange(24) // 4) & (mix.share < 1)
    assert torch.equal((changed - target).abs().amax(-1) > 1e-6, crosses & (mix.share < 1 - 1e-5))


def test_the_pasted_area_is_the_partners_share_of_the_label():
    torch.manual_seed(0)
    for _ in range(5):
        mix = cutmix(8, (12, 12), partner=partners(2, 4, within_image=True))
        images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 12, 12)
        pasted = (mix.pixels(images) != images).float().mean((1, 2, 3))
        label = torch.eye(8)
        expected = pasted[:, None] * label[mix.partner] + (1 - pasted)[:, None] * label
        torch.testing.assert_close(mix.labels(label), expected)


def test_both_ways_of_mixing_are_drawn_as_often_as_the_switch_says():
    torch.manual_seed(0)
    for probability in (0.0, 0.3, 1.0):
        boxes = [mixup_or_cutmix(4, (4, 4), switch_probability=probability).mask is not None for _ in range(400)]
        assert sum(boxes) / 400 == pytest.approx(probability, abs=0.07)


# -- the method ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", limit={"train": 300, "test": 300})
    return Data(train=data.train, test=data.test, name="digits")


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    """A net that reads crops of the digits well enough."""
    torch.manual_seed(0)
    model = load_model("small_cnn", num_classes=C, in_channels=1, config={"channels": [16, 32]})
    view, optimizer = MultiCrop(1, SIZE, (0.5, 1.0), flip=False), torch.optim.AdamW(model.parameters(), 1e-2)
    image, label = digits.train.fields["image"].float() / 255, digits.train.labels
    for _ in range(60):
        row = torch.randint(len(image), (64,))
        loss = F.cross_entropy(model(view(image[row])[:, 0]), label[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def cache(digits, teacher, tmp_path_factory) -> StoredCrops:
    path = tmp_path_factory.mktemp("ferkd") / "store"
    views = {"crop": MultiCrop(1, SIZE, (0.2, 1.0), flip=False)}
    kept = {"top_k": 5, "dtype": "float16", "values": "log_probabilities", "versions": V}
    fill(path, Frozen(teacher), digits.train, views=views, **kept)
    return StoredCrops(Stored(path))


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return load_model("small_cnn", num_classes=C, in_channels=1, config={"channels": [16, 32]})


def method_and_batch(cache: StoredCrops, digits: Data, band_NV: Tensor, **settings) -> tuple[FerKD, dict]:
    """A method without mixing, and one batch of 12 images with 4 crops each."""
    index, train = digits.train.index, digits.train
    reader = CropReader(cache, index, band_NV != UNINFORMATIVE, band_NV == HARD, num_crops=4, k=5)
    row = torch.arange(12)
    fields = {**train.batch(row), **reader(index[row], 0, 0)}
    fields["crop"] = MultiCrop(4, SIZE).apply(fields["image"].float() / 255, fields["crop_params"])
    return FerKD(student(), reader, **{"mix": "none", **settings}), {"labelled": fields}


def test_without_calibration_the_labels_are_those_of_fkd(cache, digits):
    bands = bands_of(crop_scores(cache, digits.train, 5), "absolute", 0, 0, 1)
    assert (bands == IMPORTANT).all()
    method, batch = method_and_batch(cache, digits, bands)
    fields = batch["labelled"]
    expected = recover_label(cache.top_k(fields["index"], fields["crop_version"], 5))
    assert torch.equal(method.targets(fields), expected)
    log_q = method.student(fields["crop"].flatten(0, 1)).log_softmax(-1)
    loss = method.training_step(batch)["soft_ce"]
    torch.testing.assert_close(loss, -(expected.flatten(0, 1) * log_q).sum(-1).mean())


def test_a_middle_above_1_is_training_with_smoothed_labels(cache, digits):
    bands = bands_of(crop_scores(cache, digits.train, 5), "absolute", 0, 1.01, 1)
    method, batch = method_and_batch(cache, digits, bands, label_smoothing=0.1)
    fields = batch["labelled"]
    output, label = method.student(fields["crop"].flatten(0, 1)), fields["label"].repeat_interleave(4)
    expected = F.cross_entropy(output, label, label_smoothing=0.1 * C / (C - 1))
    torch.testing.assert_close(method.training_step(batch)["soft_ce"], expected)


def test_calibrated_crops_have_the_softened_class_and_the_others_the_teachers_label(cache, digits):
    score = crop_scores(cache, digits.train, 5)
    bands = bands_of(score, "quantile", 0.1, 0.5, 0.95)
    method, batch = method_and_batch(cache, digits, bands)
    fields = batch["labelled"]
    row = (digits.train.index[:, None] == fields["index"]).int().argmax(0)
    band = bands[row[:, None], fields["crop_version"]]
    assert (band != UNINFORMATIVE).all() and (band == HARD).any() and (band == IMPORTANT).any()
    targets, soft = method.targets(fields), recover_label(cache.top_k(fields["index"], fields["crop_version"], 5))
    hard = calibrated_label(fields["label"], C, 0.1)[:, None].expand_as(soft)
    assert torch.equal(targets, torch.where((band == HARD)[..., None], hard, soft))


def test_the_temperature_is_the_students_alone(cache, digits):
    bands = torch.full((len(digits.train), V), IMPORTANT)
    method, batch = method_and_batch(cache, digits, bands, temperature=3.0)
    targets = method.targets(batch["labelled"]).flatten(0, 1)
    log_q = (method.student(batch["labelled"]["crop"].flatten(0, 1)) / 3).log_softmax(-1)
    torch.testing.assert_close(method.training_step(batch)["soft_ce"], -(targets * log_q).sum(-1).mean())


def test_the_largest_probability_is_the_other_score(cache, digits):
    surest = crop_scores(cache, digits.train, 5, "max")
    by_label = crop_scores(cache, digits.train, 5)
    kept = cache.top_k(digits.train.index, cache.all_versions(digits.train.index), 5)
    torch.testing.assert_close(surest, kept.log_probs[..., 0].exp())
    right = kept.ids[..., 0] == digits.train.labels[:, None]
    torch.testing.assert_close(by_label[right], surest[right])
    assert (by_label[~right] < surest[~right]).all() and not right.all()


def test_selfmix_moves_the_labels_of_a_real_cache_less_than_cutmix_does(cache, digits):
    label = recover_label(cache.top_k(digits.train.index, cache.all_versions(digits.train.index), 5)).flatten(0, 1)
    torch.manual_seed(0)
    moved = {}
    for within_image in (True, False):
        mixes = [
            cutmix(len(label), (SIZE, SIZE), partner=partners(len(digits.train), V, within_image=within_image))
            for _ in range(20)
        ]
        moved[within_image] = torch.stack([(mix.labels(label) - label).norm(dim=-1).mean() for mix in mixes]).mean()
    assert moved[True] < 0.8 * moved[False]


def test_mixing_mixes_pixels_and_labels_by_the_same_partner(cache, digits):
    bands = torch.full((len(digits.train), V), IMPORTANT)
    method, batch = method_and_batch(cache, digits, bands, mix="self", switch_probability=0.0)
    torch.manual_seed(3)
    loss = method.training_step(batch)["soft_ce"]
    torch.manual_seed(3)
    partner = partners(12, 4, within_image=True)
    mix = mixup_or_cutmix(48, (SIZE, SIZE), switch_probability=0.0, partner=partner)
    crop = batch["labelled"]["crop"].flatten(0, 1)
    target = method.targets(batch["labelled"]).flatten(0, 1)
    share = mix.share[:, None]
    log_q = method.student(share[..., None, None] * crop + (1 - share[..., None, None]) * crop[partner]).log_softmax(-1)
    mixed = share * target + (1 - share) * target[partner]
    torch.testing.assert_close(loss, -(mixed * log_q).sum(-1).mean())


# -- the system ------------------------------------------------------------------------------------------------------


class Counting(Frozen):
    """A teacher that counts the pictures that it is asked about."""

    asked = 0

    def __call__(self, fields, view):
        self.asked += len(fields[view])
        return super().__call__(fields, view)


def stage(steps: int = 30, batch_size: int = 32, **streams) -> Stage:
    trainer = Trainer(steps=steps, optimizer=Optimizer(name="adamw", lr=1e-2), checkpoint_every=7)
    return Stage(trainer, streams or {"labelled": StreamSettings(batch_size)})


CROPS = {
    "crops": 4,
    "crop_size": SIZE,
    "scale": (0.2, 1.0),
    "flip": False,
    "thresholds": "quantile",
    "label_batch_size": 100,
}


def run(path: Path, data: Data, by: nn.Module | Frozen, *, train: Stage | None = None, **settings) -> nn.Module:
    taught = by if isinstance(by, Frozen | Stored) else Frozen(by)
    return ferkd(Workspace(path, seed=1), data, student(), taught, train=train or stage(), **{**CROPS, **settings})


def test_the_teacher_is_asked_once_for_each_crop_and_a_second_run_loads_everything(digits, teacher, tmp_path):
    counting = Counting(teacher)
    first = run(tmp_path / "run", digits, counting)
    asked = counting.asked
    assert asked <= 4 * len(digits.train) + 100  # one batch more, by which the store learns what answers look like
    again = run(tmp_path / "run", digits, counting)
    assert counting.asked == asked
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_stored_teacher_trains_the_same_student_as_the_one_that_filled_it(digits, teacher, tmp_path):
    first = run(tmp_path / "live", digits, teacher)
    stored = Stored(tmp_path / "live/stages/label/store")
    second = run(tmp_path / "stored", digits, stored)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    other = Data(train=digits.train.with_fields({"image": 255 - digits.train.fields["image"]}), test=digits.test)
    with pytest.raises(UserError, match="was filled from other data"):
        run(tmp_path / "other", other, stored)


class Failing(nn.Module):
    """A student whose run is broken off at its n-th forward pass of training."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, images: Tensor) -> Tensor:
        self.calls -= self.training
        if self.calls == 0:
            raise KeyboardInterrupt
        return self.model(images)


def test_a_run_killed_in_mid_epoch_goes_on_to_the_very_same_weights(digits, teacher, tmp_path):
    def go(folder: str, calls: int) -> dict[str, Tensor]:
        network = Failing(student(), calls)
        ws = Workspace(tmp_path / folder, seed=1)
        return ferkd(ws, digits, network, Frozen(teacher), train=stage(steps=60), **CROPS).state_dict()

    whole = go("whole", -1)
    with pytest.raises(KeyboardInterrupt):
        go("killed", 50)  # an epoch has 37 steps, and every 7th leaves a checkpoint
    resumed = go("killed", -1)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_the_student_learns_to_read_digits(digits, teacher, tmp_path):
    taught = run(tmp_path / "run", digits, teacher, train=stage(steps=200)).eval()
    with torch.no_grad():
        guess = taught(digits.test.fields["image"].float() / 255).argmax(-1)
    assert (guess == digits.test.labels).float().mean() > 0.6


def test_what_is_measured_counts_the_bands_and_knows_the_hidden_object(cache, digits):
    train = digits.train
    boxes = torch.tensor([[0.25, 0.0, 0.75, 1.0]]).expand(len(train), -1)
    samples = train.with_fields({"hidden_box": boxes})
    score = crop_scores(cache, train, 5)
    band = bands_of(score, "quantile", 0.05, 0.3, 0.95)
    found = calibration_shares(cache, samples, score, band)
    assert found["dropped"] + found["calibrated"] + found["kept"] == pytest.approx(1)
    assert found["calibrated"] == pytest.approx(float((band == HARD).float().mean()))
    assert 0 < found["auc"] < 1
    left, _, right, _ = cache.params(train.index, cache.all_versions(train.index))["box"].unbind(-1)
    empty = (right <= 0.25) | (left >= 0.75)
    assert found["empty"] == pytest.approx(float(empty.float().mean()))
    assert found["empty_kept"] == pytest.approx(float(empty[band == IMPORTANT].float().mean()))
    assert "auc" not in calibration_shares(cache, train, score, band)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"train": stage(batch_size=30)}, "batch_size counts crops and is 30, no multiple of num_crops=4; give 32"),
        (
            {"train": stage(labelled=StreamSettings(32, {"crop": "identity"}))},
            "replays the stored crops; leave the stream's views out",
        ),
        ({"num_crops": 1}, "mix 'self' pairs the crops of one image and num_crops is 1"),
        ({"recover": "ori"}, "needs all 10 classes and top_k is 5"),
        ({"label_smoothing": 0.9}, "with 10 classes give at least 0 and less than 0.9"),
        ({"low": 0.9, "top": 0.5}, "expected 0 <= low <= top"),
        ({"middle": 1.5}, "middle is 1.5; give a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"switch_probability": 2.0}, "switch_probability is 2.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_teacher_is_asked(settings_, words, digits, teacher, tmp_path):
    counting = Counting(teacher)
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", digits, counting, **settings_)
    assert counting.asked == 0


def test_a_teacher_of_other_classes_is_refused(digits, tmp_path):
    other = load_model("small_cnn", num_classes=7, in_channels=1, config={"channels": [4]})
    with pytest.raises(UserError, match="answers for 7 classes and the data have 10"):
        run(tmp_path / "run", digits, other, crops=1)


@pytest.mark.slow
def test_a_step_of_a_resnet_50_on_crops_of_224_pixels(tmp_path):
    image = torch.randint(0, 256, (2, 3, 256, 320), dtype=torch.uint8)
    samples = Samples({"image": image, "label": torch.tensor([3, 998])}, [str(c) for c in range(1000)])
    resnet = load_model("hf-config:resnet", config={}, num_classes=1000)
    teacher = load_model("hf-config:resnet", config={"depths": [1, 1, 1, 1]}, num_classes=1000).eval()
    train = Stage(Trainer(steps=1), {"labelled": StreamSettings(4)})
    before = {name: value.clone() for name, value in resnet.named_parameters()}
    data = Data(train=samples, test=samples)
    sizes = {"crop_size": 224, "teacher_size": 288, "crops": 3, "num_crops": 2, "label_batch_size": 2}
    shipped = ferkd(Workspace(tmp_path / "run"), data, resnet, Frozen(teacher), train=train, **sizes)
    changed = [not torch.equal(before[name], value) for name, value in shipped.named_parameters()]
    assert all(value.isfinite().all() for value in shipped.parameters()) and sum(changed) > 0.9 * len(changed)
