"""Training: resumed equals uninterrupted, kills and NaNs lose nothing, the recipe is the official one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_mae import small_config

import main
from galaxy_mae.batches import GalaxyBatches, Rows, mask_noise
from galaxy_mae.errors import UserError
from galaxy_mae.mae import build_mae
from galaxy_mae.recipe import read_recipe
from galaxy_mae.sources import open_galaxies
from galaxy_mae.trainer import EpochOrder, PretrainingTrainer, evaluation_masks, find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--image_size", "32", "--num_hidden_layers", "2"]
TINY += ["--hidden_size", "48", "--decoder_hidden_size", "32", "--decoder_num_hidden_layers", "1"]
TINY += ["--batch_size", "16", "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
TINY += ["--reconstruct_every", "0", "--logging_steps", "4"]


def command(folder: Path, data: Path, *flags: str) -> list[str]:
    return [*TINY, "--dataset", str(data), "--output_dir", str(folder), *flags]


def make_trainer(folder: Path, data: Path, *flags: str, pieces: int = 1) -> PretrainingTrainer:
    """A trainer on the rows of a small file, without main.py around it; a batch of 16 goes in so many pieces."""
    training = read_recipe(command(folder, data, *flags)).training
    training.per_device_train_batch_size = 16 // pieces
    training.gradient_accumulation_steps = pieces
    galaxies = open_galaxies(str(data))
    batches = GalaxyBatches(galaxies.pixels, np.full(3, 0.5), np.full(3, 0.3), 32, seed=training.seed)
    torch.manual_seed(0)
    return PretrainingTrainer(
        build_mae(small_config(), seed=training.seed),
        training,
        train_dataset=Rows(np.arange(160)),
        eval_dataset=Rows(np.arange(160, 200)),
        batches=batches,
    )


def weights(trainer: PretrainingTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop", [4, 10, 14])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, small_hdf5, stop):
    """Steps 4 and 14 lie within an epoch of ten steps, the first and the second; 10 is its end."""
    flags = ("--max_steps", "23", "--save_steps", "1", "--save_total_limit", "30")
    whole = make_trainer(tmp_path / "whole", small_hdf5, *flags)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", small_hdf5, *flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 23
    assert same(weights(whole), weights(resumed))
    for file in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(tmp_path / run / "checkpoint-23" / file) for run in ("whole", "resumed")]
        assert str(states[0]) == str(states[1])


def test_accumulated_batches_give_the_same_training(tmp_path, small_hdf5):
    """The same sixteen images a step, at once or in four pieces: the same crops, masks and, nearly, weights."""
    at_once = make_trainer(tmp_path / "a", small_hdf5, "--max_steps", "12", "--save_strategy", "no")
    in_pieces = make_trainer(tmp_path / "b", small_hdf5, "--max_steps", "12", "--save_strategy", "no", pieces=4)
    losses = []
    for trainer in (at_once, in_pieces):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert np.allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(("rate", "best_is_last"), [(0.3, False), (1e-3, True)])
def test_best_model_is_really_loaded(tmp_path, small_hdf5, rate, best_is_last):
    """A learning rate that ruins the model after a few steps makes an early checkpoint the best."""
    flags = ("--max_steps", "8", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "10")
    trainer = make_trainer(tmp_path, small_hdf5, *flags, "--load_best_model_at_end", "True")
    trainer.args.learning_rate = rate
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert (best.name == "checkpoint-8") == best_is_last
    assert same(weights(trainer), load_file(best / "model.safetensors"))
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_half_written_checkpoint_is_never_picked(tmp_path, small_hdf5, monkeypatch):
    """A kill at any point of a save leaves the earlier checkpoint as the last one."""
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2")

    class Killed(BaseException):
        pass

    save = trainer._save_optimizer_and_scheduler

    def killed(folder):
        if trainer.state.global_step == 4:
            raise Killed
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)  # after the weights, before the rest
    with pytest.raises(Killed):
        trainer.train()
    assert find_checkpoint(tmp_path).name == "checkpoint-2"
    monkeypatch.undo()
    trainer._save_checkpoint(trainer.model, None)
    assert find_checkpoint(tmp_path).name == "checkpoint-4"


def test_damaged_checkpoints_are_passed_over(tmp_path, small_hdf5):
    make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "1", "--save_total_limit", "9").train()
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    optimizer = tmp_path / "checkpoint-2" / "optimizer.pt"
    (tmp_path / "checkpoint-9").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_checkpoint_that_lost_a_tensor_is_refused(tmp_path, small_hdf5):
    from safetensors.torch import save_file

    make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2").train()
    checkpoint = tmp_path / "checkpoint-2"
    state = load_file(checkpoint / "model.safetensors")
    del state["vit.layers.0.mlp.fc1.weight"]
    save_file(state, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint-2: does not hold this model's weights"):
        make_trainer(tmp_path, small_hdf5, "--max_steps", "4").train(resume_from_checkpoint=str(checkpoint))


def test_validation_loss_that_is_not_finite_saves_nothing(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2")
    trainer.args.learning_rate = 1e30
    with pytest.raises(UserError, match="eval_loss is nan"):
        trainer.train()
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, small_hdf5, where):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "20", "--save_steps", "3")
    step = trainer.training_step

    def poisoned(model, *arguments, **named):
        loss = step(model, *arguments, **named)
        if trainer.state.global_step == 7:
            if where == "loss":
                return loss * float("nan")
            model.get_parameter("decoder.decoder_pred.bias").data[0] = float("inf")
        return loss

    trainer.training_step = poisoned
    with pytest.raises(UserError, match="checkpoint-6"):
        trainer.train()
    assert find_checkpoint(tmp_path).name == "checkpoint-6"
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-6" / "model.safetensors").values())


def test_optimiser_and_schedule_are_the_official_ones(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "100", "--save_strategy", "no")
    trainer.create_optimizer_and_scheduler(100)
    decayed, free = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert all("norm" not in names[id(p)] and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert {names[id(p)] for p in free["params"] if p.ndim > 1} == {"vit.embeddings.cls_token", "decoder.mask_token"}
    assert not any("pos" in names[id(p)] for group in (decayed, free) for p in group["params"])  # frozen
    peak = 4e-3 * 16 / 256  # the demo's base learning rate at this batch
    rates = []
    for _ in range(100):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [peak * i / 5 if i < 5 else peak * (1 + np.cos(np.pi * (i - 5) / 95)) / 2 for i in range(100)]
    assert np.allclose(rates, expected, rtol=1e-6)


def test_200_steps_have_the_losses_of_a_plain_loop(tmp_path, small_hdf5):
    """Whatever is done for speed: image by image, with PyTorch's optimiser, without the Trainer, it is the same."""
    steps, peak = 200, 1e-3
    flags = ("--max_steps", str(steps), "--logging_steps", "1", "--learning_rate", str(peak), "--save_strategy", "no")
    trainer = make_trainer(tmp_path, small_hdf5, *flags, "--eval_strategy", "no")
    trainer.train()
    reached = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, batches = build_mae(small_config(), seed=0).train(), trainer.batches
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim > 1]
    vectors = [p for p in trained if p.squeeze().ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), weight_decay=0.05, foreach=False)
    expected = []
    for step in range(steps):
        epoch, place = divmod(step, 10)
        order = np.random.default_rng([0, epoch]).permutation(160)[16 * place : 16 * place + 16]
        rows = [{"rows": torch.tensor([row])} for row in order]
        images = torch.cat([batches.augmented(row, step) for row in rows])
        noise = torch.cat([mask_noise(row["rows"], 0, step, 16) for row in rows])
        loss = model(images, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        warm = step / 10 if step < 10 else (1 + np.cos(np.pi * (step - 10) / (steps - 10))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * warm
        optimizer.step()
        expected.append(loss.item())
    assert len(reached) == steps
    assert expected[-1] < 0.7 * expected[0]
    assert np.allclose(reached[:50], expected[:50], rtol=1e-4)
    assert np.allclose(reached, expected, rtol=5e-3)


def test_evaluation_is_the_mean_over_images_with_fixed_masks(tmp_path, small_hdf5):
    """Whatever the batches; 40 images in batches of 16 end in one of 8."""
    trainer = make_trainer(tmp_path, small_hdf5, "--per_device_eval_batch_size", "16")
    torch.manual_seed(1)
    first = trainer.evaluate()["eval_loss"]
    torch.manual_seed(2)
    assert trainer.evaluate()["eval_loss"] == first
    batches, rows = trainer.batches, torch.arange(160, 200)
    with torch.no_grad():
        output = trainer.model.eval()(batches.plain({"rows": rows}), noise=evaluation_masks(rows, 16))
    assert first == pytest.approx(float(output.loss), rel=1e-5)
    assert all(output.mask[i].sum() == 12 for i in range(40))
    assert len({tuple(mask.tolist()) for mask in output.mask}) > 30


def test_the_attention_that_is_faster_gives_the_same_losses(tmp_path, small_hdf5):
    """On a CPU in bfloat16 another implementation is taken than elsewhere; and no saved model remembers which."""
    losses, kinds = [], []
    for precision in ("False", "True"):
        folder = tmp_path / precision
        trainer = make_trainer(folder, small_hdf5, "--bf16", precision, "--max_steps", "40", "--save_steps", "40")
        kinds.append(trainer.model.config._attn_implementation)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert "attn" not in (folder / "checkpoint-40" / "config.json").read_text()
    assert kinds == ["sdpa", "eager"]
    assert np.allclose(*losses, rtol=0.02)


def test_gradients_are_measured_for_the_log_alone(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "8", "--save_strategy", "no")  # logs every fourth step
    measured = []
    measure = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args: measured.append(trainer.state.global_step) or measure(*args)
    trainer.train()
    assert measured == [3, 7]
    assert [entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True, True]


def test_every_epoch_shows_every_galaxy_once_in_whole_batches():
    order = EpochOrder(100, 16, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert len(order) == 96
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_hdf5):
    """The weights of a run of forty steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main.main(command(folder, small_hdf5, "--max_steps", "40", "--save_steps", "8"))
    return load_file(folder / "model.safetensors")


def test_killed_three_times_and_restarted_by_the_same_command(tmp_path, small_hdf5, uninterrupted):
    """SIGKILL while steps are taken or checkpoints written; the same command ends with the same bits."""
    arguments = command(tmp_path / "run", small_hdf5, "--max_steps", "40", "--save_steps", "8")
    program = [sys.executable, str(ROOT / "main.py"), *arguments]
    rng = np.random.default_rng(5)
    for after in (8, 16, 24):  # killed a little after this checkpoint, or while it is written
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / f"checkpoint-{after}").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = find_checkpoint(tmp_path / "run")
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {last}" in done.stderr
    assert same(load_file(tmp_path / "run" / "model.safetensors"), uninterrupted)
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert len(sessions) == 4
    assert sessions[0]["resumed_from"] is None
    assert sessions[-1]["resumed_from"] == last.name


# A learning rate that grows all the time: it first helps and then ruins the model.
RUINED = ("--load_best_model_at_end", "True", "--learning_rate", "3")
RUINED += ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "23")


@pytest.mark.parametrize("best", [(), RUINED])
def test_stopped_after_the_last_step_takes_no_step_more(tmp_path, small_hdf5, monkeypatch, best):
    """23 steps end within an epoch, where the Trainer would go on with it; and the best model is still the best."""
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    flags = ("--max_steps", "23", "--eval_steps", "2", "--save_steps", "2", *best)
    main.main(command(folders[0], small_hdf5, *flags))
    monkeypatch.setattr(main, "leave_behind", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main.main(command(folders[1], small_hdf5, *flags))
    monkeypatch.undo()
    main.main(command(folders[1], small_hdf5, *flags))
    whole, stopped = (load_file(folder / "model.safetensors") for folder in folders)
    assert same(whole, stopped)
    assert same(whole, load_file(folders[0] / "checkpoint-23" / "model.safetensors")) == (not best)
    losses = [json.loads((folder / "train_results.json").read_text())["train_loss"] for folder in folders]
    assert losses[0] == losses[1]


def test_two_processes_resume_as_if_never_stopped(tmp_path, small_hdf5):
    """In the second epoch, where the wrappers of a resumed, shared loader hide the sampler from the Trainer."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py"]
    flags = ("--max_steps", "23", "--save_steps", "7", "--save_total_limit", "9")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run([*program, *command(whole, small_hdf5, *flags)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    stopped.mkdir()
    shutil.copytree(whole / "checkpoint-14", stopped / "checkpoint-14")
    about = json.loads((whole / "run.json").read_text()) | {"finished": False}
    (stopped / "run.json").write_text(json.dumps(about))
    again = [*program, *command(stopped, small_hdf5, *flags)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=200)
    assert f"going on from {stopped / 'checkpoint-14'}" in done.stderr
    assert same(*(load_file(folder / "model.safetensors") for folder in (whole, stopped)))


def test_two_processes_take_the_steps_of_one(tmp_path, small_hdf5):
    """The same sixteen galaxies a step, none of them twice in an epoch, and the same losses within float tolerance.

    The validation loss too: 40 galaxies are no whole number of batches of sixteen.
    """
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]}
    steps, losses, validation = {}, {}, {}
    for processes, launcher in launchers.items():
        folder, record = tmp_path / f"run_{processes}", tmp_path / f"rows_{processes}"
        flags = command(folder, small_hdf5, "--max_steps", "20", "--logging_steps", "1", "--eval_strategy", "no")
        program = [sys.executable, *launcher, ROOT / "tests" / "recording.py", *flags, "--eval_on_start", "False"]
        environment = os.environ | {"RECORD": str(record), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr
        batches = [Path(f"{record}.{rank}").read_text().splitlines()[:20] for rank in range(processes)]
        steps[processes] = [[int(row) for line in step for row in line.split()] for step in zip(*batches, strict=True)]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses[processes] = [entry["loss"] for entry in log if "loss" in entry]
        validation[processes] = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    for epoch in (slice(0, 10), slice(10, 20)):
        rows = [row for step in steps[2][epoch] for row in step]
        assert len(set(rows)) == len(rows) == 160
    assert [sorted(step) for step in steps[1]] == [sorted(step) for step in steps[2]]
    assert len(losses[1]) == 20
    assert np.allclose(losses[1], losses[2], rtol=1e-4)
    assert validation[1] == pytest.approx(validation[2], rel=1e-4)


def test_memory_of_the_process_is_not_needed(tmp_path, small_hdf5, uninterrupted):
    """The same command once more in a fresh process, with another hash seed: the same bits."""
    arguments = command(tmp_path / "run", small_hdf5, "--max_steps", "40", "--save_steps", "8")
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], check=True, env=environment, cwd=tmp_path)
    assert same(load_file(tmp_path / "run" / "model.safetensors"), uninterrupted)
