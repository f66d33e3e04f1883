"""Arguments: a YAML recipe and flags over it, as typed dataclasses.

A recipe is a flat YAML file of the same names that the flags have. It is turned into flags and read by the same
parser, so that types and choices are checked once, by `HfArgumentParser`, and a later flag overrides the recipe.
Every field of transformers' `TrainingArguments` is a flag and a recipe field as well.
"""

import argparse
import difflib
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, ViTMAEConfig
from transformers.integrations import get_reporting_integration_callbacks

from galaxy_mae.errors import UserError

POOLINGS = ("mean", "cls", "both")  # of frozen features: mean of the patch tokens, class token, both
RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# What defines the result of a run, besides the data and the model. A folder goes on with one recipe only.
RESULT_FIELDS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "seed", "data_seed", "bf16", "fp16"),
    *("lr_scheduler_kwargs", "optim_args", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


@dataclass
class DataArguments:
    """Which galaxies."""

    dataset: str = field(
        default="galaxy10",
        metadata={
            "help": "galaxy10; synthetic or synthetic:COUNT; an HDF5 file in Galaxy10's schema; a Parquet file; a "
            "folder of Parquet files or of images; or a dataset's id on the Hugging Face Hub"
        },
    )
    split_seed: int = field(default=0, metadata={"help": "chooses training, validation and test rows"})


@dataclass
class GalaxyArguments(DataArguments):
    """Which galaxies, and how they are seen."""

    _argument_group_name = "galaxies"

    image_size: int = field(
        default=256, metadata={"help": "pixels across; images that are larger are area-averaged to it"}
    )
    smallest_crop: float = field(
        default=0.2, metadata={"help": "least share of the image's area that a random resized crop takes"}
    )


@dataclass
class ModelArguments:
    """The masked autoencoder."""

    _argument_group_name = "masked autoencoder"

    hidden_size: int = field(default=384, metadata={"help": "the encoder's width"})
    num_hidden_layers: int = field(default=12, metadata={"help": "the encoder's layers"})
    num_attention_heads: int = field(default=6, metadata={"help": "the encoder's attention heads"})
    intermediate_size: int | None = field(default=None, metadata={"help": "the encoder's MLP; 4 widths if not given"})
    patch_size: int = field(default=16, metadata={"help": "pixels across a patch"})
    mask_ratio: float = field(default=0.75, metadata={"help": "share of the patches that the encoder does not see"})
    norm_pix_loss: bool = field(
        default=False, metadata={"help": "predict each patch normalised by its own mean and deviation"}
    )
    decoder_hidden_size: int = field(default=512, metadata={"help": "the decoder's width"})
    decoder_num_hidden_layers: int = field(default=4, metadata={"help": "the decoder's layers"})
    decoder_num_attention_heads: int | None = field(
        default=None, metadata={"help": "the decoder's attention heads; width / 32 if not given"}
    )
    decoder_intermediate_size: int | None = field(
        default=None, metadata={"help": "the decoder's MLP; 4 widths if not given"}
    )

    def config(self, image_size: int) -> ViTMAEConfig:
        """The model's configuration, with what follows from the widths filled in."""
        sizes = asdict(self)
        sizes["intermediate_size"] = self.intermediate_size or 4 * self.hidden_size
        sizes["decoder_intermediate_size"] = self.decoder_intermediate_size or 4 * self.decoder_hidden_size
        heads = max(1, self.decoder_hidden_size // 32)
        sizes["decoder_num_attention_heads"] = self.decoder_num_attention_heads or heads
        return ViTMAEConfig(image_size=image_size, layer_norm_eps=1e-6, **sizes)


@dataclass
class PretrainingArguments(TrainingArguments):
    """The training: our own fields, and the fields of TrainingArguments whose defaults differ here."""

    _argument_group_name = "training"

    output_dir: str | None = field(default="runs/galaxy10", metadata={"help": "the run's folder"})
    batch_size: int = field(
        default=512,
        metadata={
            "help": "galaxies a step, over all devices; split into what a device holds. --per_device_train_batch_size, "
            "--gradient_accumulation_steps take its place if given"
        },
    )
    base_learning_rate: float = field(
        default=1.5e-4,
        metadata={"help": "learning rate at batch 256, scaled by batch/256; --learning_rate takes its place if given"},
    )
    num_train_epochs: float = field(default=400, metadata={"help": "passes over the training rows"})
    max_steps: int = field(default=-1, metadata={"help": "stop after this many steps instead"})
    weight_decay: float = field(default=0.05, metadata={"help": "on weight matrices only"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second momentum; --adam_beta1 is 0.9"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm; 0 does not clip"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps of warm-up, or their share if below 1"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    seed: int = field(default=0, metadata={"help": "of weights, masks, augmentation and order"})
    reconstruct_every: float = field(
        default=20, metadata={"help": "draw reconstructions at evaluations this many epochs apart; 0 never"}
    )
    report_to: list[str] | str | None = field(
        default="wandb", metadata={"help": "where to log: wandb, tensorboard, none", "nargs": "+"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate on the validation rows"})
    eval_steps: float | None = field(default=0.05, metadata={"help": "steps between evaluations, or share if below 1"})
    save_steps: float = field(default=0.05, metadata={"help": "steps between checkpoints, or share if below 1"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})


@dataclass
class EvaluationArguments(DataArguments):
    """What is evaluated, on which galaxies, and how."""

    _argument_group_name = "evaluation"

    encoder: str | None = field(
        default=None, metadata={"help": "a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub"}
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": "a method's name or index: 0 zero_shot, 1 random_linear_probe, 2 ssl_linear_probe, 3 "
            "random_fine_tune, 4 ssl_fine_tune; if not given, $SLURM_ARRAY_TASK_ID says it, and without that all run"
        },
    )
    seeds: int = field(default=3, metadata={"help": "random encoders, and fine-tunings of each arm"})
    pooling: str = field(default="mean", metadata={"help": "frozen features: mean of the patch tokens, cls, or both"})
    report: bool = field(default=False, metadata={"help": "only read the results there and write the report"})
    rerun: bool = field(default=False, metadata={"help": "run methods again that are finished"})


@dataclass
class FineTuningArguments(TrainingArguments):
    """The fine-tuning: our own fields, and the fields of TrainingArguments whose defaults differ here."""

    _argument_group_name = "fine-tuning"

    output_dir: str | None = field(
        default=None, metadata={"help": "the results' folder; results/NAME of the encoder if not given"}
    )
    batch_size: int = field(default=128, metadata={"help": "galaxies a step, over all devices"})
    base_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "of the head, at batch 256, scaled by batch/256; --learning_rate takes its place if given"},
    )
    layer_decay: float = field(
        default=0.75, metadata={"help": "the learning rate falls by this factor from each layer to the one below"}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "share of a target spread over all classes"})
    mixup: float = field(default=0.2, metadata={"help": "alpha of the Beta that blends pairs of images; 0 does not"})
    smallest_crop: float = field(
        default=0.8, metadata={"help": "least share of the image's area that a random resized crop takes"}
    )
    num_train_epochs: float = field(default=50, metadata={"help": "passes over the training rows"})
    weight_decay: float = field(default=0.05, metadata={"help": "on weight matrices only"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm; 0 does not clip"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps of warm-up, or their share if below 1"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    seed: int = field(default=0, metadata={"help": "the first of the seeds"})
    report_to: list[str] | str | None = field(
        default="wandb", metadata={"help": "where to log: wandb, tensorboard, none", "nargs": "+"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to look at the validation rows"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to write a checkpoint"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep besides the best"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the best epoch"})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "on validation rows"})


# Fields of TrainingArguments that this data path fixes: naming them is an error instead of a silent no.
_FIXED = {
    "remove_unused_columns": "the loader carries row numbers",
    "label_names": "the loader carries row numbers",
    "dataloader_drop_last": "every step takes a whole batch",
    "train_sampling_strategy": "the order of the rows is a function of the seed and the epoch",
    "auto_find_batch_size": "the batch is part of the recipe",
    "ignore_data_skip": "a resumed run sees what the uninterrupted one would have",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "save_only_model": "a checkpoint without the optimiser cannot be resumed",
    "push_to_hub": "upload the finished folder with huggingface_hub instead",
    "resume_from_checkpoint": "a run goes on by itself: type the same command again",
}
_FIXED_IN_EVALUATION = _FIXED | dict.fromkeys(
    ("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    "the epoch with the best accuracy on validation rows is kept",
)
_FIXED_IN_EVALUATION |= {
    "max_steps": "--num_train_epochs says how long to fine-tune",
    "label_smoothing_factor": "use --label_smoothing, which knows mixup",
}


@dataclass(frozen=True)
class _Command:
    """What differs between the two scripts' arguments."""

    program: str
    default_recipe: Path
    groups: tuple[type, ...]
    fixed: dict[str, str]
    description: str


_PRETRAINING = _Command(
    "main.py",
    RECIPES / "galaxy10.yaml",
    (GalaxyArguments, ModelArguments, PretrainingArguments),
    _FIXED,
    "Pre-train a masked autoencoder on galaxy images. The recipe (default: recipes/galaxy10.yaml) sets the fields; "
    "flags override it. Typing the same command again goes on where a run stopped.",
)
_EVALUATION = _Command(
    "linear_probe_checkpoints.py",
    RECIPES / "evaluation.yaml",
    (EvaluationArguments, FineTuningArguments),
    _FIXED_IN_EVALUATION,
    "Evaluate an encoder by five methods. The recipe (default: recipes/evaluation.yaml) sets the fields; flags "
    "override it. Finished methods are not run again, interrupted ones go on.",
)


@dataclass
class Recipe:
    """All that a run was asked for. `given` names what the recipe file or a flag set."""

    galaxies: GalaxyArguments
    model: ModelArguments
    training: PretrainingArguments
    given: set[str]

    def as_dict(self) -> dict[str, Any]:
        """What defines the result: compared when a run goes on, and kept beside the weights."""
        training = self.training.to_dict()
        return {
            **asdict(self.galaxies),
            **asdict(self.model),
            "batch_size": total_batch_size(self.training),
            **{name: training[name] for name in RESULT_FIELDS},
        }


@dataclass
class EvaluationRecipe:
    """All that an evaluation was asked for. `given` names what the recipe file or a flag set."""

    evaluation: EvaluationArguments
    training: FineTuningArguments
    given: set[str]

    def as_dict(self) -> dict[str, Any]:
        """What defines the results: compared when methods are added to a folder, and kept in each result."""
        training = self.training.to_dict()
        names = ("batch_size", "layer_decay", "label_smoothing", "mixup", "smallest_crop", *RESULT_FIELDS)
        unwanted = {"bf16", "fp16", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "max_steps"}
        return {
            "split_seed": self.evaluation.split_seed,
            "seeds": self.evaluation.seeds,
            "pooling": self.evaluation.pooling,
            **{name: training[name] for name in names if name not in unwanted},
        }


def read_recipe(arguments: list[str]) -> Recipe:
    """Read main.py's `--config RECIPE` (default: recipes/galaxy10.yaml) and the flags over it.

    Raises:
        UserError: no such recipe, an unknown field or flag, a value of the wrong type, values that exclude each other.
    """
    given = _read(arguments, _PRETRAINING)
    galaxies, model = (group(**_of(group, given)) for group in _PRETRAINING.groups[:2])
    training = _training(PretrainingArguments, given, label="rows")
    _check_galaxies(galaxies)
    _check_training(training)
    _check_seeds(seed=training.seed, data_seed=training.data_seed, split_seed=galaxies.split_seed)
    if not training.reconstruct_every >= 0:
        raise UserError(f"--reconstruct_every {training.reconstruct_every}: it must not be negative")
    if not training.output_dir:
        raise UserError("--output_dir: give the name of a folder")
    _set_batch(training, given)
    return Recipe(galaxies, model, training, set(given))


def read_evaluation(arguments: list[str]) -> EvaluationRecipe:
    """Read linear_probe_checkpoints.py's `--config RECIPE` (default: recipes/evaluation.yaml) and the flags over it.

    Raises:
        UserError: as `read_recipe`.
    """
    given = _read(arguments, _EVALUATION)
    evaluation = EvaluationArguments(**_of(EvaluationArguments, given))
    if not evaluation.encoder and not (evaluation.report and given.get("output_dir")):
        raise UserError("--encoder: give a run of main.py, an encoder's folder or a Hub id")
    if not given.get("output_dir"):
        given["output_dir"] = str(Path("results", Path(evaluation.encoder).name))
    training = _training(FineTuningArguments, given, label="labels")
    _check_training(training)
    _check_seeds(seed=training.seed, data_seed=training.data_seed, split_seed=evaluation.split_seed)
    if evaluation.seeds < 1:
        raise UserError(f"--seeds {evaluation.seeds}: it must be at least 1")
    if evaluation.pooling not in POOLINGS:
        raise UserError(f"--pooling {evaluation.pooling}: choose one of {', '.join(POOLINGS)}")
    for name in ("layer_decay", "smallest_crop"):
        if not 0 < getattr(training, name) <= 1:
            raise UserError(f"--{name} {getattr(training, name)}: it must lie above 0 and not above 1")
    if not 0 <= training.label_smoothing < 1:
        raise UserError(f"--label_smoothing {training.label_smoothing}: it must lie between 0 and 1")
    if not training.mixup >= 0:
        raise UserError(f"--mixup {training.mixup}: it must not be negative")
    _set_batch(training, given)
    return EvaluationRecipe(evaluation, training, set(given))


def _read(arguments: list[str], command: _Command) -> dict[str, Any]:
    """The fields that the recipe and the flags set, by name."""
    parser = _parser(command)
    named, arguments = take_flag("--config", arguments)
    config = Path(named) if named is not None else command.default_recipe
    given = _parse(parser, field_flags(read_yaml(config)), f"{config}: ")
    flags = _parse(parser, arguments, "")
    given = _later_batch_wins(given, flags) | flags
    for name in sorted(set(given) & set(command.fixed)):
        raise UserError(f"--{name} cannot be chosen here: {command.fixed[name]}")
    return given


def total_batch_size(training: TrainingArguments) -> int:
    """Galaxies in one optimiser step, over all processes, devices and accumulated batches."""
    return training.train_batch_size * training.world_size * training.gradient_accumulation_steps


# --------------------------------------------------------------------------------------------------------- the parser


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ours, and which yields only what was given."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser(command: _Command) -> _Parser:
    parser = _Parser(
        command.groups,
        prog=command.program,
        formatter_class=argparse.HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=f"{command.program} [--config RECIPE] [--FIELD VALUE ...]",
        description=command.description,
        epilog="Every other field of transformers.TrainingArguments is a flag and a recipe field as well (--run_name, "
        "--bf16, --torch_compile, --use_cpu, --dataloader_num_workers, ...): "
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file of these fields, such as recipes/demo.yaml")
    if command is _PRETRAINING:
        parser.add_argument(
            "--cell", metavar="INDEX", help="of a search's recipe, such as recipes/search/mask_ratio.yaml"
        )
    *ours_alone, training = command.groups  # of TrainingArguments' fields the help shows those that differ here
    ours = {f.name for group in ours_alone for f in fields(group)} | set(training.__annotations__)
    ours -= set(command.fixed)
    for action in parser._actions:
        default, action.default = action.default, argparse.SUPPRESS
        if action.dest in ("help", "config", "cell"):
            continue
        if action.dest not in ours:
            action.help = argparse.SUPPRESS
            continue
        action.option_strings = action.option_strings[:1]  # in the help; --batch-size is understood as well
        action.metavar = "VALUE"
        action.help += f" (default: {default})" if default is not None else ""
    return parser


def take_flag(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take a flag and its value out of arguments, `--flag VALUE` or `--flag=VALUE`: (value or None, the rest).

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
    """A recipe's fields as they are written.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); see {RECIPES.name}/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a recipe is a list of lines `field: value`")
    for name in ("config", "help", "cell"):
        if name in content:
            raise UserError(f"--config {path}: a recipe has no field {name}")
    return content


def field_flags(content: dict[str, Any]) -> list[str]:
    """A recipe's fields as the flags that say the same."""
    flags: list[str] = []
    for name, value in content.items():
        if value is False and str(name).endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


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
        meant = f"; did you mean {close[0]}?" if close else "; --help lists what there is"
        raise UserError(f"{where}unknown {kind} {name}{meant}")
    return vars(namespace)


def _of(group: type, given: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(group) if f.init}
    return {name: value for name, value in given.items() if name in names}


# ------------------------------------------------------------------------------------ what follows from what was given


_Training = TypeVar("_Training", PretrainingArguments, FineTuningArguments)


def _training(group: type[_Training], given: dict[str, Any], label: str) -> _Training:
    """TrainingArguments with this project's data path, and the precision that the device is good at.

    Args:
        group: the class to make.
        given: by the recipe and the flags.
        label: what the loader's batches hold that makes the Trainer compute a validation loss.
    """
    use_cpu = given.get("use_cpu", False) or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    automatic: dict[str, Any] = {}
    if not {"bf16", "fp16"} & set(given):
        automatic["bf16"] = _bfloat16_is_fast(use_cpu)
    if "ddp_find_unused_parameters" not in given:
        automatic["ddp_find_unused_parameters"] = False  # every parameter takes part in every step
    if "disable_tqdm" not in given:
        automatic["disable_tqdm"] = not sys.stderr.isatty()  # a bar in a job's log is thousands of lines in one
    if "torch_compile" not in given:
        automatic["torch_compile"] = torch.cuda.is_available() and not use_cpu
    if "dataloader_pin_memory" not in given:
        automatic["dataloader_pin_memory"] = torch.cuda.is_available() and not use_cpu
    fixed = {"remove_unused_columns": False, "label_names": [label], "logging_nan_inf_filter": False}
    try:
        training = group(**_of(group, {**automatic, "use_cpu": use_cpu, **given, **fixed}))
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()  # says now, in one line, that its package is missing
        return training
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _bfloat16_is_fast(use_cpu: bool) -> bool:
    """GPUs from Ampere on; CPUs with AVX512-BF16 or AMX. Elsewhere bfloat16 is emulated and slower than float32."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    if not use_cpu:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _later_batch_wins(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Two ways to say the batch: where a flag uses one, the recipe's other is void; two flags contradict each other."""
    by_device = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if "batch_size" in flags and by_device & set(flags):
        raise UserError("--batch_size and --per_device_train_batch_size or --gradient_accumulation_steps: give one")
    void = by_device if "batch_size" in flags else {"batch_size"} if by_device & set(flags) else set()
    return {name: value for name, value in given.items() if name not in void}


def _check_galaxies(galaxies: GalaxyArguments) -> None:
    if not 0 < galaxies.smallest_crop <= 1:
        raise UserError(f"--smallest_crop {galaxies.smallest_crop}: it must lie above 0 and not above 1")
    if not 1 <= galaxies.image_size <= 4096:
        raise UserError(f"--image_size {galaxies.image_size}: it must lie between 1 and 4096")


def _check_seeds(**seeds: int | None) -> None:
    for name, value in seeds.items():
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"--{name} {value}: it must lie between 0 and 2**32 - 1")


def _check_training(training: PretrainingArguments | FineTuningArguments) -> None:
    if training.batch_size < 1:
        raise UserError(f"--batch_size {training.batch_size}: it must be at least 1")
    if training.max_steps == 0 or (training.max_steps < 0 and not training.num_train_epochs > 0):
        raise UserError("--num_train_epochs or --max_steps must be above 0")
    positive = ("learning_rate", "base_learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size")
    positive += ("gradient_accumulation_steps", "logging_steps", "save_steps")
    for name in positive:
        if not getattr(training, name) > 0:  # also refuses NaN
            raise UserError(f"--{name} {getattr(training, name)}: it must be above 0")
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        if not getattr(training, name) >= 0:
            raise UserError(f"--{name} {getattr(training, name)}: it must not be negative")
    if training.eval_steps is not None and not training.eval_steps > 0:
        raise UserError(f"--eval_steps {training.eval_steps}: it must be above 0")


def _set_batch(training: PretrainingArguments | FineTuningArguments, given: dict[str, Any]) -> None:
    """Fill in the batch of a device, the accumulation and the learning rate."""
    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(given):
        devices = training.world_size * max(1, training.n_gpu)
        each, rest = divmod(training.batch_size, devices)
        if rest or each == 0:
            raise UserError(f"--batch_size {training.batch_size} is no multiple of the {devices} devices: choose one")
        training.per_device_train_batch_size = each  # `fit_batch` splits it further where the device is small
    if "learning_rate" not in given:
        training.learning_rate = training.base_learning_rate * total_batch_size(training) / 256


def fit_batch(training: PretrainingArguments | FineTuningArguments, given: set[str], bytes_per_image: float) -> None:
    """Accumulate where a device cannot hold its share of the batch at once; the batch of a step stays what it was.

    Args:
        training: changed in place, unless the batch of a device was given.
        given: what the recipe or a flag set.
        bytes_per_image: memory of one image's forward and backward pass.
    """
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} & given:
        return
    if training.device.type == "cuda":
        budget = 0.6 * torch.cuda.get_device_properties(training.device).total_memory
    else:
        budget = 1e9  # more does not make a CPU faster
    share = training.per_device_train_batch_size
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    pieces = next((n for n in divisors if share / n * bytes_per_image <= budget), share)
    training.per_device_train_batch_size = share // pieces
    training.gradient_accumulation_steps = pieces
    if "per_device_eval_batch_size" not in given:
        training.per_device_eval_batch_size = training.per_device_train_batch_size


def show_help(arguments: list[str], evaluation: bool = False) -> bool:
    """Print the help if it is asked for."""
    if not {"-h", "--help"} & set(arguments):
        return False
    _parser(_EVALUATION if evaluation else _PRETRAINING).print_help(sys.stdout)
    return True
