"""Chapter 9: one group per parameter, batches that are pure functions, exact resume, sound checkpoints."""

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from diffussm import training
from diffussm.data import TensorData, batch_indices, digits, generator
from diffussm.fft_convolution import convolve
from diffussm.folders import ImageFolder
from diffussm.model import PRESETS, DiffuSSM, DiffuSSMConfig
from diffussm.training import (
    RECIPES,
    Clock,
    Execution,
    Meter,
    Preempted,
    Recipe,
    TrainState,
    World,
    describe_groups,
    ema_decay_at,
    find_checkpoint,
    flat,
    from_flat,
    learning_rate_factor,
    load_run,
    parameter_groups,
    replay,
    snapshot,
    train,
    training_batch,
    training_batches,
    update_ema,
    write_checkpoint,
)

TINY = Recipe(
    model=DiffuSSMConfig(
        input_size=8, in_channels=1, num_classes=10, d_model=16, n_blocks=1, d_state=4
    ),
    batch_size=8,
    steps=10,
    lr=1e-3,
)
SELDOM = Execution(log_every=4, save_every=100)


def changed(changes):
    """TINY and SELDOM with these options, whichever of the two they belong to."""
    names = {field.name for field in fields(Execution)}
    recipe = {key: value for key, value in changes.items() if key not in names}
    execution = {key: value for key, value in changes.items() if key in names}
    return replace(TINY, **recipe), replace(SELDOM, **execution)


def run_tiny(folder, **changes):
    recipe, execution = changed(changes)
    images = None
    if recipe.data != "digits":
        images = ImageFolder(recipe.data, recipe.model.height)
    return train(recipe, folder, execution, "cpu", progress=False, dataset=images)


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "seconds_left")
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in lines
    ]


def assert_same_state(a, b):
    assert a.step == b.step
    for first, second in ((a.model, b.model), (a.ema, b.ema)):
        for (name, p), (_, q) in zip(
            first.named_parameters(), second.named_parameters(), strict=True
        ):
            assert torch.equal(p, q), name
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        for slot, value in a.optimizer.state[p].items():
            assert torch.equal(value, b.optimizer.state[q][slot]), slot


@pytest.mark.parametrize("name", ["DiffuSSM-S", "digits"])
def test_every_parameter_is_in_exactly_one_group(name):
    with torch.device("meta"):
        model = DiffuSSM.from_preset(name)
    groups = parameter_groups(model, lr=1e-2, ssm_lr=1e-3, weight_decay=0.1)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [id(p) for g in groups for p in g["params"]] == [
        id(dict(model.named_parameters())[n]) for n in names
    ]
    by_name = {group["name"]: group for group in groups}
    assert (
        by_name["dynamics"]["lr"] == 1e-3 and by_name["dynamics"]["weight_decay"] == 0
    )
    assert all(p.ndim >= 2 for p in by_name["matrices"]["params"])
    assert (
        by_name["matrices"]["weight_decay"] == 0.1
        and by_name["vectors"]["weight_decay"] == 0
    )
    assert len(by_name["dynamics"]["params"]) == 2 * 3 * model.config.n_blocks
    for group in groups:
        assert group["name"] in describe_groups(groups)


def test_ema_is_the_unrolled_weighted_sum():
    torch.manual_seed(0)
    model, ema = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    expected = ema.weight.detach().clone()
    for step in range(30):
        nn.init.normal_(model.weight)
        decay = ema_decay_at(step, 0.9)
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weight, expected)
    assert [ema_decay_at(step, 0.9) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.9]


