"""Recipes: a YAML file and flags that override it become a resolved configuration.

A recipe is a flat YAML file with the names of the flags. It is turned into flags and read by the same parser, so that
types and choices are checked once, by `HfArgumentParser`, and a later flag overrides the recipe. Every field of
transformers' `TrainingArguments` is a flag and a recipe field as well.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments, ViTMAEConfig
from transformers.hf_argparser import string_to_bool

from galaxy_mae.errors import UserError
from galaxy_mae.model.compute import activation_bytes_per_image, num_patches, select_micro_batch_size
from galaxy_mae.model.mae import validate_config
from galaxy_mae.training.arguments import (
    METRIC_SCHEDULES,
    EvaluationArguments,
    FineTuningArguments,
    GalaxyArguments,
    ModelArguments,
    ObjectiveArguments,
    PretrainingArguments,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_MAX_YAML_BYTES = 100_000
_MAX_YAML_DEPTH = 4  # a sweep over a field whose values are mappings

# What defines the result of a run, besides the data and the model. A folder holds runs of one recipe only.
RESULT_FIELDS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "seed", "data_seed", "bf16", "fp16"),
    *("lr_scheduler_kwargs", "optim_args", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("neftune_noise_alpha", "tf32"),
)
# These define it too where evaluations decide: on the weights that are kept, or on the learning rate.
_EVALUATION_FIELDS = ("eval_strategy", "eval_steps", "eval_delay")

# Fields of TrainingArguments that this project fixes: setting them is an error, not silently ignored.
_FIXED = {
    "remove_unused_columns": "the loader carries sample indices",
    "label_names": "the loader carries sample indices",
    "dataloader_drop_last": "every step takes a full batch",
    "train_sampling_strategy": "the sample order is a function of the seed and the epoch",
    "auto_find_batch_size": "the batch size is part of the recipe",
    "ignore_data_skip": "a resumed run gets the batches of an uninterrupted one",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "debug": "a loss that is not finite stops the run",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "push_to_hub": "upload the finished folder with huggingface_hub instead",
    "enable_jit_checkpoint": "a run saves at USR1 and TERM by itself",
    "resume_from_checkpoint": "a run resumes by itself: repeat the same command",
    "restore_callback_states_from_checkpoint": "no callback here has a state that a resumed run would need",
    "save_on_each_node": "all nodes of a run share its folder",
    "dataloader_in_order": "the sample order is a function of the seed and the epoch",
    "dataloader_multiprocessing_context": "workers are forked; a spawned one would get a copy of the images",
    "dataloader_persistent_workers": "workers ignore the signals of Slurm, and persistent ones would never end",
    "length_column_name": "images have no length to group them by",
    "accelerator_config": "the recipe says how batches are made and shared out",
    "local_rank": "torchrun tells each process its rank",
    "use_liger_kernel": "Liger has no kernels for a ViT",
    "liger_kernel_config": "Liger has no kernels for a ViT",
    "use_cache": "a ViT has no cache of keys and values",
    "include_num_input_tokens_seen": "images are counted, not tokens",
    "average_tokens_across_devices": "the loss is a mean over images, not over tokens",
    "optim_target_modules": "the optimizers that read it (GaLore, APOLLO) are not supported",
    "bf16_full_eval": "it would round the weights themselves; --bf16 also evaluates in bfloat16",
    "fp16_full_eval": "it would round the weights themselves; --fp16 also evaluates in float16",
    "label_smoothing_factor": "an autoencoder has no class labels",
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        "--activation_checkpointing has no options here",
    ),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        "each GPU holds the whole model; torchrun shares out the batch",
    ),
    **dict.fromkeys(
        (
            *("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"),
            *("eval_do_concat_batches", "eval_use_gather_object"),
        ),
        "the metrics need the predictions of the whole validation set, and nothing else",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "what a command does is fixed"),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "upload the finished folder with huggingface_hub instead",
    ),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "set TRACKIO_PROJECT and its other variables instead; W&B takes its project from WANDB_PROJECT",
    ),
}
_FIXED_IN_EVALUATION = (
    _FIXED
    | dict.fromkeys(
        (
            *(*_EVALUATION_FIELDS, "save_strategy", "save_steps"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        ),
        "the epoch with the best accuracy on the validation set is kept",
    )
    | {
        "max_steps": "--num_train_epochs says how long to fine-tune",
        "label_smoothing_factor": "use --label_smoothing, which works with mixup",
    }
)


@dataclass(frozen=True)
class Command:
    """What differs between the arguments of the two scripts."""

    program: str
    default_recipe: Path
    groups: tuple[type, ...]
    fixed: dict[str, str]
    description: str


PRETRAINING = Command(
    "main.py",
    RECIPES / "galaxy10.yaml",
    (GalaxyArguments, ModelArguments, ObjectiveArguments, PretrainingArguments),
    _FIXED,
    "Pre-train a masked autoencoder on galaxy images. The recipe (default: recipes/galaxy10.yaml) sets the fields, "
    "flags override it. The same command resumes an interrupted run.",
)
EVALUATION = Command(
    "linear_probe_checkpoints.py",
    RECIPES / "evaluation.yaml",
    (EvaluationArguments, FineTuningArguments),
    _FIXED_IN_EVALUATION,
    "Evaluate an encoder by five methods. The recipe (default: recipes/evaluation.yaml) sets the fields, flags "
    "override it. Finished methods are skipped, interrupted ones are resumed.",
)


@dataclass
class Recipe:
    """The resolved configuration of a pre-training run. `explicitly_set`: fields set by the recipe or a flag."""

    galaxies: GalaxyArguments
    model: ModelArguments
    objective: ObjectiveArguments
    training: PretrainingArguments
    explicitly_set: set[str]

    @property
    def model_config(self) -> ViTMAEConfig:
        """The model's configuration at the recipe's image size."""
        return self.model.config(self.galaxies.image_size)

    def as_dict(self) -> dict[str, Any]:
        """What defines the result: compared when a run is resumed, and kept beside the weights."""
        training = self.training.to_dict()
        evaluations_decide = training["load_best_model_at_end"] or training["lr_scheduler_type"] in METRIC_SCHEDULES
        names = (*RESULT_FIELDS, *_EVALUATION_FIELDS) if evaluations_decide else RESULT_FIELDS
        return {
            **asdict(self.galaxies),
            **asdict(self.model),
            **self.objective.not_default(),
            "batch_size": global_batch_size(self.training),
            **{name: training[name] for name in names},
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
        training = self.training.to_dict()
        names = ("layer_decay", "label_smoothing", "mixup", "min_crop_scale", *RESULT_FIELDS)
        by_device = {"bf16", "fp16", "tf32"} - self.explicitly_set  # methods may run on different nodes
        excluded = by_device | {"load_best_model_at_end", "metric_for_best_model", "greater_is_better", "max_steps"}
        return {
            "split_seed": self.evaluation.split_seed,
            "seeds": self.evaluation.seeds,
            "pooling": self.evaluation.pooling,
            "batch_size": global_batch_size(self.training),
            **{name: training[name] for name in names if name not in excluded},
        }


def read_recipe(arguments: list[str]) -> Recipe:
    """Read main.py's `--config RECIPE` (default: recipes/galaxy10.yaml) and the flags that override it.

    Raises:
        UserError: no such recipe, an unknown field or flag, a value of the wrong type or range, values that exclude
            each other.
    """
    values = _read(arguments, PRETRAINING)
    galaxies, model, objective, training = (_build(group, values) for group in PRETRAINING.groups)
    recipe = Recipe(galaxies, model, objective, training, set(values))
    validate_config(recipe.model_config)
    if objective.masking == "light":
        objective.patch_counts(num_patches(recipe.model_config), model.mask_ratio)
    set_batch_and_learning_rate(training, recipe.explicitly_set, activation_bytes_per_image(recipe.model_config))
    training.check_optimizer()
    return recipe


def read_evaluation_recipe(arguments: list[str]) -> EvaluationRecipe:
    """Read linear_probe_checkpoints.py's `--config RECIPE` (default: recipes/evaluation.yaml) and the flags over it.

    Raises:
        UserError: as `read_recipe`.
    """
    values = _read(arguments, EVALUATION)
    evaluation = _build(EvaluationArguments, values)
    if not values.get("output_dir"):
        if not evaluation.encoder:
            raise UserError("--report: give --output_dir, the folder of the results, or --encoder")
        values["output_dir"] = str(Path("results", Path(evaluation.encoder).name))
    recipe = EvaluationRecipe(evaluation, _build(FineTuningArguments, values), set(values))
    set_batch_and_learning_rate(recipe.training, recipe.explicitly_set, 0)  # again once the encoder's size is known
    recipe.training.check_optimizer()
    return recipe


def global_batch_size(training: TrainingArguments) -> int:
    """Images per optimizer step, over all processes and micro-batches."""
    return training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps


def set_batch_and_learning_rate(
    training: PretrainingArguments | FineTuningArguments, explicitly_set: set[str], bytes_per_image: float
) -> None:
    """Resolve the batch and the learning rate, in place.

    The global batch is divided among the processes, and each part into micro-batches that fit the device. The learning
    rate is scaled linearly with the global batch size (Goyal et al. 2017).

    Args:
        training: changed in place; its per-device batch and learning rate are kept if they were set explicitly.
        explicitly_set: fields set by the recipe or a flag.
        bytes_per_image: memory of one image's forward and backward pass.

    Raises:
        UserError: the batch is not divisible by the number of processes.
    """
    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & explicitly_set:
        per_device, remainder = divmod(training.batch_size, training.world_size)
        if remainder or per_device == 0:
            raise UserError(
                f"--batch_size {training.batch_size} is not divisible by the {training.world_size} processes"
            )
        micro_batch = select_micro_batch_size(per_device, bytes_per_image, training.device)
        training.per_device_train_batch_size = micro_batch
        training.gradient_accumulation_steps = per_device // micro_batch
        if "per_device_eval_batch_size" not in explicitly_set:
            training.per_device_eval_batch_size = micro_batch
    if "learning_rate" not in explicitly_set:
        training.learning_rate = training.base_learning_rate * global_batch_size(training) / 256


def select_index(value: str | None, flag: str, names: Sequence[str]) -> int | None:
    """The index that a flag selects, or else Slurm's array task; None without either.

    Args:
        value: of the flag, a name or an index; None if it was not given.
        flag: its name, for messages.
        names: of what can be selected.

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


