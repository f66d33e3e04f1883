"""Every field of the training works, and every other of transformers' TrainingArguments is refused in one line.

The fields of TrainingArguments are those of the installed release, so that a new release's fields are refused as well.
"""

import dataclasses
import logging
import multiprocessing
import os
import shutil
import signal
import typing
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
import yaml
from conftest import random_images, write_hdf5
from transformers import TrainingArguments

import linear_probe_checkpoints
import main
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.training.arguments import FineTuningArguments, PretrainingArguments
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
    "disable_tqdm": ["False"],
    "gradient_accumulation_steps": ["3"],
    "learning_rate": ["0.001"],
    "logging_steps": ["5"],
    "max_grad_norm": ["0.01"],
    "max_steps": ["2"],
    "push_to_hub": ["False"],  # somebody may be logged in; tests/test_main.py tries it
    "report_to": ["tensorboard"],
    "torch_compile": ["False"],  # inductor would compile for a quarter of a minute
}
# Of our own, which every training has and other tests try.
OWN = {"batch_size", "base_learning_rate", "layer_decay", "label_smoothing", "mixup", "min_crop_scale"}
OWN |= {"reconstruct_every", "probe_every", "photometric_jitter"}


def plausible_value(arguments: type, field: dataclasses.Field) -> str:
    """A value of a field's type that is not its default."""
    hint = typing.get_type_hints(arguments)[field.name]
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return next(value for value in reversed(kinds) if value != field.default)
    if any(typing.get_origin(kind) is typing.Literal for kind in kinds):
        return typing.get_args(kinds[0])[0]
    if bool in kinds:
        return str(not field.default)
    for kind, step in ((int, 1), (float, 0.25)):
        if kind in kinds:
            return str((field.default or 0) + step)
    return "x"


def flags_of(arguments: type) -> dict[str, dataclasses.Field]:
    """The fields of a training that are flags and not of our own."""
    return {field.name: field for field in dataclasses.fields(arguments) if field.init and field.name not in OWN}


def not_supported(arguments: type) -> list[str]:
    return [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in flags_of(arguments)]


FIELDS = [
    pytest.param(name, [f"--{field.name}", *VALUES.get(field.name, [plausible_value(arguments, field)])], id=field.name)
    for name, arguments in (("pretraining", PretrainingArguments), ("evaluation", FineTuningArguments))
    for field in flags_of(arguments).values()
]


@pytest.fixture(autouse=True)
def _same_process(tmp_path, monkeypatch):
    """What a command leaves in its process, which usually ends with it; and an end for one that hangs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    # Half of the time, and no field's matter.
    monkeypatch.setattr(main.reconstruction, "plot_final_reconstructions", lambda *_: "")
    monkeypatch.setattr(main, "write_encoder_card", lambda *_: None)
    for name in ("write_report", "write_classifier_cards", "write_evaluation_page", "send_report"):
        monkeypatch.setattr(linear_probe_checkpoints, name, Mock())
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
@pytest.mark.filterwarnings("ignore")  # TF32 where there is no GPU
@pytest.mark.parametrize(("name", "flags"), FIELDS)
def test_every_field_works_or_is_refused_in_one_line(name, flags, request, capsys):
    """What changes the weights belongs to the recipe that a folder is restricted to."""
    command = request.getfixturevalue(name)
    result = command.result(flags, capsys)
    if isinstance(result, str):
        assert flags[0] in ("--fp16", "--tf32")
        assert not list(Path().glob("*/*"))
    elif result != command.weights:
        assert command.identity([*command.arguments, *flags]) != command.identity(command.arguments)


def test_the_fields_of_the_trainer_are_those_of_transformers():
    """Ours have other names, also than those of a new release; they would reach its Trainer."""
    trainers = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not OWN & trainers
    assert set(flags_of(PretrainingArguments)) | set(flags_of(FineTuningArguments)) <= trainers


@pytest.mark.parametrize(
    ("read", "flags", "arguments"),
    [
        (read_recipe, [], PretrainingArguments),
        (read_evaluation_recipe, ["--encoder", "x"], FineTuningArguments),
    ],
)
def test_every_other_field_is_refused_in_one_line(read, flags, arguments):
    names = not_supported(arguments)
    assert len(names) > 70
    for name in names:
        with pytest.raises(UserError, match=f"^--{name}: not supported here; "):
            read([*flags, f"--{name}", "1"])
    for name, reason in {"fsdp": "torchrun", "deepspeed": "torchrun", "resume_from_checkpoint": "repeat"}.items():
        with pytest.raises(UserError, match=reason):
            read([*flags, f"--{name}"])


@pytest.mark.parametrize(
    "flags",
    [
        *(["--adam_beta1", "1.5"], ["--adam_beta2", "nan"], ["--adam_epsilon", "-1"]),
        *(["--num_train_epochs", "inf"], ["--num_train_epochs", "nan"], ["--learning_rate", "inf"]),
        *(["--warmup_steps", "nan"], ["--save_steps", "inf"], ["--logging_steps", "inf"], ["--eval_steps", "0"]),
        *(["--dataloader_num_workers", "-1"], ["--ddp_timeout", "0"], ["--batch_size", "10000000000"], ["--fp16"]),
        *(["--save_strategy", "best", "--eval_strategy", "no"], ["--report_to", "mlflow"]),
        *(["--metric_for_best_model", "accuracy"], ["--metric_for_best_model", "mse", "--load_best_model_at_end"]),
        ["--load_best_model_at_end", "--eval_strategy", "no", "--save_strategy", "no"],
        *(["--optim", "galore_adamw"], ["--lr_scheduler_type", "sinus"], ["--logging_steps", "1.5"]),
    ],
    ids=" ".join,
)
def test_bad_values_are_refused_before_anything_is_written(flags, pretraining, capsys):
    line = pretraining.result(flags, capsys)
    assert isinstance(line, str)
    assert flags[0] in line
    assert not list(Path().glob("*/*"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WANDB_PROJECT", "team/mae"), ("WANDB_MODE", "offlin")],
)
def test_bad_settings_of_dashboards_are_refused_before_anything_is_written(
    variable, value, pretraining, capsys, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv(variable, value)
    line = pretraining.result(["--report_to", "wandb"], capsys)
    assert line.startswith(f"command: error: {variable}={value}: ")
    assert not list(Path().glob("*/*"))


def test_the_variables_of_a_launcher_do_not_change_the_weights(pretraining, capsys, monkeypatch):
    """`accelerate launch` sets them. The flags decide, which are in `run.json`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert pretraining.result([], capsys) == pretraining.weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretraining", "evaluation"])
@pytest.mark.parametrize("field", ["optim", "lr_scheduler_type"])
def test_every_optimizer_and_every_schedule_works(name, field, request, capsys):
    command = request.getfixturevalue(name)
    for value in typing.get_args(typing.get_type_hints(PretrainingArguments)[field]):
        output = f"{field}_{value}"
        assert isinstance(command.result([f"--{field}", value, "--output_dir", output], capsys), bytes)
        shutil.rmtree(output)
