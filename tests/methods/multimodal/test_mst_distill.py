"""MST-Distill: each stage's objective against its formula, and what each stage must leave alone.

Letters: B samples, C classes, M specialised teachers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.data.multimodal import drop_at_random
from limbeck.errors import UserError
from limbeck.evaluate.multimodal import MultimodalEvaluator
from limbeck.methods.multimodal.mst_distill import (
    CoTraining,
    RoutedDistillation,
    Specialising,
    decayed,
    kd,
    mst_distill,
    part_name,
)
from limbeck.models.masks import Masked, mask_for
from limbeck.models.moe import GateNet
from limbeck.models.multimodal import load_multimodal_model
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed
from limbeck.train import Clock, Optimizer, Stage, StreamSettings, Trainer, Workspace

B, C = 6, 4
SHAPES = {"image": (1, 8, 8), "spectrogram": (1, 8, 8)}
PLACES = [("fused", "fusion"), ("fused", "hidden"), ("other", "stages.0"), ("other", "stages.1")]
CNN = {"name": "small_cnn", "config": {"channels": [6, 8]}}


def networks(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    know = {"num_classes": C, "shapes": SHAPES}
    return {
        "student": load_multimodal_model(**CNN, modality="spectrogram", **know),
        "fused": load_multimodal_model(encoders=dict.fromkeys(SHAPES, CNN), hidden=12, **know),
        "other": load_multimodal_model(**CNN, modality="image", **know),
    }


def masks() -> dict[tuple[str, str], nn.Module]:
    torch.manual_seed(1)
    widths = {"fusion": (16,), "hidden": (12,), "stages.0": (6, 8, 8), "stages.1": (8, 4, 4)}
    return {place: mask_for(torch.zeros(1, *widths[place[1]])) for place in PLACES}


def batch(seed: int = 2) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    fields = {name: torch.rand(B, *shape, generator=generator) for name, shape in SHAPES.items()}
    return {"labelled": {**fields, "label": torch.arange(B) % C, "index": torch.arange(B)}}


def pool(nets: dict[str, nn.Module], given: dict[tuple[str, str], nn.Module]) -> Routed:
    teachers = [Frozen(Masked(nets[name], layer, mask)) for (name, layer), mask in given.items()]
    return Routed(teachers, [part_name(place) for place in given])


def routed(**more) -> RoutedDistillation:
    nets = networks()
    torch.manual_seed(3)
    return RoutedDistillation(nets["student"], GateNet(C, len(PLACES)), pool(nets, masks()), **more)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------- the divergence and stage 1


def test_kd_is_t_squared_times_torchs_batchmean_and_per_position_of_maps():
    p, q = torch.randn(5, C), torch.randn(5, C)
    torchs = 16 * F.kl_div((p / 4).log_softmax(1), (q / 4).softmax(1), reduction="batchmean")
    torch.testing.assert_close(kd(p, q, temperature=4.0), torchs)
    p, q = torch.randn(2, C, 3, 5), torch.randn(2, C, 3, 5)
    torchs = 16 * F.kl_div((p / 4).log_softmax(1), (q / 4).softmax(1), reduction="batchmean") / 15
    torch.testing.assert_close(kd(p, q, temperature=4.0), torchs)


def test_co_training_sums_the_tasks_and_all_pairs():
    nets = {name: net.eval() for name, net in networks().items()}
    losses = CoTraining(**nets, temperature=3.0).training_step(batch())
    fields = batch()["labelled"]
    z = {name: net(fields) for name, net in nets.items()}
    assert set(losses) == {f"{term}_{name}" for term in ("ce", "kd") for name in z}
    for name in z:
        torch.testing.assert_close(losses[f"ce_{name}"], F.cross_entropy(z[name], fields["label"]))
        others = [kd(z[name], z[j], temperature=3.0) for j in z if j != name]
        torch.testing.assert_close(losses[f"kd_{name}"], sum(others))


def test_in_co_training_gradient_flows_into_the_targets_too():
    method = CoTraining(**networks())
    method.training_step(batch())["kd_fused"].backward()
    for name in ("fused", "student", "other"):
        assert sum(p.grad.abs().sum() for p in getattr(method, name).parameters() if p.grad is not None) > 0, name


# ---------------------------------------------------------------- stage 2


def specialising() -> Specialising:
    nets = networks()
    frozen = {name: Frozen(nets[name]) for name in ("fused", "other")}
    return Specialising(Frozen(nets["student"]), frozen, masks())


def test_each_mask_learns_alone_and_the_networks_stay_bit_identical():
    method = specialising()
    fixed = [method.guide.model, *(teacher.model for teacher in method.frozen.values())]
    before = [weights(network) for network in fixed]
    optimizers = {part: torch.optim.Adam(ps, lr=0.01) for part, ps in method.parts().items()}
    assert list(optimizers) == ["fused_fusion", "fused_hidden", "other_stages_0", "other_stages_1"]
    method.train()
    for number, (part, losses) in enumerate(method.training_step(batch())):
        masked_before = [weights(mask) for mask in method.masks]
        optimizers[part].zero_grad()
        sum(losses.values()).backward()
        optimizers[part].step()
        for other, mask in enumerate(method.masks):
            same = all(torch.equal(v, masked_before[other][n]) for n, v in mask.state_dict().items())
            assert same == (other != number)
    for network, was in zip(fixed, before, strict=True):
        assert_unchanged(network, was)
        assert not network.training


def test_a_mask_is_trained_to_make_its_teacher_like_the_student():
    method, fields = specialising(), batch()["labelled"]
    target = method.guide.model(fields)
    for (part, losses), (name, layer) in zip(method.training_step(batch()), PLACES, strict=True):
        teacher = Masked(method.frozen[name].model, layer, method.masks[PLACES.index((name, layer))])
        torch.testing.assert_close(losses[f"kd_{part}"], kd(teacher(fields), target, temperature=4.0))
        assert losses[f"kd_{part}"].requires_grad


def test_masks_are_chosen_by_the_mean_of_each_teachers_masks():
    method = specialising()
    method.eval()
    samples = Samples({k: v for k, v in batch()["labelled"].items() if k != "index"})
    each = [float(next(iter(losses.values())).detach()) for _, losses in method.training_step(batch())]
    found = method.evaluate(method.masks, samples)["kd"]
    assert found == pytest.approx((each[0] + each[1]) / 2 + (each[2] + each[3]) / 2, rel=1e-4)


# ---------------------------------------------------------------- stage 3


def test_masks_of_ones_leave_the_plain_teachers():
    class Ones(nn.Module):
        def forward(self, feature: Tensor) -> Tensor:
            return torch.ones_like(feature)

    nets, fields = networks(), batch()["labelled"]
    found = pool(nets, {place: Ones() for place in PLACES}).stacked({"fields": fields}, "fields")
    for (name, _), logits in zip(PLACES, found, strict=True):
        assert torch.equal(logits, nets[name](fields))


def test_each_specialised_teacher_has_exactly_one_mask():
    """The official code removes its hooks after the step only: a network's second one then has both masks."""
    nets, given, fields = networks(), masks(), batch()["labelled"]
    found = pool(nets, given).stacked({"fields": fields}, "fields")
    fused = nets["fused"].eval()
    features = [fused.encoders[m](fields[m]) for m in fused.modalities]
    joined = torch.cat(features, 1)
    hidden = fused.hidden(joined)
    first, second = (given[place].eval() for place in PLACES[:2])
    torch.testing.assert_close(found[0], fused.head(fused.hidden(first(joined) * joined)))
    torch.testing.assert_close(found[1], fused.head(second(hidden) * hidden))


