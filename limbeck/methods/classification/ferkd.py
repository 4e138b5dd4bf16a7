"""FerKD: a student learns from a teacher's stored labels of crops, of which the unreliable ones are mended.

Shen: FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023; crops and stored labels as in FKD
(Shen, Xing: A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022; szq0214/FKD).

    1. label      crops r of each image, drawn once: the K largest of p_r = softmax(T(r)) are stored with box and flip
    2. calibrate  c_r = p_r[y];  c < T_L or c > T_T: the crop is dropped;  T_L <= c < T_M: its label becomes
                  1 - eps on y and eps / (C - 1) elsewhere;  T_M <= c <= T_T: its label stays
    3. train      n_c surviving crops of each of B / n_c images, every crop mixed with another one of its own image:
                  x = lambda x_a + (1 - lambda) x_b (or a pasted box),  q = lambda q_a + (1 - lambda) q_b,
                  L = - mean_crops sum_c q_c log softmax(z / t)_c

Shapes: N images, B images of a batch, V stored crops of an image, R crops of an image in a batch (n_c), K kept
classes, C classes, S edge of a crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from limbeck.data import Data, MultiCrop, Samples, Stream, mixup_or_cutmix, permutation, shown_share
from limbeck.errors import UserError, require_positive, require_share
from limbeck.labels import HARD, IMPORTANT, UNINFORMATIVE, confidence_bands, keep_median, one_hot, quantile
from limbeck.losses import soft_cross_entropy
from limbeck.models import TopK
from limbeck.teachers import CropReader, Dtype, Stored, StoredCrops, Teacher
from limbeck.train import Bars, Batch, Fit, Losses, Method, Pictures, Stage, StreamSettings, Workspace

Thresholds = Literal["absolute", "quantile"]
Score = Literal["label", "max"]
Recovery = Literal["marginal_smoothing", "marginal_renorm", "smoothing", "hard", "ori"]
Mixing = Literal["self", "batch", "none"]
BANDS = {"dropped": UNINFORMATIVE, "calibrated": HARD, "kept": IMPORTANT}


def ferkd(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    teacher: Teacher,
    *,
    train: Stage,
    crops: int = 500,
    crop_size: int | None = None,
    teacher_size: int | None = None,
    scale: tuple[float, float] = (0.08, 0.936),
    flip: bool = True,
    top_k: int = 5,
    dtype: Dtype = "float16",
    label_batch_size: int = 256,
    num_crops: int = 4,
    thresholds: Thresholds = "absolute",
    low: float = 0.05,
    middle: float = 0.15,
    top: float = 0.95,
    label_smoothing: float = 0.1,
    score: Score = "label",
    recover: Recovery = "marginal_smoothing",
    mix: Mixing = "self",
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
    temperature: float = 1.0,
) -> nn.Module:
    """The three phases. Ships the student, trained without the teacher in memory.

    Args:
        student: images to logits [B, C].
        teacher: images to logits [B, C], asked once for each crop. One that is stored already, under the view `crop`,
            is read as it is.
        train: stream `labelled`; its `batch_size` counts crops, its view is the stored crops.
        crops: V, crops of each image that are drawn and labelled.
        crop_size, teacher_size: edge of a crop as the student and the teacher see it; None is the images' height.
        scale, flip: share of the image that a crop covers; whether half of the crops are flipped.
        top_k, dtype: how many classes of each crop are stored, and in which numbers.
        label_batch_size: crops that the teacher sees at once.
        num_crops: n_c, crops of one image in a batch.
        thresholds: whether `low`, `middle`, `top` (T_L, T_M, T_T) are values of c, or shares of all crops: quantiles
            of c. With 0, 0, 1 all labels stay as they are, which is FKD.
        label_smoothing: eps.
        score: whether c is the probability of the label, or the largest one.
        recover: how C probabilities come from K, see `recover_label`.
        mix: a crop's partner: another one of its image, any of the batch (FKD), or none.
        mixup_alpha, cutmix_alpha: lambda ~ Beta(alpha, alpha); CutMix is drawn with `switch_probability`.
        temperature: t, of the student alone.

    Raises:
        UserError: an argument out of range, a batch size that `num_crops` does not divide, views of the stream's own,
            or a stored teacher that answers for other classes.
    """
    classes = data.num_classes
    require_positive(temperature=temperature, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
    require_positive(crops=crops, num_crops=num_crops, top_k=top_k, label_batch_size=label_batch_size)
    require_share(switch_probability=switch_probability)
    _check_limits(thresholds, low, middle, top)
    _check_labels(label_smoothing, recover, top_k, classes)
    if mix == "self" and num_crops < 2:
        raise UserError("mix 'self' pairs the crops of one image and num_crops is 1; give at least 2, or mix none")
    streams = _crop_stream(train, num_crops, crop_size).on(labelled=data.train)
    k, samples = min(top_k, classes), data.train

    views = {"crop": MultiCrop(1, teacher_size, scale, flip=flip)}
    stored = ws.store(
        "label",
        teacher,
        samples,
        views=views,
        top_k=k,
        values="log_probabilities",  # so that rounding never makes a probability larger than 1
        dtype=dtype,
        versions=crops,
        batch_size=label_batch_size,
    )
    cache = StoredCrops(stored)
    if cache.classes != classes:
        raise UserError(f"the teacher answers for {cache.classes} classes and the data have {classes}")
    if isinstance(teacher, Stored):
        stored.check(samples)

    def calibrate() -> dict[str, Tensor]:
        score_NV = crop_scores(cache, samples, k, score)
        return {"score": score_NV, "band": bands_of(score_NV, thresholds, low, middle, top)}

    found = ws.compute("calibrate", calibrate)
    score_NV, band_NV = found["score"], found["band"]
    ws.measure("calibration", lambda: calibration_shares(cache, samples, score_NV, band_NV))
    _show(ws, cache, samples, score_NV, band_NV, crop_size)

    method = FerKD(
        student,
        CropReader(
            cache,
            samples.index,
            band_NV != UNINFORMATIVE,
            band_NV == HARD,
            num_crops=num_crops,
            k=k,
            seed=ws.seed,
        ),
        label_smoothing=label_smoothing,
        recover=recover,
        mix=mix,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        switch_probability=switch_probability,
        temperature=temperature,
    )
    shipped = ws.fit("train", method, streams, train.trainer, validation=data.validation).shipped()
    ws.measure("training", lambda: _course(ws.fits["train"]))
    return shipped


# -- phase 2: calibration --------------------------------------------------------------------------------------------


def crop_scores(cache: StoredCrops, samples: Samples, k: int, score: Score = "label") -> Tensor:
    """c of every stored crop, float32 [N,V]: the stored probability of its image's label, or the largest one."""
    parts = []
    for index_B, label_B in zip(samples.index.split(1024), samples.labels.split(1024), strict=True):
        kept = cache.top_k(index_B, cache.all_versions(index_B), k)
        parts.append(kept.log_probs[..., 0].exp() if score == "max" else label_score(kept, label_B[:, None]))
    return torch.cat(parts)


