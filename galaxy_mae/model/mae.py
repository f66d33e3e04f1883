"""The masked autoencoder: transformers' `ViTMAEForPreTraining` with the official initialization, and a self-check.

Built from a configuration, transformers 5 leaves the position embeddings and the mask token of this model at zero.
Every masked patch then gets the same prediction, and the loss still falls, so nobody notices. `build_mae` therefore
sets every parameter itself, to the official initialization (He et al. 2022; facebookresearch/mae), and `check_mae` runs
before the first step.
"""

import copy
import functools
import json
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.utils import ModelOutput

from galaxy_mae.errors import UserError
from galaxy_mae.files import atomic_folder, move_files, temporary_folder, write_json
from galaxy_mae.model.backbone import VIT_FIELDS, VIT_SIZES, check_sizes, load_backbone, read_config
from galaxy_mae.model.compute import AttentionShape, measure_cost, num_patches
from galaxy_mae.model.saved_model import TRAINING_IMAGES, SavedModel, save_model
from galaxy_mae.provenance import Pretraining, differences

# What must be equal in a model and in the saved one that it starts from.
_FIT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "hidden_act")
_FIT_DECODER = tuple(f"decoder_{name}" for name in _FIT[:4])
_TOKENS, _POSITIONS = ("cls_token", "mask_token"), ("position_embeddings", "decoder_pos_embed")


