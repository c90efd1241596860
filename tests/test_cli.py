"""The command line: results, and one clear line with exit status 2 for what will not do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from fastjepa.cli import main
from tests.helpers import make_pictures, tiny_config


@pytest.fixture
def config(tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    tree = tiny_config(pictures, tmp_path / "run").to_dict()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_train(config, tmp_path, capsys):
    assert main(["train", str(config), "runtime.stop_after=3", "--json", str(tmp_path / "out.json")]) == 0
    assert "3 steps done, loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["steps"] == 3
    assert main(["train", str(config), "meta.load_checkpoint=true", "runtime.stop_after=4", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "nothing.yaml: no such configuration file"),
        (["{config}", "data.batchsize=3"], "unknown key data.batchsize; did you mean batch_size?"),
        (["{config}", "data.batch_size=x"], "data.batch_size must be a whole number"),
        (["{config}", "data.root_path=/nowhere"], "data.root_path / data.image_folder: no such folder"),
        (["{config}", "data.root_path={empty}"], "no pictures"),
        (["{config}", "mask.patch_size=5"], "mask.patch_size=5 does not divide"),
        (["{config}", "mask.min_keep=100"], "no mask is possible"),
        (["{config}", "meta.load_checkpoint=true"], "no checkpoint at"),
        (["{config}", "meta.load_checkpoint=true", "meta.read_checkpoint={config}"], "not a PyTorch checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_status_2(config, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    filled = [a.format(config=config, empty=tmp_path / "empty") for a in arguments]
    assert main(["train", *filled]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_module_is_the_command(config):
    run = subprocess.run(
        [sys.executable, "-m", "fastjepa", "train", str(config), "mask.min_keep=100"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "no mask is possible" in run.stderr


def test_traceback_on_request(config):
    with pytest.raises(ValueError, match="no mask"):
        main(["--traceback", "train", str(config), "mask.min_keep=100"])


def test_doctor(capsys):
    assert main(["doctor", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
