"""Configurations: official files unchanged, overrides, and what is said of mistakes."""

from __future__ import annotations

import pytest
import yaml

from fastjepa.config import load_config, parse_config, shipped_configs

# A file in the official form, every key that the official ones have.
OFFICIAL = """
data:
  batch_size: 128
  color_jitter_strength: 0.0
  crop_scale:
  - 0.3
  - 1.0
  crop_size: 224
  image_folder: imagenet_full_size/061417/
  num_workers: 10
  pin_mem: true
  root_path: $replace_this_with_absolute_path_to_your_datasets_directory
  use_color_distortion: false
  use_gaussian_blur: false
  use_horizontal_flip: false
logging:
  folder: $replace_this_with_path_for_experiment_logs/vith14.224-bs.2048-ep.300/
  write_tag: jepa
mask:
  allow_overlap: false
  aspect_ratio:
  - 0.75
  - 1.5
  enc_mask_scale:
  - 0.85
  - 1.0
  min_keep: 10
  num_enc_masks: 1
  num_pred_masks: 4
  patch_size: 14
  pred_mask_scale:
  - 0.15
  - 0.2
meta:
  copy_data: false
  load_checkpoint: false
  model_name: vit_huge
  pred_depth: 12
  pred_emb_dim: 384
  read_checkpoint: null
  use_bfloat16: true
optimization:
  ema:
  - 0.996
  - 1.0
  epochs: 300
  final_lr: 1.0e-06
  final_weight_decay: 0.4
  ipe_scale: 1.0
  lr: 0.001
  start_lr: 0.0002
  warmup: 40
  weight_decay: 0.04
"""


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "in1k_vith14_ep300.yaml"
    path.write_text(OFFICIAL)
    return path


def test_official_file(official):
    config = load_config(official)
    values = config.to_dict()
    for section, keys in yaml.safe_load(OFFICIAL).items():
        for key, value in keys.items():
            assert values[section][key] == value, f"{section}.{key}"
    assert config.mask.ragged is False


def test_shipped_file_has_the_official_values():
    ours = load_config("in1k_vith14_ep300").to_dict()
    for section, keys in yaml.safe_load(OFFICIAL).items():
        for key, value in keys.items():
            if key not in ("root_path", "image_folder", "folder"):
                assert ours[section][key] == value, f"{section}.{key}"


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_shipped_files_are_whole(name):
    config = load_config(name)
    assert parse_config(config.to_dict()) == config


def test_overrides(official):
    config = load_config(
        official,
        ["data.batch_size=64", "optimization.lr=1e-3", "mask.aspect_ratio=[1, 2]", "meta.read_checkpoint=x.pth.tar"],
    )
    assert (config.data.batch_size, config.optimization.lr) == (64, 1e-3)
    assert config.mask.aspect_ratio == (1.0, 2.0)
    assert config.meta.read_checkpoint == "x.pth.tar"
    assert config.runtime.profile is False
    assert load_config(official, ["runtime.profile=true"]).runtime.profile is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batchsize=3", r"unknown key data\.batchsize; did you mean batch_size"),
        ("data.lr=1", r"unknown key data\.lr; did you mean optimization\.lr"),
        ("optimisation.lr=1", r"unknown section 'optimisation'; did you mean optimization"),
        ("data.batch_size=many", r"data\.batch_size must be a whole number, got 'many'"),
        ("data.batch_size=1.5", r"data\.batch_size must be a whole number"),
        ("data.batch_size=true", r"data\.batch_size must be a whole number"),
        ("data.batch_size=0", r"data\.batch_size must be at least 1"),
        ("data.pin_mem=3", r"data\.pin_mem must be true or false"),
        ("runtime.profile=3", r"runtime\.profile must be true or false, got 3"),
        (
            "runtime.activation_checkpointing=encoder",
            r"runtime\.activation_checkpointing must be true or false or predictor, got 'encoder'",
        ),
        (
            "runtime.activation_checkpointing=3",
            r"runtime\.activation_checkpointing must be true or false or predictor, got 3",
        ),
        ("runtime.profiler=true", r"unknown key runtime\.profiler; did you mean profile"),
        ("optimization.lr=fast", r"optimization\.lr must be a number, got 'fast'"),
        ("optimization.lr=.nan", r"optimization\.lr must be a number"),
        ("data.crop_scale=[0.3]", r"data\.crop_scale must be two numbers"),
        ("data.crop_scale=[0.9, 0.3]", r"data\.crop_scale"),
        ("optimization.ema=[0.9, 1.1]", r"optimization\.ema"),
        ("mask.patch_size=15", r"mask\.patch_size=15 does not divide data\.crop_size=224"),
        ("meta.copy_data=true", r"meta\.copy_data is not supported"),
        ("optimization.epochs=0", r"epochs must be at least 1"),
        ("data.root_path=null", r"data\.root_path must be text"),
        ("data", r"an override is section\.key=value"),
        ("data.batch_size", r"an override is section\.key=value"),
        ("data.batch_size=[", r"cannot read the value"),
    ],
)
def test_mistakes_are_named(official, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(official, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [1, 2", "line 1: not valid YAML"),
        ("just text", "this file holds text"),
        ("", "this file holds nothing"),
        ("data: 3\n", "section data must hold keys and values, not a number"),
        ("data: {batch_size: 3}\nlogging: {folder: x}\n", r"data\.root_path is missing"),
        ("data: {root_path: x}\n", r"logging\.folder is missing"),
        ("data: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    ],
)
def test_files_that_will_not_do(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="no such configuration file; shipped ones are"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(binary)


@pytest.mark.parametrize("tag", ["../out", "/tmp/out", "a/b", "", "..", ".hidden", "a\\b", "a*"])
def test_a_tag_that_leads_elsewhere(official, tag):
    with pytest.raises(ValueError, match=r"logging\.write_tag must be a plain file name"):
        load_config(official, [f"logging.write_tag='{tag}'"])


@pytest.mark.parametrize("line", ["a{i}: &a{i} [{nine}]", "a{i}: &a{i} {{<<: [{nine}]}}"])
def test_aliases_of_aliases_are_not_unfolded(tmp_path, line):
    lines = ["a0: &a0 {k: 1}"]
    lines += [line.format(i=i, nine=",".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="an alias within an anchor"):
        load_config(path)


def test_plain_aliases_are_read(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(
        "data: {root_path: x, crop_scale: &s [0.3, 1.0]}\nlogging: {folder: y}\nmask: {enc_mask_scale: *s}\n"
    )
    assert load_config(path).mask.enc_mask_scale == (0.3, 1.0)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "1" + "0" * 400, "[" * 5000, "2020-13-45", "[" + "x, " * 9000 + "x]"], ids=lambda v: v[:12]
)
def test_values_out_of_all_bounds_are_one_short_line(official, value):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(official, [f"optimization.lr={value}"]) if len(value) < 500 else load_config(
            write(official, value), []
        )
    assert len(str(caught.value).splitlines()) == 1


def write(official, value):
    path = official.parent / "spoilt.yaml"
    path.write_text(f"optimization: {{lr: {value}}}\ndata: {{root_path: x}}\nlogging: {{folder: y}}\n")
    return path
