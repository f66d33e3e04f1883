"""Saved models: the files of an encoder or a classifier, read without trust and written for every transformers.

A folder of a model is `config.json`, `model.safetensors` and `preprocessor_config.json`. Of the JSON files only numbers
and names are used, and only after they were checked. Weights are read from safetensors alone, every tensor of them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ViTImageProcessorPil
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.files import move_files, read_json, temporary_folder, user_path

# Other architectures, which `backbone` opens.
BACKBONES = ("deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "ijepa", "beit", "clip")
BACKBONES += ("clip_vision_model", "siglip", "siglip_vision_model", "swin", "convnext", "convnextv2", "resnet")
_DTYPES = {"F16", "BF16", "F32", "F64", "I64"}  # the last one of indices and counts, which are not read
_MAX_IMAGE_SIZE = 1024  # of other architectures than a ViT, whose images can be resized
_COMPLETE = "a model is config.json, preprocessor_config.json and one model.safetensors: save or copy it again"


DEFAULT_MODEL = "pretrained/galaxy-zoo-small"  # comes with this package, as a classifier and its encoder
TRAINING_IMAGES = "training_images.json"  # not in every model's folder
_PACKAGE = Path(__file__).resolve().parents[1]


def model_path(source: str) -> Path:
    """The path that a source names. `pretrained` and `pretrained/...` are of this package, where there are no such."""
    path = user_path(source)
    if source == "pretrained" and (not path.exists() or Path(DEFAULT_MODEL).exists()):
        path = Path(DEFAULT_MODEL)
    return _PACKAGE / path if path.parts[:1] == ("pretrained",) and not path.exists() else path


@dataclass(frozen=True)
class LoadedModel:
    """What a loaded encoder and a loaded classifier have."""

    name: str  # the source that was given
    model: PreTrainedModel  # in evaluation mode
    mean: np.ndarray  # (3,) float64, by which its images are normalized, in units of 0 to 1
    std: np.ndarray
    image_size: int  # width and height of its images
    training_images: dict | None  # how those look that it was trained on, as of `data.seen.TrainingImages`, unchecked


@dataclass(frozen=True)
class SavedModel:
    """The files of a model, in a folder or on the Hub. Whatever is wrong with them is a `UserError`."""

    source: str  # as the user gave it
    flag: str  # that names it, for error messages
    location: str  # the folder that holds it, or its Hub id

    @classmethod
    def find(cls, source: str, flag: str, subfolders: Sequence[str] = ("encoder", "")) -> "SavedModel":
        """The model of a source: in the first of these subfolders of a run's or model's folder, or a Hub id."""
        path = model_path(source)
        for folder in (path / name for name in subfolders):
            if (folder / "config.json").is_file():
                return cls(source, flag, str(folder))
        if path.exists():
            reason = "the run is not finished" if (path / "run.json").is_file() else "neither encoder/ nor config.json"
            raise UserError(f"{flag} {source}: no model there: {reason}")
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            return cls(source, flag, source)
        raise UserError(f"{flag} {source}: no such folder; give a run of main.py, a model's folder or a Hub id")

    def error(self, message: str) -> UserError:
        """One that names this model."""
        return UserError(f"{self.flag} {self.source}: {message}")

    @property
    def model_type(self) -> str:
        """The architecture: `vit` or `vit_mae`, or one of `BACKBONES`."""
        kind = self.read_json("config.json").get("model_type")
        if kind not in ("vit", "vit_mae", *BACKBONES):
            raise self.error(f"its architecture is {kind}; it must be one of vit, vit_mae, {', '.join(BACKBONES)}")
        return kind

    @property
    def is_classifier(self) -> bool:
        """Whether it was saved as a classifier of one label per image, as fine-tuning does.

        Those of ImageNet on the Hub do not say so: they are encoders here, without their heads.
        """
        content = self.read_json("config.json")
        named = "ForImageClassification" in str(content.get("architectures"))
        single = content.get("problem_type") == "single_label_classification"
        return named and single and self.model_type not in ("vit", "vit_mae")

    def count_weights(self) -> tuple[int, int]:
        """The number of tensors in the file of weights, and of the numbers in them, from its header."""
        try:
            with safe_open(cached_file(self.location, "model.safetensors"), "pt") as stored:
                tensors = [stored.get_slice(name) for name in stored.keys()]  # noqa: SIM118 (it is no dictionary)
                held = sum(math.prod(tensor.get_shape()) for tensor in tensors)
                dtypes = {tensor.get_dtype() for tensor in tensors}
        except (OSError, SafetensorError) as error:
            raise self.error(f"model.safetensors cannot be loaded ({first_line(error)}); {_COMPLETE}") from error
        if not dtypes <= _DTYPES:
            raise self.error(f"model.safetensors holds {', '.join(sorted(dtypes))}; save it as float32")
        return len(tensors), held

    def read_processor(self, image_size: object, resizable: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """How the image processor normalizes images of 0 to 255, and the size that it gives them.

        The processor computes (x * rescale_factor - image_mean) / image_std; settings that are not in
        `preprocessor_config.json` have the defaults of `ViTImageProcessor`, and `image_size`. A `resizable` model takes
        other sizes, too; processors of such architectures have other defaults, so mean and std must be in the file.

        Returns:
            Mean and std (3,) float64, in units of 0 to 1; width and height of the images.
        """
        file, normalization = "preprocessor_config.json", ("image_mean", "image_std")
        settings = self.read_json(file)
        factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
        mean, std = (settings.get(x, None if resizable else getattr(ViTImageProcessorPil, x)) for x in normalization)
        if not settings.get("do_normalize", True):
            mean, std = [0] * 3, [1] * 3
        try:
            numbers = np.array([mean, std, [factor] * 3], np.float64)
        except (TypeError, ValueError, OverflowError):  # no numbers, or not as many
            numbers = np.zeros(0)
        if numbers.shape != (3, 3) or not ((abs(numbers) < 1e6).all() and (numbers[1:] > 1e-6).all()):
            wrong = "image_mean and image_std must hold three numbers each, and rescale_factor must be one"
            raise self.error(f"{file}: {wrong}; all below 1e6, std and factor above 1e-6")
        cropped = settings.get("do_center_crop") is True and "crop_size" in settings
        size = settings.get("crop_size" if cropped else "size", image_size)
        sides = [x for x in (size.values() if isinstance(size, dict) else [size]) if x is not None]
        allowed = range(1, _MAX_IMAGE_SIZE + 1) if resizable else (image_size,)
        if not sides or sides.count(sides[0]) < len(sides) or sides[0] not in allowed:
            wanted = f"one number of at most {_MAX_IMAGE_SIZE}" if resizable else image_size
            raise self.error(f"{file}: it makes images of size {size!r}, and the model takes {wanted}")
        mean, std, factor = numbers
        return mean / (255 * factor), std / (255 * factor), sides[0]

    def load(self, model_class: type[PreTrainedModel], ignored: str = "(?!)", **kwargs: Any) -> PreTrainedModel:
        """The model with every tensor of the file, as float32 and in evaluation mode.

        `ignored` is a regular expression of names of tensors that the file may hold and the model does not have.
        """
        transformers_logging.disable_progress_bar()  # of a second; in a notebook it would stay
        try:
            model, loading_info = model_class.from_pretrained(
                self.location,
                dtype=torch.float32,  # that of the random encoders, whatever the file's
                use_safetensors=True,  # the other format is a pickle, which can run code
                ignore_mismatched_sizes=True,  # reported below with the missing keys
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self.error(f"cannot be loaded ({first_line(error)})") from error
        loading_info["unexpected_keys"] = {x for x in loading_info["unexpected_keys"] if not re.match(ignored, x)}
        check_loading_info(self.location, loading_info)
        for name, tensor in model.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise self.error(f"{name} has values that are not finite")
            if name.endswith("position_embeddings") and not bool(tensor.any()):
                raise self.error("its position embeddings are all zero (docs/transformers5.md): retrain it")
        return model.eval()

    def read_training_images(self) -> dict | None:
        """The object in `training_images.json`; None if there is no such file."""
        try:
            return read_json(Path(cached_file(self.location, TRAINING_IMAGES)), _COMPLETE)
        except OSError:
            return None

    def read_json(self, name: str) -> dict:
        """The object that a JSON file of the model holds."""
        try:
            return read_json(Path(cached_file(self.location, name)), _COMPLETE)
        except OSError as error:
            raise self.error(f"{name} cannot be loaded ({first_line(error)}); {_COMPLETE}") from error


def check_loading_info(folder: Path | str, loading_info: dict) -> None:
    """Raise a `UserError` if transformers' loading info names missing, unexpected or mismatched tensors."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, loading_info.get(what) or ())):
            wrong = f"{len(found)} {what.replace('_', ' ')}, among them {found[0]}"
            raise UserError(f"{folder}: the weights do not fit the model: {wrong}")


def save_model(
    model: PreTrainedModel, folder: Path, mean: Iterable[float], std: Iterable[float], image_size: int | None = None
) -> None:
    """Write a model and its image processor into a folder; its files appear when all are on the disk.

    The tensors have transformers 4's names, which every version reads, and which resuming does not: a checkpoint is
    saved in another way (`training.trainer`). `mean` and `std` are (3,) statistics by which the images were normalized,
    in units of 0 to 1; without `image_size` that of the configuration is taken.
    """
    size = image_size or model.config.image_size
    processor = ViTImageProcessorPil(  # the variant without torchvision; AutoImageProcessor opens either from it
        size={"height": size, "width": size},
        resample=Resampling.BOX,  # averages over areas, as `data.images.area_average`
        image_mean=[float(x) for x in mean],
        image_std=[float(x) for x in std],
    )
    with temporary_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        move_files(staging, folder)
