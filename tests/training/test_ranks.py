"""Training in several processes: who a process is, and that they come to what one comes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastjepa import read_checkpoint
from fastjepa.data.batches import dealt
from fastjepa.training.ranks import Ranks, first_host
from tests.helpers import make_pictures, tiny_config

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_NODELIST": "gpu[03-04]"}


def test_torchrun():
    assert Ranks.from_environment(TORCHRUN) == Ranks(3, 4, 1, "a", 29500)
    assert not Ranks.from_environment(TORCHRUN).leads


def test_slurm():
    found = Ranks.from_environment(SLURM | {"SLURM_JOB_ID": "40007"})
    assert found == Ranks(5, 16, 5, "gpu03", 20007)
    assert Ranks.from_environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Ranks()


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_variable_that_is_missing_is_named(name: str):
    environment = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=f"set but not {name}: torchrun sets all of them"):
        Ranks.from_environment(environment)


def test_slurm_without_srun():
    with pytest.raises(ValueError, match="start with srun"):
        Ranks.from_environment({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"})
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST is not set: start each task with srun"):
        Ranks.from_environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"})


def test_what_is_no_number():
    with pytest.raises(ValueError, match="RANK must be a number, got 'x'"):
        Ranks.from_environment(TORCHRUN | {"RANK": "x"})


@pytest.mark.parametrize("nodes, first", [("n1", "n1"), ("n[1,3-4]", "n1"), ("a-[07-12],b", "a-07"), ("x,y", "x")])
def test_first_host(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize("world", [1, 2, 4])
def test_images_are_dealt_out_evenly(world: int):
    tokens = np.random.default_rng(0).integers(20, 200, size=64)
    shares = [dealt(tokens, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(64))
    assert {len(share) for share in shares} == {64 // world}
    sums = [tokens[share].sum() for share in shares]
    assert max(sums) - min(sums) <= 0.02 * np.mean(sums)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=24)


def launched(world: int, config, folder: Path, *overrides: str, restarts: int = 0) -> list[str]:
    """The command that trains in `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    launcher += [f"--max-restarts={restarts}"]
    return [sys.executable, *(launcher if world > 1 else []), "-m", "fastjepa", "train", str(file), *overrides]


def run(world: int, config, folder: Path, *overrides: str) -> dict:
    """What a run in `world` processes has left in its newest checkpoint."""
    done = subprocess.run(launched(world, config, folder, *overrides), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return newest(config)


def newest(config) -> dict:
    """The newest checkpoint of a run, of either kind."""
    kind = "" if config.runtime.checkpoint == "sharded" else ".pth.tar"
    return read_checkpoint(Path(config.logging.folder) / f"jepa-latest{kind}")


def scripted(world: int, config, folder: Path, script: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """A script that was run, with the configuration's file as its argument, in `world` processes."""
    launcher = launched(world, config, folder, restarts=restarts)
    (folder / "train.py").write_text(script)
    start = launcher[: launcher.index("fastjepa") - 1]
    command = [*start, str(folder / "train.py"), str(folder / "config.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def config_of(pictures, folder: Path, batch_size: int, **runtime):
    return tiny_config(
        pictures,
        folder,
        data={"batch_size": batch_size},
        mask={"ragged": True},
        optimization={"epochs": 4, "warmup": 1},
        runtime={"stop_after": 10, **runtime},
    )


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> dict:
    """Ten steps of eight images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return run(1, config_of(pictures, folder, 8), folder)


def assert_same(found: dict, wanted: dict) -> None:
    for name in ("encoder", "predictor", "target_encoder"):
        for key, value in wanted[name].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["fastjepa"]["step"] == wanted["fastjepa"]["step"]


SHARDED = {"shard": True, "checkpoint": "sharded"}


@pytest.mark.parametrize(
    "world, runtime",
    [
        (2, {}),
        (2, {"accumulate": 2}),
        (4, {}),
        (2, {"shard": True, "accumulate": 2, "activation_checkpointing": True}),
        (4, SHARDED),
    ],
)
def test_several_processes_come_to_what_one_comes_to(pictures, tmp_path, alone, world, runtime):
    found = run(world, config_of(pictures, tmp_path, 8 // world, **runtime), tmp_path)
    assert_same(found, alone)
    assert found["world_size"] == world
    assert (tmp_path / "jepa_r0.csv").read_text().count("\n") == 1 + 10


def test_a_run_goes_on_with_another_number_of_processes(pictures, tmp_path, alone):
    run(2, config_of(pictures, tmp_path, 4, stop_after=5), tmp_path)
    assert_same(run(1, config_of(pictures, tmp_path, 8, resume=True), tmp_path), alone)


def test_a_run_goes_on_with_other_processes_and_other_checkpoints(pictures, tmp_path, alone):
    """Sharded, then one process and a file, then shards again."""
    run(2, config_of(pictures, tmp_path, 4, stop_after=4, **SHARDED), tmp_path)
    assert not (tmp_path / "jepa-latest.pth.tar").exists()
    run(1, config_of(pictures, tmp_path, 8, stop_after=7, resume=True), tmp_path)
    assert not (tmp_path / "jepa-latest").exists()
    assert_same(run(2, config_of(pictures, tmp_path, 4, resume=True, **SHARDED), tmp_path), alone)
    assert sorted(p.name for p in tmp_path.glob("*step*")) == ["jepa-step00000009", "jepa-step00000010"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(pictures, tmp_path, alone):
    """Every process has written its part, and the one that would say so is gone."""
    config = config_of(pictures, tmp_path, 4, save_every=2, **SHARDED)
    done = scripted(
        2,
        config,
        tmp_path,
        "import os, signal, sys\n"
        "from fastjepa import dcp\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import train\n"
        "finish, saves = dcp._Writer.finish, []\n"
        "def strike(writer, **rest):\n"
        "    saves.append(writer)\n"
        "    if len(saves) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    finish(writer, **rest)\n"
        "dcp._Writer.finish = strike\n"
        "train(load_config(sys.argv[1]))\n",
    )
    assert done.returncode != 0
    assert newest(config)["fastjepa"]["step"] == 3  # saved after steps 2 and 3, an epoch, and then never
    part, *others = sorted(tmp_path.glob(".jepa-step*.part"))
    assert part.name.startswith(".jepa-step00000004")
    assert len(list(part.glob("*.distcp"))) == 2
    # The process that is left may have begun the next one, alone.
    assert all(len(list(other.glob("*.distcp"))) < 2 for other in others)
    assert_same(run(2, config, tmp_path, "runtime.resume=true"), alone)
    assert not list(tmp_path.glob(".jepa*"))


def test_a_process_that_lags_changes_nothing(pictures, tmp_path, alone):
    """Nor does the number of workers that read pictures."""
    config = config_of(pictures, tmp_path, 4, **SHARDED)
    done = scripted(
        2,
        config,
        tmp_path,
        "import os, sys, time\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import train\n"
        "def lag(trainer):\n"
        "    if trainer.step in (2, 3, 7) and os.environ['RANK'] == '1':\n"
        "        time.sleep(0.5)\n"
        "if __name__ == '__main__':\n"
        "    train(load_config(sys.argv[1], ['data.num_workers=2']), lag)\n",
    )
    assert done.returncode == 0, done.stderr
    assert_same(newest(config), alone)


def test_a_process_of_a_sharded_run_holds_its_part_alone(pictures, tmp_path):
    """Of everything but positions; and a loss that is not finite in one process is skipped in all."""
    config = config_of(pictures, tmp_path, 4, **SHARDED)
    done = scripted(
        2,
        config,
        tmp_path,
        "import os, sys\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import engine\n"
        "real, rank = engine.Trainer.train_step, os.environ['RANK']\n"
        "def spoilt(trainer, batch):\n"
        "    bad = rank == '1' and trainer.step in (3, 4)\n"
        "    hook = lambda m, i, out: (out[0] + float('inf'), out[1]) if bad else out\n"
        "    handle = trainer.forward.register_forward_hook(hook)\n"
        "    try:\n"
        "        return real(trainer, batch)\n"
        "    finally:\n"
        "        handle.remove()\n"
        "engine.Trainer.train_step = spoilt\n"
        "def count(trainer):\n"
        "    held = {n: getattr(p, '_local_tensor', p).numel() for n, p in trainer.model.named_parameters()}\n"
        "    whole = {n: p.numel() for n, p in trainer.model.named_parameters()}\n"
        "    sizes = [sum(v for n, v in x.items() if 'pos_embed' not in n) for x in (held, whole)]\n"
        "    state = [v for s in trainer.optimizer.state.values() for v in s.values()]\n"
        "    moments = sum(getattr(v, '_local_tensor', v).numel() for v in state)\n"
        "    with open(f'{sys.argv[1]}.{rank}', 'w') as file:\n"
        "        print(*sizes, moments, file=file)\n"
        "engine.train(load_config(sys.argv[1]), count)\n",
    )
    assert done.returncode == 0, done.stderr
    held = [[int(n) for n in (tmp_path / f"config.yaml.{rank}").read_text().split()] for rank in range(2)]
    assert held[0][1] == held[1][1] == held[0][0] + held[1][0]
    assert all(0.45 < mine / whole < 0.55 for mine, whole, _ in held)
    assert all(moments < 1.1 * mine for mine, _, moments in held)  # two of each trained weight, none of the target's
    rows = (tmp_path / "jepa_r0.csv").read_text().splitlines()
    assert [row[-1] for row in rows[1:]] == list("0001100000")


def test_the_target_encoder_of_a_sharded_run_is_called_alone(pictures, tmp_path):
    """Between two steps, and training goes on as if nobody had called it."""
    script = (
        "import os, sys\n"
        "import torch\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import train\n"
        "def look(trainer):\n"
        "    if trainer.step in (2, 5):\n"
        "        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(trainer.step))\n"
        "        seen = trainer.model.target_encoder(images), trainer.model.target_features(images)\n"
        "        torch.save(seen, f'{sys.argv[1]}.{trainer.step}.{os.environ.get(\"RANK\", 0)}')\n"
        "train(load_config(sys.argv[1]), look)\n"
    )
    seen = {}
    for world, more in ((1, {}), (2, SHARDED)):
        folder = tmp_path / str(world)
        config = config_of(pictures, folder, 8 // world, **more)
        done = scripted(world, config, folder, script)
        assert done.returncode == 0, done.stderr
        files = [folder / f"config.yaml.{step}.{rank}" for step in (2, 5) for rank in range(world)]
        seen[world] = newest(config), [torch.load(file) for file in files]
    assert_same(seen[2][0], seen[1][0])
    for number, pair in enumerate(seen[2][1]):
        for features in pair:
            torch.testing.assert_close(features, seen[1][1][number // 2][0], rtol=1e-4, atol=1e-5)


def test_processes_that_would_start_from_different_steps_do_not(pictures, tmp_path):
    run(1, config_of(pictures, tmp_path / "0", 8, stop_after=3), tmp_path / "0")
    done = scripted(
        2,
        config_of(pictures, tmp_path / "2", 4),
        tmp_path / "2",
        "import os, sys\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import train\n"
        f"folder = '{tmp_path}/' + os.environ['RANK']\n"
        "train(load_config(sys.argv[1], ['runtime.resume=true', 'logging.folder=' + folder]))\n",
    )
    assert done.returncode != 0
    assert "logging.folder must be one that all processes see: they would start from steps 3, 0" in done.stderr


def test_a_process_that_dies_is_started_again(pictures, tmp_path, alone):
    """torchrun starts all anew, and they go on from the last checkpoint by themselves."""
    config = config_of(pictures, tmp_path, 4, save_every=2)
    done = scripted(
        2,
        config,
        tmp_path,
        "import os, sys\n"
        "from fastjepa.config import load_config\n"
        "from fastjepa.training import train\n"
        "def die(trainer):\n"
        "    if trainer.step == 5 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(9)\n"
        "train(load_config(sys.argv[1]), die)\n",
        restarts=2,
    )
    assert done.returncode == 0, done.stderr
    assert "at step 4 to step 10" in done.stderr
    assert_same(read_checkpoint(tmp_path / "jepa-latest.pth.tar"), alone)


SPOILT = """
import os, sys, torch
from fastjepa.config import load_config
from fastjepa.training import engine
real = engine.Trainer.train_step
def spoilt(trainer, batch):
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    hooks = []
    if last and trainer.step in (3, 4):
        hooks += [trainer.forward.register_forward_hook(lambda m, i, out: (out[0] + float("inf"), out[1]))]
    if last and trainer.step == 7:
        weight = trainer.model.predictor.predictor_proj.weight
        hooks += [weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), float("nan")))]
    done = real(trainer, batch)
    for hook in hooks:
        hook.remove()
    return done
engine.Trainer.train_step = spoilt
engine.train(load_config(sys.argv[1]))
"""


def test_what_is_not_finite_in_one_process_is_skipped_in_all(pictures, tmp_path):
    """A loss at steps 3 and 4, a gradient at step 7: the run is that of one process that skips the same steps."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        config = config_of(pictures, folder, 8 // world)
        done = scripted(world, config, folder, SPOILT)
        assert done.returncode == 0, done.stderr
        assert "step 4 was skipped: loss inf, gradient norm nan (2 skipped so far, 2 in a row)" in done.stderr
        rows = (folder / "jepa_r0.csv").read_text().splitlines()
        found[world] = read_checkpoint(folder / "jepa-latest.pth.tar"), [row[-1] for row in rows[1:]]
        pictures_of = [line.split(",") for line in (folder / "jepa-skipped.csv").read_text().splitlines()[1:]]
        assert [len([1 for step, _ in pictures_of if step == str(s)]) for s in range(10)] == [
            0,
            0,
            0,
            8,
            8,
            0,
            0,
            8,
            0,
            0,
        ]
    assert_same(found[2][0], found[1][0])
    assert found[1][1] == found[2][1] == list("0001100100")


@pytest.mark.parametrize(
    "world, name, kind",  # torchrun passes on SIGTERM alone; srun signals every task
    [(1, "SIGTERM", {}), (1, "SIGUSR1", {}), (2, "SIGTERM", {}), (2, "SIGTERM", SHARDED)],
)
def test_a_signal_saves_and_the_run_can_go_on(pictures, tmp_path, world, name, kind):
    config = tiny_config(
        pictures,
        tmp_path,
        data={"batch_size": 2},
        mask={"ragged": True},
        optimization={"epochs": 500, "warmup": 1},
        logging={"every": 1},
        runtime={"save_every": 10**6, **kind},
    )
    process = subprocess.Popen(launched(world, config, tmp_path), stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "jepa_r0.csv"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (rows.exists() and rows.read_text().count("\n") > 3):
        time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
    assert "runtime.resume=true goes on from there" in said
    if world == 1:
        assert process.returncode == 75
    step = newest(config)["fastjepa"]["step"]
    assert step >= 3
    again = run(1, config, tmp_path, "runtime.resume=true", f"runtime.stop_after={step + 2}", "data.batch_size=2") \
        if world == 1 else None  # fmt: skip
    assert again is None or again["fastjepa"]["step"] == step + 2


def test_a_missing_variable_is_one_line(pictures, tmp_path):
    command = launched(1, config_of(pictures, tmp_path, 8), tmp_path)
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "fastjepa train: RANK, WORLD_SIZE set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: torchrun sets all of them"
    )
