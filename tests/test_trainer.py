"""Training: resumed equals uninterrupted, kills and NaNs lose nothing, the recipe is the official one."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TRANSFORMERS_5_17
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_mae import small_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

import main
from galaxy_mae.data.batches import GalaxyBatches, IndexDataset
from galaxy_mae.data.cache import open_galaxies
from galaxy_mae.data.random_numbers import mask_noise
from galaxy_mae.errors import UserError
from galaxy_mae.model import compute
from galaxy_mae.model.compute import prefer_attention, rank_attention_backends, time_attention
from galaxy_mae.model.mae import build_mae
from galaxy_mae.provenance import read_run
from galaxy_mae.training import checkpoints, pretraining, tracking
from galaxy_mae.training import trainer as trainer_module
from galaxy_mae.training.arguments import PretrainingArguments
from galaxy_mae.training.checkpoints import find_checkpoint
from galaxy_mae.training.pretraining import PretrainingTrainer
from galaxy_mae.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--image_size", "32", "--num_hidden_layers", "2"]
TINY += ["--hidden_size", "48", "--decoder_hidden_size", "32", "--decoder_num_hidden_layers", "1"]
TINY += ["--batch_size", "16", "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
TINY += ["--reconstruct_every", "0", "--logging_steps", "4"]
RUN_ID = "this run"  # of trainers without main.py


def command(folder: Path, data: Path, *flags: str) -> list[str]:
    return [*TINY, "--dataset", str(data), "--output_dir", str(folder), *flags]


@contextmanager
def killed_at(step: int, trainer_class: type[PretrainingTrainer] = PretrainingTrainer):
    """Within the block a training ends before it takes this step, as by Ctrl-C."""
    take = trainer_class.training_step

    def killed(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return take(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_class, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def make_trainer(
    folder: Path, data: Path, *flags: str, micro_batches: int = 1, run_id: str = RUN_ID
) -> PretrainingTrainer:
    """A trainer on the images of a small file, without main.py, with a global batch of 16."""
    recipe = read_recipe(command(folder, data, *flags))
    training = recipe.training
    training.per_device_train_batch_size = 16 // micro_batches
    training.gradient_accumulation_steps = micro_batches
    galaxies = open_galaxies(str(data))
    batches = GalaxyBatches(galaxies.pixels, np.full(3, 0.5), np.full(3, 0.3), 32, training.device, seed=training.seed)
    torch.manual_seed(0)
    return PretrainingTrainer(
        build_mae(small_config(), seed=training.seed),
        training,
        train_dataset=IndexDataset(np.arange(160)),
        eval_dataset=IndexDataset(np.arange(160, 200)),
        batches=batches,
        run_id=run_id,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which main.py would resume a run."""
    run = read_run(folder)
    return find_checkpoint(folder, run["id"]) if run else None


def weights(trainer: PretrainingTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, small_hdf5):
    """Steps 4 and 14 are within the first and second epoch of ten steps; step 10 is the end of an epoch."""
    flags = ("--max_steps", "23", "--save_steps", "1", "--save_total_limit", "30")
    whole = make_trainer(tmp_path / "whole", small_hdf5, *flags)
    whole.train()
    for stop in (4, 10, 14):
        resumed = make_trainer(tmp_path / str(stop), small_hdf5, *flags)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert resumed.state.global_step == 23
        assert same(weights(whole), weights(resumed))
        for file in ("optimizer.pt", "scheduler.pt"):
            states = [torch.load(tmp_path / run / "checkpoint-23" / file) for run in ("whole", str(stop))]
            assert str(states[0]) == str(states[1])


def test_accumulated_batches_give_the_same_training(tmp_path, small_hdf5):
    """The same sixteen images per step, in one batch or in four micro-batches: the same crops, masks and losses."""
    losses = []
    for micro_batches in (1, 4):
        flags = ("--max_steps", "12", "--save_strategy", "no")
        trainer = make_trainer(tmp_path / str(micro_batches), small_hdf5, *flags, micro_batches=micro_batches)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert np.allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(("rate", "best_is_last"), [(0.3, False), (1e-3, True)])
def test_best_model_is_really_loaded(tmp_path, small_hdf5, rate, best_is_last):
    """A learning rate that destroys the model after a few steps makes an early checkpoint the best."""
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


