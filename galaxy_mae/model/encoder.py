"""Encoders: load any ViT or ViTMAE completely or not at all, build random ones, fingerprint both.

A pre-trained encoder and its random baseline differ in the weights alone. They have the same class, configuration,
trainable position embeddings and image normalization.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, ViTConfig, ViTImageProcessorPil, ViTMAEConfig, ViTModel

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.model.mae import check_loading_info, encoder_config, init_layers, sincos_2d_position_embeddings
from galaxy_mae.provenance import Pretraining, read_pretraining, read_run


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
            Heads and decoders in the file are ignored.

    Raises:
        UserError: no encoder there, another architecture, or weights that do not fit it (missing, unexpected or
            mismatched keys).
    """
    location = _find_encoder(source)
    try:
        # Without trust_remote_code, a configuration with an `auto_map` makes transformers ask whether to run its code.
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder {source}: cannot be opened ({first_line(error)})") from error
    if isinstance(config, ViTMAEConfig):
        config = encoder_config(config)
    if not isinstance(config, ViTConfig):
        raise UserError(f"--encoder {source}: its architecture is {config.model_type}; it must be vit or vit_mae")
    if config.num_channels != 3:
        raise UserError(f"--encoder {source}: it takes images of {config.num_channels} channels; galaxies have 3 here")
    try:
        processor = ViTImageProcessorPil.from_pretrained(location)
        model, loading_info = ViTModel.from_pretrained(
            location,
            config=config,
            add_pooling_layer=False,
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
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0] * 3, [1] * 3)
    return Encoder(source, model.eval(), np.array(mean), np.array(std), read_pretraining(location))


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
