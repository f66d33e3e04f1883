"""Recipes: a YAML file and flags that override it become a resolved configuration.

A recipe is a flat YAML file with the names of the flags. It is turned into flags and read by the same parser, so that
types and choices are checked once, by `HfArgumentParser`, and a later flag overrides the recipe. The fields are those
of `arguments.py`.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml

from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.files import read_settings, user_path
from galaxy_mae.training.arguments import (
    EvaluationArguments,
    FineTuningArguments,
    GalaxyArguments,
    ModelArguments,
    PretrainingArguments,
)

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments, ViTMAEConfig

_Group = TypeVar("_Group")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # a link in the repository, a folder of the wheel
RESERVED = {"config", "help", "trial"}  # flags that are no fields of a recipe

# What defines the result of a run, besides the data and the model. A folder holds runs of one recipe only.
RESULT_FIELDS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("num_train_epochs", "warmup_steps", "lr_scheduler_type", "seed", "bf16", "fp16", "tf32"),
)
_PRETRAINING_FIELDS = ("max_steps", "load_best_model_at_end", "metric_for_best_model")
_FINE_TUNING_FIELDS = ("layer_decay", "label_smoothing", "mixup", "min_crop_scale", "photometric_jitter")

# Flags that people look for and that are not among the fields, with the reason.
_NOT_SUPPORTED = dict.fromkeys(("fsdp", "deepspeed"), "each GPU holds the whole model; torchrun shares out the batch")
_NOT_SUPPORTED["resume_from_checkpoint"] = "a run resumes by itself: repeat the same command"


@dataclass(frozen=True)
class Command:
    """What differs between the arguments of the two scripts."""

    program: str
    default_recipe: Path
    groups: tuple[type, ...]
    description: str


PRETRAINING = Command(
    "main.py",
    RECIPES / "galaxy10.yaml",
    (GalaxyArguments, ModelArguments, PretrainingArguments),
    "Pre-train a masked autoencoder on galaxy images. The recipe (default: recipes/galaxy10.yaml) sets the fields, "
    "flags override it. The same command resumes an interrupted run.",
)
EVALUATION = Command(
    "linear_probe_checkpoints.py",
    RECIPES / "evaluation.yaml",
    (EvaluationArguments, FineTuningArguments),
    "Evaluate an encoder by five methods. The recipe (default: recipes/evaluation.yaml) sets the fields, flags "
    "override it. Finished methods are skipped, interrupted ones are resumed.",
)


@dataclass
class Recipe:
    """The resolved configuration of a pre-training run. `explicitly_set`: fields set by the recipe or a flag."""

    galaxies: GalaxyArguments
    model: ModelArguments
    training: PretrainingArguments
    explicitly_set: set[str]

    @property
    def model_config(self) -> "ViTMAEConfig":
        """The model's configuration at the recipe's image size."""
        return self.model.config(self.galaxies.image_size)

    def as_dict(self) -> dict[str, Any]:
        """What defines the result: compared when a run is resumed, and kept beside the weights."""
        names = RESULT_FIELDS + _PRETRAINING_FIELDS
        if self.training.load_best_model_at_end:  # then evaluations decide which weights are kept
            names += ("eval_strategy", "eval_steps")
        return {
            **asdict(self.galaxies),
            **asdict(self.model),
            "batch_size": global_batch_size(self.training),
            **{name: getattr(self.training, name) for name in names},
        }


@dataclass
class EvaluationRecipe:
    """The configuration of an evaluation. `explicitly_set` names the fields set by the recipe or a flag.

    `set_batch_and_learning_rate` completes it once the encoder is known.
    """

    evaluation: EvaluationArguments
    training: FineTuningArguments
    explicitly_set: set[str]

    def as_dict(self) -> dict[str, Any]:
        """What defines the results: compared when methods are added to a folder, and kept in each result."""
        by_device = {"bf16", "fp16", "tf32"} - self.explicitly_set  # methods may run on different nodes
        return {
            "split_seed": self.evaluation.split_seed,
            "seeds": self.evaluation.seeds,
            "pooling": self.evaluation.pooling,
            "batch_size": global_batch_size(self.training),
            **{name: getattr(self.training, name) for name in _FINE_TUNING_FIELDS},
            **{name: getattr(self.training, name) for name in RESULT_FIELDS if name not in by_device},
        }


def read_recipe(arguments: list[str]) -> Recipe:
    """Read main.py's `--config RECIPE` (default: recipes/galaxy10.yaml) and the flags that override it.

    Raises:
        UserError: no such recipe, an unknown field or flag, or a bad value.
    """
    from galaxy_mae.model.mae import measure_mae, validate_config

    values = _read(arguments, PRETRAINING)
    recipe = Recipe(*(_build(group, values) for group in PRETRAINING.groups), set(values))
    validate_config(recipe.model_config)
    _, activation_bytes = measure_mae(recipe.model_config)
    set_batch_and_learning_rate(recipe.training, recipe.explicitly_set, activation_bytes)
    return recipe


def read_evaluation_recipe(arguments: list[str]) -> EvaluationRecipe:
    """`read_recipe` for linear_probe_checkpoints.py, whose default is recipes/evaluation.yaml."""
    values = _read(arguments, EVALUATION)
    evaluation = _build(EvaluationArguments, values)
    if not values.get("output_dir"):
        if not evaluation.encoder:
            raise UserError("--report: give --output_dir, the folder of the results, or --encoder")
        values["output_dir"] = str(Path("results", Path(evaluation.encoder).name))
    recipe = EvaluationRecipe(evaluation, _build(FineTuningArguments, values), set(values))
    set_batch_and_learning_rate(recipe.training, recipe.explicitly_set, 0)  # again once the encoder's size is known
    return recipe


def global_batch_size(training: "PretrainingArguments | FineTuningArguments | TrainingArguments") -> int:
    """Images per optimizer step, over all processes and micro-batches."""
    return training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps


def set_batch_and_learning_rate(
    training: PretrainingArguments | FineTuningArguments, explicitly_set: set[str], bytes_per_image: float
) -> None:
    """Resolve the batch and the learning rate in place, unless they were set explicitly.

    The global batch is divided among the processes, and each part into micro-batches that fit the device, where an
    image's forward and backward pass takes `bytes_per_image`. The learning rate is scaled linearly with the global
    batch size (Goyal et al. 2017).

    Raises:
        UserError: the batch is not divisible by the number of processes.
    """
    from galaxy_mae.model.compute import select_micro_batch_size

    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & explicitly_set:
        per_device, remainder = divmod(training.batch_size, training.world_size)
        if remainder or per_device == 0:
            processes = f"the {training.world_size} processes"
            raise UserError(f"--batch_size {training.batch_size} is not divisible by {processes}")
        micro_batch = select_micro_batch_size(per_device, bytes_per_image, training.device)
        training.per_device_train_batch_size = micro_batch
        training.gradient_accumulation_steps = per_device // micro_batch
        if "per_device_eval_batch_size" not in explicitly_set:
            training.per_device_eval_batch_size = micro_batch
    if "learning_rate" not in explicitly_set:
        training.learning_rate = training.base_learning_rate * global_batch_size(training) / 256


def select_index(value: str | None, flag: str, names: Sequence[str]) -> int | None:
    """The index that the value of a flag, a name or an index, selects, or else Slurm's array task; None without either.

    Raises:
        UserError: no such name or index.
    """
    if value is None:
        flag, value = "SLURM_ARRAY_TASK_ID", os.environ.get("SLURM_ARRAY_TASK_ID")
    if value is None:
        return None
    if value in names:
        return names.index(value)
    if value.isdecimal() and int(value) < len(names):
        return int(value)
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names[:10])) + ", ..." * (len(names) > 10)
    raise UserError(f"{flag} {value}: not one of 0 to {len(names) - 1} ({known})")


def build_parser(command: Command) -> "HfArgumentParser":
    """The parser of a script. It raises `UserError`, and yields only what was set."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    program = sys.argv[0] if sys.argv[0].startswith("galaxy-mae ") else command.program
    parser = HfArgumentParser(
        command.groups,
        prog=program,
        formatter_class=argparse.HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"{program} [--config RECIPE] [--FIELD VALUE ...]",
        description=command.description,
        epilog="The training has the names of transformers.TrainingArguments: "
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
    )
    parser.error = _raise_user_error
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file of these fields, such as recipes/demo.yaml")
    if command is PRETRAINING:
        parser.add_argument(
            "--trial",
            metavar="INDEX",
            help="index of a trial, if RECIPE is a sweep such as recipes/sweep/mask_ratio.yaml",
        )
    for action in parser._actions:
        default, action.default = action.default, argparse.SUPPRESS
        if action.dest in ("help", "config", "trial"):
            continue
        if action.type is string_to_bool and action.nargs is None:  # of a field that may be None
            action.nargs, action.const = "?", True
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
            continue
        action.option_strings = action.option_strings[:1]  # in the help; --batch-size is understood as well
        action.metavar = "|".join(map(str, action.choices)) if action.choices else "VALUE"
        if default not in (None, argparse.SUPPRESS) and "default: " not in action.help:
            words = default if isinstance(default, list) else [default]
            action.help += f" (default: {' '.join(map(str, words))})"
    return parser


