"""The masked autoencoder: transformers' `ViTMAEForPreTraining`, initialised as its authors do, and checked.

Built from a configuration, transformers 5 leaves the position tables and the mask token of this model at zero: every
masked patch then gets the same prediction, and the loss still falls, so nobody notices. `build_mae` therefore sets
every parameter itself, to the official initialisation (He et al. 2022; facebookresearch/mae), and `check_mae` looks at
what a broken model cannot show: before the first step, and whenever one is loaded.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from galaxy_mae.atomic import atomic_folder
from galaxy_mae.errors import UserError


def build_mae(config: ViTMAEConfig, seed: int = 0) -> ViTMAEForPreTraining:
    """Build a masked autoencoder with the official initialisation; a pure function of its arguments.

    Raises:
        UserError: sizes that do not fit together, named by `check_sizes`.
    """
    check_sizes(config)
    with torch.device("meta"):  # transformers' own initialisation would only be thrown away
        model = ViTMAEForPreTraining(config)
    model = model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def check_sizes(config: ViTMAEConfig) -> None:
    """Raise a `UserError` that names the first pair of sizes that cannot be."""
    positive = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    positive += ("intermediate_size", "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    for name in (*positive, "decoder_intermediate_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: it must be at least 1")
    for size, divisor in (
        ("image_size", "patch_size"),
        ("hidden_size", "num_attention_heads"),
        ("decoder_hidden_size", "decoder_num_attention_heads"),
    ):
        if getattr(config, size) % getattr(config, divisor):
            raise UserError(
                f"--{size} {getattr(config, size)} is not divisible by --{divisor} {getattr(config, divisor)}"
            )
    for size in ("hidden_size", "decoder_hidden_size"):
        if getattr(config, size) % 4:
            raise UserError(f"--{size} {getattr(config, size)}: the sine-cosine positions need a multiple of 4")
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"--mask_ratio {config.mask_ratio}: it must lie between 0 and 1, both excluded")
    patches = patch_count(config)
    if not 0 < int(patches * (1 - config.mask_ratio)) < patches:
        raise UserError(
            f"--mask_ratio {config.mask_ratio}: of {patches} patches at least one must be masked and one be seen"
        )


def patch_count(config: ViTMAEConfig) -> int:
    """Number of patches of an image."""
    return (config.image_size // config.patch_size) ** 2


@torch.no_grad()
def initialise(model: ViTMAEForPreTraining, generator: torch.Generator) -> None:
    """Set every parameter of the model in place, as facebookresearch/mae does (models_mae.py, initialize_weights).

    Xavier-uniform weights and zero biases for every linear layer; the patch projection's weight Xavier-uniform as if it
    were a linear layer of flattened patches, its bias PyTorch's default for a convolution; class and mask tokens
    N(0, 0.02); LayerNorms 1 and 0; fixed sine-cosine positions. Queries, keys and values are layers of their own here
    and are initialised as such, as in the original ViT; the official code holds them in one layer.
    """
    initialise_layers(model, generator)
    grid = model.config.image_size // model.config.patch_size
    embeddings, decoder = model.vit.embeddings, model.decoder
    for token in (embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=0.02, generator=generator)
    for table in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        table.copy_(torch.from_numpy(sine_cosine_positions(table.shape[-1], grid)))
        table.requires_grad_(False)


@torch.no_grad()
def initialise_layers(model: nn.Module, generator: torch.Generator) -> None:
    """Set the linear layers, LayerNorms and patch projection of a model in place, as `initialise` says."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=generator)
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)


def sine_cosine_positions(width: int, grid: int) -> np.ndarray:
    """The fixed position table of the official MAE (util/pos_embed.py): (1, 1 + grid * grid, width) float32.

    Row 0, the class token's, is zero. A patch's row holds sines and cosines of its column and then of its row, a
    quarter of the width each, at wave lengths growing geometrically from 2 pi to 10000 * 2 pi patches.
    """
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    x, y = np.outer(column, frequency), np.outer(row, frequency)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