def test_the_step_is_the_formula():
    method = routed(k=2)
    method.eval()
    losses, fields = method.training_step(batch()), batch()["labelled"]
    z, stacked = method.student(fields), method.pool.stacked({"fields": fields}, "fields")
    gate = method.gate(z).softmax(1)
    order = gate.sort(1, descending=True).indices
    total = torch.zeros(())
    for b in range(B):
        for r in range(2):
            total = total + kd(z[b : b + 1], stacked[order[b, r], b : b + 1], temperature=4.0) / (2 * B)
    torch.testing.assert_close(losses["kd"], total)
    torch.testing.assert_close(losses["ce"], F.cross_entropy(z, fields["label"]))
    uniform = torch.full((4,), 0.25)
    torch.testing.assert_close(losses["balance"], (uniform * (uniform.log() - gate.mean(0).log())).sum() / 4)
    assert sum(method.logged[f"route_{name}"] for name in method.pool.names) == pytest.approx(1)


def test_equal_teachers_make_the_gate_irrelevant_to_kd():
    class Same(Routed):
        def stacked(self, fields, view):
            return super().stacked(fields, view)[:1].expand(len(self), -1, -1)

    def value(seed: int) -> Tensor:
        method = routed()
        method.pool = Same(method.pool.teachers)
        torch.manual_seed(seed)
        method.gate = GateNet(C, len(PLACES))
        return method.training_step(batch())["kd"]

    assert torch.equal(value(5), value(6))


