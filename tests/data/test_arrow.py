"""Hugging Face datasets on disk and Parquet files."""

from __future__ import annotations

import io
import json
import pickle
import sys

import pytest
from PIL import Image

from fastjepa.data import Augment, TrainingBatches, UnreadableImage
from fastjepa.data.arrow import ArrowFiles, ParquetFiles
from fastjepa.data.sources import open_pictures
from fastjepa.masks import MaskCollator

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
INFO = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(numbers, kind=STRUCT):
    values = [{"bytes": png(i), "path": None} if kind == STRUCT else png(i) for i in numbers]
    columns = {"image": pa.array(values, kind), "label": pa.array([i % 2 for i in numbers])}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(INFO)})


def save_to_disk(folder, *parts):
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    files = []
    for number, part in enumerate(parts):
        files.append({"filename": f"data-{number:05}-of-{len(parts):05}.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return folder


@pytest.fixture(params=["arrow", "parquet", "binary"])
def source(request, tmp_path):
    if request.param == "arrow":
        return open_pictures(save_to_disk(tmp_path / "a", table(range(3)), table(range(3, 10))))
    kind = STRUCT if request.param == "parquet" else pa.binary()
    parquet.write_table(table(range(3), kind), tmp_path / "0.parquet", row_group_size=2)
    parquet.write_table(table(range(3, 10), kind), tmp_path / "1.parquet", row_group_size=2)
    return open_pictures(tmp_path)


def test_reads_at_any_place(source):
    assert len(source) == 10
    for index in (9, 0, 3, 2, 5):
        assert source.read(index) == png(index)
        assert source.load(index).size == (8 + index, 6)
    assert source.classes == ["cat", "dog"]
    assert source.labels == [0, 1] * 5
    assert source.name(3).endswith((".arrow: row 0", "1.parquet: row 0"))
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(10)] == [png(i) for i in range(10)]


def test_epochs_see_each_once(source):
    masks = MaskCollator((32, 32), 4, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5))
    batches = TrainingBatches(source, Augment(32), masks, 3)
    seen = [i for step in range(3) for i in batches[step].samples.tolist()]
    assert len(set(seen)) == 9


def test_row_groups_are_kept_few(tmp_path):
    parquet.write_table(table(range(40)), tmp_path / "0.parquet", row_group_size=2)
    found = ParquetFiles(tmp_path, [tmp_path / "0.parquet"])
    assert found.blocks == [2] * 20
    for index in range(40):
        assert found.read(index) == png(index)
    assert len(found._open) == 8


def test_splits_and_hub_folders(tmp_path):
    save_to_disk(tmp_path / "splits" / "train", table(range(4)))
    save_to_disk(tmp_path / "splits" / "test", table(range(2)))
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "hub" / "data").mkdir(parents=True)
    parquet.write_table(table(range(5)), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(table(range(2)), tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet")
    assert len(open_pictures(tmp_path / "splits")) == 4
    assert len(open_pictures(tmp_path / "hub")) == 5
    assert len(open_pictures(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet")) == 2


def test_paths_and_missing_values(tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    values = [{"bytes": None, "path": "x.png"}, None, {"bytes": None, "path": "gone.png"}]
    parquet.write_table(pa.table({"image": pa.array(values, STRUCT)}), tmp_path / "0.parquet")
    found = open_pictures(tmp_path)
    assert found.read(0) == png(1)
    assert found.labels == [-1, -1, -1]
    with pytest.raises(UnreadableImage, match=r"0\.parquet: row 1 \(.*column image is empty"):
        found.read(1)
    with pytest.raises(UnreadableImage, match="row 2 .*No such file"):
        found.read(2)


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"label": [1, 2]}, "no column of bytes"),
        ({"a": [b"x"], "b": [b"y"]}, r"several columns of bytes \(a, b\)"),
    ],
)
def test_no_column_of_pictures(tmp_path, columns, said):
    parquet.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=said):
        open_pictures(tmp_path)


def test_files_that_will_not_do(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read as Parquet"):
        open_pictures(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say which Arrow files"):
        open_pictures(tmp_path / "1")
    parquet.write_table(table([]), tmp_path / "1" / "empty.parquet")
    with pytest.raises(ValueError, match="no rows"):
        ParquetFiles(tmp_path / "1", [tmp_path / "1" / "empty.parquet"])


def test_without_pyarrow(tmp_path, monkeypatch):
    folder = save_to_disk(tmp_path / "a", table(range(3)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install 'fastjepa\[data\]'"):
        ArrowFiles(folder)


def test_hugging_face_writes_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    values = {"image": [{"bytes": png(i), "path": None} for i in range(5)], "label": [0, 1, 0, 1, 0]}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(tmp_path / "saved"))
    found = open_pictures(tmp_path / "saved")
    assert [found.read(i) for i in range(5)] == [png(i) for i in range(5)]
    assert (found.classes, found.labels) == (["cat", "dog"], [0, 1, 0, 1, 0])
