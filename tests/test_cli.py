"""The command line end to end in a temporary folder: what works, and one clear sentence for what cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from limbeck.cli import main
from limbeck.models import load_model, save_model

SMALL = {
    "method": "supervised",
    "data": {"name_or_path": "digits", "limit": {"train": 200, "test": 100}},
    "student": {"name": "small_cnn", "config": {"channels": [4, 8]}},
    "streams": {"labelled": {"batch_size": 32}},
    "trainer": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe with changes and returns its path; the current folder is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> str:
        content = {**SMALL, **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


def teacher_folder(path: Path, classes: int = 10) -> str:
    torch.manual_seed(0)
    return str(save_model(load_model("mlp", num_classes=classes, in_channels=1, image_size=8), path))


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which a command fails."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("limbeck: ")
    return error


# -- what works --------------------------------------------------------------------------------------------------


def test_run_leaves_metrics_student_logs_and_a_page(recipe, tmp_path, capsys):
    assert main(["run", recipe(), "--workspace", "out", "--trainer.epochs", "3"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/result.json").read_text())
    assert metrics["steps"] == 3 * (200 // 32)
    for name in ("student/model.safetensors", "report.html", "stages/student/validation.csv", "recipe.yaml"):
        assert (tmp_path / "out" / name).is_file(), name


def test_a_saved_student_is_a_teacher_of_the_next_run(recipe, tmp_path):
    assert main(["run", recipe(), "--workspace", "first"]) == 0
    kd = recipe(method="kd", teacher={"name": "first/student"})
    assert main(["run", kd, "--workspace", "second"]) == 0


def test_running_a_finished_workspace_again_trains_nothing(recipe, tmp_path):
    path = recipe()
    assert main(["run", path, "--workspace", "out"]) == 0
    before = (tmp_path / "out/stages/student/method.safetensors").stat().st_mtime_ns
    assert main(["run", path, "--workspace", "out"]) == 0
    assert (tmp_path / "out/stages/student/method.safetensors").stat().st_mtime_ns == before


def test_compare_gives_both_arms_the_same_initial_weights_and_splits(recipe, tmp_path, capsys):
    first = recipe()
    second = tmp_path / "other.yaml"
    second.write_text(Path(first).read_text().replace("method: supervised", "method: {name: ps-kd, alpha_final: 0}"))
    assert main(["compare", first, str(second), "--seeds", "2", "--workspace", "cmp"]) == 0
    rows = json.loads((tmp_path / "cmp/comparison.json").read_text())["arms"]
    # PS-KD without any weight of the past is plain training: only equal splits and weights make these equal.
    assert [row["nll"] for row in rows["recipe"]] == [row["nll"] for row in rows["other"]]
    assert rows["recipe"][0]["nll"] != rows["recipe"][1]["nll"]
    assert "other against recipe: accuracy +0.00 points" in capsys.readouterr().out
    assert (tmp_path / "cmp/report.html").is_file()


def test_export_writes_three_formats_and_the_onnx_one_agrees(recipe, tmp_path):
    assert main(["run", recipe(), "--workspace", "out"]) == 0
    assert main(["export", "out"]) == 0
    import onnxruntime

    student = load_model(tmp_path / "out/student").eval()
    image = torch.rand(5, 1, 8, 8)
    (onnx_file,) = (tmp_path / "out/export").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(onnx_file))
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(image).detach(), atol=1e-4, rtol=0)
    (program,) = (tmp_path / "out/export").glob("*.pt2")
    torch.testing.assert_close(torch.export.load(program).module()(image), student(image), atol=1e-5, rtol=0)
    assert list((tmp_path / "out/export").glob("*.safetensors"))


@pytest.mark.parametrize("words", [["methods"], ["show", "dho"]])
def test_finding_a_system_takes_at_most_a_third_of_a_second_and_no_torch(words):
    script = f"import sys; from limbeck.cli import main; code = main({words}); sys.exit(code or 'torch' in sys.modules)"
    seconds = []
    for _ in range(3):  # the machine may be busy: one quick answer shows that it can
        started = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert "DHO" in answer.stdout or "dho" in answer.stdout
    assert min(seconds) < 0.3


def test_the_help_of_a_recipe_lists_its_keys(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "dho", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for key in ("--method.temperature", "--data.labels_per_class", "--trainer.optimizer.lr", "--streams.unlabelled"):
        assert key in text, key


def test_a_mistake_ends_the_process_with_status_2(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "limbeck.cli", "show", "nothing-like-it"], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr


# -- one clear sentence ------------------------------------------------------------------------------------------


def test_an_unknown_method_is_named_with_the_nearest_one(recipe, capsys):
    assert "'shrinkmatch'" in refused(capsys, "run", "shrinkmach")
    assert "'ps-kd'" in refused(capsys, "run", recipe(method="ps_kdd"))


def test_a_misspelt_key_is_named_with_the_nearest_one(recipe, capsys):
    assert "did you mean 'epochs'" in refused(capsys, "run", recipe(trainer={"epoch": 3}))
    assert "did you mean 'lr'" in refused(capsys, "run", recipe(), "--trainer.optimizer.lrr", "3")
    assert "did you mean 'trainer'" in refused(capsys, "run", recipe(trianer={"epochs": 3}))
    assert "label_smoothing" in refused(capsys, "run", recipe(), "--method.label_smothing", "0.1")


def test_a_value_of_the_wrong_type_names_its_key(recipe, capsys):
    assert "trainer.epochs" in refused(capsys, "run", recipe(), "--trainer.epochs", "many")


def test_a_missing_stream_is_named(recipe, capsys, tmp_path):
    message = refused(capsys, "run", recipe(method="dho", teacher={"name": teacher_folder(tmp_path / "t")}))
    assert "unlabelled" in message and "labels_per_class" in message


def test_class_counts_that_differ_are_named(recipe, capsys, tmp_path):
    message = refused(capsys, "run", recipe(method="kd", teacher={"name": teacher_folder(tmp_path / "t", classes=7)}))
    assert "7 classes" in message and "10" in message


def test_a_label_out_of_range_is_named_with_its_row(recipe, capsys, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    np.savez(folder / "train.npz", x=np.zeros((40, 4), np.float32), y=np.r_[np.zeros(39, int), -1])
    np.savez(folder / "test.npz", x=np.zeros((4, 4), np.float32), y=np.zeros(4, int))
    message = refused(capsys, "run", recipe(data={"name_or_path": str(folder)}))
    assert "row 39" in message and "-1" in message


def test_an_unreadable_image_is_named_by_its_path(recipe, capsys, tmp_path):
    for name in ("cat", "dog"):
        for number in range(6):
            path = tmp_path / "pets" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(path)
    (tmp_path / "pets/dog/3.png").write_bytes(b"not a picture")
    assert "dog/3.png" in refused(capsys, "run", recipe(data={"name_or_path": str(tmp_path / "pets")}))


def test_an_empty_folder_is_named(recipe, capsys, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "nothing" in refused(capsys, "run", recipe(data={"name_or_path": str(tmp_path / "nothing")}))


def test_fewer_labels_than_asked_for_are_named_with_their_class(recipe, capsys):
    message = refused(capsys, "run", recipe(), "--data.labels_per_class", "1000")
    assert "1000" in message and "class" in message


def test_weights_of_another_architecture_are_refused_in_one_sentence(recipe, capsys, tmp_path):
    folder = teacher_folder(tmp_path / "t")
    message = refused(capsys, "run", recipe(method="kd", teacher={"name": "small_cnn", "weights": folder}))
    assert "missing" in message or "unexpected" in message


def test_a_stage_of_another_architecture_is_refused_in_one_sentence(recipe, capsys, tmp_path):
    path = recipe()
    assert main(["run", path, "--workspace", "out"]) == 0
    save_file({"student.other": torch.zeros(2)}, tmp_path / "out/stages/student/method.safetensors")
    assert "another architecture" in refused(capsys, "run", path, "--workspace", "out")


def test_a_pickle_is_refused_where_safetensors_are_expected(recipe, capsys, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "teacher.pt")
    message = refused(
        capsys, "run", recipe(method="kd", teacher={"name": "mlp", "weights": str(tmp_path / "teacher.pt")})
    )
    assert "pickle" in message and "safetensors" in message


def test_a_workspace_of_another_recipe_is_refused_naming_the_difference(recipe, capsys):
    assert main(["run", recipe(), "--workspace", "out"]) == 0
    message = refused(capsys, "run", recipe(), "--workspace", "out", "--trainer.optimizer.lr", "0.5")
    assert "trainer.optimizer.lr" in message and "0.01" in message and "0.5" in message


def test_nan_in_the_data_is_named_with_field_and_row(recipe, capsys, tmp_path):
    folder = tmp_path / "nan"
    folder.mkdir()
    x = np.zeros((40, 4), np.float32)
    x[17, 2] = np.nan
    np.savez(folder / "train.npz", x=x, y=np.arange(40) % 2)
    np.savez(folder / "test.npz", x=x[:4], y=np.arange(4) % 2)
    message = refused(capsys, "run", recipe(data={"name_or_path": str(folder)}))
    assert "NaN" in message and "row 17" in message


def test_a_teacher_without_weights_is_refused(recipe, capsys):
    assert "no weights" in refused(capsys, "run", recipe(method="kd", teacher={"name": "small_cnn"}))


def test_a_recipe_cannot_import_code_unless_the_user_allows_it(recipe, capsys, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("open('was_here', 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spellings = [
        {"method": "stranger:Method"},
        {"method": {"name": "stranger:Method"}},
        {"student": {"name": "stranger:build"}},
        {"trainer": {"epochs": 1, "optimizer": {"class_path": "stranger.Optimizer"}}},
        {"trainer": {"class_path": "stranger.Trainer"}},
        {"method": {"name": "supervised", "class_path": "stranger.Method"}},
        {"student": {"name": "hf:stranger/net", "trust_remote_code": True}},
    ]
    for change in spellings:
        assert "--allow-imports" in refused(capsys, "run", recipe(**change)), change
    assert not (tmp_path / "was_here").exists()


def test_text_in_a_recipe_never_becomes_an_object_or_another_file(recipe, capsys, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("open('was_here', 'w').close()\n\n\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "more.yaml").write_text("name: {class_path: stranger.Thing}\n")
    teacher = {"name": "mlp", "weights": "w"}
    refused(capsys, "run", recipe(method={"name": "dho", "class_embeddings": "stranger.Thing"}, teacher=teacher))
    refused(capsys, "run", recipe(method={"name": "kd", "teacher": "stranger.Thing"}, teacher=teacher))
    assert "mapping" in refused(capsys, "run", recipe(student="more.yaml"))
    assert "mapping" in refused(capsys, "run", recipe(trainer={"epochs": 1, "optimizer": "more.yaml"}))
    assert not (tmp_path / "was_here").exists()


def test_with_allow_imports_a_recipe_may_name_the_users_own_network(recipe, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef build(width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = recipe(student={"name": "mine:build", "config": {"width": 12}})
    assert main(["run", path, "--workspace", "out", "--allow-imports"]) == 0


def test_a_tagged_yaml_object_is_not_built(recipe, capsys, tmp_path):
    Path(recipe()).write_text("method: !!python/object/apply:os.system ['touch was_here']\n")
    refused(capsys, "run", str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "was_here").exists()


def test_texts_with_a_transformers_student_run_from_a_recipe(recipe, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained("words")
    for split, count in (("train", 40), ("test", 10)):
        rows = [{"text": f"{['bad', 'good'][n % 2]} film", "label": n % 2} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "films").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").rename(tmp_path / "films" / f"{split}.jsonl")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 5,
    }
    path = recipe(
        data={"name_or_path": "films", "tokenizer": "words", "max_length": 4},
        student={"name": "hf-config:bert", "config": small},
        streams={"labelled": {"batch_size": 8}},
        trainer={"epochs": 10, "optimizer": {"name": "adam", "lr": 0.01}},
    )
    assert main(["run", path, "--workspace", "out"]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["accuracy"] == 1.0
    assert main(["export", "out", "--formats", "safetensors", "onnx"]) == 0


def test_texts_without_a_tokenizer_are_refused(recipe, capsys, tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films/train.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 20)
    assert "data.tokenizer" in refused(capsys, "run", recipe(data={"name_or_path": "films"}))


def test_rows_of_numbers_run_from_a_recipe(recipe, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "table").mkdir()
    for split, count in (("train", 200), ("test", 50)):
        x = generator.normal(size=(count, 6)).astype(np.float32)
        np.savez(tmp_path / "table" / f"{split}.npz", x=x, y=(x[:, 0] > 0).astype(int))
    path = recipe(data={"name_or_path": "table"}, student={"name": "mlp", "config": {"hidden": [16]}})
    assert main(["run", path, "--workspace", "out", "--trainer.epochs", "20"]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["accuracy"] > 0.9


def test_a_setting_that_is_no_yaml_is_named(recipe, capsys):
    assert main(["run", recipe(), "--trainer.epochs", "[3"]) == 2
    assert "--trainer.epochs: '[3' is no valid YAML" in capsys.readouterr().err
