"""Every probe on one encoder, from pictures on disk to the table; and `fastjepa eval`."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import vit_tiny
from fastjepa.checkpoint import write_checkpoint
from fastjepa.cli import main
from fastjepa.data.pack import pack
from fastjepa.data.sources import open_pictures
from fastjepa.evaluation import ProbeSettings, evaluate_checkpoint, judge
from fastjepa.evaluation.features import extract_features, whole_picture
from fastjepa.evaluation.labelled import LabelledPictures, TokenBatches, labelled_pictures
from fastjepa.evaluation.probes import knn_probe, linear_probe, low_shot_probe
from fastjepa.export import export

QUICK = ProbeSettings(epochs=1, lr=(0.05,), weight_decay=(0.0, 5e-3), attentive_lr=(1e-3,), attentive_epochs=3, draws=2)


def make_classes(folder: Path, counts: dict[str, int], size: int = 20, noise: int = 120, seed: int = 0) -> Path:
    """Noisy pictures whose mean colour is their class's."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = np.roll([90, 120, 150], label)
            pixels = np.clip(colour + rng.normal(0, noise, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    counts = {"ant": 30, "bee": 30, "cat": 30}
    make_classes(root / "train", counts)
    make_classes(root / "val", {"ant": 15, "bee": 15, "cat": 15}, seed=1)
    return root


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return vit_tiny(img_size=[16], patch_size=8, depth=5, embed_dim=24, num_heads=2).eval()


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pth.tar"
    state = encoder.state_dict()
    write_checkpoint({"encoder": state, "predictor": {}, "target_encoder": state, "epoch": 1}, path)
    return path


def sets(data, **more):
    return labelled_pictures(data, None, partial(LabelledPictures, size=16, batch_size=32, **more))


def test_marks_are_those_of_the_probes_alone(encoder, data):
    train, test, classes, _ = sets(data)
    result = judge(encoder, train, test, classes, QUICK)
    ours, theirs = (torch.stack([s[i][0] for i in range(len(s))]) for s in (train, test))
    features = extract_features(encoder, ours), train.labels, extract_features(encoder, theirs), test.labels
    marks = {(row["probe"], row["features"], row["setting"]): row["accuracy"] for row in result["rows"]}
    assert marks["knn", "last layer", "10 neighbours"] == pytest.approx(knn_probe(*features))
    few = low_shot_probe(*features, shots=5, draws=2)
    assert marks["low-shot", "last layer", "5 labels a class, 2 draws"] == pytest.approx(few)
    share = low_shot_probe(*features, shots=0.01, draws=2)
    assert marks["low-shot", "last layer", "1 % of the labels, 2 draws"] == pytest.approx(share)
    by_sgd = [row["accuracy"] for row in result["rows"] if row["probe"] == "linear"]
    assert abs(by_sgd[0] - linear_probe(*features, c=1.0)) < 10
    assert [row["features"] for row in result["rows"]][:2] == ["last layer", "last 4 layers"]
    attentive = [row for row in result["rows"] if row["probe"] == "attentive"]
    assert attentive[0]["accuracy"] > 45  # a guess is right in 33 %
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(dim=1).tolist() == [15, 15, 15]
    best = max(row["accuracy"] for row in result["rows"])
    assert 100 * confusion.diag().sum() / 45 == pytest.approx(best, abs=5)
    assert result["train"] == 90
    assert result["rankme"] > 1


def test_everything_follows_from_the_seed(encoder, data):
    train, test, classes, _ = sets(data)
    state = torch.get_rng_state()
    results = [judge(encoder, train, test, classes, ProbeSettings(**{**vars(QUICK), "seed": s})) for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]
    assert results[0] != results[2]
    workers = sets(data, workers=2)
    again = judge(encoder, *workers[:2], classes, ProbeSettings(**{**vars(QUICK), "seed": 3}))
    assert again["rows"] == results[0]["rows"]


def test_tokens_are_the_same_from_memory_and_from_disk(encoder, data):
    train, *_ = sets(data)
    places = torch.tensor([5, 80, 3, 44, 61])
    kept, read = (TokenBatches(encoder, train, places, memory) for memory in (1 << 30, 0))
    assert kept.kept is not None
    assert read.kept is None
    for epoch in (None, 0, 1):
        for (a, x), (b, y) in zip(kept(epoch), read(epoch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)
            assert torch.equal(x, y)
    orders = [torch.cat([labels for _, labels in read(epoch)]) for epoch in range(6)]
    assert any(not torch.equal(orders[0], other) for other in orders[1:])


def test_a_folder_without_a_split_is_split_by_class(tmp_path):
    make_classes(tmp_path / "d", {"a": 10, "b": 7})
    make = partial(LabelledPictures, size=16)
    train, test, classes, line = labelled_pictures(tmp_path / "d", None, make, seed=5)
    assert (len(train), len(test), classes) == (14, 3, ["a", "b"])
    assert test.labels.tolist() == [0, 0, 1]
    assert not set(train.chosen) & set(test.chosen)
    assert labelled_pictures(tmp_path / "d", None, make, seed=5)[1].chosen == test.chosen
    assert "14 pictures" in line
    assert torch.equal(train[0][0], whole_picture(train.source.load(train.chosen[0]), 16, 0.875))


def test_classes_are_matched_by_name(tmp_path, data):
    make_classes(tmp_path / "t", {"cat": 2, "ant": 1})
    _, test, classes, _ = labelled_pictures(data, tmp_path / "t", partial(LabelledPictures, size=16))
    assert [classes[i] for i in test.labels] == ["ant", "cat", "cat"]
    make_classes(tmp_path / "u", {"dog": 2, "ant": 1})
    with pytest.raises(ValueError, match=r"u has the class dog, which .*train has not"):
        labelled_pictures(data, tmp_path / "u", partial(LabelledPictures, size=16))


def test_unreadable_pictures_are_left_out_and_named(encoder, tmp_path):
    make_classes(tmp_path / "train", {"a": 20, "b": 20})
    make_classes(tmp_path / "val", {"a": 9, "b": 9})
    (tmp_path / "train" / "a" / "003.png").write_bytes(b"no picture")
    train, test, classes, _ = sets(tmp_path)
    result = judge(encoder, train, test, classes, QUICK)
    assert result["train"] == 39
    assert len(result["unreadable"]) == 1
    assert "003.png" in result["unreadable"][0]
    for i in range(5):
        (tmp_path / "train" / "b" / f"{i:03d}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="too many pictures"):
        judge(encoder, *sets(tmp_path)[:2], classes, QUICK)


def test_command(checkpoint, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("marks.csv", "marks.json", "confusion.png")}
    arguments = ["eval", str(checkpoint), "--num-heads", "2", "--data", str(data), "--probes", "linear,knn,low-shot"]
    options = ["--csv", str(files["marks.csv"]), "--json", str(files["marks.json"]), "--device", "cpu"]
    options += ["--confusion", str(files["confusion.png"]), "--shots", "3"]
    assert main([*arguments, *options]) == 0
    out, err = capsys.readouterr()
    assert "90 pictures" in err
    assert "3 labels a class" in out
    result = json.loads(files["marks.json"].read_text())
    with open(files["marks.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in result["rows"]]
    with Image.open(files["confusion.png"]) as picture:
        assert picture.size == (1080, 1080)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "/nowhere"}, "no such folder of pictures"),
        ({"--probes": "linear,svm"}, "probes are some of linear, knn, low-shot, attentive, got linear, svm"),
        ({"--shots": "x"}, "--shots takes numbers with commas between"),
        ({"--shots": "1.5"}, "shots are whole numbers"),
        ({"--epochs": "0"}, "epochs must be at least 1"),
        ({"--batch-size": "0"}, "batch_size must be at least 1"),
        ({"--device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"--num-heads": "5"}, "5 heads do not divide"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoint, data, capsys, change, message):
    options = {"--data": str(data), "--num-heads": "2", "--device": "cpu"} | change
    assert main(["eval", str(checkpoint), *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not [line for line in error if "Traceback" in line]


def test_shards_do_too(encoder, data, tmp_path):
    make = partial(LabelledPictures, size=16, batch_size=32)
    for part in ("train", "val"):
        pack(open_pictures(data / part), tmp_path / part, shard_size=20, quiet=True)
    train, test, classes, _ = labelled_pictures(tmp_path, None, make)
    assert classes == ["ant", "bee", "cat"]
    ours = judge(encoder, train, test, classes, QUICK)
    theirs = judge(encoder, *sets(data)[:2], classes, QUICK)
    assert [r["accuracy"] for r in ours["rows"][:3]] == [r["accuracy"] for r in theirs["rows"][:3]]


def test_a_transformers_folder_gets_the_same_marks(checkpoint, data, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    export(checkpoint, "transformers", tmp_path / "folder", num_heads=2)
    quick = ProbeSettings(probes=("knn", "low-shot"))
    results = [
        evaluate_checkpoint(path, data, num_heads=heads, settings=quick, device="cpu")
        for path, heads in ((checkpoint, 2), (tmp_path / "folder", None))
    ]
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["confusion"] == results[1]["confusion"]


def test_too_few_pictures(tmp_path, checkpoint):
    make_classes(tmp_path / "d", {"a": 4, "b": 6})
    with pytest.raises(ValueError, match="has 4 pictures of a; at least 5 are needed"):
        evaluate_checkpoint(checkpoint, tmp_path / "d", num_heads=2)
    make_classes(tmp_path / "one", {"a": 4})
    with pytest.raises(ValueError, match="fewer than two classes of pictures"):
        evaluate_checkpoint(checkpoint, tmp_path / "one", num_heads=2)
