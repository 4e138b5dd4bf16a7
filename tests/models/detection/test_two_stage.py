"""The two-stage detector as a whole; the references are its own parts put together by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import UserError
from limbeck.models import load_weights, save_model
from limbeck.models.detection import (
    Detector,
    FrozenBatchNorm2d,
    Sampled,
    Targets,
    decode_boxes,
    encode_boxes,
    load_detector,
    pairwise_iou,
    region_losses,
    rpn_losses,
)

SMALL = {"channels": [8, 8, 8], "width": 8, "hidden": 16, "bins": 4}
EMPTY = Targets(torch.zeros(2, 3, 4), torch.full((2, 3), -1))
TWO = Targets(
    torch.tensor([[[5.0, 5, 25, 30], [30, 10, 44, 26]], [[10.0, 12, 40, 38], [0, 0, 0, 0]]]),
    torch.tensor([[0, 2], [1, -1]]),
)


def detector(**config):
    torch.manual_seed(0)
    return load_detector("compact", num_classes=3, config={**SMALL, **config})


@pytest.fixture
def pictures():
    torch.manual_seed(1)
    return torch.rand(2, 3, 40, 48)


def test_it_answers_the_protocol_and_gives_padded_detections(pictures):
    model = detector(score=0.0, most=7)
    assert isinstance(model, Detector)
    found = model(pictures)
    assert found.boxes.shape == (2, 7, 4) and found.labels.dtype == torch.int64
    assert ((found.labels >= 0) == (found.scores > 0)).all()
    assert (found.scores.diff(dim=1) <= 0).all()
    assert (found.boxes >= 0).all() and (found.boxes[..., 2] <= 48).all() and (found.boxes[..., 3] <= 40).all()


def test_where_nothing_is_found_all_is_padding(pictures):
    found = detector(score=0.99)(pictures)
    assert (found.labels == -1).all() and not found.scores.any() and not found.boxes.any()


def test_images_of_a_batch_do_not_see_each_other(pictures):
    model = detector(score=0.0)
    together, alone = model(pictures), model(pictures[1:])
    torch.testing.assert_close(together.boxes[1:], alone.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(together.scores[1:], alone.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [TWO, EMPTY, Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0).long())])
def test_losses_are_finite_and_train_every_part_that_they_should(pictures, targets):
    model = detector()
    losses = model.losses(pictures, targets)
    assert set(losses) == {"rpn_objectness", "rpn_box", "region_class", "region_box"}
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None or g.isfinite().all() for g in gradients.values())
    objects = targets is TWO
    assert gradients["classifier.weight"].any() and gradients["rpn_objectness.weight"].any()
    assert bool((losses["rpn_box"] > 0) & (losses["region_box"] > 0)) is objects
    assert bool(gradients["box_regressor.weight"].any()) is objects


def test_overfitting_two_pictures_finds_their_objects(pictures):
    model = detector(anchor_sizes=[16.0, 24.0], norm="group", samples=32, positive_share=0.5)
    pictures = pictures * 0.2
    for picture, boxes, labels in zip(pictures, TWO.boxes, TWO.labels, strict=True):
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            picture[label, y1:y2, x1:x2] = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(model.losses(pictures, TWO).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    found = model(pictures)
    for row, place in (TWO.labels >= 0).nonzero().tolist():
        scores = found.scores[row].masked_fill(found.labels[row] != TWO.labels[row, place], -1)
        surest = found.boxes[row, scores.argmax()]
        assert scores.max() > 0.3
        assert pairwise_iou(surest[None], TWO.boxes[row, place : place + 1]).item() > 0.5


def test_given_boxes_are_scored_as_they_are_and_in_any_order(pictures):
    model = detector()
    features = model.features(pictures)
    scored = model.score_boxes(features, TWO.boxes)
    assert (
        scored.logits.shape == (2, 2, 4) and scored.deltas.shape == (2, 2, 3, 4) and scored.features.shape == (2, 2, 16)
    )
    flipped = model.score_boxes(features, TWO.boxes.flip(1))
    torch.testing.assert_close(flipped.logits.flip(1), scored.logits)
    torch.testing.assert_close(model.classifier(scored.features), scored.logits)
    assert model.pool(features, TWO.boxes).shape == (2, 2, 8, 4, 4)


def test_detections_are_the_decoded_boxes_of_the_proposals(pictures):
    model = detector(score=0.0, nms=1.0, candidates=10_000, most=10_000)
    torch.nn.init.normal_(model.box_regressor.weight, std=0.1)
    features = model.features(pictures)
    proposals = model.propose(model.rpn(features), features)
    scored = model.score_boxes(features, proposals.boxes)
    found = model.select(scored, proposals.boxes, proposals.valid, features)
    label, score, box = found.labels[0, 0], found.scores[0, 0], found.boxes[0, 0]
    probabilities = scored.logits[0].softmax(-1)[:, :-1]
    row = probabilities[:, label].argmax()
    torch.testing.assert_close(score, probabilities.max())
    expected = decode_boxes(scored.deltas[0, row, label], proposals.boxes[0, row])
    expected = expected.minimum(torch.tensor([48.0, 40, 48, 40])).clamp(min=0)
    torch.testing.assert_close(box, expected)


def test_test_mode_has_its_own_number_of_proposals(pictures):
    model = detector(rpn_before=[100, 50], rpn_after=[30, 10])
    features = model.features(pictures)
    rpn = model.rpn(features)
    assert model.propose(rpn, features, training=True).boxes.shape[1] == 30
    assert model.propose(rpn, features).boxes.shape[1] == 10


def test_rpn_losses_are_those_of_a_loop():
    torch.manual_seed(0)
    logits, deltas = torch.randn(1, 4), torch.randn(1, 4, 4)
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 15, 15], [0, 0, 40, 40]])
    matched, chosen = torch.tensor([[0, -1, -2, -1]]), torch.tensor([[True, True, False, False]])
    targets = Targets(torch.tensor([[[1.0, 1, 11, 12]]]), torch.tensor([[0]]))
    objectness, box = rpn_losses(logits, deltas, anchors, matched, chosen, targets, normalizer=8.0)
    torch.testing.assert_close(objectness, (F.softplus(-logits[0, 0]) + F.softplus(logits[0, 1])) / 8)
    wanted = encode_boxes(targets.boxes[0, 0], anchors[0], (1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(box, (deltas[0, 0] - wanted).abs().sum() / 8)


def sampled(labels) -> Sampled:
    labels = torch.tensor([labels])
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(*labels.shape, 4)
    return Sampled(boxes, labels, torch.zeros_like(labels), boxes + torch.tensor([1.0, 0, 2, 3]))


def test_region_losses_are_means_over_real_regions_and_boxes_of_objects_alone():
    torch.manual_seed(0)
    logits, deltas = torch.randn(1, 4, 4), torch.randn(1, 4, 3, 4)
    picked = sampled([1, 3, -1, 3])
    class_loss, box_loss = region_losses(logits, deltas, picked)
    rows = [0, 1, 3]
    torch.testing.assert_close(class_loss, F.cross_entropy(logits[0, rows], picked.labels[0, rows]))
    wanted = encode_boxes(picked.target_boxes[0, 0], picked.boxes[0, 0])
    torch.testing.assert_close(box_loss, (deltas[0, 0, 1] - wanted).abs().sum() / 3)


def test_region_weights_and_normalizers_are_those_given_and_unknown_labels_count_nowhere():
    torch.manual_seed(0)
    logits, deltas = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 3, 4)
    picked = sampled([0, 3, 4])  # 3 is background, 4 an unknown class
    weight = torch.tensor([[1.0, 0.25, 7.0]])
    class_loss, _ = region_losses(logits, deltas, picked, class_weight_BS=weight, class_normalizer=weight[:, :2].sum())
    ce = F.cross_entropy(logits[0, :2], picked.labels[0, :2], reduction="none")
    torch.testing.assert_close(class_loss, (ce[0] + 0.25 * ce[1]) / 1.25)
    class_loss.backward()
    assert not logits.grad[0, 2].any()


def test_a_class_agnostic_head_has_one_set_of_deltas(pictures):
    model = detector(class_agnostic=True)
    assert model.score_boxes(model.features(pictures), TWO.boxes).deltas.shape == (2, 2, 1, 4)
    assert model.losses(pictures, TWO)["region_box"] > 0
    assert model(pictures).boxes.shape[-1] == 4


def test_frozen_batchnorm_keeps_its_statistics_and_weights_in_training_mode(pictures):
    model = detector(norm="frozen").train()
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    sum(model.losses(pictures, TWO).values()).backward()
    assert norms and all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(norm.weight.grad is None and not norm.training for norm in norms)


def test_a_saved_detector_comes_back_the_same_with_its_settings_and_normalisation(pictures, tmp_path):
    model = detector(score=0.0, most=5)
    save_model(model, tmp_path)
    again = load_detector(tmp_path)
    assert again.settings == model.settings or again.settings.most == 5
    torch.testing.assert_close(again(pictures).scores, model(pictures).scores)
    torch.testing.assert_close(again.normalize.mean, model.normalize.mean)
    load_weights(detector(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "compakt"}, "no detector 'compakt'"),
        ({"name": "compact"}, "num_classes"),
        ({"name": "compact", "num_classes": 3, "config": {"widht": 8}}, "no argument 'widht'"),
        ({"name": "compact", "num_classes": 3, "config": {"stride": 3}}, "stride is 3"),
        ({"name": "compact", "num_classes": 0}, "num_classes=0"),
        ({"name": torch.nn.Linear(2, 2)}, "no losses"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        load_detector(**arguments)


def test_a_saved_detector_of_other_classes_is_refused(tmp_path):
    save_model(detector(), tmp_path)
    with pytest.raises(UserError, match="has 3 classes, 5 were asked for"):
        load_detector(tmp_path, num_classes=5)


def test_torchvision_is_asked_for_only_when_it_is_named():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs torchvision"):
            load_detector("torchvision-config:fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=3)


def test_a_small_resnet_c4_has_stride_16_and_its_last_stage_in_the_head(pictures):
    config = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8, "layer_type": "basic"}
    settings = {"anchor_sizes": [16.0, 32.0], "bins": 4, "rpn_before": [50, 50], "rpn_after": [20, 20], "samples": 8}
    model = load_detector("resnet-c4", num_classes=3, config={**config, **settings})
    features = model.features(pictures)
    assert features.map.shape == (2, 16, 3, 3)
    assert model.score_boxes(features, TWO.boxes).features.shape == (2, 2, 16)
    sum(model.losses(pictures, TWO).values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.head.parameters())


@pytest.mark.slow
def test_resnet_50_c4_makes_a_training_step_at_real_size():
    config = {"rpn_before": [2000, 1000], "rpn_after": [300, 100], "samples": 32}
    model = load_detector("resnet-c4", num_classes=20, config=config)
    assert sum(p.numel() for p in model.parameters()) > 30e6
    targets = Targets(torch.tensor([[[40.0, 40, 200, 260]]]), torch.tensor([[7]]))
    losses = model.losses(torch.rand(1, 3, 320, 416), targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