def test_with_all_teachers_picked_kd_is_their_plain_average():
    method = routed(k=len(PLACES))
    method.eval()
    fields = batch()["labelled"]
    targets = method.pool.stacked({"fields": fields}, "fields")
    average = torch.stack([kd(method.student(fields), target, temperature=4.0) for target in targets]).mean()
    torch.testing.assert_close(method.training_step(batch())["kd"], average)


@pytest.mark.parametrize("balance", ["kl", "cv"])
def test_the_gate_learns_from_the_balance_alone_which_also_moves_the_student(balance):
    method = routed(balance=balance)
    losses = method.training_step(batch())
    gate, student = list(method.gate.parameters()), list(method.student.parameters())
    assert all(g is None for g in torch.autograd.grad(losses["kd"], gate, retain_graph=True, allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(losses["ce"], gate, retain_graph=True, allow_unused=True))
    of_gate = torch.autograd.grad(losses["balance"], gate, retain_graph=True)
    assert any(g.abs().sum() > 0 for g in of_gate)
    assert any(g.abs().sum() > 0 for g in torch.autograd.grad(losses["balance"], student))


def test_stage_three_leaves_masks_and_teachers_bit_identical():
    method = routed()
    before = [weights(teacher.model) for teacher in method.pool.teachers]
    assert {id(p) for p in method.parameters()} == {
        id(p) for part in (method.student, method.gate) for p in part.parameters()
    }
    optimizer = torch.optim.Adam(method.parts()["student"], lr=0.1)
    method.train()
    sum(method.training_step(batch()).values()).backward()
    optimizer.step()
    for teacher, was in zip(method.pool.teachers, before, strict=True):
        assert_unchanged(teacher.model, was)
        assert not any(module.training for module in teacher.model.modules())


def test_weights_decay_at_the_ends_of_epochs_from_the_first_on():
    """The official loop, epoch by epoch."""
    kd_weight, balance_weight = 1.0, 1.0
    for epoch in range(100):
        assert decayed(1.0, 0.5, 30, epoch) == pytest.approx(kd_weight)
        assert decayed(1.0, 0.9, 10, epoch) == pytest.approx(balance_weight)
        balance_weight *= 0.9 if epoch % 10 == 0 else 1
        kd_weight *= 0.5 if epoch % 30 == 0 else 1
    method = routed(ce_weight=2.0)
    method.clock = Clock(step=5, steps=50, steps_per_epoch=5)
    method.training_step(batch())
    assert method.weights == {"ce": 2.0, "kd": 0.5, "balance": 0.9}


def test_a_step_reads_nothing_back_from_the_device():
    method = routed().to("meta")
    method.pool.to(torch.device("meta"))
    fields = {name: value.to("meta") for name, value in batch()["labelled"].items()}
    losses = method.training_step({"labelled": fields})
    sum(losses.values()).backward()
    assert not method.logged.keys() & losses.keys() and method.weights.keys() == losses.keys()


class Dense(nn.Module):
    """Logits for every pixel, from the fields of its modalities."""

    def __init__(self, *modalities: str) -> None:
        super().__init__()
        self.modalities = modalities
        self.inner = nn.Conv2d(len(modalities), 8, 3, padding=1)
        self.head = nn.Conv2d(8, C, 1)

    def forward(self, fields) -> Tensor:
        return self.head(self.inner(torch.cat([fields[m] for m in self.modalities], 1)).relu())


def stages(epochs: int = 1) -> dict[str, Stage]:
    stage = Stage(
        Trainer(epochs=epochs, optimizer=Optimizer("adam", lr=0.01), accelerator="cpu"),
        {"labelled": StreamSettings(batch_size=16, views={})},
    )
    return {"cotrain": stage, "specialise": stage, "distill": replace(stage, trainer=replace(stage.trainer, epochs=2))}


def test_pixels_can_be_classified_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, C, (24, 6, 6), generator=generator, dtype=torch.uint8)
    mask[:, 0] = 255
    fields = {name: torch.rand(24, 1, 6, 6, generator=generator) for name in SHAPES}
    samples = Samples({**fields, "mask": mask})
    student = mst_distill(
        Workspace(tmp_path),
        Data(samples, samples, validation=samples),
        Dense("spectrogram"),
        Dense("image", "spectrogram"),
        Dense("image"),
        **stages(),
        fused_layers=["inner"],
        other_layers=["inner"],
        truth="mask",
    )
    assert student(batches_of(samples)).shape == (24, C, 6, 6)