def choose_attention(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Take transformers' plain attention where it is faster than PyTorch's fused one: on a CPU in bfloat16.

    By a tenth in pre-training, a fifth in fine-tuning (docs/performance.md). An autoencoder's decoder has its own
    configuration and keeps the fused one, which is the faster there. No saved configuration holds the choice.
    """
    if device.type == "cpu" and bf16:
        model.set_attn_implementation("eager")


# ------------------------------------------------------------------------------------------------------ the self-check


@torch.no_grad()
def check_mae(model: ViTMAEForPreTraining) -> None:
    """Raise a `UserError` if the model cannot tell one masked patch from another.

    Looks at the position tables and the tokens, and at the spread of the predictions over the masked patches of one
    random image, which is about 1e-8 where the positions are missing. Leaves the global random state alone.
    """
    advice = "it was saved or built without the cures for transformers 5 (see README): train it anew"
    for name, tensor in (
        ("the encoder's positions", model.vit.embeddings.position_embeddings),
        ("the class token", model.vit.embeddings.cls_token),
        ("the decoder's positions", model.decoder.decoder_pos_embed),
        ("the mask token", model.decoder.mask_token),
    ):
        if not bool(tensor.any()):
            raise UserError(f"the model is broken: {name} are all zero; {advice}")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"the model is broken: {name} are not finite; go back to an earlier checkpoint")
    config, generator = model.config, torch.Generator().manual_seed(0)
    device = model.decoder.mask_token.device
    image = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
    noise = torch.rand(1, patch_count(config), generator=generator)
    was_training = model.training
    output = model.eval()(image.to(device), noise=noise.to(device))
    model.train(was_training)
    masked = output.logits[output.mask.bool()]  # (masked patches, patch pixels)
    if not bool(torch.isfinite(masked).all()):
        raise UserError("the model is broken: its predictions are not finite; go back to an earlier checkpoint")
    if len(masked) > 1 and float(masked.std(dim=0).max()) < 1e-6:
        raise UserError(f"the model is broken: it predicts the same for every masked patch; {advice}")


def load_mae(folder: Path) -> ViTMAEForPreTraining:
    """Load a saved masked autoencoder and check it.

    Raises:
        UserError: nothing there, a missing or unexpected tensor, or a model that fails `check_mae`.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there (no config.json); give a folder that main.py wrote")
    model, report = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    refuse_incomplete(folder, report)
    check_mae(model)
    return model


def refuse_incomplete(folder: Path, report: dict) -> None:
    """Raise a `UserError` if transformers' loading report names tensors that were missing, strange or misshapen."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(what):
            first = sorted(map(str, report[what]))[0]
            raise UserError(
                f"{folder}: the weights do not fit the model: {len(report[what])} {what.replace('_', ' ')}, "
                f"among them {first}"
            )


# ---------------------------------------------------------------------------------------------- the loss of each image


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation that pixel normalisation takes out of patches (B, N, P): (B, N, 1) each."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5


def loss_per_image(
    model: ViTMAEForPreTraining, pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The model's loss, image by image: mean squared error over the masked patches (He et al. 2022, section 3).

    Args:
        model: the autoencoder.
        pixel_values: (B, 3, S, S) float, normalised.
        logits: (B, patches, patch pixels) float, the predictions.
        mask: (B, patches), 1 where a patch was hidden.

    Returns:
        (B,) float32; its mean is the model's own loss.
    """
    target = model.patchify(pixel_values)
    if model.config.norm_pix_loss:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error = (logits.float() - target).square().mean(dim=-1)
    return (error * mask).sum(dim=1) / mask.sum(dim=1)


# --------------------------------------------------------------------------------------------- what a run leaves behind


def save_encoder(
    model: ViTMAEForPreTraining, folder: Path, mean: np.ndarray, deviation: np.ndarray, class_names: tuple[str, ...]
) -> None:
    """Write the encoder as a plain ViT with its image processor, for `AutoModel` and `AutoImageProcessor`.

    A ViT, because `ViTMAEModel` masks and shuffles patches even in evaluation mode. The folder appears whole.

    Args:
        model: the trained autoencoder.
        folder: where to write; replaced if it exists.
        mean, deviation: (3,) statistics that the images were normalised by, in units of 0 to 1.
        class_names: of the data set it was trained on, kept in the configuration for those who fine-tune.
    """
    config = encoder_config(model.config)
    if class_names:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: i for i, name in enumerate(class_names)}
    encoder = ViTModel(config, add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict(), strict=True)
    processor = ViTImageProcessorPil(  # the variant without torchvision; AutoImageProcessor opens either from it
        size={"height": config.image_size, "width": config.image_size},
        image_mean=[float(x) for x in mean],
        image_std=[float(x) for x in deviation],
    )
    with atomic_folder(folder) as aside:
        encoder.save_pretrained(aside)
        processor.save_pretrained(aside)
        _check_written(aside, encoder)


def encoder_config(source: ViTMAEConfig) -> ViTConfig:
    """The configuration of a masked autoencoder's encoder as a plain ViT."""
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    shared += ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")
    shared += ("image_size", "patch_size", "num_channels", "qkv_bias")
    return ViTConfig(**{name: getattr(source, name) for name in shared})


def _check_written(folder: Path, encoder: ViTModel) -> None:
    """The file must hold as many parameters as the encoder, each under a name every version of transformers knows."""
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    expected = len(encoder.state_dict())
    if len(names) != expected or "encoder.layer.0.attention.attention.query.weight" not in names:
        raise RuntimeError(f"{folder}: transformers wrote {len(names)} tensors of {expected}, under unexpected names")


def training_flops_per_image(config: ViTMAEConfig) -> float:
    """Floating-point operations of one image's forward and backward pass (the backward counted as two forwards).

    Counts the matrix products: patch projection, attention and MLP of both stacks, and the decoder's two projections.
    """
    patches = patch_count(config)
    patch_values = config.patch_size**2 * config.num_channels
    seen = int(patches * (1 - config.mask_ratio)) + 1
    width, decoder_width = config.hidden_size, config.decoder_hidden_size
    products = patches * patch_values * width
    products += config.num_hidden_layers * layer_products(seen, width, config.intermediate_size)
    products += seen * width * decoder_width
    products += config.decoder_num_hidden_layers * layer_products(
        patches + 1, decoder_width, config.decoder_intermediate_size
    )
    products += (patches + 1) * decoder_width * patch_values
    return 3 * 2.0 * products


def activation_bytes_per_image(config: ViTMAEConfig) -> float:
    """Memory that one image's forward pass keeps for the backward pass, an estimate in bytes for float32.

    About 20 values a token and channel in each layer: 68 MB at full size, where a process's resident memory grew by
    69 MB an image in float32 and by 51 MB with bfloat16 autocast (8 to 32 images, on a CPU).
    """
    patches = patch_count(config)
    seen = int(patches * (1 - config.mask_ratio)) + 1
    values = config.num_hidden_layers * seen * config.hidden_size
    values += config.decoder_num_hidden_layers * (patches + 1) * config.decoder_hidden_size
    return 4 * (20.0 * values + 3 * patches * config.patch_size**2 * config.num_channels)


def layer_products(tokens: int, width: int, intermediate: int) -> int:
    """Multiplications in one transformer layer: four projections, two attention products, two MLP layers."""
    return tokens * (4 * width**2 + 2 * width * intermediate) + 2 * tokens**2 * width
