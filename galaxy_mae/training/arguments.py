"""Arguments as typed dataclasses, the flags of the two scripts. Each checks itself when it is made, and names the flag.

Of transformers' `TrainingArguments` the fields that are declared here are flags, and no others. `trainer_arguments`
makes the object that the Trainer takes from them. torch and transformers are imported where they are needed: `--help`
does not wait for them.
"""

import math
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from galaxy_mae.data.columns import COLUMNS_HELP, parse_columns
from galaxy_mae.data.fits import STRETCH_HELP, Stretch
from galaxy_mae.data.frame import ARCSEC_HELP, FIT_HELP, Frame
from galaxy_mae.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments, ViTMAEConfig

ONLINE_PROBES = ("online_linear_probe_accuracy", "online_knn_accuracy")  # on validation galaxies, during training
TRACKERS = ("wandb", "tensorboard", "trackio", "none")

# Of the numbers of a training: which may be 0, and which have an upper limit. None may be negative.
_MAY_BE_ZERO = (
    *("weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs"),
    *("dataloader_num_workers", "mixup", "label_smoothing", "reconstruct_every", "probe_every", "seed"),
    "photometric_jitter",
)
_MAXIMUM = {"batch_size": 2**20, "seed": 2**32 - 1, "layer_decay": 1, "min_crop_scale": 1, "photometric_jitter": 1}
_MAXIMUM |= {"adam_beta1": 0.999999, "adam_beta2": 0.999999, "label_smoothing": 0.99}


def flag(default: Any, description: str) -> Any:
    """A field of a dataclass, which `--help` describes."""
    return field(default=default, metadata={"help": description})


@dataclass
class DataArguments:
    """The galaxies, and how their images become squares, `frame`, of 8 bits, `stretch`: the flags of both scripts."""

    dataset: str = flag(
        "galaxy10",
        "galaxy10; synthetic or synthetic:COUNT; an HDF5 file in Galaxy10's schema; a Parquet file; a CSV or FITS "
        "table with a column of image paths; a HATS catalogue; a folder of Parquet files, images or FITS cut-outs; or "
        "a dataset's id on the Hugging Face Hub; an evaluation's default is what the encoder was pre-trained on",
    )
    split_seed: int = flag(0, "selects training, validation and test set")
    stretch: str = flag("auto", STRETCH_HELP)
    fit: str | None = flag(None, FIT_HELP)
    arcsec: float | None = flag(None, ARCSEC_HELP)
    columns: list[str] | None = field(default=None, metadata={"help": COLUMNS_HELP})

    def __post_init__(self):
        _check_number("split_seed", self.split_seed, 2**32 - 1, zero=True)
        Stretch.named(self.stretch)
        self.frame = Frame.chosen(self.fit, self.arcsec)
        parse_columns(self.columns or ())


@dataclass
class GalaxyArguments(DataArguments):
    """The galaxies, and how they are cropped and scaled."""

    _argument_group_name = "galaxies"

    image_size: int = flag(256, "image width in pixels; larger images are averaged over areas, smaller ones enlarged")
    min_crop_scale: float = flag(0.2, "smallest area of a random resized crop, as a fraction of the image")
    unlabelled: list[str] | None = field(
        default=None,
        metadata={"help": "more data sets to pre-train on, all of their galaxies; values as for --dataset"},
    )
    max_crop_scale: float = flag(
        1.0, "largest area of a random crop; above 1, with --fit galaxy or center, galaxies become smaller, too"
    )
    photometric_jitter: float = flag(0.0, "with --distill: random photometry")
    stream: bool | None = flag(
        None,
        "read the shards of a HATS catalogue or of a folder of Parquet files in every epoch, in place of caching all "
        "decoded images; default: where these would not fit on the cache's disk",
    )
    stream_buffer: int | None = flag(
        None, "with --stream, galaxies in the shuffle buffer, encoded, over all processes; default: 8192"
    )

    def __post_init__(self):
        super().__post_init__()
        self.frame = self.frame or Frame()
        if self.stream_buffer is not None:
            _check_number("stream_buffer", self.stream_buffer)
        _check_number("min_crop_scale", self.min_crop_scale, 1)
        _check_number("max_crop_scale", self.max_crop_scale, 9)
        if self.max_crop_scale < self.min_crop_scale:
            raise UserError(f"--max_crop_scale {self.max_crop_scale}: it is below --min_crop_scale")
        _check_number("photometric_jitter", self.photometric_jitter, 1, zero=True)
        _check_number("image_size", self.image_size, 4096)


