"""Taps: inner features by name, early stop, compile, threads, no trace left."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from limbeck.errors import UserError
from limbeck.models import Normalized, SmallCnn, SmallViT, Taps, load_model, resnet20

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4}


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def staged(model: SmallCnn, image: torch.Tensor) -> list[torch.Tensor]:
    outs = [model.stages[0](image)]
    for stage in model.stages[1:]:
        outs.append(stage(nn.functional.max_pool2d(outs[-1], 2)))
    return outs


@pytest.mark.parametrize("stop_early", [False, True])
def test_taps_give_what_the_modules_compute(stop_early):
    model, image = SmallCnn().eval(), torch.rand(2, 3, 16, 16)
    outputs = Taps(model, ["stages.2", "stages.0"], stop_early)(image)
    expected = staged(model, image)
    torch.testing.assert_close(outputs.features["stages.0"], expected[0])
    torch.testing.assert_close(outputs.features["stages.2"], expected[2])
    assert list(outputs.features) == ["stages.2", "stages.0"]
    if stop_early:
        assert outputs.logits is None
    else:
        torch.testing.assert_close(outputs.logits, model(image))


def test_early_stop_runs_nothing_behind_the_last_name():
    model = resnet20().train()
    Taps(model, ["layer1.2", "bn1"], stop_early=True)(torch.rand(2, 3, 8, 8))
    assert model.layer1[2].bn2.num_batches_tracked == 1
    assert model.layer2[0].bn1.num_batches_tracked == 0


def test_gradient_flows_through_taps():
    model = SmallCnn()
    Taps(model, ["stages.1"], stop_early=True)(torch.rand(2, 3, 8, 8)).features["stages.1"].sum().backward()
    assert model.stages[0][0].weight.grad is not None
    assert model.stages[2][0].weight.grad is None


def test_a_later_change_in_place_does_not_reach_the_feature():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.relu(self.first(x))
            out += 1
            return out

    model, x = InPlace(), torch.randn(4, 3)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(Taps(model, ["first"])(x).features["first"], model.first(x))


def test_no_hook_is_left_after_use_or_after_an_exception():
    model = SmallCnn()
    Taps(model, ["stages.0"])(torch.rand(1, 3, 8, 8))
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError):
        Taps(model, ["stages.0"])(torch.rand(1, 5, 8, 8))
    assert hook_count(model) == 0


def test_taps_of_two_threads_on_one_model_do_not_mix():
    model = SmallCnn().eval()
    images = [torch.rand(2, 3, 16, 16) for _ in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        taps = Taps(model, [f"stages.{i % 2}"], stop_early=i >= 2)
        expected = staged(model, images[i])[i % 2]
        for _ in range(25):
            if not torch.equal(taps(images[i]).features[f"stages.{i % 2}"], expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hook_count(model) == 0


def test_wrapper_prefixes_may_be_left_out():
    net = SmallCnn().eval()
    model = Normalized(net, [0.0] * 3, [1.0] * 3)
    image = torch.rand(1, 3, 8, 8)
    short = Taps(model, ["stages.0"])(image).features["stages.0"]
    long = Taps(model, ["model.stages.0"])(image).features["model.stages.0"]
    distributed = Taps(net, ["module.stages.0"])(image).features["module.stages.0"]
    torch.testing.assert_close(short, staged(net, image)[0])
    torch.testing.assert_close(long, short)
    torch.testing.assert_close(distributed, short)


def test_a_deep_copy_taps_the_copy():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = SmallCnn().eval()
            self.taps = Taps(self.student, ["head"])

    method, image = Method(), torch.rand(1, 3, 8, 8)
    method.taps(image)
    other = copy.deepcopy(method)
    nn.init.zeros_(other.student.head.weight)
    nn.init.zeros_(other.student.head.bias)
    assert other.taps(image).features["head"].abs().sum() == 0
    assert method.taps(image).features["head"].abs().sum() > 0
    assert set(method.state_dict()) == {f"student.{k}" for k in method.student.state_dict()}


def test_small_vit_gives_attention_that_sums_to_one():
    model = SmallViT(image_size=16)
    attention = Taps(model, ["blocks.1.attention.softmax@attention"])(torch.rand(2, 3, 16, 16)).attention
    weights = attention["blocks.1.attention.softmax"]
    assert weights.shape == (2, 3, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 17))


def test_transformers_vit_gives_hidden_states_and_attention():
    model = load_model("hf-config:vit", config=VIT, image_size=16, attn_implementation="eager").eval()
    image = torch.rand(2, 3, 16, 16)
    outputs = Taps(model, ["vit.layers.0", "vit.layers.1.attention@attention", "vit"])(image)
    whole = model.model(pixel_values=image, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.features["vit.layers.0"], whole.hidden_states[1])
    torch.testing.assert_close(outputs.attention["vit.layers.1.attention"], whole.attentions[1])
    torch.testing.assert_close(outputs.features["vit"][:, 0], model.model.vit(image).last_hidden_state[:, 0])
    torch.testing.assert_close(outputs.logits, whole.logits)


def test_attention_that_is_not_computed_is_said_so():
    model = load_model("hf-config:vit", config=VIT, image_size=16, attn_implementation="sdpa")
    with pytest.raises(UserError, match="attn_implementation='eager'"):
        Taps(model, ["vit.layers.1.attention@attention"])(torch.rand(1, 3, 16, 16))


def test_transformers_bert_gives_layers():
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = load_model("hf-config:bert", config={**config, "vocab_size": 50}, attn_implementation="eager").eval()
    tokens = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    names = ["bert.encoder.layer.0", "bert.encoder.layer.1.attention.self@attention"]
    outputs = Taps(model, names)(tokens)
    whole = model.model(**tokens, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.features["bert.encoder.layer.0"], whole.hidden_states[1])
    torch.testing.assert_close(outputs.attention["bert.encoder.layer.1.attention.self"], whole.attentions[1])


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="no module 'layer4.0'; the nearest name is 'layer"):
        Taps(resnet20(), ["layer4.0"])
    with pytest.raises(UserError, match="non-empty list"):
        Taps(resnet20(), "layer1")


def test_a_module_that_never_runs_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].unused = nn.Linear(2, 2)
    with pytest.raises(UserError, match="never ran the tapped module '0.unused'"):
        Taps(model, ["0.unused"])(torch.rand(1, 2))


# --- torch.compile; aot_eager traces and functionalises as the default backend does, without its compile time ---


@pytest.mark.parametrize("stop_early", [False, True])
def test_compiled_and_eager_taps_are_equal(stop_early):
    torch._dynamo.reset()
    model, image = SmallCnn().train(), torch.rand(2, 3, 16, 16)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    names = ["stages.0", "stages.1"]
    taps, eager = Taps(compiled, names, stop_early), Taps(reference, names, stop_early)
    compiled(image), reference(image)  # code that was compiled before the hooks were there
    for _ in range(2):
        ours, theirs = taps(image), eager(image)
        for name in names:
            torch.testing.assert_close(ours.features[name], theirs.features[name])
        assert (ours.logits is None) == stop_early
        sum(f.square().sum() for f in ours.features.values()).backward()
        sum(f.square().sum() for f in theirs.features.values()).backward()
    torch.testing.assert_close(model.stages[0][0].weight.grad, reference.stages[0][0].weight.grad)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert hook_count(model) == 0


def test_of_a_compiled_model_the_tapped_forward_is_compiled_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    taps = Taps(torch.compile(SmallCnn().eval(), backend=counter), ["stages.1"], stop_early=True)
    for _ in range(3):
        taps(torch.rand(2, 3, 16, 16))
    assert counter.frame_count == 1


def test_several_taps_on_one_compiled_model_keep_apart():
    torch._dynamo.reset()
    model = SmallCnn().eval()
    compiled = torch.compile(model, backend="aot_eager")
    wanted = [(["stages.0"], False), (["stages.0"], True), (["stages.2"], False), (["stages.0", "stages.2"], True)]
    several = [Taps(compiled, names, stop) for names, stop in wanted]
    for _ in range(2):
        image = torch.rand(2, 3, 16, 16)
        expected = staged(model, image)
        for taps, (names, stop) in zip(several, wanted, strict=True):
            outputs = taps(image)
            assert set(outputs.features) == set(names) and (outputs.logits is None) == stop
            for name in names:
                torch.testing.assert_close(outputs.features[name], expected[int(name[-1])])
        torch.testing.assert_close(compiled(image), model(image))


def test_parts_compiled_further_inside_are_tapped_too():
    torch._dynamo.reset()
    model = SmallCnn().eval()
    image = torch.rand(2, 3, 16, 16)
    expected = staged(model, image)
    wrapped = Normalized(torch.compile(model, backend="aot_eager"), [0.0] * 3, [1.0] * 3)
    wrapped(image)
    torch.testing.assert_close(Taps(wrapped, ["stages.1"])(image).features["stages.1"], expected[1])
    model.stages[1].compile(backend="aot_eager")
    model(image)
    torch.testing.assert_close(Taps(model, ["stages.1.0"])(image).features["stages.1.0"].shape, (2, 64, 8, 8))


def test_taps_work_inside_a_compiled_caller():
    torch._dynamo.reset()
    model = SmallCnn().eval()
    taps = Taps(model, ["stages.1"], stop_early=True)
    step = torch.compile(lambda image: taps(image).features["stages.1"] * 2, backend="aot_eager")
    for _ in range(3):
        image = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(step(image), 2 * staged(model, image)[1])
