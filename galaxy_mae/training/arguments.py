"""Arguments as typed dataclasses. Each checks itself when it is made, and names the flag that is wrong."""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainingArguments, ViTMAEConfig, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from galaxy_mae.data.fits import Stretch
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.model.compute import bfloat16_is_fast

# Of frozen features: mean of the patch tokens, class token, both concatenated, means over rings about the center.
POOLINGS = ("mean", "cls", "both", "radial")
MASKINGS = ("random", "light")
LOSS_WEIGHTINGS = ("none", "variance")
BRIGHT_FRACTION = 0.25  # of the patches of an image, which count as bright where masks follow the light
ONLINE_PROBES = ("online_linear_probe_accuracy", "online_knn_accuracy")  # on validation galaxies, during training
TRACKERS = ("wandb", "tensorboard", "trackio", "none")
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # follow the validation metric

_ABOVE_ZERO = (
    *("learning_rate", "base_learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps", "eval_accumulation_steps"),
    *("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"),
)
_NOT_NEGATIVE = (
    *("weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "neftune_noise_alpha", "eval_delay"),
    "dataloader_num_workers",
)
_STRETCH_HELP = {f.name: {"help": f.metadata["help"]} for f in fields(Stretch)}
# What optimizers and schedulers raise for options that they cannot take.
_OPTION_ERRORS = (ArithmeticError, AttributeError, ImportError, RuntimeError, TypeError, ValueError)


@dataclass
class DataArguments:
    """Which galaxies are used, and how they are split."""

    dataset: str = field(
        default="galaxy10",
        metadata={
            "help": "galaxy10; synthetic or synthetic:COUNT; an HDF5 file in Galaxy10's schema; a Parquet file; a CSV "
            "or FITS table with a column of image paths; a HATS catalogue; a folder of Parquet files, of images or of "
            "FITS cut-outs; or "
            "a dataset's id on the Hugging Face Hub"
        },
    )
    split_seed: int = field(default=0, metadata={"help": "selects training, validation and test set"})
    fits_bands: list[int] | None = field(default=None, metadata=_STRETCH_HELP["fits_bands"])
    lupton_scales: list[float] = field(
        default_factory=lambda: list(Stretch.lupton_scales), metadata=_STRETCH_HELP["lupton_scales"]
    )
    lupton_minimum: float = field(default=Stretch.lupton_minimum, metadata=_STRETCH_HELP["lupton_minimum"])
    lupton_stretch: float = field(default=Stretch.lupton_stretch, metadata=_STRETCH_HELP["lupton_stretch"])
    lupton_q: float = field(default=Stretch.lupton_q, metadata=_STRETCH_HELP["lupton_q"])
    asinh_a: float = field(default=Stretch.asinh_a, metadata=_STRETCH_HELP["asinh_a"])
    asinh_percentile: float = field(default=Stretch.asinh_percentile, metadata=_STRETCH_HELP["asinh_percentile"])

    def __post_init__(self):
        _check_seed("split_seed", self.split_seed)
        Stretch.from_options(self)

    @property
    def stretch(self) -> Stretch:
        """How FITS cut-outs become images of 8 bits."""
        return Stretch.from_options(self)


@dataclass
class GalaxyArguments(DataArguments):
    """The galaxies, and how they are cropped and scaled."""

    _argument_group_name = "galaxies"

    image_size: int = field(
        default=256, metadata={"help": "image width in pixels; larger images are downsampled to it by area averaging"}
    )
    min_crop_scale: float = field(
        default=0.2, metadata={"help": "smallest area of a random resized crop, as a fraction of the image"}
    )
    stream: bool | None = field(
        default=None,
        metadata={
            "help": "read the shards of a HATS catalogue or of a folder of Parquet files in every epoch, in place of "
            "caching all decoded images; default: where these would not fit on the cache's disk"
        },
    )
    stream_buffer: int | None = field(
        default=None,
        metadata={"help": "with --stream, galaxies in the shuffle buffer, encoded, over all processes; default: 8192"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.stream_buffer is not None and self.stream_buffer < 1:
            raise UserError(f"--stream_buffer {self.stream_buffer}: it must be at least 1")
        _check_fraction("min_crop_scale", self.min_crop_scale)
        if not 1 <= self.image_size <= 4096:
            raise UserError(f"--image_size {self.image_size}: it must be between 1 and 4096")


@dataclass
class ModelArguments:
    """The masked autoencoder. `model.mae.validate_config` checks the sizes, together with the image size."""

    _argument_group_name = "masked autoencoder"

    hidden_size: int = field(default=384, metadata={"help": "hidden size of the encoder"})
    num_hidden_layers: int = field(default=12, metadata={"help": "layers of the encoder"})
    num_attention_heads: int = field(default=6, metadata={"help": "attention heads of the encoder"})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "MLP size of the encoder; default: 4 x hidden size"}
    )
    patch_size: int = field(default=16, metadata={"help": "patch width in pixels"})
    mask_ratio: float = field(default=0.75, metadata={"help": "fraction of the patches that are masked"})
    norm_pix_loss: bool = field(
        default=False, metadata={"help": "predict each patch normalized by its own mean and std"}
    )
    decoder_hidden_size: int = field(default=512, metadata={"help": "hidden size of the decoder"})
    decoder_num_hidden_layers: int = field(default=4, metadata={"help": "layers of the decoder"})
    decoder_num_attention_heads: int | None = field(
        default=None, metadata={"help": "attention heads of the decoder; default: hidden size / 32"}
    )
    decoder_intermediate_size: int | None = field(
        default=None, metadata={"help": "MLP size of the decoder; default: 4 x hidden size"}
    )

    def config(self, image_size: int) -> ViTMAEConfig:
        """The model's configuration, with the sizes that follow from the hidden sizes."""
        sizes = asdict(self)
        defaults = {
            "intermediate_size": 4 * self.hidden_size,
            "decoder_intermediate_size": 4 * self.decoder_hidden_size,
            "decoder_num_attention_heads": max(1, self.decoder_hidden_size // 32),
        }
        sizes |= {name: default for name, default in defaults.items() if sizes[name] is None}
        return ViTMAEConfig(image_size=image_size, layer_norm_eps=1e-6, **sizes)


@dataclass
class ObjectiveArguments:
    """Which patches are masked, and how much their errors count. The model stays the stock class."""

    _argument_group_name = "objective"

    masking: str = field(
        default="random",
        metadata={
            "help": "random patches; or light: the same number of the quarter of the patches with the largest variance "
            "in every image, at random among them"
        },
    )
    bright_mask_ratio: float | None = field(
        default=None,
        metadata={"help": "with --masking light, fraction of that quarter that is masked; default: --mask_ratio"},
    )
    loss_weighting: str = field(
        default="none",
        metadata={"help": "weight of a masked patch in the training loss: none, or the variance of its pixels"},
    )

    def __post_init__(self):
        for name, known in (("masking", MASKINGS), ("loss_weighting", LOSS_WEIGHTINGS)):
            _check_one_of(name, getattr(self, name), known)
        if self.bright_mask_ratio is not None and self.masking != "light":
            raise UserError(f"--bright_mask_ratio {self.bright_mask_ratio}: it needs --masking light")

    def not_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults. A run that is older than the fields has none of them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def patch_counts(self, num_patches: int, mask_ratio: float) -> tuple[int, int, int]:
        """How many patches of an image are bright, and how many of these, and of the others, stay visible.

        Raises:
            UserError: the ratio of the bright patches is impossible, or impossible together with that of all.
        """
        ratio = mask_ratio if self.bright_mask_ratio is None else self.bright_mask_ratio
        if not 0 <= ratio <= 1:
            raise UserError(f"--bright_mask_ratio {ratio}: it must be between 0 and 1")
        visible, bright = int(num_patches * (1 - mask_ratio)), round(BRIGHT_FRACTION * num_patches)
        visible_bright = round(bright * (1 - ratio))
        if not 0 <= visible - visible_bright <= num_patches - bright:
            raise UserError(
                f"--bright_mask_ratio {ratio}: {visible} of {num_patches} patches are visible, and {visible_bright} of "
                f"{bright} bright ones cannot be; change it or --mask_ratio"
            )
        return bright, visible_bright, visible - visible_bright


@dataclass
class _TrainingArguments(TrainingArguments):
    """What pre-training and fine-tuning share: TrainingArguments with other defaults, and defaults by device.

    A field without help is not shown by `--help`. None means: chosen in `__post_init__`, by the device.
    """

    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of matrices; vectors have none"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm; 0: no clipping"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    logging_steps: float = field(default=10, metadata={"help": "log every this many steps"})
    report_to: list[str] | str | None = field(
        default="wandb", metadata={"help": "where to log: wandb, tensorboard, trackio, none", "nargs": "+"}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "train in bfloat16 mixed precision; default: if the device is fast at it"}
    )
    torch_compile: bool | None = field(default=None, metadata={"help": "compile the model; default: on CUDA"})
    disable_tqdm: bool | None = None
    ddp_find_unused_parameters: bool | None = None

    def __post_init__(self):
        self._check_values()
        if self.ddp_backend and "LOCAL_RANK" not in os.environ:
            raise UserError(f"--ddp_backend {self.ddp_backend}: it is for several processes, which torchrun starts")
        gpu = not self.use_cpu and (torch.cuda.is_available() or torch.backends.mps.is_available())
        cuda = gpu and torch.cuda.is_available()
        self.use_cpu = not gpu
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bfloat16_is_fast(self.use_cpu)
        if self.torch_compile is None:
            self.torch_compile = cuda
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # in a log file, every update of a bar would be a line
        self.dataloader_pin_memory = self.dataloader_pin_memory and cuda
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter is used in every step
        self.remove_unused_columns = False  # the loader carries sample indices
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run
        super().__post_init__()
        self._check()
        if self.lr_scheduler_type in METRIC_SCHEDULES and self.greater_is_better:
            self.lr_scheduler_kwargs = {"mode": "max"} | (self.lr_scheduler_kwargs or {})
        for callback in get_reporting_integration_callbacks(self.report_to):
            callback()  # fails now, in one line, if its package is missing

    def check_gpus(self) -> None:
        """Raise a `UserError` if one process sees several GPUs: the Trainer would use DataParallel."""
        if self.n_gpu > 1:
            raise UserError(
                f"one process sees {self.n_gpu} GPUs: select one with CUDA_VISIBLE_DEVICES=0, or pre-train on all with "
                f"torchrun --nproc_per_node {self.n_gpu} main.py"
            )

    def check_optimizer(self) -> None:
        """Build the optimizer and the schedule for one parameter, once the learning rate is known.

        Raises:
            UserError: a package that is missing, an option that is malformed, unknown or without effect.
        """
        optimizer = self._check_optimizer()
        kwargs, flags = self.lr_scheduler_kwargs or {}, f"--lr_scheduler_type {self.lr_scheduler_type.value}"
        if kwargs:
            flags += f" --lr_scheduler_kwargs '{json.dumps(kwargs)}'"
        if kwargs and self.lr_scheduler_type in ("constant", "constant_with_warmup"):
            raise UserError(f"{flags}: this schedule takes no arguments")
        steps = max(self.max_steps, 1000 + int(self.warmup_steps))
        warmup = self.get_warmup_steps(steps)
        try:
            schedule = get_scheduler(self.lr_scheduler_type, optimizer, warmup, steps, kwargs)
            factors = [f(step) for f in getattr(schedule, "lr_lambdas", []) for step in (warmup, steps // 2, steps)]
        except _OPTION_ERRORS as error:
            raise UserError(f"{flags}: {first_line(error)}") from error
        if not all(0 <= factor < math.inf for factor in factors):
            raise UserError(f"{flags}: the learning rate becomes negative or is not finite")

    def _check_optimizer(self) -> torch.optim.Optimizer:
        flags = f"--optim {self.optim.value}" + (f" --optim_args {self.optim_args}" if self.optim_args else "")
        if re.match("galore|apollo|.*lomo", self.optim.value):
            raise UserError(f"{flags}: it makes its own parameter groups, without the weight decay of the recipe")
        if any(pair.count("=") != 1 for pair in self._optim_args):
            raise UserError(f"{flags}: --optim_args must be NAME=VALUE,NAME=VALUE,...")
        try:
            optimizer, options = Trainer.get_optimizer_cls_and_kwargs(self)
            ignored = self._ignored_optim_args()
            built = optimizer([nn.Parameter(torch.zeros(2, 2))], **options)
        except _OPTION_ERRORS as error:
            raise UserError(f"{flags}: {first_line(error)}") from error
        if ignored:
            raise UserError(f"{flags}: this optimizer does not read {', '.join(ignored)}")
        return built

    @property
    def _optim_args(self) -> list[str]:
        """The pairs NAME=VALUE of `--optim_args`, as the Trainer divides them."""
        return self.optim_args.replace(" ", "").split(",") if self.optim_args else []

    def _ignored_optim_args(self) -> list[str]:
        """Names in `--optim_args` that the optimizer does not read: even an absurd value makes no difference."""
        names = [pair.split("=")[0] for pair in self._optim_args]
        return [name for name in names if self._optimizer_options([]) == self._optimizer_options([f"{name}=?"])]

    def _optimizer_options(self, pairs: list[str]) -> dict[str, Any] | None:
        """The optimizer's options with these `--optim_args`; None if they cannot be read."""
        arguments = copy.copy(self)
        arguments.optim_args = ",".join(pairs)
        try:
            return Trainer.get_optimizer_cls_and_kwargs(arguments)[1]
        except _OPTION_ERRORS:
            return None

    def _check_values(self) -> None:
        """What TrainingArguments itself would change, or answer without the name of the flag."""
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} {value}: it must be a finite number")
        for name in _ABOVE_ZERO:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)}: it must be above 0")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: it must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least 0 and below 1")
        if not 1 <= self.batch_size <= 2**20:
            raise UserError(f"--batch_size {self.batch_size}: it must be between 1 and {2**20}")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise UserError("--num_train_epochs or --max_steps must be above 0")
        _check_seed("seed", self.seed)
        _check_seed("data_seed", self.data_seed)
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for tracker in trackers:
            if tracker not in TRACKERS:
                raise UserError(f"--report_to: {tracker} is not supported; choose from {', '.join(TRACKERS)}")
        if isinstance(self.lr_scheduler_kwargs, str):
            self.lr_scheduler_kwargs = _json_object("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        self._check_compiler()

    def _check_compiler(self) -> None:
        if self.torch_compile_backend:
            known = {name for name in torch.compiler.list_backends(None) if name.upper() in DynamoBackend.list()}
            _check_one_of("torch_compile_backend", self.torch_compile_backend, known)
        if self.torch_compile_mode:
            from torch._inductor import list_mode_options  # slow to import

            _check_one_of("torch_compile_mode", self.torch_compile_mode, list_mode_options())

    def _check(self) -> None:
        """What depends on the device, or on several fields."""
        if not self.output_dir:
            raise UserError("--output_dir: give the name of a folder")
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16: float16 needs a GPU; --bf16 also works on a CPU")
        self._check_best_model()

    def _check_best_model(self) -> None:
        best = "--load_best_model_at_end" if self.load_best_model_at_end else "--save_strategy best"
        wanted = self.load_best_model_at_end or self.save_strategy == SaveStrategy.BEST
        if wanted and self.eval_strategy == IntervalStrategy.NO:
            raise UserError(f"{best} needs evaluations: --eval_strategy steps or epoch")
        steps = (self.eval_strategy, self.save_strategy) == (IntervalStrategy.STEPS, SaveStrategy.STEPS)
        if self.load_best_model_at_end and steps and self.eval_steps != self.save_steps:
            raise UserError(
                f"--load_best_model_at_end needs a checkpoint of every evaluation: --eval_steps {self.eval_steps} and "
                f"--save_steps {self.save_steps} must be equal"
            )


@dataclass
class PretrainingArguments(_TrainingArguments):
    """The pre-training: fields of its own, and fields of TrainingArguments with other defaults."""

    _argument_group_name = "training"

    output_dir: str | None = field(default="runs/galaxy10", metadata={"help": "folder of the run"})
    batch_size: int = field(
        default=512,
        metadata={
            "help": "global batch size, over all devices; split into micro-batches that fit a device. "
            "--per_device_train_batch_size and --gradient_accumulation_steps take its place if set"
        },
    )
    base_learning_rate: float = field(
        default=1.5e-4,
        metadata={"help": "learning rate at batch size 256, scaled by batch size / 256; --learning_rate overrides it"},
    )
    num_train_epochs: float = field(default=400, metadata={"help": "passes over the training set"})
    max_steps: int = field(default=-1, metadata={"help": "number of steps, instead of epochs"})
    adam_beta2: float = field(
        default=0.95, metadata={"help": "decay rate of AdamW's second moment; --adam_beta1 is 0.9"}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "warm-up steps, or their fraction if below 1"})
    seed: int = field(default=0, metadata={"help": "seed of weights, masks, augmentation and sample order"})
    reconstruct_every: float = field(
        default=20, metadata={"help": "epochs between figures of reconstructions, at evaluations; 0: none"}
    )
    probe_every: float = field(
        default=20,
        metadata={
            "help": "epochs between probes of the frozen features (k-NN and linear, on validation galaxies), at "
            "evaluations; 0: none, unless --metric_for_best_model is one of them"
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate on the validation set"})
    eval_on_start: bool = field(default=True, metadata={"help": "evaluate before the first step"})
    eval_steps: float | None = field(
        default=0.05, metadata={"help": "steps between evaluations, or their fraction if below 1"}
    )
    save_steps: float = field(
        default=0.05, metadata={"help": "steps between checkpoints, or their fraction if below 1"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})

    def __post_init__(self):
        self.label_names = ["index"]  # in the loader's batches: makes the Trainer compute a validation loss
        if self.metric_for_best_model is None and self.save_strategy == SaveStrategy.BEST:
            self.metric_for_best_model = "loss"  # as the Trainer does for `load_best_model_at_end`
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in ("loss", *ONLINE_PROBES):
            raise UserError(f"--metric_for_best_model {metric}: not one of loss, {', '.join(ONLINE_PROBES)}")
        if self.greater_is_better is None and metric and metric.removeprefix("eval_") in ONLINE_PROBES:
            self.greater_is_better = True
        super().__post_init__()
        if not self.reconstruct_every >= 0:
            raise UserError(f"--reconstruct_every {self.reconstruct_every}: it must not be negative")
        if not self.probe_every >= 0:
            raise UserError(f"--probe_every {self.probe_every}: it must not be negative")


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
            "help": "a method's name or index in the table below; default: $SLURM_ARRAY_TASK_ID, or all of them "
            "outside of an array"
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={"help": "only train this network from scratch, as fine-tuning does; the networks are below"},
    )
    seeds: int = field(
        default=3, metadata={"help": "number of random encoders, and of fine-tuning runs per initialization"}
    )
    pooling: str = field(
        default="mean",
        metadata={
            "help": "frozen features: mean of the patch tokens, cls, both, or radial, means over rings about the center"
        },
    )
    orientations: bool = field(
        default=True,
        metadata={
            "help": "also probe features over sixteen orientations of every image, which takes sixteen more forward "
            "passes"
        },
    )
    label_fractions: list[float] | None = field(
        default=None,
        metadata={"help": "also train linear probes and fine-tune on these fractions of the training labels"},
    )
    transfer: str | None = field(
        default=None,
        metadata={"help": "a second labelled dataset, on which few labels are also probed; values as for --dataset"},
    )
    report: bool = field(default=False, metadata={"help": "only write the report of the results that exist"})
    rerun: bool = field(default=False, metadata={"help": "run finished methods again"})
    allow_seen: bool = field(
        default=False,
        metadata={"help": "evaluate although test galaxies were used in pre-training; the report tells"},
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.encoder and not self.report:
            raise UserError("--encoder: give a run of main.py, an encoder's folder or a Hub id")
        if self.baseline and self.method:
            raise UserError(f"--baseline {self.baseline}: it is a method of its own; give it without --method")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: it must be at least 1")
        if self.pooling not in POOLINGS:
            raise UserError(f"--pooling {self.pooling}: choose one of {', '.join(POOLINGS)}")
        for fraction in self.label_fractions or []:
            _check_fraction("label_fractions", fraction)


@dataclass
class FineTuningArguments(_TrainingArguments):
    """The fine-tuning: fields of its own, and fields of TrainingArguments with other defaults."""

    _argument_group_name = "fine-tuning"

    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the results; default: results/NAME, with the encoder's name"}
    )
    batch_size: int = field(default=128, metadata={"help": "global batch size"})
    base_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "learning rate of the head at batch size 256, scaled by batch size / 256; or give --learning_rate"
        },
    )
    layer_decay: float = field(
        default=0.75, metadata={"help": "factor between the learning rates of a layer and the layer above it"}
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "fraction of a target spread over all classes"})
    mixup: float = field(default=0.2, metadata={"help": "alpha of mixup's Beta distribution; 0: no mixup"})
    min_crop_scale: float = field(
        default=0.8, metadata={"help": "smallest area of a random resized crop, as a fraction of the image"}
    )
    num_train_epochs: float = field(default=50, metadata={"help": "passes over the training set"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps, or their fraction if below 1"})
    seed: int = field(default=0, metadata={"help": "the first seed"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate on the validation set"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep besides the best"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the best epoch"})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "metric on the validation set"})

    def __post_init__(self):
        self.label_names = ["labels"]
        super().__post_init__()
        _check_fraction("layer_decay", self.layer_decay)
        _check_fraction("min_crop_scale", self.min_crop_scale)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label_smoothing {self.label_smoothing}: it must be at least 0 and below 1")
        if not self.mixup >= 0:
            raise UserError(f"--mixup {self.mixup}: it must not be negative")


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        raise UserError(f"--{name} {text}: it must be JSON, as in '{{\"num_cycles\": 2}}' ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"--{name} {text}: it must be a JSON object, as in '{{\"num_cycles\": 2}}'")
    return value


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _check_one_of(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"--{name} {value}: not one of {', '.join(sorted(known))}")


def _check_seed(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value < 2**32:
        raise UserError(f"--{name} {value}: it must be between 0 and 2**32 - 1")


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"--{name} {value}: it must be above 0 and at most 1")