def build_mae(config: ViTMAEConfig, seed: int = 0) -> ViTMAEForPreTraining:
    """Build a masked autoencoder with the official initialization: a pure function of its arguments."""
    validate_config(config)
    with torch.device("meta"):  # transformers' own initialization would be overwritten anyway
        model = ViTMAEForPreTraining(config)
    model = model.to_empty(device="cpu")
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def init_mae(model: ViTMAEForPreTraining, saved: SavedModel) -> str:
    """Set the weights of a model to those of a saved ViTMAE, or its encoder's to those of a saved ViT or ViTMAE.

    Position embeddings for another size of images are computed if they are the fixed ones, and else interpolated.

    Returns:
        What was taken, in words.

    Raises:
        UserError: the saved model is damaged or another architecture, or a size of it is not that of the model.
    """
    if saved.model_type not in ("vit", "vit_mae"):
        raise saved.error(f"its architecture is {saved.model_type}; only a ViTMAE or a ViT can be trained on")
    stored, content, config = read_config(saved), saved.read_json("config.json"), copy.deepcopy(model.config)
    is_complete = "ForPreTraining" in str(content.get("architectures"))
    there = {name: content.get(name, getattr(config, name)) for name in (*_FIT, *(_FIT_DECODER if is_complete else ()))}
    if found := differences(there, {name: getattr(config, name) for name in there}, set()):
        raise saved.error(f"it does not fit this model: {found}; set these fields as they are there")
    config.image_size = stored.image_size
    if is_complete:
        weights = saved.load(ViTMAEForPreTraining, config=config).state_dict()
    else:
        weights = {f"vit.{name}": x for name, x in load_backbone(saved, stored).state_dict().items()}
    state, words = model.state_dict(), ["all weights" if is_complete else "the encoder's weights, with a new decoder"]
    for name in [name for name in weights if name.endswith(_POSITIONS) and weights[name].shape != state[name].shape]:
        grids = [size // config.patch_size for size in (stored.image_size, model.config.image_size)]
        fixed = torch.from_numpy(sincos_2d_position_embeddings(weights[name].shape[-1], grids[0]))
        if torch.allclose(weights[name], fixed, atol=1e-3):
            weights[name] = state[name]
            continue
        patches = weights[name][:, 1:].transpose(1, 2).unflatten(2, (grids[0], grids[0]))
        resized = F.interpolate(patches, size=(grids[1], grids[1]), mode="bicubic", align_corners=False)
        weights[name] = torch.cat([weights[name][:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
        words.append(f"position embeddings interpolated from {grids[0]} x {grids[0]} to {grids[1]} x {grids[1]}")
    model.load_state_dict(state | weights, strict=True)
    return ", ".join(words)


def measure_mae(config: ViTMAEConfig) -> tuple[float, float]:
    """What `measure_cost` says of one image's passes through an autoencoder without values."""
    return _measure_mae(config.to_json_string())


@functools.cache
def _measure_mae(config_json: str) -> tuple[float, float]:
    config = ViTMAEConfig.from_dict(json.loads(config_json))
    with torch.device("meta"):
        image = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
        return measure_cost(ViTMAEForPreTraining(config), image, torch.zeros(1, num_patches(config)))


def attention_layers(config: ViTMAEConfig, batch_size: int) -> dict[AttentionShape, int]:
    """How many layers have attention of a shape in training, over the class token and visible or all patches."""
    patches, heads, decoder_heads = num_patches(config), config.num_attention_heads, config.decoder_num_attention_heads
    visible = int(patches * (1 - config.mask_ratio))
    encoder = (batch_size, heads, visible + 1, config.hidden_size // heads)
    decoder = (batch_size, decoder_heads, patches + 1, config.decoder_hidden_size // decoder_heads)
    return {encoder: config.num_hidden_layers, decoder: config.decoder_num_hidden_layers}


def return_only_loss_in_training(model: ViTMAEForPreTraining) -> None:
    """In training mode the model's `forward` returns its loss and nothing else; in evaluation mode all it did before.

    A compiled forward pass writes whatever it returns. The predictions, which training does not read, would be written
    in float32: 403 MB of 512 images of 256 pixels. The class, its names and the loss stay as they are; `del
    model.forward` ends it.
    """

    @functools.wraps(type(model).forward)
    def forward(self: ViTMAEForPreTraining, *args, **kwargs) -> ModelOutput:
        output = type(self).forward(self, *args, **kwargs)
        return type(output)(loss=output.loss) if self.training else output

    model.forward = MethodType(forward, model)


def validate_config(config: ViTMAEConfig) -> None:
    """Raise a `UserError` that names the first impossible size or pair of sizes."""
    decoder = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    names = (*VIT_SIZES, *decoder, "decoder_intermediate_size")
    check_sizes({name: getattr(config, name) for name in names}, prefix="--")
    ratio, patches = config.mask_ratio, num_patches(config)
    if not (0 < ratio < 1 and 0 < int(patches * (1 - ratio)) < patches):
        raise UserError(f"--mask_ratio {ratio}: of {patches} patches at least one must be masked and one visible")


@torch.no_grad()
def init_weights(model: ViTMAEForPreTraining | ViTModel, generator: torch.Generator) -> None:
    """Set every parameter of a model in place, as facebookresearch/mae does (models_mae.py, initialize_weights).

    Xavier-uniform weights and zero biases for every linear layer. The patch projection's weight is Xavier-uniform as a
    linear layer of flattened patches, its bias has PyTorch's default for a convolution. Class and mask tokens are
    normal with std 0.02, LayerNorms 1 and 0, position embeddings fixed sines and cosines. Queries, keys and values are
    separate layers here and are initialized as such, as in the original ViT; the official code has one layer for them.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=generator)
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    grid = model.config.image_size // model.config.patch_size
    for name, parameter in model.named_parameters():
        if name.endswith(_TOKENS):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith(_POSITIONS):
            parameter.copy_(torch.from_numpy(sincos_2d_position_embeddings(parameter.shape[-1], grid)))


def sincos_2d_position_embeddings(hidden_size: int, grid: int) -> np.ndarray:
    """The fixed position embeddings of the official MAE (util/pos_embed.py): (1, 1 + grid * grid, hidden_size) float32.

    Row 0, for the class token, is zero. The row of a patch holds sines and cosines of its column and then of its row, a
    quarter of the hidden size each, at wavelengths that grow geometrically from 2 pi to 10000 * 2 pi patches.
    """
    frequency = 10000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    x, y = np.outer(column, frequency), np.outer(row, frequency)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.concatenate([np.zeros((1, hidden_size)), table])[None].astype(np.float32)


@torch.no_grad()
def check_mae(model: ViTMAEForPreTraining) -> None:
    """Raise a `UserError` if the model cannot tell one masked patch from another.

    Checks the position embeddings and tokens, and the spread of the predictions over the masked patches of one random
    image, which is about 1e-8 without position embeddings. Does not change the global random state.
    """
    advice = "it was built or saved without the fixes for transformers 5 (docs/transformers5.md): retrain it"
    for name, parameter in model.named_parameters():
        if name.endswith((*_TOKENS, *_POSITIONS)) and not bool(parameter.any()):
            raise UserError(f"the model is broken: its {name.rpartition('.')[2]} are all zero; {advice}")
    config, generator = model.config, torch.Generator().manual_seed(0)
    image = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
    noise = torch.rand(1, num_patches(config), generator=generator)
    was_training = model.training
    output = model.eval()(image.to(model.device), noise=noise.to(model.device))
    model.train(was_training)
    masked = output.logits[output.mask.bool()]  # (masked patches, patch pixels)
    if not bool(torch.isfinite(masked).all()):
        raise UserError("the model is broken: its predictions are not finite; use an earlier checkpoint")
    if len(masked) > 1 and float(masked.std(dim=0).max()) < 1e-6:
        raise UserError(f"the model is broken: it predicts the same for every masked patch; {advice}")


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std by which pixel normalization standardizes patches (B, N, P): (B, N, 1) each."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5


def loss_per_image(
    model: ViTMAEForPreTraining, pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The loss of each image: mean squared error over the masked patches (He et al. 2022, section 3).

    Of (B, 3, S, S) normalized images, predictions (B, patches, patch pixels) and a mask (B, patches), 1 for masked
    patches: (B,) float32, whose mean is the model's own loss.
    """
    target = model.patchify(pixel_values)
    if model.config.norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (logits.float() - target).square().mean(dim=-1)
    return (error * mask).sum(dim=1) / mask.sum(dim=1)


def save_mae(model: ViTMAEForPreTraining, folder: Path) -> None:
    """Write the autoencoder into a folder; its files appear when all are on the disk."""
    with temporary_folder(folder) as staging:  # by default, names of the decoder are corrupt (docs/transformers5.md)
        model.save_pretrained(staging, save_original_format=False)
        move_files(staging, folder)


def save_encoder(
    model: ViTMAEForPreTraining,
    folder: Path,
    mean: np.ndarray,
    std: np.ndarray,
    class_names: tuple[str, ...],
    pretraining: Pretraining | None = None,
    training_images: dict | None = None,
) -> None:
    """Write the encoder as a plain ViT with its image processor, for `AutoModel` and `AutoImageProcessor`.

    A ViT, because `ViTMAEModel` masks and shuffles patches even in evaluation mode. The folder appears, or is replaced,
    as one. `mean` and `std` are (3,) statistics by which the images were normalized, in units of 0 to 1;
    `training_images` is what `data.seen.TrainingImages.as_json` returns.
    """
    encoder = encoder_of(model)
    if class_names:
        encoder.config.id2label = dict(enumerate(class_names))
        encoder.config.label2id = {name: c for c, name in enumerate(class_names)}
    with atomic_folder(folder) as staging:
        save_model(encoder, staging, mean, std)
        if pretraining is not None:
            pretraining.write(staging)
        if training_images is not None:
            write_json(staging / TRAINING_IMAGES, training_images)


def encoder_of(model: ViTMAEForPreTraining) -> ViTModel:
    """A masked autoencoder's encoder as a plain ViT. It shares the weights and does not use the random state."""
    with torch.device("meta"):
        encoder = ViTModel(encoder_config(model.config), add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict(), strict=True, assign=True)
    return encoder.eval()


def encoder_config(source: ViTMAEConfig) -> ViTConfig:
    """The configuration of a masked autoencoder's encoder as a plain ViT."""
    shared = (*VIT_FIELDS, "initializer_range", "qkv_bias")
    return ViTConfig(**{name: getattr(source, name) for name in shared})