@pytest.mark.parametrize("file", ["optimizer.pt", "complete.json"])
def test_incomplete_checkpoint_is_never_resumed_from(tmp_path, small_hdf5, monkeypatch, file):
    """A kill before any of a checkpoint's files is written leaves the earlier one, also if only one is kept."""
    flags = ("--max_steps", "4", "--save_steps", "2", "--save_total_limit", "1")
    trainer = make_trainer(tmp_path, small_hdf5, *flags)

    class Killed(BaseException):
        pass

    def killed_before(write):
        def wrapped(content, path, *args, **kwargs):
            if trainer.state.global_step == 4 and Path(path).name == file:
                raise Killed
            return write(content, path, *args, **kwargs)

        return wrapped

    write_json = checkpoints.write_json
    monkeypatch.setattr(torch, "save", killed_before(torch.save))
    monkeypatch.setattr(
        checkpoints, "write_json", lambda path, content: killed_before(lambda c, p: write_json(p, c))(content, path)
    )
    with pytest.raises(Killed):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-2"
    monkeypatch.undo()
    make_trainer(tmp_path, small_hdf5, *flags).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-4"


SIX_STEPS = ("--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9", "--eval_strategy", "no")
SIX_STEPS += ("--eval_on_start", "False")
CHECKPOINT = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINT += ("trainer_state.json", "complete.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_hdf5):
    """Two runs of six steps with checkpoints after 2, 4 and 6, the second of another seed and id."""
    folders = [tmp_path_factory.mktemp("saved") / name for name in ("this", "other")]
    for seed, folder in enumerate(folders):
        trainer = make_trainer(
            folder, small_hdf5, *SIX_STEPS, "--seed", str(seed), run_id=RUN_ID if seed == 0 else "other"
        )
        trainer.train()
    return folders


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def flip_bit(position: float):
    """A function that flips a bit of a file, at a fraction of its length."""

    def flip(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip


DAMAGES = {
    "a bit at the beginning": flip_bit(0),
    "a bit in the middle": flip_bit(0.5),
    "a bit at the end": flip_bit(1),
    "another run's file": lambda path, other: shutil.copy(other, path),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
}


def test_a_checkpoint_has_no_other_file_than_the_damaged_ones(saved):
    """No training_args.bin among them, which only a pickle could read."""
    assert {path.name for path in (saved[0] / "checkpoint-4").iterdir()} == set(CHECKPOINT)


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_checkpoint_with_any_damage_to_any_file_is_skipped(tmp_path, small_hdf5, saved, caplog, name):
    """One line names it; the run resumes from the one before and ends with the same bits, in all checkpoints."""
    this, other = saved
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-4"
    for step in (2, 4):
        shutil.copytree(this / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (checkpoint / "notes.txt").write_text("a user's own file does no damage")
    for damage in DAMAGES.values():
        shutil.copy(this / "checkpoint-4" / name, checkpoint / name)
        assert find_checkpoint(folder, RUN_ID) == checkpoint
        damage(checkpoint / name, other / "checkpoint-4" / name)
        if (checkpoint / name).exists() and same_bytes(checkpoint / name, this / "checkpoint-4" / name):
            continue  # the schedule and the configuration are those of the other run as well
        caplog.clear()
        assert find_checkpoint(folder, RUN_ID) == folder / "checkpoint-2"
        (line,) = caplog.messages
        assert line.startswith(f"{checkpoint} ")
        assert line.endswith(": skipped")
        assert name in line or name == "complete.json"  # which may name a file of which it has a wrong checksum
    if name == CHECKPOINT[-1]:  # of all, the run resumes from the same checkpoint
        resumed = make_trainer(folder, small_hdf5, *SIX_STEPS)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        for step in (4, 6):
            files = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for run in (this, folder)]
            assert same(*files)
        assert find_checkpoint(folder, RUN_ID).name == "checkpoint-6"


def test_another_runs_checkpoint_is_skipped_and_kept(tmp_path, small_hdf5, saved, caplog):
    """It neither is resumed from, nor displaces this run's checkpoints, nor is lost."""
    this, other = saved
    shutil.copytree(this / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(other / "checkpoint-6", tmp_path / "checkpoint-6")
    assert find_checkpoint(tmp_path, RUN_ID) == tmp_path / "checkpoint-2"
    assert caplog.messages == [
        f"{tmp_path}/checkpoint-6 belongs to another run (id other, this one is {RUN_ID}): skipped"
    ]
    resumed = make_trainer(tmp_path, small_hdf5, *SIX_STEPS, "--save_total_limit", "1")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "skipped-checkpoint-6"]
    for run, name in ((this, "checkpoint-6"), (other, "skipped-checkpoint-6")):
        files = (run / "checkpoint-6" / "model.safetensors", tmp_path / name / "model.safetensors")
        assert same(*map(load_file, files))


def test_a_checkpoint_is_on_the_disk_before_its_manifest_and_before_the_old_one_goes(tmp_path, small_hdf5, monkeypatch):
    """After a power loss there is a complete checkpoint, whatever the disk wrote last."""
    log, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree

    def watched_fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        log.append(f"flush {path.relative_to(tmp_path) if path.parent.parent == tmp_path else path.name}")
        fsync(descriptor)

    def watched_replace(source, target, **kwargs):
        log.append(f"rename {Path(target).relative_to(tmp_path)}")
        replace(source, target, **kwargs)

    def watched_rmtree(path, **kwargs):
        log.append(f"delete {Path(path).name}")
        rmtree(path, **kwargs)

    trainer = make_trainer(tmp_path, small_hdf5, *SIX_STEPS, "--max_steps", "4", "--save_total_limit", "1")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    trainer.train()
    manifest, old_deleted = log.index("rename checkpoint-4/complete.json"), log.index("delete checkpoint-2")
    for name in CHECKPOINT[:-1]:
        assert log.index(f"flush checkpoint-4/{name}") < manifest
    assert "flush checkpoint-4" in log[manifest:old_deleted]
    assert f"flush {tmp_path.name}" in log[manifest:old_deleted]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_behind(tmp_path, small_hdf5, saved, monkeypatch):
    """Also after the last step, when the training is not begun again."""
    for step in (2, 4, 6):
        shutil.copytree(saved[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    with monkeypatch.context() as patch:  # killed after the first file
        patch.setattr(shutil, "rmtree", lambda path, **_: next(path.iterdir()).unlink())
        checkpoints.remove_old_checkpoints(tmp_path, 2, None)
    assert (tmp_path / "checkpoint-2").exists()
    make_trainer(tmp_path, small_hdf5, *SIX_STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_damaged_newest_checkpoint_does_not_displace_the_new_ones(tmp_path, small_hdf5):
    """With --save_total_limit 1 it would otherwise count as the newest, which is kept."""
    flags = ("--max_steps", "6", "--save_total_limit", "1")
    make_trainer(tmp_path, small_hdf5, *flags, "--save_steps", "2", "--save_total_limit", "9").train()
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    resumed = make_trainer(tmp_path, small_hdf5, *flags, "--save_steps", "2")
    resumed.add_callback(StopTraining(after=4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert find_checkpoint(tmp_path, RUN_ID) == tmp_path / "checkpoint-4"


class StopTraining(TrainerCallback):
    """Ends a training early, as a limit of time would."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.after


def test_a_tracker_that_fails_while_saving_leaves_a_complete_checkpoint(tmp_path, small_hdf5):
    class Tracker(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise ConnectionResetError("upload failed")

    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2")
    trainer.callback_handler.callbacks.insert(1, Tracker())  # where the Trainer puts W&B's callback: before others
    with pytest.raises(ConnectionResetError):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-2"


def test_the_limit_keeps_the_newest_checkpoint_and_the_best(tmp_path, small_hdf5):
    """A learning rate that destroys the model makes an early checkpoint the best."""
    flags = ("--max_steps", "8", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "1")
    trainer = make_trainer(tmp_path, small_hdf5, *flags, "--load_best_model_at_end", "True")
    trainer.args.learning_rate = 0.3
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [best, "checkpoint-8"]


def remove_tensor(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    del state["vit.layers.0.mlp.fc1.weight"]
    save_file(state, checkpoint / "model.safetensors")


def truncate(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("damage", [remove_tensor, truncate])
def test_damaged_best_checkpoint_is_refused(tmp_path, small_hdf5, damage):
    """With a missing tensor, the Trainer's own loading of the best model would only warn."""

    class Damage(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "train_loss" in logs:  # after the last step, before the best model is loaded
                damage(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    flags = ("--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--load_best_model_at_end", "True")
    trainer = make_trainer(tmp_path, small_hdf5, *flags)
    trainer.add_callback(Damage())
    with pytest.raises(
        UserError, match=r"checkpoint-\d is damaged .*: the best one is lost; delete .* and train again"
    ):
        trainer.train()


def test_checkpoint_that_lost_a_tensor_is_refused(tmp_path, small_hdf5):
    make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2").train()
    checkpoint = tmp_path / "checkpoint-2"
    remove_tensor(checkpoint)
    with pytest.raises(UserError, match="checkpoint-2: does not hold this model's weights"):
        make_trainer(tmp_path, small_hdf5, "--max_steps", "4").train(resume_from_checkpoint=str(checkpoint))
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-4"  # nothing was deleted


def test_validation_loss_that_is_not_finite_saves_nothing(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2")
    trainer.args.learning_rate = 1e30
    with pytest.raises(UserError, match="eval_loss is nan"):
        trainer.train()
    assert find_checkpoint(tmp_path, RUN_ID) is None


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
    assert find_checkpoint(tmp_path, RUN_ID).name == "checkpoint-6"
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


@pytest.mark.slow
def test_200_steps_have_the_losses_of_a_plain_loop(tmp_path, small_hdf5):
    """All optimizations together change nothing: image by image, without the Trainer, the losses are the same."""
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
        epoch, position = divmod(step, 10)
        order = np.random.default_rng([0, epoch]).permutation(160)[16 * position : 16 * position + 16]
        samples = [{"index": torch.tensor([index])} for index in order]
        images = torch.cat([batches.train_transform(sample, step) for sample in samples])
        noise = torch.cat([mask_noise(sample["index"], 16, 0, step) for sample in samples])
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
    """40 images in batches of 16 end in a batch of 8, which does not change the mean."""
    trainer = make_trainer(tmp_path, small_hdf5, "--per_device_eval_batch_size", "16")
    torch.manual_seed(1)
    first = trainer.evaluate()["eval_loss"]
    torch.manual_seed(2)
    assert trainer.evaluate()["eval_loss"] == first
    batches, index = trainer.batches, torch.arange(160, 200)
    with torch.no_grad():
        output = trainer.model.eval()(batches.eval_transform({"index": index}), noise=mask_noise(index, 16))
    assert first == pytest.approx(float(output.loss), rel=1e-5)
    assert all(output.mask[i].sum() == 12 for i in range(40))
    assert len({tuple(mask.tolist()) for mask in output.mask}) > 30


@pytest.mark.slow
def test_the_faster_attention_implementation_gives_the_same_losses(tmp_path, small_hdf5):
    """This project's own on a CPU in bfloat16, SDPA elsewhere; a saved model does not hold the choice."""
    losses, kinds = [], []
    for precision in ("False", "True"):
        folder = tmp_path / precision
        trainer = make_trainer(folder, small_hdf5, "--bf16", precision, "--max_steps", "40", "--save_steps", "40")
        kinds.append(trainer.model.config._attn_implementation)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert "attn" not in (folder / "checkpoint-40" / "config.json").read_text()
    assert kinds == ["sdpa", "cpu_bfloat16"]
    assert np.allclose(*losses, rtol=0.02)


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="watches what a step does on a GPU")
CUDNN, FLASH, EFFICIENT, MATH = (
    getattr(SDPBackend, name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
)


@ON_A_GPU
def test_only_logged_steps_wait_for_the_gpu(tmp_path, small_hdf5):
    """From the end of the third step, after compilation, to that of the eighth nothing makes the host wait."""

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 3 <= state.global_step < 8 else "default")

    flags = ("--use_cpu", "False", "--max_steps", "9", "--logging_steps", "9", "--save_strategy", "no")
    trainer = make_trainer(tmp_path, small_hdf5, *flags, "--eval_strategy", "no", "--eval_on_start", "False")
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_A_GPU
@pytest.mark.parametrize(("compiled", "launches"), [("True", range(1, 45)), ("False", range(150, 500))])
def test_crops_and_masks_are_a_few_launches(tmp_path, small_hdf5, compiled, launches):
    """The warp's own are among them."""
    trainer = make_trainer(tmp_path, small_hdf5, "--use_cpu", "False", "--torch_compile", compiled)
    batch = {"index": torch.arange(16, device="cuda")}
    trainer.prepare_batch(batch, training=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        trainer.prepare_batch(batch, training=True)
        torch.cuda.synchronize()
    assert sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key) in launches


def test_copies_are_not_waited_for_where_they_come_from_pinned_memory(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5)
    assert trainer.accelerator.non_blocking == trainer.args.dataloader_pin_memory == torch.cuda.is_available() is False


def test_attention_backends_are_ranked_by_all_layers_of_a_step(monkeypatch):
    """A backend that cannot compute one of the shapes is left out."""
    seconds = {FLASH: {"encoder": 1, "decoder": 9}, EFFICIENT: {"encoder": 2, "decoder": 3}, CUDNN: {"encoder": 0.1}}

    def measure(backend, shape, *_):
        if shape not in seconds[backend]:
            raise RuntimeError("No available kernel. Aborting execution.")
        return seconds[backend][shape]

    monkeypatch.setattr(compute, "time_attention", measure)
    assert rank_attention_backends({"encoder": 12, "decoder": 4}, "cuda", torch.float32) == {EFFICIENT: 36, FLASH: 48}
    ranked = rank_attention_backends({"encoder": 100, "decoder": 1}, "cuda", torch.float32)
    assert list(ranked) == [FLASH, EFFICIENT]


def test_an_attention_backend_that_cannot_compute_is_an_error():
    """A CPU has flash attention and no memory-efficient one."""
    shape, on_cpu = (2, 3, 5, 16), (torch.device("cpu"), torch.float32)
    assert 0 < time_attention(FLASH, shape, *on_cpu) < 60
    with pytest.raises(RuntimeError, match=r"No (available|viable)"):
        time_attention(EFFICIENT, shape, *on_cpu)


def backends_in_use() -> list[SDPBackend]:
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


def test_a_training_prefers_the_fastest_attention_and_logs_it(tmp_path, small_hdf5, monkeypatch, caplog):
    trainer, usual, used = make_trainer(tmp_path, small_hdf5, *SIX_STEPS), backends_in_use(), []
    fake = SimpleNamespace(
        device=torch.device("cuda"), full_determinism=False, bf16=True, per_device_train_batch_size=2
    )
    times = {CUDNN: 1e-3, FLASH: 5e-3, EFFICIENT: 2e-3}
    monkeypatch.setattr(compute, "time_attention", lambda backend, *_: times[backend])
    caplog.set_level("INFO")
    trainer.attention_order = pretraining._measure_attention(trainer.model.config, fake)
    milliseconds = "CUDNN_ATTENTION 4.0 ms, EFFICIENT_ATTENTION 8.0 ms, FLASH_ATTENTION 20.0 ms"
    assert f"attention of a micro-batch, forward and backward: {milliseconds}" in caplog.messages
    fake.full_determinism = True
    assert pretraining._measure_attention(trainer.model.config, fake) == []
    step = trainer.training_step
    trainer.training_step = lambda *arguments: used.append(backends_in_use()) or step(*arguments)
    trainer.train()
    assert used == 6 * [[CUDNN, EFFICIENT, FLASH, MATH]]
    assert backends_in_use() == usual


def test_on_a_cpu_nothing_is_measured_or_compiled(tmp_path, small_hdf5, monkeypatch):
    monkeypatch.setattr(compute, "time_attention", None)
    trainer = make_trainer(tmp_path, small_hdf5, *SIX_STEPS, "--max_steps", "1")
    trainer.train()
    assert trainer.attention_order == []
    assert not trainer.batches.compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_graph_is_not_taken_from_the_cache_with_another_attention(tmp_path, monkeypatch):
    """On a CPU, flash attention and PyTorch's own products; torch's keys of its caches do not know the order."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, ran = torch.randn(2, 2, 9, 16), []
    for order in ([FLASH], [MATH], [FLASH]):
        torch._dynamo.reset()
        attention = torch.compile(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x) + 1)
        with prefer_attention(order):
            attention(x)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                attention(x)
        ran.append(any("flash_attention" in event.key for event in profiled.key_averages()))
    assert ran == [True, False, True]


def test_only_the_loss_is_returned_in_training_and_the_weights_are_the_same(tmp_path, small_hdf5):
    trained = []
    for only_loss in (True, False):
        trainer = make_trainer(tmp_path / str(only_loss), small_hdf5, *SIX_STEPS)
        if not only_loss:
            del trainer.model.forward
        returned = []
        trainer.model.register_forward_hook(lambda module, inputs, output, seen=returned: seen.append(list(output)))
        trainer.train()
        assert (returned == 6 * [["loss"]]) == only_loss
        assert trainer.evaluate()["eval_loss"] > 0
        trained.append(weights(trainer))
    assert same(*trained)


CACHE = f"inductor-{os.getuid()}"


@pytest.mark.parametrize("obstacle", [None, "chosen", "shared", "no locks"])
def test_compiled_code_is_kept_in_the_users_own_cache(tmp_path, monkeypatch, obstacle):
    """Not in the node's /tmp, unless the user chose a folder, others could write to it, or there are no locks."""
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen" if obstacle == "chosen" else default_cache_dir())
    if obstacle == "shared":
        (tmp_path / CACHE).mkdir()
        (tmp_path / CACHE).chmod(0o775)
    if obstacle == "no locks":
        monkeypatch.setattr(FileLock, "_acquire", lambda self: os.open("/", os.O_WRONLY))
    before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    trainer_module._keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (before if obstacle else str(tmp_path / CACHE))
    if not obstacle:
        assert (tmp_path / CACHE).stat().st_mode & 0o777 == 0o700


def test_gradient_norm_is_computed_only_for_logged_steps(tmp_path, small_hdf5):
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "8", "--save_strategy", "no")  # logs every fourth step
    measured = []
    measure = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args: measured.append(trainer.state.global_step) or measure(*args)
    trainer.train()
    assert measured == [3, 7]
    assert [entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True, True]


def test_throughput_is_that_of_training_steps_alone(tmp_path, small_hdf5, monkeypatch):
    """By a clock on which a step takes a second; the first one, an evaluation and a checkpoint take much longer."""
    clock = [0.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    flags = ("--max_steps", "9", "--logging_steps", "3", "--eval_steps", "2", "--save_steps", "5")
    trainer = make_trainer(tmp_path, small_hdf5, *flags)

    def take_time(name: str, seconds: list[float]) -> None:
        method = getattr(trainer, name)

        def slow(*args, **kwargs):
            clock[0] += seconds.pop() if len(seconds) > 1 else seconds[0]
            return method(*args, **kwargs)

        monkeypatch.setattr(trainer, name, slow)

    take_time("prepare_batch", [1, 50])
    take_time("evaluation_loop", [100])
    take_time("save_model", [1000])
    trainer.train()
    assert [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry] == [16, 16, 16]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_hdf5):
    """The weights of an uninterrupted run of forty steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main.main(command(folder, small_hdf5, "--max_steps", "40", "--save_steps", "8"))
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_killed_three_times_and_restarted_by_the_same_command(tmp_path, small_hdf5, uninterrupted, monkeypatch):
    """SIGKILL during steps or while a checkpoint is written; the same command ends with the same bits.

    They do not depend on the hash seed.
    """
    monkeypatch.setenv("PYTHONHASHSEED", "7")
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
    last = last_checkpoint(tmp_path / "run")
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {last}" in done.stderr
    assert same(load_file(tmp_path / "run" / "model.safetensors"), uninterrupted)
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert len(sessions) == 4
    assert sessions[0]["resumed_from"] is None
    assert sessions[-1]["resumed_from"] == last.name


# A learning rate that grows all the time: it first helps and then destroys the model.
DIVERGING = ("--load_best_model_at_end", "True", "--learning_rate", "3")
DIVERGING += ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "23")


@pytest.mark.slow
@pytest.mark.parametrize("best", [(), DIVERGING])
def test_resuming_after_the_last_step_takes_no_further_step(tmp_path, small_hdf5, monkeypatch, best):
    """23 steps end within an epoch, which the Trainer would continue; and the best model is still loaded."""
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    flags = ("--max_steps", "23", "--eval_steps", "2", "--save_steps", "2", *best)
    main.main(command(folders[0], small_hdf5, *flags))
    monkeypatch.setattr(main, "export_artifacts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main.main(command(folders[1], small_hdf5, *flags))
    monkeypatch.undo()
    main.main(command(folders[1], small_hdf5, *flags))
    whole, stopped = (load_file(folder / "model.safetensors") for folder in folders)
    assert same(whole, stopped)
    assert same(whole, load_file(folders[0] / "checkpoint-23" / "model.safetensors")) == (not best)
    losses = [json.loads((folder / "train_results.json").read_text())["train_loss"] for folder in folders]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_resume_as_if_never_stopped(tmp_path, small_hdf5):
    """The same sixteen galaxies per step, none twice in an epoch, and the same losses within float tolerance.

    The validation loss too, although 40 galaxies are not a multiple of a batch of sixteen. They resume in the second
    epoch, where accelerate's wrappers of a resumed, sharded loader hide the sampler.
    """
    flags = ("--max_steps", "23", "--logging_steps", "1", "--eval_strategy", "no", "--eval_on_start", "False")
    flags += ("--save_steps", "7", "--save_total_limit", "9")

    def train(folder: Path, processes: int) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
        program = [sys.executable, *launcher, ROOT / "tests" / "recording.py", *command(folder, small_hdf5, *flags)]
        environment = os.environ | {"RECORD": f"{folder}.indices", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    steps, losses, validation = {}, {}, {}
    for processes in (1, 2):
        folder = tmp_path / f"run_{processes}"
        train(folder, processes)
        batches = [Path(f"{folder}.indices.{rank}").read_text().splitlines()[:20] for rank in range(processes)]
        for rank in range(processes):  # one that drops a tensor at the end would abort its process, at times
            assert "gloo" not in Path(f"{folder}.indices.{rank}.threads").read_text()
        steps[processes] = [[int(i) for line in step for i in line.split()] for step in zip(*batches, strict=True)]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses[processes] = [entry["loss"] for entry in log if "loss" in entry]
        validation[processes] = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    for epoch in (slice(0, 10), slice(10, 20)):
        indices = [index for step in steps[2][epoch] for index in step]
        assert len(set(indices)) == len(indices) == 160
    assert [sorted(step) for step in steps[1]] == [sorted(step) for step in steps[2]]
    assert len(losses[1]) == 23
    assert np.allclose(losses[1], losses[2], rtol=1e-4)
    assert validation[1] == pytest.approx(validation[2], rel=1e-4)

    if TRANSFORMERS_5_17:  # it cannot load an optimizer in several CPU processes
        return
    whole, stopped = tmp_path / "run_2", tmp_path / "stopped"
    stopped.mkdir()
    shutil.copytree(whole / "checkpoint-14", stopped / "checkpoint-14")
    about = json.loads((whole / "run.json").read_text()) | {"finished": False}
    (stopped / "run.json").write_text(json.dumps(about))
    assert f"resuming from {stopped / 'checkpoint-14'}" in train(stopped, 2)
    assert same(*(load_file(folder / "model.safetensors") for folder in (whole, stopped)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_compiled_ends_in_one_line(tmp_path, small_hdf5, monkeypatch):
    monkeypatch.setattr(PretrainingArguments, "torch_compile_backend", "tvm", raising=False)
    trainer = make_trainer(tmp_path, small_hdf5, "--max_steps", "2", "--torch_compile")
    with pytest.raises(UserError, match=r"(?s)^--torch_compile: .*tvm.*; --torch_compile False trains without it"):
        trainer.train()


def test_private_methods_that_are_overridden_exist_and_are_called():
    """The list at the top of trainer.py is complete, and transformers still has and calls each method of it."""
    documented = set(re.findall(r"^- `(_\w+)`:", trainer_module.__doc__, re.MULTILINE))
    classes = [c for c in vars(trainer_module).values() if isinstance(c, type) and issubclass(c, Trainer)]
    ours = {name for c in classes if c is not Trainer for name in vars(c)}
    overridden = {
        name for name in ours if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert overridden == documented
    source = inspect.getsource(Trainer)
    for name in documented:
        assert f"self.{name}(" in source, f"transformers {transformers.__version__} no longer calls Trainer.{name}"