def _raise_user_error(message: str) -> NoReturn:
    raise UserError(message)


def show_help(arguments: list[str], command: Command, more: Callable[[], str] | None = None) -> bool:
    """Print the help, and `more`, if the arguments ask for it, and return whether they do."""
    if not {"-h", "--help"} & set(arguments):
        return False
    with one_line_errors(command.program):
        build_parser(command).print_help(sys.stdout)
        if more:
            print(f"\n{more()}")
    return True


def _read(arguments: list[str], command: Command) -> dict[str, Any]:
    """The fields that the recipe and the flags set, by name."""
    parser = build_parser(command)
    named, arguments = pop_flag("--config", arguments)
    config = find_recipe(named) if named is not None else command.default_recipe
    from_recipe = _parse(parser, to_flags(read_yaml(config)), f"{config}: ")
    flags = _parse(parser, arguments, "")
    return _drop_overridden(from_recipe, flags) | flags


def _parse(parser: "HfArgumentParser", arguments: list[str], where: str) -> dict[str, Any]:
    """The fields that these arguments set, by name."""
    try:
        namespace, unknown = parser.parse_known_args(arguments)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    if unknown:
        name = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        advice = f"did you mean {close[0]}?" if close else "--help lists what is"
        reason = _NOT_SUPPORTED.get(name.removeprefix("--").replace("-", "_"), advice)
        raise UserError(f"{where}{name}: not supported here; {reason}")
    return vars(namespace)