def test_learning_rate_rises_stays_and_falls():
    config = replace(TINY, steps=100, warmup=10, cooldown=20)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1
    assert set(factors[9:80]) == {1.0}
    assert (
        factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
        and factors[-1] > 0
    )


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    torch.manual_seed(1)
    a = training_batch(data, model, TINY, 3)
    torch.manual_seed(2)
    b = training_batch(data, model, TINY, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for config, step in ((TINY, 4), (replace(TINY, seed=1), 3)):
        other = training_batch(data, model, config, step)
        assert not torch.equal(a.noise, other.noise) and not torch.equal(a.t, other.t)


def test_each_draw_of_a_step_has_a_purpose_of_its_own():
    # so that no draw depends on which others are made, or in which order
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    batch = training_batch(data, model, TINY, 3)
    shape, count = batch.noise.shape, (TINY.batch_size,)
    draw = partial(generator, TINY.seed, number=3)
    assert torch.equal(batch.noise, torch.randn(shape, generator=draw("noise")))
    t = torch.randint(TINY.timesteps, count, generator=draw("timesteps"))
    assert torch.equal(batch.t, t)
    labels = data.labels[batch_indices(50, *count, 3, TINY.seed)]
    dropped = model.drop_labels(labels, draw("label dropout"))
    assert torch.equal(batch.y, dropped)


def test_drawing_a_batch_leaves_the_global_generator_alone():
    data = TensorData(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    before = torch.get_rng_state()
    training_batch(data, model, TINY, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_meter_means_equal_a_loop():
    torch.manual_seed(0)
    meter, seen = Meter(), []
    for _ in range(3):
        losses = {name: torch.rand(8) for name in ("loss", "mse", "vb")}
        t = torch.randint(500, (8,))  # nothing in the two noisy quarters
        meter.add(Meter.tally(losses, t, 1000), 2.0)
        seen += [
            (int(t[i]), {name: float(losses[name][i]) for name in losses})
            for i in range(8)
        ]
    row = meter.read_and_reset()
    for name in ("loss", "mse", "vb"):
        assert row[name] == pytest.approx(
            sum(terms[name] for _, terms in seen) / len(seen)
        )
    low = [terms["mse"] for t, terms in seen if t < 250]
    assert row["mse_q1"] == pytest.approx(sum(low) / len(low))
    assert row["mse_q3"] is None and row["grad_norm"] == 2.0
    assert meter.sums.abs().sum() == 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_halves_equal_one_run_bit_for_bit(tmp_path, precision):
    straight = run_tiny(tmp_path / "straight", precision=precision)
    run_tiny(tmp_path / "halves", steps=5, precision=precision)
    halves = run_tiny(tmp_path / "halves", precision=precision)
    assert_same_state(straight, halves)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "halves")
    assert len(log_of(tmp_path / "halves")) == 2


def test_lines_logged_after_the_last_checkpoint_are_written_again(tmp_path):
    straight = run_tiny(tmp_path / "straight", save_every=5)
    run_tiny(tmp_path / "killed", save_every=5)
    # as if killed just before the last save, and in the middle of a line of the log
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_00000010")
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "loss"')
    resumed = run_tiny(tmp_path / "killed", save_every=5)
    assert_same_state(straight, resumed)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "killed")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "garble"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    run_tiny(tmp_path / "run", save_every=5)
    newest = tmp_path / "run" / "checkpoints" / "step_00000010"
    weights = newest / "ema" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        weights.unlink()
    else:
        (newest / "state.json").write_text("[]")
    assert find_checkpoint(tmp_path / "run").name == "step_00000005"
    assert "damaged" in capsys.readouterr().err
    straight = run_tiny(tmp_path / "straight", save_every=5)
    assert_same_state(straight, run_tiny(tmp_path / "run", save_every=5))


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path):
    state = run_tiny(tmp_path / "run", save_every=2)
    kept = sorted(
        folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()
    )
    assert kept == ["step_00000008", "step_00000010"]
    # left by a kill in the middle of a save
    (tmp_path / "run" / "checkpoints" / ".step_00000011.tmp").mkdir()
    state.step = 11
    write_checkpoint(tmp_path / "run", snapshot(state, World("cpu")))
    assert find_checkpoint(tmp_path / "run").name == "step_00000011"


def test_checkpoints_hold_safetensors_and_json_only(tmp_path):
    run_tiny(tmp_path / "run")
    suffixes = {
        path.suffix for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()
    }
    assert suffixes == {".json", ".jsonl", ".safetensors"}


def test_a_checkpoint_folder_loads_as_a_model(tmp_path):
    state = run_tiny(tmp_path / "run")
    for weights, module in (("ema", state.ema), ("model", state.model)):
        model, config, classes = load_run(tmp_path / "run", weights)
        assert config == TINY and classes == [str(digit) for digit in range(10)]
        for p, q in zip(model.parameters(), module.parameters(), strict=True):
            assert torch.equal(p, q)
    saved = safetensors.torch.load_file(
        find_checkpoint(tmp_path / "run") / "ema" / "model.safetensors"
    )
    assert saved.keys() == state.ema.state_dict().keys()