def label_score(kept: TopK, label: Tensor) -> Tensor:
    """p[y] of each item, float32 [...]; the labels, int64, broadcast to [...].

    A label that was not kept has an equal share of the mass that is left, as in `recover_label`.
    """
    is_label = kept.ids == label[..., None]
    share = kept.rest / max(1, kept.classes - kept.ids.shape[-1])
    return torch.where(is_label.any(-1), (kept.log_probs.exp() * is_label).sum(-1), share)


def bands_of(score_NV: Tensor, thresholds: Thresholds, low: float, middle: float, top: float) -> Tensor:
    """int64 [N,V]: the band of each crop; an image that would lose all of them keeps its median one."""
    limits: tuple[float | Tensor, ...] = (low, middle, top)
    if thresholds == "quantile":
        limits = tuple(quantile(score_NV, share) for share in (low, middle, top))
    return keep_median(confidence_bands(score_NV, *limits), score_NV, limits[1])


def recover_label(kept: TopK, how: Recovery = "marginal_smoothing") -> Tensor:
    """Probabilities of all C classes from the K that were kept, float32 [..., C]; they sum to 1.

    `marginal_smoothing` spreads what is left evenly over the other classes, `marginal_renorm` rescales the kept ones,
    `smoothing` keeps the likeliest alone and spreads what it leaves, `hard` puts 1 on it, `ori` has all C.
    """
    if how == "hard":
        return one_hot(kept.ids[..., 0], kept.classes)
    dense = (kept.cut(1) if how == "smoothing" else kept).dense("ignore" if how == "marginal_renorm" else "spread")
    return dense.softmax(-1)  # they sum to 1 already, but for what 16 bits round off