# ---------------------------------------------------------------------------------------------------------- the parser


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises `UserError` and yields only what was set."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser(command: Command) -> _Parser:
    parser = _Parser(
        command.groups,
        prog=command.program,
        formatter_class=argparse.HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"{command.program} [--config RECIPE] [--FIELD VALUE ...]",
        description=command.description,
        epilog="Every other field of transformers.TrainingArguments is a flag and a recipe field as well (--run_name, "
        "--use_cpu, --dataloader_num_workers, ...): "
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file of these fields, such as recipes/demo.yaml")
    if command is PRETRAINING:
        parser.add_argument(
            "--trial",
            metavar="INDEX",
            help="index of a trial, if RECIPE is a sweep such as recipes/sweep/mask_ratio.yaml",
        )
    documented = {
        f.name: f.metadata["help"]
        for group in command.groups
        for f in fields(group)
        if "help" in f.metadata and any(f.name in vars(c).get("__annotations__", {}) for c in _own_classes(group))
    }
    for action in parser._actions:
        default, action.default = action.default, argparse.SUPPRESS
        if action.type is string_to_bool and action.nargs is None:  # of a field that may be None
            action.nargs, action.const = "?", True
        if action.dest in ("help", "config", "trial"):
            continue
        negated = action.option_strings[0].startswith("--no_")
        if negated or action.dest not in documented or action.dest in command.fixed:
            action.help = argparse.SUPPRESS
            continue
        action.option_strings = action.option_strings[:1]  # in the help; --batch-size is understood as well
        action.metavar = "VALUE"
        action.help += f" (default: {default})" if default not in (None, argparse.SUPPRESS) else ""
    return parser


def _own_classes(group: type) -> list[type]:
    """The classes of a group of arguments that this project defines."""
    return [c for c in group.__mro__ if c.__module__.startswith("galaxy_mae.")]


def show_help(arguments: list[str], command: Command) -> bool:
    """Print the help if the arguments ask for it, and return whether they do."""
    if not {"-h", "--help"} & set(arguments):
        return False
    _parser(command).print_help(sys.stdout)
    return True


def _read(arguments: list[str], command: Command) -> dict[str, Any]:
    """The fields that the recipe and the flags set, by name."""
    parser = _parser(command)
    named, arguments = pop_flag("--config", arguments)
    config = Path(named) if named is not None else command.default_recipe
    from_recipe = _parse(parser, to_flags(read_yaml(config)), f"{config}: ")
    flags = _parse(parser, arguments, "")
    values = _drop_overridden_batch(from_recipe, flags) | flags
    for name in sorted(set(values) & set(command.fixed)):
        raise UserError(f"--{name} cannot be chosen here: {command.fixed[name]}")
    return values


def _parse(parser: _Parser, arguments: list[str], where: str) -> dict[str, Any]:
    """The fields that these arguments set, by name."""
    try:
        namespace, unknown = parser.parse_known_args(arguments)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    if unknown:
        name = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        kind = "field" if where else "flag"
        suggestion = f"; did you mean {close[0]}?" if close else "; --help lists the known ones"
        raise UserError(f"{where}unknown {kind} {name}{suggestion}")
    return vars(namespace)


def _drop_overridden_batch(from_recipe: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """There are two ways to set the batch. A flag of one overrides the recipe's other; two flags contradict."""
    by_device = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if "batch_size" in flags and by_device & set(flags):
        raise UserError(
            "--batch_size and --per_device_train_batch_size or --gradient_accumulation_steps: give one of them"
        )
    overridden = by_device if "batch_size" in flags else {"batch_size"} if by_device & set(flags) else set()
    return {name: value for name, value in from_recipe.items() if name not in overridden}


_Group = TypeVar("_Group")


def _build(group: type[_Group], values: dict[str, Any]) -> _Group:
    """Make a group of arguments from the values that are its fields."""
    names = {f.name for f in fields(group) if f.init}
    try:
        return group(**{name: value for name, value in values.items() if name in names})
    except UserError:
        raise
    except (ArithmeticError, ValueError, TypeError, ImportError, OSError, RuntimeError) as error:  # TrainingArguments
        raise UserError(str(error)) from error


# ------------------------------------------------------------------------------------------------- flags and YAML files


def pop_flag(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Remove a flag and its value from arguments, `--flag VALUE` or `--flag=VALUE`: (value or None, the rest).

    Raises:
        UserError: the flag has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, dest="value")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return options.value, rest


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a recipe as they are written.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_YAML_BYTES + 1)
        _check_yaml(text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); see {RECIPES.name}/") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date or number that cannot be
        raise UserError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a recipe is a list of lines `field: value`")
    for name in ("config", "help", "trial"):
        if name in content:
            raise UserError(f"--config {path}: a recipe has no field {name}")
    return content


def _check_yaml(text: bytes) -> None:
    """Refuse what no recipe needs and what could take forever or all memory, from the parser's events alone.

    Raises:
        ValueError: a file too large, aliases, which grow exponentially when they are expanded, or deep nesting.
    """
    if len(text) > _MAX_YAML_BYTES:
        raise ValueError(f"larger than {_MAX_YAML_BYTES:,} bytes")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases are not supported (*{event.anchor} in line {event.start_mark.line + 1})")
        if depth > _MAX_YAML_DEPTH:
            raise ValueError(f"nested more than {_MAX_YAML_DEPTH} levels deep (line {event.start_mark.line + 1})")


def to_flags(content: dict[str, Any]) -> list[str]:
    """The fields of a recipe as flags."""
    flags: list[str] = []
    for name, value in content.items():
        if value is False and str(name).endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags
