"""Encoders: load any ViT or ViTMAE completely or not at all, build random ones, fingerprint both.

A pre-trained encoder and its random baseline differ in the weights alone. They have the same class, configuration,
trainable position embeddings and image normalization.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.model.compute import num_patches
from galaxy_mae.model.mae import check_loading_info, init_layers, sincos_2d_position_embeddings
from galaxy_mae.provenance import Pretraining, read_pretraining, read_run

_SIZES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_CONFIG_FIELDS = (*_SIZES, "num_channels", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
_CONFIG_FIELDS += ("layer_norm_eps", "qkv_bias")
_COMPLETE = "an encoder is config.json, preprocessor_config.json and one model.safetensors: save or copy it again"


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        name: the value of `--encoder`.
        model: the vision transformer, without a pooling layer, in evaluation mode.
        mean, std: (3,) float, by which its images are normalized, in units of 0 to 1.
        pretraining: the recipe and the galaxies of the run that made it; None if unknown.
    """

    name: str
    model: ViTModel
    mean: np.ndarray
    std: np.ndarray
    pretraining: Pretraining | None


def load_encoder(source: str) -> Encoder:
    """Load an encoder with every tensor, or fail.

    Args:
        source: a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub, of a ViT or a ViTMAE.
            Heads and decoders in the file are ignored. Weights of another precision become float32.

    Raises:
        UserError: no encoder there, another architecture, impossible sizes or normalization, or weights that do not fit
            (missing, unexpected or mismatched keys).
    """
    location = _find_encoder(source)
    config = _read_config(source, location)
    _check_weight_file(source, location, config)
    mean, std = _read_normalization(source, location, config.image_size)
    try:
        model, loading_info = ViTModel.from_pretrained(
            location,
            config=config,
            add_pooling_layer=False,
            dtype=torch.float32,  # that of the random encoders, whatever the file's
            use_safetensors=True,  # the other format is a pickle, which can run code
            ignore_mismatched_sizes=True,  # reported below with the missing keys
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--encoder {source}: cannot be loaded ({first_line(error)})") from error
    ignored = re.compile(r"(vit\.)?(decoder|pooler|classifier|mask_token|embeddings\.mask_token)\b")
    loading_info["unexpected_keys"] = {key for key in loading_info["unexpected_keys"] if not ignored.match(key)}
    check_loading_info(location, loading_info)
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--encoder {source}: {name} has values that are not finite")
    if not bool(model.embeddings.position_embeddings.any()):
        raise UserError(f"--encoder {source}: its position embeddings are all zero (docs/transformers5.md): retrain it")
    return Encoder(source, model.eval(), mean, std, read_pretraining(location))


def _find_encoder(source: str) -> str:
    """The folder that holds the encoder, or the Hub id."""
    path = Path(source).expanduser()
    for folder in (path / "encoder", path):
        if (folder / "config.json").is_file():
            return str(folder)
    if path.exists():
        run = read_run(path) if path.is_dir() else None
        unfinished = run is not None and not run["finished"]
        reason = "the run there is not finished" if unfinished else "it holds neither encoder/ nor config.json"
        raise UserError(f"--encoder {source}: no encoder there: {reason}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return source
    raise UserError(f"--encoder {source}: no such folder; give a run of main.py, an encoder's folder or a Hub id")


def _read_config(source: str, location: str) -> ViTConfig:
    """The sizes in `config.json`, checked, in a new configuration.

    Nothing else is taken from the file: it may name code to run (`auto_map`), a quantization, another attention or
    output format, or 10^9 classes, for each of which transformers would allocate a name.
    """
    content = _read_json(source, location, "config.json")
    if content.get("model_type") not in ("vit", "vit_mae"):
        raise UserError(
            f"--encoder {source}: its architecture is {content.get('model_type')}; it must be vit or vit_mae"
        )
    try:  # the defaults of ViTMAEConfig are the same
        config = ViTConfig(**{name: content[name] for name in _CONFIG_FIELDS if name in content})
    except StrictDataclassError as error:
        raise UserError(f"--encoder {source}: config.json: {' '.join(str(error).split())}") from error
    if config.num_channels != 3:
        raise UserError(f"--encoder {source}: it takes images of {config.num_channels} channels; galaxies have 3 here")
    if problem := _impossible_value(config):
        raise UserError(f"--encoder {source}: config.json: {problem}")
    return config


def _impossible_value(config: ViTConfig) -> str | None:
    """What is wrong with the first value that no encoder can have, or None."""
    for name in _SIZES:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            return f"{name} is {value}; it must be a positive integer"
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            return f"{name} is {value}; it must be at least 0 and less than 1"
    for size, divisor in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
        if getattr(config, size) % getattr(config, divisor):
            return f"{size} {getattr(config, size)} is not divisible by {divisor} {getattr(config, divisor)}"
    if config.hidden_size % 4:
        return f"hidden_size {config.hidden_size}: the random baseline's position embeddings need a multiple of 4"
    if config.hidden_act not in ACT2FN:
        return f"hidden_act is {config.hidden_act!r}; transformers has no such activation"
    return None


def _read_normalization(source: str, location: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (3,) float64, in units of 0 to 1, by which the image processor normalizes images of 0 to 255.

    The processor computes (x * rescale_factor - image_mean) / image_std; settings that are not in
    `preprocessor_config.json` have the defaults of `ViTImageProcessor`.
    """
    file = "preprocessor_config.json"
    settings = _read_json(source, location, file)
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    do_rescale, factor, do_normalize, mean, std = (settings.get(x, getattr(ViTImageProcessorPil, x)) for x in names)
    if not (isinstance(do_rescale, bool) and isinstance(do_normalize, bool)):
        raise UserError(f"--encoder {source}: {file}: do_rescale and do_normalize must be true or false")
    factor = factor if do_rescale else 1
    mean, std = (mean, std) if do_normalize else ([0] * 3, [1] * 3)
    for name, values, count, low in (
        ("rescale_factor", [factor], 1, 1e-6),
        ("image_mean", mean, 3, -1e6),
        ("image_std", std, 3, 1e-6),
    ):
        if not _are_numbers(values, count, low):
            wrong = f"{name} is {settings.get(name)!r}; it must hold {count} x a number between {low:g} and 1e+06"
            raise UserError(f"--encoder {source}: {file}: {wrong}")
    size = settings.get("size", image_size)
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if any(side != image_size for side in sides) and not settings.get("do_center_crop"):
        raise UserError(
            f"--encoder {source}: {file}: it makes images of size {size!r}, and the model takes {image_size} pixels"
        )
    return np.array(mean) / (255 * factor), np.array(std) / (255 * factor)


def _are_numbers(values: object, count: int, low: float) -> bool:
    """Whether this is a list of `count` numbers between `low` and a million, exclusive."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, int | float) and low < x < 1e6 for x in values)
    )


def _check_weight_file(source: str, location: str, config: ViTConfig) -> None:
    """Compare the sizes with the header of the file of weights, before transformers allocates a model of these sizes.

    Raises:
        UserError: no such file, a damaged one, weights that are not floating-point numbers, or so much fewer than
            the configuration describes that it cannot be theirs.
    """
    try:
        with safe_open(_find_file(location, "model.safetensors"), "pt") as stored:
            tensors = [stored.get_slice(name) for name in stored.keys()]  # noqa: SIM118 (it is no dictionary)
            held = sum(math.prod(tensor.get_shape()) for tensor in tensors)
            dtypes = {tensor.get_dtype() for tensor in tensors}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--encoder {source}: model.safetensors cannot be loaded ({first_line(error)}); {_COMPLETE}"
        ) from error
    if not dtypes <= {"F16", "BF16", "F32", "F64"}:
        raise UserError(f"--encoder {source}: model.safetensors holds {', '.join(sorted(dtypes))}; save it as float32")
    hidden, layers = config.hidden_size, config.num_hidden_layers
    described = layers * hidden * (4 * hidden + 2 * config.intermediate_size)
    described += hidden * (num_patches(config) + 3 * config.patch_size**2)
    if described > 2 * held:  # smaller differences are reported tensor by tensor
        raise UserError(
            f"--encoder {source}: config.json describes {described:.2g} weights, and model.safetensors holds {held:,}"
        )


def _read_json(source: str, location: str, name: str) -> dict:
    try:
        content = json.loads(Path(_find_file(location, name)).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # a JSON error is a ValueError
        raise UserError(f"--encoder {source}: {name} cannot be loaded ({first_line(error)}); {_COMPLETE}") from error
    if not isinstance(content, dict):
        raise UserError(f"--encoder {source}: {name} cannot be loaded (it holds no JSON object); {_COMPLETE}")
    return content


def _find_file(location: str, name: str) -> str:
    """The path of a file of a folder, or of a model on the Hub, which is downloaded. Raises OSError if it is absent."""
    if Path(location).is_dir():
        return str(Path(location) / name)
    return cached_file(location, name)


@torch.no_grad()
def random_encoder(config: ViTConfig, seed: int) -> ViTModel:
    """An untrained encoder of the given sizes with the official initialization (see `mae.init_weights`)."""
    with torch.device("meta"):  # transformers' own initialization would be overwritten anyway
        model = ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    init_layers(model, generator)
    nn.init.normal_(model.embeddings.cls_token, std=0.02, generator=generator)
    positions = sincos_2d_position_embeddings(config.hidden_size, config.image_size // config.patch_size)
    model.embeddings.position_embeddings.copy_(torch.from_numpy(positions))
    return model


def encoder_fingerprint(model: ViTModel, mean: np.ndarray, std: np.ndarray) -> str:
    """Hex SHA-256 of everything that features depend on besides the pixels: weights, sizes and normalization."""
    config = model.config
    sizes = (config.image_size, config.patch_size, config.num_attention_heads, config.layer_norm_eps, config.hidden_act)
    digest = hashlib.sha256(f"{sizes} {np.float64(mean).tolist()} {np.float64(std).tolist()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()