def calibrated_label(label: Tensor, classes: int, epsilon: float) -> Tensor:
    """1 - epsilon on the label and epsilon / (C - 1) on each other class: int64 [...] to float32 [..., C]."""
    return one_hot(label, classes, smoothing=epsilon * classes / (classes - 1))


# -- phase 3: training -----------------------------------------------------------------------------------------------


class FerKD(Method):
    """The student learns the stored labels of its crops, the hard ones calibrated, mixed within each image.

    Args:
        student: crops to logits.
        reader: puts crops and their labels beside each batch; `marked` are those to be calibrated. The others are
            those of `ferkd`.
    """

    streams = {"labelled": ("crop", "label")}

    def __init__(
        self,
        student: nn.Module,
        reader: CropReader,
        *,
        label_smoothing: float = 0.1,
        recover: Recovery = "marginal_smoothing",
        mix: Mixing = "self",
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        switch_probability: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.reader = student, reader
        self.label_smoothing, self.recover, self.mix = label_smoothing, recover, mix
        self.mixup_alpha, self.cutmix_alpha, self.switch_probability = mixup_alpha, cutmix_alpha, switch_probability
        self.temperature = temperature

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        streams["labelled"].beside(self.reader)

    def training_step(self, batch: Batch) -> Losses:
        crop_BRxSS, target_BRC = batch["labelled"]["crop"], self.targets(batch["labelled"])
        crop, target = crop_BRxSS.flatten(0, 1), target_BRC.flatten(0, 1)
        if self.mix != "none":
            mix = mixup_or_cutmix(
                len(crop),
                (crop.shape[-2], crop.shape[-1]),
                mixup_alpha=self.mixup_alpha,
                cutmix_alpha=self.cutmix_alpha,
                switch_probability=self.switch_probability,
                partner=partners(*target_BRC.shape[:2], within_image=self.mix == "self", device=crop.device),
                device=crop.device,
            )
            mixed = mix.labels(target)
            self.log(label_shift=(mixed - target).norm(dim=-1).mean())
            crop, target = mix.pixels(crop), mixed
        logits = self.student(crop).float()
        loss = soft_cross_entropy(logits, target, temperature=self.temperature, reduction="batchmean")
        return {"soft_ce": loss}

    def targets(self, labelled: Mapping[str, Any]) -> Tensor:
        """The label of each crop, float32 [B,R,C]: the teacher's, or where it is calibrated the softened class."""
        classes = self.reader.crops.classes
        kept = TopK(labelled["crop_ids"], labelled["crop_log_probs"], labelled["crop_rest"], classes)
        calibrated_B1C = calibrated_label(labelled["label"], classes, self.label_smoothing)[:, None]
        return torch.where(labelled["crop_marked"][..., None], calibrated_B1C, recover_label(kept, self.recover))


def partners(images: int, num_crops: int, *, within_image: bool, device: torch.device | str = "cpu") -> Tensor:
    """int64 [B R]: each crop's partner, those of one image in a row: another one of its image (SelfMix), or any."""
    group = torch.arange(images, device=device).repeat_interleave(num_crops) if within_image else None
    return permutation(images * num_crops, group=group, derange=within_image, device=device)


# -- what is measured and shown --------------------------------------------------------------------------------------


def calibration_shares(cache: StoredCrops, samples: Samples, score_NV: Tensor, band_NV: Tensor) -> dict[str, float]:
    """Share of the crops in each band; with the field `hidden_box`, how well c tells crops that show the object (at
    least half of its box) from others (AUC), and the share of each band's crops that show nothing of it."""
    values = {name: float((band_NV == band).float().mean()) for name, band in BANDS.items()}
    if "hidden_box" in samples.fields:
        boxes_NV4 = cache.params(samples.index, cache.all_versions(samples.index))["box"]
        shown_NV = shown_share(boxes_NV4, samples.fields["hidden_box"][:, None])
        visible_NV, empty_NV = shown_NV >= 0.5, (shown_NV == 0).float()
        values["auc"] = float(roc_auc_score(visible_NV.flatten().numpy(), score_NV.flatten().numpy()))
        values["empty"] = float(empty_NV.mean())
        values |= {f"empty_{n}": float(empty_NV[band_NV == b].mean()) for n, b in BANDS.items() if values[n] > 0}
    return values


def _course(fit: Fit) -> dict[str, float]:
    """Seconds of the training alone, and the validation accuracy when it was measured first."""
    first = fit.validation[0] if fit.validation else {}
    return {"seconds": fit.seconds, **({"early_accuracy": first["accuracy"]} if "accuracy" in first else {})}


def _show(
    ws: Workspace, cache: StoredCrops, samples: Samples, score_NV: Tensor, band_NV: Tensor, size: int | None
) -> None:
    """A dozen crops of each band from the lowest to the highest c, and the shares of the bands."""
    ws.show("Share of the crops", Bars({name: float((band_NV == band).float().mean()) for name, band in BANDS.items()}))
    classes = samples.classes or []
    for name, band in BANDS.items():
        place_M2 = (band_NV == band).nonzero()
        if not len(place_M2):
            continue
        rising_M2 = place_M2[score_NV[band_NV == band].argsort()]
        row, version = rising_M2[torch.linspace(0, len(rising_M2) - 1, 12).long()].unbind(1)
        image = samples.batch(row)["image"]
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        crop = MultiCrop(1, size).apply(image, cache.params(samples.index[row], version[:, None]))[:, 0]
        labels = zip(samples.labels[row].tolist(), score_NV[row, version].tolist(), strict=True)
        ws.show(f"Crops that were {name}", Pictures(crop, [f"{classes[y]}: c = {c:.2f}" for y, c in labels]))


# -- checks ----------------------------------------------------------------------------------------------------------


def _crop_stream(train: Stage, num_crops: int, crop_size: int | None) -> Stage:
    """The stage with a stream of B / n_c images, of each of which its view cuts n_c crops."""
    settings = train.streams.get("labelled", StreamSettings())
    if settings.views not in ({}, StreamSettings().views):
        raise UserError("ferkd replays the stored crops; leave the stream's views out, and set scale and crop_size")
    if settings.batch_size % num_crops:
        raise UserError(
            f"batch_size counts crops and is {settings.batch_size}, no multiple of num_crops={num_crops}; give "
            f"{-(-settings.batch_size // num_crops) * num_crops}"
        )
    views = {"crop": {"name": "multi_crop", "crops": num_crops, "size": crop_size}}
    labelled = replace(settings, batch_size=settings.batch_size // num_crops, views=views)
    return replace(train, streams={**train.streams, "labelled": labelled})


def _check_limits(thresholds: Thresholds, low: float, middle: float, top: float) -> None:
    if thresholds == "quantile":
        require_share(low=low, middle=middle, top=top)
    if min(low, middle) < 0 or low > top:
        raise UserError(f"low, middle, top are {low}, {middle}, {top}; expected 0 <= low <= top and middle at least 0")


def _check_labels(label_smoothing: float, recover: Recovery, top_k: int, classes: int) -> None:
    if not 0 <= label_smoothing < 1 - 1 / classes:
        raise UserError(
            f"label_smoothing is {label_smoothing}; with {classes} classes give at least 0 and less than "
            f"{1 - 1 / classes:.3g}, so that the label stays the likeliest class"
        )
    if recover == "ori" and top_k < classes:
        raise UserError(f"recover 'ori' needs all {classes} classes and top_k is {top_k}; raise top_k")