def test_another_runs_folder_is_refused_and_untouched(tmp_path):
    run_tiny(tmp_path / "run")
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    with pytest.raises(
        ValueError, match=r"holds another run.*lr \(there 0.001, asked 0.002\)"
    ):
        run_tiny(tmp_path / "run", lr=2e-3)
    assert before == {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no training run"):
        run_tiny(tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to_mother.txt"]


def test_a_run_with_a_cooldown_cannot_be_prolonged(tmp_path):
    run_tiny(tmp_path / "run", cooldown=2)
    with pytest.raises(ValueError, match="steps"):
        run_tiny(tmp_path / "run", cooldown=2, steps=12)


def reseal(checkpoint):
    """Make the checksums of a checkpoint fit what lies in it, as an attacker or a careless tool would."""
    record = json.loads((checkpoint / "state.json").read_text())
    for name in record["sha256"]:
        record["sha256"][name] = hashlib.sha256(
            (checkpoint / name).read_bytes()
        ).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(record))


def test_a_diverged_run_stops_and_leaves_what_led_to_it(tmp_path):
    run_tiny(tmp_path / "run", steps=4, save_every=4)
    checkpoint = find_checkpoint(tmp_path / "run")
    weights = safetensors.torch.load_file(checkpoint / "model" / "model.safetensors")
    weights["embed_y.weight"][3] = float(
        "nan"
    )  # only images of a three, label kept, are affected
    safetensors.torch.save_file(weights, checkpoint / "model" / "model.safetensors")
    reseal(checkpoint)
    with pytest.raises(FloatingPointError, match=r"step \d+ .*lower lr"):
        run_tiny(tmp_path / "run", steps=30)
    assert find_checkpoint(tmp_path / "run") == checkpoint
    (dump,) = (tmp_path / "run").glob("dump_*")
    again = replay(dump)
    batch = safetensors.torch.load_file(dump / "batch.safetensors")
    assert (
        torch.equal(again["loss"].isnan(), batch["y"] == 3) and (batch["y"] == 3).any()
    )


def test_a_batch_in_four_parts_is_the_batch(tmp_path):
    whole = run_tiny(tmp_path / "whole", clip=0.5)
    parts = run_tiny(tmp_path / "parts", clip=0.5, micro_batch=2)
    for (name, p), q in zip(
        whole.model.named_parameters(), parts.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=name)
    for a, b in zip(
        log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-4)
    with pytest.raises(ValueError, match="choose a divisor of 8"):
        run_tiny(tmp_path / "other", micro_batch=3)


def test_clipping_bounds_what_the_optimiser_sees(tmp_path):
    free, clipped = (
        run_tiny(tmp_path / str(clip), steps=1, clip=clip) for clip in (0.0, 1e-3)
    )
    norm = log_norm = 0.0
    for p in clipped.model.parameters():
        norm += float(
            (clipped.optimizer.state[p]["exp_avg"] / 0.1).square().sum()
        )  # after one step
    for p in free.model.parameters():
        log_norm += float((free.optimizer.state[p]["exp_avg"] / 0.1).square().sum())
    assert norm**0.5 == pytest.approx(1e-3, rel=1e-3) and log_norm**0.5 > 1e-2


def test_parts_of_processes_make_the_batch():
    data = TensorData(torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    for size in (2, 4, 8):
        parts = [
            training_batch(data, model, TINY, 3, rank, size) for rank in range(size)
        ]
        assert all(
            torch.equal(torch.cat(a), b)
            for a, b in zip(zip(*parts, strict=True), whole, strict=True)
        )
    ahead = list(training_batches(data, model, TINY, 7))
    assert len(ahead) == 3 and torch.equal(
        ahead[1].x0, training_batch(data, model, TINY, 8).x0
    )


def test_a_data_set_that_draws_gets_noise_of_its_own():
    class Blurred(TensorData):
        def batch(self, indices, flips, noise):
            return self.images[indices] + noise, self.labels[indices]

    data = Blurred(torch.zeros(50, 1, 8, 8), torch.arange(50) % 10)
    model = DiffuSSM(TINY.model)
    whole = training_batch(data, model, TINY, 3)
    assert (
        not torch.equal(whole.x0, whole.noise) and abs(float(whole.x0.std()) - 1) < 0.1
    )
    parts = [training_batch(data, model, TINY, 3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)


@pytest.mark.parametrize("trick", ["foreign", "pickle", "path", "step"])
def test_a_checkpoint_with_anything_else_in_it_is_refused(tmp_path, trick):
    run_tiny(tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run")
    if trick == "foreign":
        torch.save({"harm": 1}, checkpoint / "extra.pt")
    elif trick == "pickle":
        torch.save({"harm": 1}, checkpoint / "optimizer.safetensors")
        reseal(checkpoint)
        with pytest.raises(ValueError, match="no checkpoint of this run"):
            run_tiny(tmp_path / "run", steps=12)
        return
    else:
        record = json.loads((checkpoint / "state.json").read_text())
        if trick == "path":
            (tmp_path / "elsewhere").write_text("secret")
            record["sha256"]["../../../elsewhere"] = hashlib.sha256(
                b"secret"
            ).hexdigest()
        else:
            record["step"] = 11
        (checkpoint / "state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        run_tiny(tmp_path / "run", steps=12)


def test_training_that_cannot_save_stops_loudly(tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails in the middle."""
    code = (
        "import resource, sys; from test_training import run_tiny; from pathlib import Path; "
        "run_tiny(Path(sys.argv[1]), steps=4, save_every=2); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); run_tiny(Path(sys.argv[1]), steps=8, save_every=2)"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert (
        done.returncode == 1
        and "OSError: the checkpoint of step 6 could not be written" in done.stderr
    )
    assert "make room" in done.stderr
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_state(
        run_tiny(tmp_path / "run", steps=8), run_tiny(tmp_path / "straight", steps=8)
    )


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path):
    run_tiny(tmp_path / "run", steps=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text(
        "a file where the folder should be"
    )  # root may write into read-only folders
    with pytest.raises(OSError, match="could not be written"):
        run_tiny(tmp_path / "run", steps=4)


def test_a_run_that_is_being_trained_is_refused(tmp_path):
    def intrude(row):
        with pytest.raises(ValueError, match="another process"):
            run_tiny(tmp_path / "run")
        seen.append(row["step"])

    seen = []
    train(TINY, tmp_path / "run", SELDOM, "cpu", progress=False, on_log=intrude)
    assert seen == [4, 8] and run_tiny(tmp_path / "run", steps=12).step == 12


def test_every_hundredth_checkpoint_can_be_kept(tmp_path):
    run_tiny(tmp_path / "run", save_every=1, keep_last=2, keep_every=4)
    kept = sorted(
        folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()
    )
    assert kept == [f"step_{step:08d}" for step in (4, 8, 9, 10)]


def test_as_many_checkpoints_are_kept_as_was_asked(tmp_path):
    # with more to keep than there are, a negative bound once removed the oldest
    run_tiny(tmp_path / "run", save_every=1, keep_last=6)
    assert steps_kept(tmp_path / "run") == [5, 6, 7, 8, 9, 10]


def test_a_run_has_one_encoder_whatever_its_data(tmp_path):
    def latents(encoder):
        data = TensorData(
            torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        )
        data.vae = {"name": encoder, "encoder_sha256": encoder, "scaling_factor": 1.0}
        return data

    config = replace(TINY, model=replace(TINY.model, num_classes=0, label_dropout=0.0))
    training.open_run(tmp_path / "run", config, SELDOM, latents("one"))
    assert training.encoder_of(tmp_path / "run")["name"] == "one"
    training.open_run(tmp_path / "run", config, SELDOM, latents("one"))
    with pytest.raises(ValueError, match="another folder|choose a new folder"):
        training.open_run(
            tmp_path / "run", config, SELDOM, latents("two"), other_data=True
        )
    assert training.encoder_of(tmp_path / "run")["name"] == "one"
    (tmp_path / "run" / "vae.json").unlink()  # as a run of an older version has none
    assert training.encoder_of(tmp_path / "run", tmp_path / "nowhere") is None


def test_a_lock_that_is_new_already_is_not_taken(tmp_path, monkeypatch):
    """Two starts judge the same lock stale; the second of them must not remove what the first made."""
    lock = tmp_path / ".lock.json"
    lock.write_text(
        json.dumps({"host": socket.gethostname(), "process": 1, "token": "gone"})
    )

    def meanwhile(process, token):
        lock.write_text(json.dumps({"host": "here", "process": 2, "token": "new"}))
        return False

    monkeypatch.setattr(training, "_alive", meanwhile)
    training._remove_if_stale(lock, socket.gethostname())
    assert (
        json.loads(lock.read_text())["token"] == "new"
        and len(list(tmp_path.iterdir())) == 1
    )


def test_the_same_data_may_move_and_other_data_may_not(tmp_path):
    def folder(name, count):
        for i in range(count):
            (tmp_path / name / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(tmp_path / name / str(i % 2) / f"{i}.png")
        return str(tmp_path / name)

    model = replace(TINY.model, num_classes=2, in_channels=3)
    here, there, more = folder("here", 8), folder("there", 8), folder("more", 9)
    run_tiny(tmp_path / "run", model=model, data=here, steps=2)
    assert run_tiny(tmp_path / "run", model=model, data=there, steps=4).step == 4
    with pytest.raises(ValueError, match="other data"):
        run_tiny(tmp_path / "run", model=model, data=more, steps=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": 1.5}, "learning rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "float32"),
        ({"warmup": 9, "cooldown": 9}, "fit into steps=10"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(changes)


def test_unknown_options_are_refused_by_name():
    assert from_flat(flat(TINY, SELDOM)) == (TINY, SELDOM)
    with pytest.raises(ValueError, match="learning_rat"):
        from_flat({**asdict(TINY), "learning_rat": 1e-4})
    with pytest.raises(ValueError, match="'model' section"):
        from_flat({})


def test_old_names_are_read_with_a_warning_that_says_the_new(capsys):
    training._warn.cache_clear()
    old = {**asdict(TINY), "parallel": "fsdp", "recompute": True}
    _, execution = from_flat(old)
    assert execution.strategy == "fsdp" and execution.activation_checkpointing
    said = capsys.readouterr().err
    assert "parallel is called strategy" in said
    assert "recompute is called activation_checkpointing" in said


def test_data_and_model_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path,
):
    for model, message in (
        (replace(TINY.model, num_classes=7), "num_classes=10"),
        (replace(TINY.model, input_size=16), "model.input_size"),
    ):
        with pytest.raises(ValueError, match=message):
            run_tiny(tmp_path / "run", model=model)
    with pytest.raises(ValueError, match="pass them as dataset="):
        train(replace(TINY, data=str(tmp_path)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a training run"):
        load_run(tmp_path)
    run_tiny(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        load_run(tmp_path / "run")


def test_unconditional_training_needs_no_labels(tmp_path):
    state = run_tiny(
        tmp_path / "run", model=replace(TINY.model, num_classes=0), steps=2
    )
    assert state.model.null_label is None


def test_the_recipes_are_the_presets():
    from diffussm.model import PRESETS

    for name, recipe in RECIPES.items():
        assert recipe.model == DiffuSSMConfig(**PRESETS[name])


def doubled(u, spectra):
    return convolve(u, 2 * spectra)


def test_another_convolution_is_asked_for_and_used(tmp_path, monkeypatch, capsys):
    asked = []

    def choose(*question):
        asked.append(question)
        return SimpleNamespace(convolution=doubled, reason="twice is better")

    monkeypatch.setitem(sys.modules, "elsewhere", SimpleNamespace(choose=choose))
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    execution = Execution(micro_batch=4, convolution="elsewhere:choose")
    state = TrainState.create(config, execution, World("cpu"))
    assert asked == [(64, 96, 4, torch.device("cpu"), torch.float32)]
    assert "convolution: twice is better" in capsys.readouterr().err
    for model in (state.model, state.ema):
        assert all(block.ssm.convolution is doubled for block in model.blocks)
    plain = TrainState.create(config, Execution(), World("cpu"))
    assert all(block.ssm.convolution is convolve for block in plain.model.blocks)


def test_a_cpu_that_asks_for_the_chip_is_told_why_not(capsys):
    pytest.importorskip("triton")
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    execution = Execution(convolution="diffussm.autotuning:autotune_convolution")
    state = TrainState.create(config, execution, World("cpu"))
    assert "FFT: the kernels on the chip are for a GPU" in capsys.readouterr().err
    assert state.model.blocks[0].ssm.convolution is convolve


@pytest.mark.parametrize(
    "name", ["triton", "no.such.module:choose", "diffussm.model:choose", ":", "math:"]
)
def test_a_convolution_that_does_not_exist_is_refused(name):
    config = Recipe(model=DiffuSSMConfig(**PRESETS["digits"]), batch_size=8)
    with pytest.raises(
        ValueError, match="expected 'fft', or 'package.module:function'"
    ):
        TrainState.create(config, Execution(convolution=name), World("cpu"))


# ------------------------------------------------------------------------------
# Checkpoints that are kept, and asked for by step


def steps_kept(run):
    return [
        int(folder.name.removeprefix("step_"))
        for folder in sorted((run / "checkpoints").iterdir())
    ]


def test_named_checkpoints_are_written_when_reached_and_outlive_all_others(tmp_path):
    # with 8 images a step, 35 are reached by step 5; neither 3 nor 5 is a multiple of save_every
    run_tiny(tmp_path / "run", save_every=2, keep_last=1, keep=("3", "35 images"))
    assert steps_kept(tmp_path / "run") == [3, 5, 10]
    # what is kept may change on resume, and what was passed already is told
    run_tiny(tmp_path / "run", steps=14, save_every=2, keep_last=1, keep=("3", "13"))
    assert steps_kept(tmp_path / "run") == [3, 13, 14]


def test_a_kept_step_that_was_passed_is_told(tmp_path, capsys):
    run_tiny(tmp_path / "run", steps=4)
    run_tiny(tmp_path / "run", steps=6, keep=("2", "4", "9"))
    assert "too late to keep what keep names: 2\n" in capsys.readouterr().err


def test_images_are_counted_exactly():
    keep = ("338M images", "338_000_000 images", "400k", "7")
    assert Execution(keep=keep).keep_steps(256) == {1_320_313, 400_000, 7}
    assert 256 * 1_320_312 < 338_000_000 <= 256 * 1_320_313
    assert Execution(keep=("0.5M images",)).keep_steps(8) == {62_500}
    assert Execution(keep=[3, "5"]).keep == ("3", "5")
    assert Execution(keep="3, 338M images").keep == ("3", "338M images")


@pytest.mark.parametrize(
    "entry", ["", "0", "-3", "1.5", "338M image", "0 images", "ten", "1e6", "5 steps"]
)
def test_what_keep_cannot_mean_is_refused(entry):
    with pytest.raises(ValueError, match="'338M images'"):
        Execution(keep=("5", entry))


def test_any_checkpoint_can_be_loaded_by_its_step(tmp_path):
    early = run_tiny(tmp_path / "early", steps=3)
    late = run_tiny(tmp_path / "run", keep=("3",))
    for step, state in ((3, early), (10, late), (None, late)):
        model, _, _ = load_run(tmp_path / "run", "ema", step)
        for p, q in zip(model.parameters(), state.ema.parameters(), strict=True):
            assert torch.equal(p, q), step
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 4; there are 3, 10$"
    ):
        load_run(tmp_path / "run", step=4)
    (find_checkpoint(tmp_path / "run", 3) / "ema" / "model.safetensors").write_bytes(
        b""
    )
    with pytest.raises(
        ValueError, match="step_00000003 is damaged"
    ):  # and never another one in its place
        load_run(tmp_path / "run", step=3)
    with pytest.raises(FileNotFoundError, match="there are none yet"):
        find_checkpoint(tmp_path / "nothing", 3)


def test_weights_are_as_readable_as_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        state = run_tiny(tmp_path / "run", steps=2)
        state.ema.save_pretrained(tmp_path / "exported")
    finally:
        os.umask(mask)
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    ]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o640)}
    assert sum(path.suffix == ".safetensors" for path in files) == 4


# ------------------------------------------------------------------------------
# Steps that are not finite


class Poisoned(TensorData):
    """The digits; the batches of some steps hold an image so large that its loss overflows."""

    def __init__(self, *steps):
        super().__init__(*digits("train"))
        self.bad = {
            int(batch_indices(len(self), TINY.batch_size, step - 1, TINY.seed)[0])
            for step in steps
        }

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image + 1e30 if index in self.bad else image), label


def run_poisoned(folder, *steps, **changes):
    recipe, execution = changed(changes)
    data = Poisoned(*steps)
    return train(recipe, folder, execution, "cpu", progress=False, dataset=data)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tmp_path):
    before = run_poisoned(tmp_path / "before", 5, steps=4, log_every=5)
    after = run_poisoned(tmp_path / "after", 5, steps=5, log_every=5)
    assert after.step == 5 and after.skipped == [5] and before.skipped == []
    before.step = 5
    assert_same_state(before, after)
    (line,) = log_of(tmp_path / "after")
    assert line["skipped"] == [5] and line["images"] == 40 and line["grad_norm"] > 0
    good = log_of_four_steps(tmp_path)
    assert {
        key: line[key] for key in good
    } == good  # the means are those of the four good steps


def log_of_four_steps(tmp_path):
    run_poisoned(tmp_path / "four", steps=4, log_every=4)
    (line,) = log_of(tmp_path / "four")
    return {key: value for key, value in line.items() if key not in ("step", "images")}


def test_a_line_of_skipped_steps_alone_says_so(tmp_path):
    run_poisoned(tmp_path / "run", 2, steps=3, log_every=1)
    lines = log_of(tmp_path / "run")
    assert "skipped" not in lines[0]
    assert (
        lines[1]["loss"] is None and lines[1]["skipped"] == [2] and lines[2]["loss"] > 0
    )


@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_repeats_what_it_skipped(tmp_path, stop, capsys):
    straight = run_poisoned(tmp_path / "straight", 5, save_every=stop)
    assert "step 5" in (told := capsys.readouterr().err) and "2 more may be" in told
    run_poisoned(tmp_path / "killed", 5, save_every=stop, keep_every=stop)
    for folder in (tmp_path / "killed" / "checkpoints").iterdir():
        if int(folder.name[5:]) > stop:
            shutil.rmtree(folder)
    assert (find_checkpoint(tmp_path / "killed").name, stop) == (
        f"step_{stop:08d}",
        stop,
    )
    resumed = run_poisoned(tmp_path / "killed", 5, save_every=stop)
    assert resumed.skipped == straight.skipped == [5]
    assert_same_state(straight, resumed)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "killed")


def test_only_so_many_steps_are_skipped_however_often_it_is_started(tmp_path):
    bad = (2, 3, 6, 8)
    for last in (
        0,
        2,
    ):  # the second start begins at the checkpoint, and counts what was skipped before
        with pytest.raises(
            FloatingPointError,
            match=r"step 6 .*left out before: 2, 3\. .*dump_00000002",
        ):
            run_poisoned(tmp_path / "run", *bad, skip_nonfinite=2, save_every=4)
        assert steps_kept(tmp_path / "run") == [4], last
    assert [path.name for path in (tmp_path / "run").glob("dump_*")] == [
        "dump_00000002"
    ]
    replayed = replay(tmp_path / "run" / "dump_00000002")
    assert (~replayed["loss"].isfinite()).sum() == 1
    # an accident may be passed on resume: that is no other run
    assert run_poisoned(tmp_path / "run", *bad, skip_nonfinite=4).skipped == [
        2,
        3,
        6,
        8,
    ]


def test_without_leave_the_first_bad_step_stops_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 3 .*left out before: none"
    ):
        run_poisoned(tmp_path / "run", 3, skip_nonfinite=0)


# ------------------------------------------------------------------------------
# The data of a resumed run


def write_images(folder, seed, count=8):
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image = torch.randint(
            256, (8, 8), generator=torch.Generator().manual_seed(100 * seed + i)
        )
        Image.fromarray(image.byte().numpy()).save(
            folder / str(i % 2) / f"of_{seed}_{i}.png"
        )
    return str(folder)


def test_other_pictures_of_the_same_number_are_refused_unless_told(tmp_path):
    model = replace(TINY.model, num_classes=2, in_channels=3)
    one, two = (
        write_images(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))
    )
    run = tmp_path / "run"
    run_tiny(run, model=model, data=one, steps=2)
    before = (run / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"other data, which differ in data.fingerprint .*--other_data"
    ):
        run_tiny(run, model=model, data=two, steps=4)
    assert (run / "config.json").read_bytes() == before
    config = replace(TINY, model=model, data=two, steps=4)
    told = {"dataset": ImageFolder(two, 8), "other_data": True}
    assert train(config, run, SELDOM, "cpu", progress=False, **told).step == 4
    facts = json.loads((run / "config.json").read_text())["data"]
    assert facts["earlier"] == [
        json.loads(before)["data"]
    ]  # it is not forgotten what it learned from
    assert (
        run_tiny(run, model=model, data=two, steps=6).step == 6
    )  # told once is enough
    with pytest.raises(ValueError, match="other data"):
        run_tiny(run, model=model, data=one, steps=8)
    assert load_run(run)[2] == ["0", "1"]


def test_digits_that_were_changed_are_other_digits(tmp_path):
    images, labels = digits("train")
    train(
        TINY,
        tmp_path / "run",
        device="cpu",
        progress=False,
        dataset=TensorData(images, labels),
    )
    changed = images.clone()
    changed[7, 0, 0, 0] *= -1
    for other in (TensorData(changed, labels), TensorData(images, labels.roll(1))):
        with pytest.raises(ValueError, match=r"data\.fingerprint"):
            train(TINY, tmp_path / "run", device="cpu", progress=False, dataset=other)


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys):
    """Its options lie flat in the file, some under other names, and it lacks younger ones."""
    run_tiny(tmp_path / "run", steps=4)
    file = tmp_path / "run" / "config.json"
    now = json.loads(file.read_text())
    values = now["recipe"] | now["execution"] | {"dataset": now["data"]}
    for younger in ("ema_warmup", "keep", "skip_nonfinite", "workers", "exif_rotate"):
        del values[younger]
    values["parallel"] = values.pop("strategy")
    values["recompute"] = values.pop("activation_checkpointing")
    values["dataset"]["fingerprint"] = None
    file.write_text(json.dumps(values))
    assert run_tiny(tmp_path / "run").step == 10
    assert "holds no fingerprint of its data" in capsys.readouterr().err
    assert load_run(tmp_path / "run")[1] == replace(TINY, steps=4)
    values["lr"] = 2e-3
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="differs in lr"):
        run_tiny(tmp_path / "run", steps=12)


def test_a_run_of_earlier_random_streams_says_so_and_goes_on(tmp_path, capsys):
    run_tiny(tmp_path / "run", steps=4)
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    assert values["random"] == 2
    run_tiny(tmp_path / "run", steps=5)
    assert "random numbers" not in capsys.readouterr().err
    del values["random"]
    file.write_text(json.dumps(values))
    assert run_tiny(tmp_path / "run").step == 10
    assert "drew its random numbers in another way" in capsys.readouterr().err
    assert load_run(tmp_path / "run")[1].steps == 4


def test_exif_is_no_question_of_digits(tmp_path):
    with pytest.raises(ValueError, match="exif_rotate applies to files"):
        run_tiny(tmp_path / "run", exif_rotate=True)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------
# Disks and systems that lack something


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_flock_has_another_lock(tmp_path, monkeypatch, capsys, code):
    import fcntl

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = tmp_path / f"run{code}"
    seen = []

    def intrude(row):
        holder = json.loads((run / ".lock.json").read_text())
        assert (holder["host"], holder["process"]) == (
            socket.gethostname(),
            os.getpid(),
        )
        with pytest.raises(
            ValueError, match=rf"held by process {os.getpid()} of the machine"
        ):
            run_tiny(run)
        seen.append(row["step"])

    train(TINY, run, SELDOM, device="cpu", progress=False, on_log=intrude)
    assert seen == [4, 8] and not (run / ".lock.json").exists()
    training._warn.cache_clear()
    run_tiny(run, steps=12)
    assert os.strerror(code) in capsys.readouterr().err


def test_a_system_without_fcntl_has_another_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    training._warn.cache_clear()
    assert run_tiny(tmp_path / "run", steps=2).step == 2
    assert "this system has no flock" in capsys.readouterr().err


def test_a_lock_left_by_a_process_that_is_no_more_is_taken_over(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    run_tiny(tmp_path / "run", steps=2)
    lock = tmp_path / "run" / ".lock.json"
    here = {"host": socket.gethostname(), "token": "another"}
    # a number that is free, and ours, which an earlier process had in the same container
    for process in (ended.pid, os.getpid()):
        lock.write_text(json.dumps({**here, "process": process}))
        assert run_tiny(tmp_path / "run", steps=3).step == 3
        assert (
            f"was left by process {process} of this machine" in capsys.readouterr().err
        )
    # of processes elsewhere, or of a file that does not name one, nothing is known
    for holder in (
        {**here, "host": "elsewhere", "process": 1},
        {**here, "process": 1},
        {},
    ):
        lock.write_text(json.dumps(holder))
        with pytest.raises(ValueError, match="remove that file"):
            run_tiny(tmp_path / "run", steps=4)
        assert json.loads(lock.read_text()) == holder


def test_a_folder_that_cannot_be_flushed_is_told_once(tmp_path, monkeypatch, capsys):
    flush = os.fsync

    def only_files(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    training._warn.cache_clear()
    run_tiny(tmp_path / "run", save_every=2)
    assert steps_kept(tmp_path / "run") == [8, 10]
    assert capsys.readouterr().err.count("cannot flush a folder") == 1


def test_a_disk_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="could not be written"):
        run_tiny(tmp_path / "run", steps=2)


def test_training_is_imported_without_fcntl_and_sigusr1():
    code = "import signal, sys; del signal.SIGUSR1; sys.modules['fcntl'] = None; import diffussm.training"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "changes", [{"convolution": "fast"}, {"micro_batch": 3}, {"batch_size": 2000}]
)
def test_a_refused_run_leaves_no_folder(tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        run_tiny(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------
# The rest of the loop


class Stopping(World):
    """A process that is asked to stop while it makes its third step."""

    asked = 0

    @property
    def stopping(self):
        self.asked += 1
        return self.asked >= 3


def test_a_run_that_is_asked_to_stop_says_from_where_it_goes_on(tmp_path):
    with pytest.raises(
        Preempted, match="saved step 3 of 10; the same command goes on from there"
    ):
        train(TINY, tmp_path / "run", SELDOM, progress=False, world=Stopping("cpu"))
    assert steps_kept(tmp_path / "run") == [3]
    assert_same_state(run_tiny(tmp_path / "run"), run_tiny(tmp_path / "straight"))


def test_a_constant_decay_is_the_papers(tmp_path):
    assert [ema_decay_at(step, 0.9999, warmup=False) for step in (0, 10**6)] == [
        0.9999,
        0.9999,
    ]
    start = TrainState.create(TINY, SELDOM, World("cpu"))
    constant = run_tiny(tmp_path / "constant", steps=1, ema_warmup=False)
    growing = run_tiny(tmp_path / "growing", steps=1)
    (first, *_), (moved, *_), (grown, *_), (model, *_) = (
        list(module.parameters())
        for module in (start.ema, constant.ema, growing.ema, growing.model)
    )
    torch.testing.assert_close(moved, 0.9999 * first + 0.0001 * model)
    torch.testing.assert_close(grown, 0.1 * first + 0.9 * model)
    with pytest.raises(ValueError, match="ema_warmup"):
        run_tiny(tmp_path / "growing", ema_warmup=False)


def test_a_tally_stays_on_the_device():
    """On a device without numbers any look at them would fail."""
    losses = {name: torch.rand(8, device="meta") for name in ("loss", "mse", "vb")}
    tally = Meter.tally(losses, torch.zeros(8, dtype=torch.int64, device="meta"), 1000)
    assert (
        tally.device.type == "meta"
        and tally.shape == (2, 8)
        and tally.dtype == torch.float64
    )


def test_a_step_reads_the_device_once(tmp_path, monkeypatch):
    reads = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: reads.append(tensor.shape) or copy(tensor)
    )
    for micro in (0, 2, 1):  # and not once for each micro-batch
        reads.clear()
        run_tiny(tmp_path / str(micro), steps=3, micro_batch=micro)
        # before the first step, data and noise schedule are read as well
        assert [shape for shape in reads if shape.numel() < 100] == [
            torch.Size([17])
        ] * 3


def test_threads_decode_at_the_same_time_and_change_nothing(tmp_path):
    data = write_images(tmp_path / "images", 1, count=32)
    model = replace(TINY.model, num_classes=2, in_channels=3)
    config = replace(TINY, model=model, data=data, steps=3)
    meeting = threading.Barrier(4, timeout=60)

    class Meeting(ImageFolder):
        """Its images come only when four of them are asked for at once."""

        def __getitem__(self, index):
            meeting.wait()
            return super().__getitem__(index)

    folder, model = ImageFolder(data, 8, flip=False), DiffuSSM(config.model)
    meet = Meeting(data, 8, flip=False)
    together = list(training_batches(meet, model, config, 0, workers=4))
    one_by_one = list(training_batches(folder, model, config, 0, workers=1))
    for a, b in zip(together, one_by_one, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_drawing_samples_does_not_count_as_training(monkeypatch):
    now = 100.0
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(0, replace(TINY, steps=100))
    now += 5.0  # ten steps
    with clock.paused():
        now += 60.0
    assert clock.read(10) == {
        "seconds": 65.0,
        "images_per_second": 16.0,
        "seconds_left": 45.0,
    }


def test_recipes_at_full_scale_clip_and_keep_the_papers_other_row():
    from diffussm import recipes

    for name in recipes.recipe_files():
        config, _ = recipes.read_recipe(name)
        if config.model.d_model == 1152:
            assert config.clip == 1.0 and not config.ema_warmup, name
    config, execution = recipes.read_recipe("imagenet256")
    (step,) = execution.keep_steps(config.batch_size)
    assert (
        (step - 1) * config.batch_size < 338_000_000 <= step * config.batch_size
        and step < config.steps
    )
