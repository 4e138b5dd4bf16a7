"""load_model, save_model and the weights' files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.errors import UserError
from limbeck.models import (
    NETS,
    Normalized,
    SmallCnn,
    core_network,
    load_model,
    load_weights,
    save_model,
    save_weights,
    split_head,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LIMBECK_DATA", ROOT.parent / "shared" / "data"))
MODELS = Path(os.environ.get("LIMBECK_MODELS", ROOT.parent / "shared" / "models"))

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4}
BERT = {**VIT, "vocab_size": 50, "max_position_embeddings": 20}
BERT.pop("patch_size")


def first_test_pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    rows = parquet.read_table(DATA / "cifar10" / "test.parquet").slice(0, count).to_pydict()
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows["image"]]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(rows["label"])


@pytest.mark.parametrize(("name", "percent"), [("resnet20", 80.8), ("resnet56", 82.2)])
def test_published_resnets_reach_their_accuracy_on_cifar10(name, percent):
    if not (DATA / "cifar10" / "test.parquet").exists() or not (MODELS / f"cifar10-{name}").exists():
        pytest.skip("needs cifar10 in LIMBECK_DATA and the CIFAR ResNets in LIMBECK_MODELS")
    pictures, labels = first_test_pictures(2000)
    model = load_model(name, weights=MODELS / f"cifar10-{name}", normalize="imagenet").eval()
    model = model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        guesses = [model((part / 255).to(memory_format=torch.channels_last)).argmax(1) for part in pictures.split(250)]
    accuracy = 100 * (torch.cat(guesses) == labels).double().mean().item()
    assert accuracy == pytest.approx(percent, abs=0.15)


def test_importing_the_room_does_not_import_transformers():
    code = "import sys, limbeck.models; print('transformers' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"


# --- reference nets ---


@pytest.mark.parametrize("name", sorted(set(NETS) - {"resnet44", "resnet56", "resnet110"}))
def test_a_saved_net_comes_back_the_same(name, tmp_path):
    config = {"n_mels": 16} if name == "audio_ntt" else {}
    shape = {"num_classes": 4, "in_channels": 1, "image_size": 16}
    model = load_model(name, config=config, normalize=([0.5], [0.25]), **shape).eval()
    image = torch.rand(2, 1, 16, 16)
    again = load_model(save_model(model, tmp_path / "saved")).eval()
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
    assert type(core_network(again)) is type(core_network(model))


def test_config_reaches_the_constructor_of_a_named_net():
    model = load_model("small_cnn", config={"channels": [8, 12]}, num_classes=3)
    assert [stage[0].out_channels for stage in model.stages] == [8, 12]


def test_nets_of_any_picture_size_ignore_image_size():
    assert isinstance(load_model("small_cnn", image_size=48), SmallCnn)


def test_a_module_is_taken_as_it_is():
    module = nn.Linear(2, 2)
    assert load_model(module) is module


def test_normalisation_is_the_models_own():
    net = SmallCnn(3).eval()
    model = load_model(net, normalize=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    image = torch.rand(2, 3, 8, 8)
    by_hand = (image - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(model(image), net(by_hand))


def test_a_grey_picture_is_not_broadcast_to_three_channels():
    model = load_model("small_cnn", in_channels=3, normalize="imagenet")
    with pytest.raises(UserError, match="1 channels but the normalisation 3"):
        model(torch.rand(1, 1, 8, 8))


def test_resize_shows_a_network_the_size_it_was_made_for(tmp_path):
    model = load_model("small_vit", resize=16, normalize="imagenet").eval()
    image = torch.rand(2, 3, 32, 32)
    assert core_network(model).image_size == 16
    again = load_model(save_model(model, tmp_path)).eval()
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


# --- transformers ---


def test_transformers_resnet_from_config_takes_pictures():
    model = load_model("hf-config:resnet", config=RESNET, num_classes=5, in_channels=1, image_size=32)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_transformers_vit_from_config_takes_pictures_of_image_size():
    model = load_model("hf-config:vit", config=VIT, num_classes=5, image_size=16)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_transformers_bert_from_config_takes_tokens():
    model = load_model("hf-config:bert", config=BERT, num_classes=3)
    tokens = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert model(tokens).shape == (2, 3)


@pytest.mark.parametrize("spelling", ["{}", "hf:{}"])
def test_a_saved_transformers_model_comes_back_the_same(spelling, tmp_path):
    model = load_model("hf-config:vit", config=VIT, num_classes=5, image_size=16, normalize="imagenet").eval()
    save_model(model, tmp_path)
    again = load_model(spelling.format(tmp_path)).eval()
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


def test_a_folder_of_ours_keeps_the_normalisation_of_a_transformers_model(tmp_path):
    model = load_model("hf-config:resnet", config=RESNET, normalize=((0.4, 0.4, 0.4), (0.2, 0.2, 0.2)), resize=24)
    again = load_model(save_model(model.eval(), tmp_path)).eval()
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


def test_the_image_processor_states_the_normalisation(tmp_path):
    save_model(load_model("hf-config:resnet", config=RESNET), tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load_model(f"hf:{tmp_path}")
    assert isinstance(model, Normalized)
    torch.testing.assert_close(model.normalize.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    assert not isinstance(load_model(f"hf:{tmp_path}", normalize="none"), Normalized)


def test_another_number_of_classes_needs_a_new_head(tmp_path):
    saved = load_model("hf-config:vit", config=VIT, num_classes=5, image_size=16)
    save_model(saved, tmp_path)
    with pytest.raises(UserError, match="5 classes, 9 were asked for.*new_head=True"):
        load_model(f"hf:{tmp_path}", num_classes=9)
    model = load_model(f"hf:{tmp_path}", num_classes=9, new_head=True)
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 9)
    torch.testing.assert_close(model.model.vit.layernorm.weight, saved.model.vit.layernorm.weight)


def test_a_checkpoint_without_a_classifier_is_not_given_a_random_one_silently(tmp_path):
    load_model("hf-config:bert", config=BERT).model.bert.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="classifier.*would be random.*new_head=True"):
        load_model(f"hf:{tmp_path}", num_classes=2)
    tokens = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert load_model(f"hf:{tmp_path}", num_classes=2, new_head=True)(tokens).shape == (1, 2)


# --- weights ---


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    save_weights(model, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == {"0.weight", "0.bias", "1.bias"}
    load_weights(other, tmp_path)
    torch.testing.assert_close(other[1].weight, model[0].weight, rtol=0, atol=0)
    assert other[1].weight is other[0].weight


def test_two_slices_of_one_storage_are_two_weights(tmp_path):
    both = torch.randn(6, 3)
    model = nn.ParameterList([nn.Parameter(both[:3]), nn.Parameter(both[3:])])
    save_weights(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(torch.cat([saved["0"], saved["1"]]), both)


def test_weights_without_batch_counters_are_complete(tmp_path):
    model = SmallCnn()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_model("small_cnn", weights=tmp_path).eval()
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(loaded(image), model.eval()(image))


def test_weights_in_shards_are_read(tmp_path):
    model = nn.Linear(2, 3)
    save_file({"weight": model.weight.detach()}, tmp_path / "a.safetensors")
    save_file({"bias": model.bias.detach()}, tmp_path / "b.safetensors")
    index = {"weight_map": {"weight": "a.safetensors", "bias": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    other = nn.Linear(2, 3)
    load_weights(other, tmp_path)
    torch.testing.assert_close(other.weight, model.weight)


def test_wrappers_leave_no_trace_in_saved_keys(tmp_path):
    save_model(load_model("small_cnn", normalize="imagenet"), tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(SmallCnn().state_dict())


def test_a_split_head_is_saved_as_weights_without_a_description(tmp_path):
    backbone, _ = split_head(SmallCnn())
    save_model(backbone, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_of_another_depth_are_refused_with_keys_and_counts(tmp_path):
    save_weights(NETS["resnet32"](), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"another architecture than resnet20: 60 unexpected \(first 'layer1\.3"):
        load_model("resnet20", weights=tmp_path)
    save_weights(NETS["resnet20"](), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"resnet32: 60 missing \(first 'layer1\.3\.conv1\.weight'\)"):
        load_model("resnet32", weights=tmp_path)


def test_weights_of_another_class_count_are_refused_with_both_shapes(tmp_path):
    save_weights(SmallCnn(10), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"2 of another shape \(first 'head.weight': \[10, 128\] .* \[7, 128\]"):
        load_model("small_cnn", num_classes=7, weights=tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_with_the_way_to_convert_them(suffix, tmp_path):
    torch.save(SmallCnn().state_dict(), tmp_path / f"weights{suffix}")
    for weights in (tmp_path, tmp_path / f"weights{suffix}"):
        with pytest.raises(UserError, match="is a pickle.*save_file"):
            load_model("small_cnn", weights=weights)
        with pytest.raises(UserError, match="is a pickle.*save_file"):
            load_model(weights)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="model.safetensors' cannot be read"):
        load_model("small_cnn", weights=tmp_path)


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet21"}, "no model 'resnet21'; did you mean 'resnet"),
        ({"name": "small_cnn", "config": {"chanels": [3]}}, "no argument 'chanels'; did you mean 'channels'"),
        ({"name": "hf-config:resnett"}, "did you mean 'resnet'"),
        ({"name": "hf-config:resnet", "config": {"depth": [1]}}, "has no 'depth'; did you mean 'depths'"),
        ({"name": "hf-config:gpt_neox_japanese"}, "no image or sequence classifier"),
        ({"name": "timm:resnet18"}, r"pip install limbeck\[timm\]"),
        ({"name": "hf:./nothing/there/at/all"}, "no transformers configuration"),
        ({"name": "small_cnn", "normalize": "imagenett"}, "'imagenet', 'none' or"),
        ({"name": "small_cnn", "resize": 8}, "normalize"),
        ({"name": "small_cnn", "weights": "nowhere"}, "no weights at 'nowhere'"),
        ({"name": nn.Linear(2, 2), "config": {"a": 1}}, "already built"),
    ],
)
def test_mistakes_get_one_sentence(arguments, words):
    if str(arguments["name"]).startswith("timm:"):
        try:
            import timm  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("timm is installed")
    with pytest.raises(UserError, match=words):
        load_model(**arguments)


def test_a_folder_of_bare_weights_asks_for_the_architecture(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="name the architecture and pass weights="):
        load_model(tmp_path)


def test_a_saved_net_with_other_classes_than_asked_for_is_refused(tmp_path):
    save_model(SmallCnn(10), tmp_path)
    with pytest.raises(UserError, match="num_classes=10, 7 was asked for"):
        load_model(tmp_path, num_classes=7)
