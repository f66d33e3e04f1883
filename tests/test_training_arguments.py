"""Every field of transformers' TrainingArguments works, or ends in one line and exit status 2: never in a traceback.

The fields are those of the installed release, so that a new release's fields are tried as well.
"""

import dataclasses
import enum
import logging
import multiprocessing
import os
import signal
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import random_images, write_hdf5
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import linear_probe_checkpoints
import main
from galaxy_mae.errors import one_line_errors
from galaxy_mae.training.recipe import read_evaluation_recipe, read_recipe

TIME_LIMIT = 60  # seconds for one command
COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "batch_size": 16}
PRETRAINING = COMMON | {"output_dir": "run", "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
PRETRAINING |= {"hidden_size": 24, "num_attention_heads": 3, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
PRETRAINING |= {"num_train_epochs": 2, "warmup_steps": 0, "base_learning_rate": 0.01, "reconstruct_every": 0}
EVALUATION = COMMON | {"output_dir": "run", "method": "ssl_fine_tune", "seeds": 1, "num_train_epochs": 1}

# Better values than those that follow from the types, and flags without which a field has no effect.
VALUES = {
    "adam_beta1": ["0.8"],
    "adam_beta2": ["0.9"],
    "dataloader_prefetch_factor": ["1", "--dataloader_num_workers", "1"],
    "disable_tqdm": ["False"],
    "eval_delay": ["5"],
    "gradient_accumulation_steps": ["3"],
    "include_for_metrics": ["inputs"],
    "learning_rate": ["0.001"],
    "lr_scheduler_kwargs": ['{"num_cycles": 1}'],
    "max_grad_norm": ["0.01"],
    "max_steps": ["2"],
    "optim": ["sgd"],
    "optim_args": ["momentum=0.9", "--optim", "sgd"],
    "report_to": ["tensorboard"],
    "torch_compile": ["True", "--torch_compile_backend", "eager"],  # inductor would compile for a quarter of a minute
    "torch_compile_backend": ["aot_eager"],
    "torch_compile_mode": ["default", "--torch_compile_backend", "eager"],
}


def plausible_value(field: dataclasses.Field) -> str:
    """A value of a field's type that is not its default."""
    hint = typing.get_type_hints(TrainingArguments)[field.name]
    kinds = typing.get_args(hint) or (hint,)
    choices = field.metadata.get("choices") or next((k for k in kinds if isinstance(k, enum.EnumMeta)), None)
    if choices is not None:
        values = [getattr(choice, "value", choice) for choice in choices]
        return next(value for value in reversed(values) if value != field.default)
    if bool in kinds:
        return str(not field.default)
    for kind, step in ((int, 1), (float, 0.25)):
        if kind in kinds:
            return str((field.default or 0) + step)
    return "{}" if any(typing.get_origin(kind) is dict or kind is dict for kind in kinds) else "x"


FIELDS = [
    [f"--{field.name}", *VALUES.get(field.name, [plausible_value(field)])]
    for field in dataclasses.fields(TrainingArguments)
]


@pytest.fixture(autouse=True)
def _same_process(tmp_path, monkeypatch):
    """What a command leaves in its process, which usually ends with it; and an end for one that hangs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(main, "plot_final_reconstructions", lambda *_: "")  # half of the time, and no field's matter
    monkeypatch.setattr(main, "write_encoder_card", lambda *_: None)  # which shows that figure
    environment, verbosity = dict(os.environ), transformers.logging.get_verbosity()

    def stop(number, frame):
        pytest.fail(f"not finished after {TIME_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT)
    yield
    assert not multiprocessing.active_children(), "the process would wait for its workers and never end"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    os.environ.clear()
    os.environ.update(environment)
    transformers.logging.set_verbosity(verbosity)
    logging.getLogger("galaxy_mae").setLevel(logging.INFO)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def recipe_file(folder: Path, fields: dict) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return ["--config", str(path)]


@dataclasses.dataclass
class Command:
    """A command on a small recipe, and what it gives without further flags."""

    run: Callable[[list[str]], None]
    identity: Callable[[list[str]], dict]
    arguments: list[str]
    written: str
    weights: bytes = b""

    def result(self, flags: list[str], capsys) -> bytes | str:
        """The weights that the command writes in the current folder, or the line in which it ends with status 2."""
        capsys.readouterr()
        status = 0
        try:
            with one_line_errors("command"):
                self.run([*self.arguments, *flags])
        except SystemExit as stopped:
            status = stopped.code
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert (status, len(errors)) in ((0, 0), (2, 1))
        if errors:
            return errors[0]
        (path,) = Path().glob(self.written)
        return path.read_bytes()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_hdf5(tmp_path_factory.mktemp("survey") / "small.h5", random_images(70, 16))


@pytest.fixture(scope="module")
def pretraining(dataset, tmp_path_factory) -> Command:
    folder = tmp_path_factory.mktemp("pretraining")
    arguments = recipe_file(folder, PRETRAINING | {"dataset": str(dataset)})
    command = Command(main.main, lambda a: read_recipe(a).as_dict(), arguments, "*/model.safetensors")
    main.main([*arguments, "--output_dir", str(folder / "run")])
    command.weights = (folder / "run" / "model.safetensors").read_bytes()
    command.encoder = folder / "run"
    return command


@pytest.fixture(scope="module")
def evaluation(pretraining, dataset, tmp_path_factory) -> Command:
    folder = tmp_path_factory.mktemp("evaluation")
    arguments = recipe_file(folder, EVALUATION | {"dataset": str(dataset), "encoder": str(pretraining.encoder)})
    written = "*/ssl_fine_tune/seed_*/model.safetensors"
    command = Command(linear_probe_checkpoints.main, lambda a: read_evaluation_recipe(a).as_dict(), arguments, written)
    linear_probe_checkpoints.main([*arguments, "--output_dir", str(folder / "run")])
    (path,) = folder.glob(written)
    command.weights = path.read_bytes()
    return command


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a deprecated field warns, and works
@pytest.mark.parametrize("flags", FIELDS, ids=lambda flags: flags[0][2:])
@pytest.mark.parametrize("name", ["pretraining", "evaluation"])
def test_every_field_works_or_is_refused_in_one_line(name, flags, request, capsys):
    """What changes the weights belongs to the recipe that a folder is restricted to."""
    command = request.getfixturevalue(name)
    result = command.result(flags, capsys)
    if isinstance(result, str):
        assert not list(Path().glob("*/*"))
    elif result != command.weights:
        assert command.identity([*command.arguments, *flags]) != command.identity(command.arguments)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--adam_beta1", "1.5"], ["--adam_beta2", "nan"], ["--adam_epsilon", "-1"]),
        *(["--num_train_epochs", "inf"], ["--num_train_epochs", "nan"], ["--learning_rate", "inf"]),
        *(["--warmup_steps", "nan"], ["--save_steps", "inf"], ["--logging_steps", "inf"], ["--eval_steps", "0"]),
        *(["--eval_accumulation_steps", "0"], ["--dataloader_num_workers", "-1"], ["--eval_delay", "-1"]),
        *(["--dataloader_prefetch_factor", "0", "--dataloader_num_workers", "1"], ["--ddp_backend", "gloo"]),
        *(["--batch_size", "10000000000"], ["--fp16"], ["--bf16_full_eval"], ["--fp16_full_eval"], ["--fsdp"]),
        *(["--fsdp", "full_shard"], ["--deepspeed", "zero3.json"], ["--use_liger_kernel"], ["--batch_eval_metrics"]),
        *(["--include_for_metrics", "inputs"], ["--prediction_loss_only"], ["--debug", "underflow_overflow"]),
        *(["--save_strategy", "best", "--eval_strategy", "no"], ["--report_to", "mlflow"]),
        *(["--metric_for_best_model", "accuracy"], ["--metric_for_best_model", "mse", "--load_best_model_at_end"]),
        ["--load_best_model_at_end", "--eval_strategy", "no", "--save_strategy", "no"],
        *(["--optim_args", "momentum"], ["--optim_args", "a=b=c"], ["--optim_args", "momentum=0.9"]),
        *(["--optim_args", "momentum=fast", "--optim", "sgd"], ["--optim_args", "mass=1", "--optim", "sgd"]),
        *(["--lr_scheduler_kwargs", text] for text in ("x", "{", "[1]", '{"cycles": 1}', '{"num_cycles": "two"}')),
        *(["--lr_scheduler_kwargs", text] for text in ('{"num_cycles": NaN}', '{"num_cycles": Infinity}')),
        ["--lr_scheduler_kwargs", '{"lr_end": 1}', "--lr_scheduler_type", "polynomial"],
        ["--lr_scheduler_kwargs", '{"lr_end": -1}', "--lr_scheduler_type", "polynomial"],
        ["--lr_scheduler_kwargs", '{"num_cycles": 1}', "--lr_scheduler_type", "constant"],
        *(["--torch_compile_backend", "gcc"], ["--torch_compile_mode", "fast"]),
        ["--dataloader_persistent_workers", "--dataloader_num_workers", "1"],
    ],
    ids=" ".join,
)
def test_bad_values_are_refused_before_anything_is_written(flags, pretraining, capsys):
    line = pretraining.result(flags, capsys)
    assert isinstance(line, str)
    assert flags[0] in line
    assert not list(Path().glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [member.value for member in OptimizerNames])
def test_every_optimizer_works_or_is_refused_in_one_line(optimizer, pretraining, capsys):
    result = pretraining.result(["--optim", optimizer], capsys)
    if isinstance(result, str):
        assert f"--optim {optimizer}: " in result
        assert not list(Path().glob("*/*"))
    else:
        assert (result == pretraining.weights) == (optimizer == TrainingArguments.default_optim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretraining", "evaluation"])
@pytest.mark.parametrize("schedule", [member.value for member in SchedulerType])
def test_every_schedule_works_or_says_what_it_needs(name, schedule, request, capsys):
    command = request.getfixturevalue(name)
    result = command.result(["--lr_scheduler_type", schedule], capsys)
    if isinstance(result, str):
        assert f"--lr_scheduler_type {schedule}: " in result
        needed = '{"num_decay_steps": 1}' if schedule == "warmup_stable_decay" else '{"min_lr": 1e-5}'
        flags = ["--lr_scheduler_type", schedule, "--lr_scheduler_kwargs", needed]
        assert isinstance(command.result(flags, capsys), bytes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_compiled_ends_in_one_line(pretraining, capsys):
    line = pretraining.result(["--torch_compile_backend", "tvm"], capsys)
    assert "--torch_compile: " in line
    assert "tvm" in line


def test_best_checkpoint_without_an_evaluation_is_said(pretraining, capsys, caplog):
    flags = ["--load_best_model_at_end", "--eval_delay", "100"]
    assert isinstance(pretraining.result(flags, capsys), bytes)
    assert "the last ones are kept" in caplog.text
