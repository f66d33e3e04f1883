"""Encoders: load a ViT, a ViTMAE or another backbone completely or not at all, build random ones, fingerprint both.

A pre-trained encoder and its random baseline differ in the weights alone. They have the same class, configuration,
trainable position embeddings and image normalization.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BeitForImageClassification, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from galaxy_mae.model.backbone import build_backbone, load_backbone, own_settings, read_config
from galaxy_mae.model.mae import init_weights
from galaxy_mae.model.saved_model import LoadedModel, SavedModel
from galaxy_mae.provenance import Pretraining, read_pretraining


@dataclass(frozen=True)
class Encoder(LoadedModel):
    """A loaded encoder, a backbone without a pooling layer; with the run that made it, None if unknown."""

    pretraining: Pretraining | None


def load_encoder(source: str, flag: str = "--encoder") -> Encoder:
    """Load an encoder with every tensor, or fail with a `UserError`.

    Args:
        source: a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub, of a ViT, a ViTMAE or one
            of `saved_model.BACKBONES`; or `pretrained`, the small one of this package. Heads and decoders in the file
            are ignored, and of a model of images and texts all but the vision tower. Weights of another precision
            become float32.
        flag: that names the source, for error messages.

    >>> encoder = gm.load_encoder("pretrained")
    >>> type(encoder.model).__name__, encoder.image_size, encoder.mean.shape
    ('ViTModel', 64, (3,))
    """
    saved = SavedModel.find(source, flag)
    if saved.is_classifier:
        raise saved.error(f"it holds a classifier ({saved.model_type}): give the encoder that it was fine-tuned from")
    config = read_config(saved)
    resizable = type(config) is not ViTConfig
    mean, std, image_size = saved.read_processor(getattr(config, "image_size", None), resizable)
    model = load_backbone(saved, config)
    return Encoder(source, model, mean, std, image_size, saved.read_training_images(), read_pretraining(saved.location))


def random_encoder(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """An untrained encoder: a ViT with the initialization of `mae.init_weights`, others with transformers' own."""
    if type(config) is not ViTConfig:
        return build_backbone(config, seed)
    with torch.device("meta"):  # transformers' own initialization would be overwritten anyway
        model = ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu").eval()
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def encoder_fingerprint(
    model: PreTrainedModel, mean: np.ndarray, std: np.ndarray, image_size: int | None = None
) -> str:
    """Hex SHA-256 of everything that outputs of an encoder or a classifier depend on besides the pixels.

    `image_size` is read for other backbones than ViTs, whose configuration may have another one.
    """
    config = model.config
    if type(model) in (ViTModel, BeitForImageClassification):
        names = ("image_size", "patch_size", "num_attention_heads", "layer_norm_eps", "hidden_act")
        sizes = tuple(getattr(config, name) for name in names)
    else:
        sizes = (config.model_type, image_size, own_settings(config))
    digest = hashlib.sha256(f"{sizes} {np.float64(mean).tolist()} {np.float64(std).tolist()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()