@dataclass
class ModelArguments:
    """The masked autoencoder. `model.mae.validate_config` checks the sizes, together with the image size."""

    _argument_group_name = "masked autoencoder"

    init_from: str | None = flag(
        None, "start from the weights of a ViTMAE, or of a ViT with a new decoder: a folder or a Hub id"
    )
    distill: str | None = flag(
        None,
        "second stage: learn, from one view of a galaxy, what a frozen encoder (a run, a folder or a Hub id) says of "
        "eight orientations; start from its weights with --init_from",
    )
    hidden_size: int = flag(384, "hidden size of the encoder")
    num_hidden_layers: int = flag(12, "layers of the encoder")
    num_attention_heads: int = flag(6, "attention heads of the encoder")
    intermediate_size: int | None = flag(None, "MLP size of the encoder; default: 4 x hidden size")
    patch_size: int = flag(16, "patch width in pixels")
    mask_ratio: float = flag(0.75, "fraction of masked patches")
    norm_pix_loss: bool = flag(False, "predict each patch normalized by its own mean and std")
    decoder_hidden_size: int = flag(512, "hidden size of the decoder")
    decoder_num_hidden_layers: int = flag(4, "layers of the decoder")
    decoder_num_attention_heads: int | None = flag(None, "attention heads of the decoder; default: hidden size / 32")
    decoder_intermediate_size: int | None = flag(None, "MLP size of the decoder; default: 4 x hidden size")

    def config(self, image_size: int) -> "ViTMAEConfig":
        """The model's configuration, with the sizes that follow from the hidden sizes."""
        from transformers import ViTMAEConfig

        sizes = asdict(self)
        del sizes["init_from"], sizes["distill"]
        defaults = {
            "intermediate_size": 4 * self.hidden_size,
            "decoder_intermediate_size": 4 * self.decoder_hidden_size,
            "decoder_num_attention_heads": max(1, self.decoder_hidden_size // 32),
        }
        sizes |= {name: default for name, default in defaults.items() if sizes[name] is None}
        return ViTMAEConfig(image_size=image_size, layer_norm_eps=1e-6, **sizes)


@dataclass
class _TrainerFields:
    """What pre-training and fine-tuning share of `TrainingArguments`. Fields that are not flags have `init=False`.

    None means: chosen in `__post_init__` by the device, or by `recipe.set_batch_and_learning_rate`. What the Trainer
    finds out is there, too: `device` and `n_gpu` of this process, and `world_size`.
    """

    output_dir: str | None = flag(None, "folder of the results")
    run_name: str | None = flag(None, "the run's name on dashboards; default: that of the folder")
    batch_size: int = flag(512, "global batch size")
    per_device_train_batch_size: int = flag(8, "micro-batch size of a device; default: what fits its memory")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step; default: as many as --batch_size needs")
    per_device_eval_batch_size: int = flag(8, "batch size of evaluations on a device; default: the micro-batch size")
    base_learning_rate: float = flag(1e-3, "learning rate at batch size 256")
    learning_rate: float | None = flag(None, "learning rate; default: --base_learning_rate x batch size / 256")
    lr_scheduler_type: Literal["cosine", "linear", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"] = (
        flag("cosine", "learning-rate schedule")
    )
    num_train_epochs: float = flag(1, "passes over the training set")
    warmup_steps: float = flag(0, "warm-up steps, or their fraction if below 1")
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor"] = flag("adamw_torch_fused", "optimizer")
    weight_decay: float = flag(0.05, "weight decay of matrices; vectors have none")
    adam_beta1: float = flag(0.9, "decay rate of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay rate of AdamW's second moment")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(0.0, "clip gradients to this norm; 0: no clipping")
    seed: int = flag(0, "seed of everything that is random")
    full_determinism: bool = flag(False, "deterministic kernels also on a GPU, where they are slower")
    use_cpu: bool = flag(False, "train on the CPU although there is a GPU")
    bf16: bool | None = flag(None, "train in bfloat16 mixed precision; default: if the device is fast at it")
    fp16: bool = flag(False, "train in float16 mixed precision, on GPUs without bfloat16")
    tf32: bool | None = flag(None, "float32 products in TF32, on GPUs from Ampere on")
    torch_compile: bool | None = flag(None, "compile the model; default: on CUDA")
    dataloader_num_workers: int = flag(0, "worker processes that load batches")
    ddp_timeout: int = flag(1800, "seconds that processes wait for one another")
    logging_steps: float = flag(10, "log every this many steps")
    disable_tqdm: bool | None = flag(None, "lines in place of a progress bar; default: unless on a terminal")
    report_to: list[str] = field(
        default_factory=lambda: ["wandb"], metadata={"help": "where to log", "choices": TRACKERS}
    )
    save_total_limit: int | None = flag(2, "checkpoints to keep")

    # What this project fixes.
    project: str = field(default="galaxy-mae", init=False)
    remove_unused_columns: bool = field(default=False, init=False)  # the loader carries sample indices
    logging_nan_inf_filter: bool = field(default=False, init=False)  # a loss that is not finite stops the run
    ddp_find_unused_parameters: bool = field(default=False, init=False)  # every parameter is used in every step
    dataloader_pin_memory: bool = field(default=False, init=False)
    accelerator_config: dict[str, bool] = field(default_factory=dict, init=False)

    def __post_init__(self):
        import torch
        from transformers.integrations import get_reporting_integration_callbacks

        from galaxy_mae.model.compute import bfloat16_is_fast
        from galaxy_mae.training.tracking import check_wandb

        self._check_values()
        self.report_to = [tracker for tracker in self.report_to if tracker != "none"]
        cuda = not self.use_cpu and torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not (cuda or torch.backends.mps.is_available())
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bfloat16_is_fast(self.use_cpu)
        if self.torch_compile is None:
            self.torch_compile = cuda
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # in a log file, every update of a bar would be a line
        self.dataloader_pin_memory = cuda
        self.accelerator_config = {"non_blocking": cuda}  # the host does not wait for the copy of a batch
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # of `accelerate launch`: a second precision, compiler, ... beside what is recorded
        trainer = self.trainer_arguments()
        self.output_dir, self.device = trainer.output_dir, trainer.device
        self.world_size, self.n_gpu = trainer.world_size, trainer.n_gpu
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16: float16 needs a GPU; --bf16 also works on a CPU")
        try:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()  # fails now, in one line, if its package is missing
        except RuntimeError as error:
            raise UserError(f"--report_to: {first_line(error)} Or give --report_to none") from error
        if "wandb" in self.report_to:
            check_wandb()

    def trainer_arguments(self) -> "TrainingArguments":
        """What the Trainer takes. `CompleteCheckpoints` keeps `save_total_limit`, main.py uploads the encoder alone."""
        from transformers import TrainingArguments

        values = {f.name: getattr(self, f.name) for f in fields(TrainingArguments) if hasattr(self, f.name)}
        values |= {"run_name": self.run_name or self.output_dir, "save_total_limit": None, "push_to_hub": False}
        return TrainingArguments(**{name: value for name, value in values.items() if value is not None})

    def check_gpus(self) -> None:
        """Raise a `UserError` if one process sees several GPUs: the Trainer would use DataParallel."""
        if self.n_gpu > 1:
            raise UserError(
                f"one process sees {self.n_gpu} GPUs: select one with CUDA_VISIBLE_DEVICES=0, or pre-train on all with "
                f"torchrun --nproc_per_node {self.n_gpu} main.py"
            )

    def _check_values(self) -> None:
        """What TrainingArguments itself would change, or answer without the name of the flag."""
        if not self.output_dir:
            raise UserError("--output_dir: give the name of a folder")
        for name, value in vars(self).items():
            if type(value) in (int, float) and name not in ("max_steps", "save_total_limit"):
                _check_number(name, value, _MAXIMUM.get(name), name in _MAY_BE_ZERO)
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise UserError("--num_train_epochs or --max_steps must be above 0")


@dataclass
class PretrainingArguments(_TrainerFields):
    """The pre-training: fields of its own, and fields of TrainingArguments with other defaults."""

    _argument_group_name = "training"

    output_dir: str | None = flag("runs/galaxy10", "folder of the run")
    batch_size: int = flag(512, "global batch size, if neither of the next two flags is set")
    base_learning_rate: float = flag(1.5e-4, "learning rate at batch size 256")
    num_train_epochs: float = flag(400, "passes over the training set")
    max_steps: int = flag(-1, "number of steps, instead of epochs")
    adam_beta2: float = flag(0.95, "decay rate of AdamW's second moment")
    warmup_steps: float = flag(0.05, "warm-up steps, or their fraction if below 1")
    seed: int = flag(0, "seed of weights, masks, augmentation and sample order")
    reconstruct_every: float = flag(20, "epochs between figures of reconstructions, at evaluations; 0: none")
    probe_every: float = flag(
        20,
        "epochs between probes of the frozen features (k-NN and linear, on validation galaxies), at "
        "evaluations; 0: none, unless --metric_for_best_model is one of them",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = flag("steps", "when to evaluate on the validation set")
    eval_on_start: bool = flag(True, "evaluate before the first step")
    eval_steps: float | None = flag(0.05, "steps between evaluations, or their fraction if below 1")
    save_strategy: Literal["no", "steps", "epoch", "best"] = flag("steps", "when to save a checkpoint")
    save_steps: float = flag(0.05, "steps between checkpoints, or their fraction if below 1")
    load_best_model_at_end: bool = flag(False, "keep the best of the checkpoints, not the last")
    metric_for_best_model: Literal["loss", *ONLINE_PROBES] | None = flag(None, "what the best one is; default: loss")
    push_to_hub: bool = flag(False, "at the end upload the encoder and its card to the Hugging Face Hub")
    hub_model_id: str | None = flag(None, "with --push_to_hub, the repository; default: the output folder's name")
    hub_private_repo: bool = flag(
        True, "make a new repository of --push_to_hub private; it also gets the positions of the training galaxies"
    )

    label_names: list[str] = field(default_factory=lambda: ["index"], init=False)  # for a validation loss

    def __post_init__(self):
        best = "--load_best_model_at_end" if self.load_best_model_at_end else "--save_strategy best"
        if self.load_best_model_at_end or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            if self.eval_strategy == "no":
                raise UserError(f"{best} needs evaluations: --eval_strategy steps or epoch")
        steps = self.eval_strategy == self.save_strategy == "steps"
        if self.load_best_model_at_end and steps and self.eval_steps != self.save_steps:
            raise UserError(
                f"--load_best_model_at_end needs a checkpoint of every evaluation: --eval_steps {self.eval_steps} and "
                f"--save_steps {self.save_steps} must be equal"
            )
        super().__post_init__()
        if self.push_to_hub:
            self.hub_model_id = self.hub_model_id or Path(self.output_dir).name
            _check_hub(self.hub_model_id)


@dataclass
class EvaluationArguments(DataArguments):
    """What is evaluated, on which galaxies, and how."""

    _argument_group_name = "evaluation"

    encoder: str | None = flag(None, "a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub")
    method: str | None = flag(
        None, "a method's name or index in the list below; default: $SLURM_ARRAY_TASK_ID, or all outside of an array"
    )
    baseline: str | None = flag(None, "only train a network from scratch, as fine-tuning does; their list is below")
    seeds: int = flag(3, "number of random encoders, and of fine-tuning runs per initialization")
    pooling: Literal["mean", "cls", "both", "radial"] = flag(
        "mean", "frozen features: mean of the patch tokens, cls, both, or radial, means over rings about the center"
    )
    additional_baselines: bool = flag(
        True,
        "run the additional baselines with the methods: orientations, rings, layers, k-NN, an attentive probe, ...",
    )
    label_fractions: list[float] | None = field(
        default=None, metadata={"help": "also train linear probes and fine-tune on these fractions of the labels"}
    )
    transfer: str | None = flag(
        None, "a second labelled dataset, on which few labels are also probed; values as for --dataset"
    )
    report: bool = flag(False, "only write the report of the results that exist")
    rerun: bool = flag(False, "run finished methods again")
    allow_seen: bool = flag(False, "evaluate although test galaxies were used in pre-training; the report tells")

    def __post_init__(self):
        super().__post_init__()
        if not self.encoder and not self.report:
            raise UserError("--encoder: give a run of main.py, an encoder's folder or a Hub id")
        if self.baseline and self.method:
            raise UserError(f"--baseline {self.baseline}: it is a method of its own; give it without --method")
        _check_number("seeds", self.seeds)
        for fraction in self.label_fractions or []:
            _check_number("label_fractions", fraction, 1)


@dataclass
class FineTuningArguments(_TrainerFields):
    """The fine-tuning: fields of its own, and fields of TrainingArguments with other defaults."""

    _argument_group_name = "fine-tuning"

    output_dir: str | None = flag(None, "folder of the results; default: results/NAME, with the encoder's name")
    batch_size: int = flag(128, "global batch size")
    base_learning_rate: float = flag(1e-3, "learning rate of the head at batch size 256")
    layer_decay: float = flag(0.75, "factor between the learning rates of a layer and the layer above it")
    label_smoothing: float = flag(0.1, "fraction of a target spread over all classes")
    mixup: float = flag(0.2, "alpha of mixup's Beta distribution; 0: no mixup")
    min_crop_scale: float = flag(0.8, "smallest area of a random resized crop, as a fraction of the image")
    photometric_jitter: float = flag(0.0, "random photometry of training images, for models of other surveys")
    num_train_epochs: float = flag(50, "passes over the training set")
    warmup_steps: float = flag(0.1, "warm-up steps, or their fraction if below 1")
    seed: int = flag(0, "the first seed")
    save_total_limit: int | None = flag(1, "checkpoints to keep besides the best")

    label_names: list[str] = field(default_factory=lambda: ["labels"], init=False)
    max_steps: int = field(default=-1, init=False)
    # The epoch with the best accuracy on the validation set is kept.
    eval_strategy: str = field(default="epoch", init=False)
    save_strategy: str = field(default="epoch", init=False)
    load_best_model_at_end: bool = field(default=True, init=False)
    metric_for_best_model: str = field(default="accuracy", init=False)


def _check_hub(repository: str) -> None:
    """Raise a `UserError` before the training, if what it ends with could not be uploaded."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {repository}: {first_line(error)}") from error
    if not get_token():
        raise UserError("--push_to_hub: there is no token; `hf auth login` keeps one, or set HF_TOKEN")


def _check_number(name: str, value: float, maximum: float | None = None, zero: bool = False) -> None:
    """Raise a `UserError` unless a number is finite, above 0, or also 0, and at most the maximum."""
    if not (0 <= value < math.inf and (value > 0 or zero) and value <= (maximum or value)):
        limit = "finite" if maximum is None else f"at most {maximum}"
        raise UserError(f"--{name} {value}: it must be {'at least' if zero else 'above'} 0 and {limit}")
