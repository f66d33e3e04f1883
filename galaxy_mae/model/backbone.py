"""Backbones: this project's ViT and other architectures, as transformers' `AutoModel` and its classifiers make them.

Of a configuration only the architecture's own numbers and names are used. It may also name code to run (`auto_map`), a
quantization, or 10^9 classes, for each of which transformers would allocate a name. The model that the numbers describe
is first built without memory (PyTorch's meta device) and compared with the size of the file of weights.
"""

import dataclasses
import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from galaxy_mae.errors import UserError
from galaxy_mae.model.saved_model import SavedModel

VIT_SIZES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
VIT_FIELDS = (*VIT_SIZES, "num_channels", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
VIT_FIELDS += ("layer_norm_eps",)  # what a ViT and a BEiT share
_DIVISORS = {"image_size": "patch_size", "hidden_size": "num_attention_heads"}
_DIVISORS |= {"decoder_hidden_size": "decoder_num_attention_heads"}
# A folder of images and texts holds a vision tower, and is the configuration of its classifier.
_VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_WITH_TEXT = {tower: pair for pair, tower in _VISION_TOWERS.items()}
# Of files: heads, decoders, the other half of a pair, and what transformers computes.
_IGNORED = (
    r"(.*\.)?(\w*classifier|head|lm_head|decoder|pooler|text_model|text_projection|visual_projection|logit_scale|"
    r"logit_bias|mask_token|position_ids|relative_position_index|num_batches_tracked)(\.|$)"
)
_NOT_READ = {"vision_use_head", "num_labels"}  # SigLIP's pooling head is not used


def read_config(saved: SavedModel, num_classes: int = 0) -> PreTrainedConfig:
    """The configuration of a backbone or of the vision tower of a pair, with the sizes of its `config.json` alone.

    Raises:
        UserError: values that no model has, or a model much larger than the file of weights.
    """
    kind, content = saved.model_type, saved.read_json("config.json")
    if kind in _VISION_TOWERS:
        kind, content = _VISION_TOWERS[kind], content.get("vision_config")
    config_class = ViTConfig if kind == "vit_mae" else CONFIG_MAPPING[kind]
    fields = (*VIT_FIELDS, "qkv_bias") if config_class is ViTConfig else _own_fields(config_class)
    tensors, held = saved.count_weights()
    try:
        values = {name: content[name] for name in fields if name in content and name not in _NOT_READ}
        if kind in ("vit", "vit_mae", "beit"):  # others raise at some of them, and take lists for some
            check_sizes({name: values.get(name, getattr(ViTConfig, name)) for name in VIT_SIZES})
        # Each layer has a tensor at least, and a configuration makes a name for each.
        if max(content.get("num_hidden_layers") or 0, sum(content.get("depths") or [0])) > tensors:
            raise ValueError(f"more layers than model.safetensors has tensors, {tensors:,}")
        config = config_class(**values)
        if kind == "siglip_vision_model":
            config.vision_use_head = False
        with torch.device("meta"):
            model = MODEL_MAPPING[type(config)](config, **_options(config))
    except Exception as error:  # whatever an architecture raises at values that it cannot have
        raise saved.error(f"config.json describes no model ({' '.join(str(error).split())[:200]})") from error
    described = sum(x.numel() for x in (*model.parameters(), *model.buffers())) + num_classes * num_channels(config)
    if described > 2 * held:  # smaller differences are reported tensor by tensor
        raise saved.error(f"config.json describes {described:.2g} weights, and model.safetensors holds {held:,}")
    if getattr(config, "num_channels", 3) != 3:
        raise saved.error(f"it takes images of {config.num_channels} channels; galaxies have 3 here")
    return config


def check_sizes(sizes: dict[str, Any], prefix: str = "") -> None:
    """Raise a `UserError` that names the first size, with a prefix, or pair of sizes that no ViT or ViTMAE can have."""
    for name, value in sizes.items():
        largest = 1_000 if name.endswith("layers") else 2**16  # beyond, memory ends without a message
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(f"{prefix}{name} {value!r}: it must be an integer from 1 to {largest}")
    for size, divisor in _DIVISORS.items():
        if size in sizes and sizes[size] % sizes[divisor]:
            raise UserError(f"{prefix}{size} {sizes[size]} is not divisible by {prefix}{divisor} {sizes[divisor]}")
        if size.endswith("hidden_size") and sizes.get(size, 0) % 4:
            raise UserError(f"{prefix}{size} {sizes[size]}: sine-cosine position embeddings need a multiple of 4")


def load_backbone(saved: SavedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone of a configuration of `read_config`, with every tensor, without pooling layer."""
    return saved.load(MODEL_MAPPING[type(config)], _IGNORED, config=config, **_options(config))


def baseline_config(name: str) -> PreTrainedConfig:
    """A network to train from scratch: `resnet18` (He et al. 2016) or `convnextv2_nano` (Woo et al. 2023).

    The sizes are those of microsoft/resnet-18 and facebook/convnextv2-nano on the Hub.
    """
    if name == "resnet18":
        return CONFIG_MAPPING["resnet"](hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return CONFIG_MAPPING["convnextv2"](hidden_sizes=[80, 160, 320, 640], depths=[2, 2, 8, 2])


def build_backbone(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A backbone with transformers' own random weights.

    Built from a configuration, some models have positions and tokens of zero (docs/transformers5.md), which would be an
    unfair baseline. They get the truncated normal of DeiT's, BEiT's and Swin's own code, std 0.02.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_MAPPING[type(config)]._from_config(config, **_options(config)).eval()
        for name, parameter in model.named_parameters():
            if re.search("position|token", name) and not bool(parameter.any()):
                nn.init.trunc_normal_(parameter, std=0.02)
    return model


class Tokens(NamedTuple):
    """What a layer makes of B images, float32."""

    patches: torch.Tensor  # (B, rows, columns, channels)
    cls: torch.Tensor | None  # the class token, (B, channels), where there is one


def hidden_states(model: PreTrainedModel, images: torch.Tensor) -> list[Tokens]:
    """The tokens of every layer, the output last. Grids and channels may differ between layers.

    Layers are the stages of a hierarchical model. Register and distillation tokens are left out; the class token of
    DINOv3's ConvNeXt, the mean of its feature map, comes with the last stage only. Positions are interpolated to other
    sizes of images.

    `images` are (B, 3, S, S) float32, normalized. Raises a `UserError` if the output is not finite.
    """
    size = images.shape[-1]
    resized = size != getattr(model.config, "image_size", size)
    output = model(images, output_hidden_states=True, **({"interpolate_pos_encoding": True} if resized else {}))
    check_finite(model, output.last_hidden_state)
    # The first hidden states are the embeddings, the last ones lack the LayerNorm at the end.
    states = output.get("reshaped_hidden_states") or output.hidden_states
    layers = [*states[1:-1], output.last_hidden_state]
    grid = states[-1].shape[2:] if states[-1].ndim == 4 else (size // model.config.patch_size,) * 2
    return [_split(x, grid) for x in layers]


def check_finite(model: PreTrainedModel, output: torch.Tensor) -> None:
    """Raise a `UserError` if outputs of a model are not finite: every galaxy would be of the first class."""
    if not bool(torch.isfinite(output).all()):
        name = model.name_or_path or f"the {model.config.model_type}"
        raise UserError(f"{name}: its outputs are not finite: copy it again, train it again, or leave bfloat16 out")


def _split(x: torch.Tensor, grid: tuple[int, int]) -> Tokens:
    if x.ndim == 4:
        return Tokens(x.permute(0, 2, 3, 1).float(), None)
    others = x.shape[1] - grid[0] * grid[1]
    return Tokens(x[:, others:].unflatten(1, grid).float(), x[:, 0].float() if others else None)


def num_channels(config: PreTrainedConfig) -> int:
    """The number of features of a backbone's last layer."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings that an architecture's outputs depend on, by name."""
    vision = getattr(config, "vision_config", config)
    return {name: getattr(vision, name) for name in sorted(_own_fields(type(vision)))}


def classifier_config(config: PreTrainedConfig, class_names: tuple[str, ...]) -> PreTrainedConfig:
    """The configuration of the classifier that transformers makes of a backbone; a `UserError` if it makes none."""
    if not has_classifier(config):
        raise UserError(f"transformers has no classifier of a {config.model_type}: run --method ssl_linear_probe")
    settings = {name: value for name, value in own_settings(config).items() if not callable(value)}
    if pair := _WITH_TEXT.get(config.model_type):
        return CONFIG_MAPPING[pair](vision_config=settings, **class_labels(class_names))
    return type(config)(**settings, **class_labels(class_names))


def class_labels(class_names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a configuration that name its classes, one per image."""
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: c for c, name in enumerate(class_names)},
        "problem_type": "single_label_classification",
    }