def batches_of(samples: Samples) -> dict[str, Tensor]:
    return {name: samples.fields[name] for name in SHAPES}


# ---------------------------------------------------------------- the system


def digits() -> Data:
    """Real pictures twice: two different pictures of a class make a pair, one of them called a spectrogram."""
    images, label = load_digits(return_X_y=True)
    kept = label < C
    pictures = torch.tensor(images[kept] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    label = torch.tensor(label[kept])
    order = label.argsort(stable=True)
    rolled = torch.cat([rows.roll(7) for rows in order.split(torch.bincount(label).tolist())])
    samples = Samples({"image": pictures[order], "spectrogram": pictures[rolled], "label": label[order]})
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return Data(samples.select(rows[:160]), samples.select(rows[160:260]), validation=samples.select(rows[260:320]))


def run(folder, data: Data, **more):
    ws = Workspace(folder, {"who": "mst"}, evaluator=MultimodalEvaluator())
    student = mst_distill(ws, data, **networks(), **stages(2), other_layers=["stages.0", "stages.1"], **more)
    return ws, student


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mst")
    return folder, *run(folder, digits())


def test_the_system_trains_in_three_stages_and_keeps_the_best_epochs(finished):
    _, ws, student = finished
    assert list(ws.fits) == ["cotrain", "specialise", "distill"]
    assert student.modalities == ("spectrogram",)
    for stage, metric in (("specialise", "kd"), ("distill", "task_loss")):
        rows = [row[metric] for row in ws.fits[stage].validation]
        assert len(rows) == 2 and ws.fits[stage].metrics[metric] == pytest.approx(min(rows), rel=1e-5)
    shares = [ws.measured[f"routing.{part_name(place)}"] for place in PLACES]
    assert sum(shares) == pytest.approx(1) and ws.measured["routing.largest"] == max(shares)
    assert len(ws.exhibits) == 1


def test_run_again_it_loads_all_stages_bit_for_bit(finished):
    folder, ws, student = finished
    again, loaded = run(folder, digits())
    assert_unchanged(loaded, weights(student))
    assert again.measured == ws.measured and not loaded.training


def test_data_in_which_a_modality_is_missing_are_refused(tmp_path):
    data = digits()
    lacking = replace(data, train=drop_at_random(data.train, {"image": 0.25}, seed=0))
    with pytest.raises(UserError, match="'image', which fused reads, is missing in 40 of 160"):
        run(tmp_path, lacking)
    with pytest.raises(UserError, match="k is 5, but there are 4"):
        run(tmp_path / "k", data, k=5)


@pytest.mark.slow
def test_real_encoders_of_transformers_make_a_step_of_each_stage(tmp_path):
    """ViT-B/16 on pictures and AST on spectrograms, from their configurations."""
    shapes = {"image": (3, 32, 32), "spectrogram": (1, 32, 32)}
    generator = torch.Generator().manual_seed(0)
    fields = {name: torch.rand(2, *shape, generator=generator) for name, shape in shapes.items()}
    samples = Samples({**fields, "label": torch.tensor([0, 1])})
    know = {"num_classes": 2, "shapes": shapes}
    vit, ast = "hf-config:vit", "hf-config:audio-spectrogram-transformer"
    one_step = Stage(
        Trainer(steps=1, optimizer=Optimizer("adam", lr=1e-4), accelerator="cpu"),
        {"labelled": StreamSettings(batch_size=2, views={})},
    )
    student = load_multimodal_model("small_cnn", modality="spectrogram", **know)
    mst_distill(
        Workspace(tmp_path),
        Data(samples, samples),
        student,
        load_multimodal_model(encoders={"image": vit, "spectrogram": ast}, **know),
        load_multimodal_model(vit, modality="image", **know),
        cotrain=one_step,
        specialise=one_step,
        distill=one_step,
        fused_layers=["fusion", "hidden"],
        other_layers=["vit.layernorm"],
        rank=8,
    )
    assert student(fields).isfinite().all()
