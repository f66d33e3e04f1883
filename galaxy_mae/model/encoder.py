"""Encoders: load a ViT, a ViTMAE or another backbone completely or not at all, build random ones, fingerprint both.

A pre-trained encoder and its random baseline differ in the weights alone. They have the same class, configuration,
trainable position embeddings and image normalization.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import BeitForImageClassification, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from galaxy_mae.model.backbone import build_backbone, load_backbone, own_settings
from galaxy_mae.model.mae import init_layers, sincos_2d_position_embeddings
from galaxy_mae.model.saved_model import SavedModel
from galaxy_mae.provenance import Pretraining, read_pretraining


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        name: the source that was given.
        model: the backbone, without a pooling layer, in evaluation mode.
        mean, std: (3,) float, by which its images are normalized, in units of 0 to 1.
        pretraining: the recipe and the galaxies of the run that made it; None if unknown.
        image_size: width and height of the images that it takes.
    """

    name: str
    model: PreTrainedModel
    mean: np.ndarray
    std: np.ndarray
    pretraining: Pretraining | None
    image_size: int

    @property
    def enlarges(self) -> bool:
        """Whether smaller galaxies are enlarged: other backbones than ViTs have a size that nobody here chose."""
        return type(self.model) is not ViTModel


def load_encoder(source: str, flag: str = "--encoder") -> Encoder:
    """Load an encoder with every tensor, or fail.

    Args:
        source: a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub, of a ViT, a ViTMAE or one
            of `saved_model.BACKBONES`. Heads and decoders in the file are ignored, and of a model of images and texts
            all but the vision tower. Weights of another precision become float32.
        flag: that names the source, for error messages.

    Raises:
        UserError: no encoder there, another architecture, impossible sizes or normalization, or weights that do not fit
            (missing, unexpected or mismatched keys).
    """
    saved = SavedModel.find(source, flag)
    kind = saved.model_type
    if saved.is_classifier:
        raise saved.error(
            f"it holds a classifier ({kind}), and no encoder: give the encoder that it was fine-tuned from"
        )
    if kind not in ("vit", "vit_mae"):
        mean, std = saved.read_normalization(None)
        model, image_size = load_backbone(saved)
        return Encoder(source, model, mean, std, read_pretraining(saved.location), image_size)
    config = saved.read_config()
    saved.check_weights(config)
    mean, std = saved.read_normalization(config.image_size)
    ignored = r"(vit\.)?(decoder|pooler|classifier|mask_token|embeddings\.mask_token)\b"
    model = saved.load(ViTModel, ignored, config=config, add_pooling_layer=False)
    return Encoder(source, model, mean, std, read_pretraining(saved.location), config.image_size)


@torch.no_grad()
def random_encoder(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """An untrained encoder of the given sizes.

    A ViT has the official initialization (see `mae.init_weights`), other backbones have transformers' own.
    """
    if type(config) is not ViTConfig:
        return build_backbone(config, seed)
    with torch.device("meta"):  # transformers' own initialization would be overwritten anyway
        model = ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    init_layers(model, generator)
    nn.init.normal_(model.embeddings.cls_token, std=0.02, generator=generator)
    positions = sincos_2d_position_embeddings(config.hidden_size, config.image_size // config.patch_size)
    model.embeddings.position_embeddings.copy_(torch.from_numpy(positions))
    return model


def encoder_fingerprint(
    model: PreTrainedModel, mean: np.ndarray, std: np.ndarray, image_size: int | None = None
) -> str:
    """Hex SHA-256 of everything that outputs depend on besides the pixels: weights, sizes and normalization.

    It takes a classifier as well.

    Args:
        model: the encoder.
        mean, std: of its images.
        image_size: of its images; read for other backbones than ViTs, whose configuration may have another one.
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
