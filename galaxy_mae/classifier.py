"""Encoders to evaluate, pre-trained or random, and the classifier that fine-tuning makes of one.

A pre-trained arm and its random twin differ in the encoder's weights alone: the same class, the same configuration, the
same trained positions, the same normalisation of the images.
"""

import copy
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, ViTConfig, ViTImageProcessorPil, ViTMAEConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from galaxy_mae.errors import UserError
from galaxy_mae.mae import (
    encoder_config,
    initialise_layers,
    layer_products,
    refuse_incomplete,
    sine_cosine_positions,
)
from galaxy_mae.provenance import read_run


@dataclass(frozen=True)
class Encoder:
    """An encoder as it was found.

    Attributes:
        name: what `--encoder` said.
        model: the vision transformer, without a pooling layer, in evaluation mode.
        mean, deviation: (3,) float, what its images are normalised by, in units of 0 to 1.
        pretraining: the recipe of the run that made it, with the fingerprints of its data and split; None if unknown.
    """

    name: str
    model: ViTModel
    mean: np.ndarray
    deviation: np.ndarray
    pretraining: dict | None


# ------------------------------------------------------------------------------------------------------- the encoders


def load_encoder(source: str) -> Encoder:
    """Load an encoder, every tensor of it, or fail.

    Args:
        source: a run's folder, an encoder's folder, or a model's id on the Hugging Face Hub. A ViT or a ViTMAE; heads
            and decoders that the file holds besides are left out.

    Raises:
        UserError: no encoder there, another architecture, or weights that do not fit it (missing, renamed, misshapen).
    """
    place = _find_encoder(source)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder {source}: cannot be opened ({_first_line(error)})") from error
    if isinstance(config, ViTMAEConfig):
        config = encoder_config(config)
    if not isinstance(config, ViTConfig):
        raise UserError(f"--encoder {source}: its architecture is {config.model_type}; it must be vit or vit_mae")
    if config.num_channels != 3:
        raise UserError(f"--encoder {source}: it takes images of {config.num_channels} channels; galaxies have 3 here")
    try:
        processor = ViTImageProcessorPil.from_pretrained(place)
        model, report = ViTModel.from_pretrained(
            place,
            config=config,
            add_pooling_layer=False,
            use_safetensors=True,  # the other format is a pickle, which can run code
            ignore_mismatched_sizes=True,  # reported below like what is missing
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--encoder {source}: cannot be loaded ({_first_line(error)})") from error
    not_needed = re.compile(r"(vit\.)?(decoder|pooler|classifier|mask_token|embeddings\.mask_token)\b")
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not not_needed.match(key)}
    refuse_incomplete(place, report)
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--encoder {source}: {name} holds values that are not finite")
    if not bool(model.embeddings.position_embeddings.any()):
        raise UserError(f"--encoder {source}: its positions are all zero: it was built without them; train it anew")
    mean, deviation = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0] * 3, [1] * 3)
    return Encoder(source, model.eval(), np.array(mean), np.array(deviation), _pretraining(place))


def _find_encoder(source: str) -> str:
    """The folder that holds the encoder, or the Hub id."""
    path = Path(source).expanduser()
    for folder in (path / "encoder", path):
        if (folder / "config.json").is_file():
            return str(folder)
    if path.exists():
        run = read_run(path) if path.is_dir() else None
        unfinished = run is not None and not run["finished"]
        mend = "the run there is not finished" if unfinished else "it holds neither encoder/ nor config.json"
        raise UserError(f"--encoder {source}: no encoder there: {mend}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return source
    raise UserError(f"--encoder {source}: no such folder; give a run of main.py, an encoder's folder or a Hub id")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _pretraining(place: str) -> dict | None:
    """The recipe of the run whose folder, or whose `encoder` folder, this is."""
    for folder in (Path(place).resolve().parent, Path(place)):
        if (folder / "run.json").is_file():
            return read_run(folder)["recipe"]
    return None


@torch.no_grad()
def random_encoder(config: ViTConfig, seed: int) -> ViTModel:
    """An encoder of the same class and sizes with the official initialisation (see `mae.initialise`), untrained."""
    with torch.device("meta"):  # transformers' own initialisation would only be thrown away
        model = ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    initialise_layers(model, generator)
    nn.init.normal_(model.embeddings.cls_token, std=0.02, generator=generator)
    positions = sine_cosine_positions(config.hidden_size, config.image_size // config.patch_size)
    model.embeddings.position_embeddings.copy_(torch.from_numpy(positions))
    return model


def encoder_fingerprint(model: ViTModel, mean: np.ndarray, deviation: np.ndarray) -> str:
    """Hex SHA-256 of all that features depend on besides the pixels: weights, sizes and normalisation."""
    config = model.config
    sizes = (config.image_size, config.patch_size, config.num_attention_heads, config.layer_norm_eps, config.hidden_act)
    digest = hashlib.sha256(f"{sizes} {np.float64(mean).tolist()} {np.float64(deviation).tolist()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- the classifier


class MeanPooledViTForImageClassification(ViTPreTrainedModel):
    """A ViT whose mean patch token, after a LayerNorm, is classified linearly (He et al. 2022, appendix A.1)."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, 3, S, S) float32, normalised.
            labels: (B,) int64 classes or (B, K) float32 probabilities; with them the output holds the mean
                cross-entropy.

        Returns:
            `logits` (B, K) and, with labels, `loss`.
        """
        tokens = self.vit(pixel_values).last_hidden_state  # (B, 1 + patches, width)
        logits = self.classifier(self.norm(tokens[:, 1:].mean(dim=1)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def build_classifier(encoder: ViTModel, class_names: tuple[str, ...], seed: int) -> MeanPooledViTForImageClassification:
    """A classifier that starts from a copy of the encoder's weights; its head is N(0, 2e-5), as the official one."""
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: c for c, name in enumerate(class_names)}
    with torch.device("meta"):
        model = MeanPooledViTForImageClassification(config)
    model = model.to_empty(device="cpu")
    model.vit.load_state_dict(encoder.state_dict(), strict=True)
    nn.init.ones_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    nn.init.trunc_normal_(model.classifier.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(model.classifier.bias)
    return model


def layer_wise_groups(
    model: MeanPooledViTForImageClassification, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups whose learning rates fall by `layer_decay` a layer, from the head down to the patches.

    As facebookresearch/mae (util/lr_decay.py): embeddings are layer 0, the head and the norms below it the last one;
    no weight decay on vectors, the class token and the positions. The head's groups come first.
    """
    last = model.config.num_hidden_layers + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = re.match(r"vit\.layers\.(\d+)\.", name)
        depth = int(layer[1]) + 1 if layer else 0 if name.startswith("vit.embeddings.") else last
        decayed = parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
        groups.setdefault((depth, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (last - depth),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda item: -item[0][0])
    ]


def classifier_flops_per_image(config: ViTConfig) -> float:
    """Floating-point operations of one image's forward and backward pass (the backward counted as two forwards)."""
    patches = (config.image_size // config.patch_size) ** 2
    products = patches * config.patch_size**2 * config.num_channels * config.hidden_size
    products += config.num_hidden_layers * layer_products(patches + 1, config.hidden_size, config.intermediate_size)
    return 3 * 2.0 * products


def classifier_activation_bytes(config: ViTConfig) -> float:
    """Memory that one image's forward pass keeps for the backward pass, estimated as for the autoencoder."""
    patches = (config.image_size // config.patch_size) ** 2
    return 4 * 20.0 * config.num_hidden_layers * (patches + 1) * config.hidden_size