def has_classifier(config: PreTrainedConfig) -> bool:
    """Whether transformers makes a classifier of a backbone."""
    return config.model_type in _WITH_TEXT or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration of `classifier_config`. A DeiT has two; this is the one without a teacher."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def build_backbone_classifier(encoder: PreTrainedModel, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """transformers' own classifier with a copy of a backbone's weights, and the head of fine-tuning."""
    config = classifier_config(encoder.config, class_names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classifier_class(config)._from_config(config)
    weights = encoder.state_dict()
    base = next(child for child in model.children() if set(weights) <= set(child.state_dict()))
    base.load_state_dict(weights, strict=False)  # a base may have a pooling layer, which does not reach the head
    init_head(head_of(model), seed)
    return model


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear head of a classifier."""
    return [module for module in model.classifier.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def init_head(head: nn.Linear, seed: int) -> None:
    """The official head of fine-tuning: truncated normal, std 2e-5 (He et al. 2022, appendix A.1)."""
    generator = torch.Generator().manual_seed(seed)
    head.weight.copy_(nn.init.trunc_normal_(torch.empty(head.weight.shape), std=2e-5, generator=generator))
    head.bias.zero_()


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """The fields of an architecture, without those of every configuration and those that choose outputs."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = (field.name for field in dataclasses.fields(config_class))
    return [name for name in names if name not in common and not name.startswith("_")]


def _options(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments of the model's class: no pooling layer, where there may be one."""
    has_pooling = "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if has_pooling else {}