def _drop_overridden(from_recipe: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Batch and length have two fields each: a flag of one overrides the recipe's other. Two of a batch contradict."""
    by_device = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if "batch_size" in flags and by_device & set(flags):
        others = "--per_device_train_batch_size or --gradient_accumulation_steps"
        raise UserError(f"--batch_size and {others}: give one of them")
    overridden = by_device if "batch_size" in flags else {"batch_size"} if by_device & set(flags) else set()
    overridden |= {"max_steps"} if "num_train_epochs" in flags else set()
    return {name: value for name, value in from_recipe.items() if name not in overridden}


def _build(group: type[_Group], values: dict[str, Any]) -> _Group:
    """Make a group of arguments from the values that are its fields."""
    names = {f.name for f in fields(group) if f.init}
    try:
        return group(**{name: value for name, value in values.items() if name in names})
    except (ArithmeticError, ValueError, TypeError, ImportError, RuntimeError) as error:  # also of TrainingArguments
        raise UserError(str(error)) from error


def pop_flag(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Remove a flag and its value from arguments, `--flag VALUE` or `--flag=VALUE`: (value or None, the rest)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _raise_user_error
    parser.add_argument(name, dest="value")
    options, rest = parser.parse_known_args(arguments)
    return options.value, rest


def find_recipe(name: str) -> Path:
    """The recipe that `--config` names: a file, or one of this package, as in `demo`, `recipes/demo.yaml`."""
    own = (RECIPES / f"{name}.yaml", RECIPES.parent / name)
    return next((path for path in (user_path(name), *own) if path.is_file()), user_path(name))


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a recipe as they are written.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    try:
        content = yaml.safe_load(read_settings(path))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); see {RECIPES.name}/") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date or number that cannot be
        raise UserError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a recipe is a list of lines `field: value`")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    if reserved := RESERVED & set(content):
        raise UserError(f"--config {path}: a recipe has no field {reserved.pop()}")
    return content


def to_flags(content: dict[str, Any]) -> list[str]:
    """The fields of a recipe as flags. Raises a `UserError` if a name or a value would be another flag."""
    flags: list[str] = []
    for name, value in content.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if value is not None:
            values = list(map(str, value if isinstance(value, list) else [value]))
            if "=" in name or any(re.match(r"-(?![\d.])", x) for x in values):
                raise UserError(f"{name}: {' '.join(values)}: in a recipe, each flag has a line of its own")
            flags += [f"--{name}", *values]
    return flags
