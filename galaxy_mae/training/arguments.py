"""Arguments as typed dataclasses. Each checks itself when it is made, and names the flag that is wrong."""

import sys
from dataclasses import asdict, dataclass, field

import torch
from transformers import TrainingArguments, ViTMAEConfig
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from galaxy_mae.errors import UserError
from galaxy_mae.model.compute import bfloat16_is_fast

POOLINGS = ("mean", "cls", "both")  # of frozen features: mean of the patch tokens, class token, both concatenated


@dataclass
class DataArguments:
    """Which galaxies are used, and how they are split."""

    dataset: str = field(
        default="galaxy10",
        metadata={
            "help": "galaxy10; synthetic or synthetic:COUNT; an HDF5 file in Galaxy10's schema; a Parquet file; a "
            "folder of Parquet files or of images; or a dataset's id on the Hugging Face Hub"
        },
    )
    split_seed: int = field(default=0, metadata={"help": "selects training, validation and test set"})

    def __post_init__(self):
        _check_seed("split_seed", self.split_seed)


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

    def __post_init__(self):
        super().__post_init__()
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
        default=False, metadata={"help": "predict each patch normalized by its own mean and standard deviation"}
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
        sizes["intermediate_size"] = self.intermediate_size or 4 * self.hidden_size
        sizes["decoder_intermediate_size"] = self.decoder_intermediate_size or 4 * self.decoder_hidden_size
        heads = max(1, self.decoder_hidden_size // 32)
        sizes["decoder_num_attention_heads"] = self.decoder_num_attention_heads or heads
        return ViTMAEConfig(image_size=image_size, layer_norm_eps=1e-6, **sizes)


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
        default="wandb", metadata={"help": "where to log: wandb, tensorboard, none", "nargs": "+"}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "train in bfloat16 mixed precision; default: if the device is fast at it"}
    )
    torch_compile: bool | None = field(default=None, metadata={"help": "compile the model; default: on CUDA"})
    disable_tqdm: bool | None = None
    ddp_find_unused_parameters: bool | None = None

    def __post_init__(self):
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
        for callback in get_reporting_integration_callbacks(self.report_to):
            callback()  # fails now, in one line, if its package is missing

    def check_gpus(self) -> None:
        """Raise a `UserError` if one process sees several GPUs: the Trainer would use DataParallel."""
        if self.n_gpu > 1:
            raise UserError(
                f"one process sees {self.n_gpu} GPUs: select one with CUDA_VISIBLE_DEVICES=0, or pre-train on all with "
                f"torchrun --nproc_per_node {self.n_gpu} main.py"
            )

    def _check(self) -> None:
        if not self.output_dir:
            raise UserError("--output_dir: give the name of a folder")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: it must be at least 1")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise UserError("--num_train_epochs or --max_steps must be above 0")
        positive = ("learning_rate", "base_learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*positive, "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if not getattr(self, name) > 0:  # also refuses NaN
                raise UserError(f"--{name} {getattr(self, name)}: it must be above 0")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: it must not be negative")
        if self.eval_steps is not None and not self.eval_steps > 0:
            raise UserError(f"--eval_steps {self.eval_steps}: it must be above 0")
        steps = (self.eval_strategy, self.save_strategy) == (IntervalStrategy.STEPS, SaveStrategy.STEPS)
        if self.load_best_model_at_end and steps and self.eval_steps != self.save_steps:
            raise UserError(
                f"--load_best_model_at_end needs a checkpoint of every evaluation: --eval_steps {self.eval_steps} and "
                f"--save_steps {self.save_steps} must be equal"
            )
        _check_seed("seed", self.seed)
        _check_seed("data_seed", self.data_seed)


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
        super().__post_init__()
        if not self.reconstruct_every >= 0:
            raise UserError(f"--reconstruct_every {self.reconstruct_every}: it must not be negative")


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
            "random_fine_tune, 4 ssl_fine_tune; default: $SLURM_ARRAY_TASK_ID, or all five outside of an array"
        },
    )
    seeds: int = field(
        default=3, metadata={"help": "number of random encoders, and of fine-tuning runs per initialization"}
    )
    pooling: str = field(default="mean", metadata={"help": "frozen features: mean of the patch tokens, cls, or both"})
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
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: it must be at least 1")
        if self.pooling not in POOLINGS:
            raise UserError(f"--pooling {self.pooling}: choose one of {', '.join(POOLINGS)}")


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


def _check_seed(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value < 2**32:
        raise UserError(f"--{name} {value}: it must be between 0 and 2**32 - 1")


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"--{name} {value}: it must be above 0 and at most 1")
