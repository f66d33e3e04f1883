"""Backbones of other architectures than this project's, as transformers' `AutoModel` and its classifiers make them.

Of a configuration only the architecture's own numbers and names are used. The model that they describe is first built
without memory (PyTorch's meta device) and compared with the size of the file of weights.
"""

import dataclasses
import inspect
import math
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    CLIPConfig,
    ConvNextV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SiglipConfig,
)

from galaxy_mae.errors import UserError, first_line
from galaxy_mae.model.saved_model import SavedModel

# A folder of images and texts holds a vision tower, and is the configuration of its classifier.
_VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_WITH_TEXT = {"clip_vision_model": CLIPConfig, "siglip_vision_model": SiglipConfig}
# Of files: heads, decoders, the other half of a pair, and what transformers computes.
_IGNORED = (
    r"(.*\.)?(\w*classifier|head|lm_head|decoder|pooler|text_model|text_projection|visual_projection|logit_scale|"
    r"logit_bias|mask_token|position_ids|relative_position_index|num_batches_tracked)(\.|$)"
)
_NOT_READ = {"vision_use_head", "num_labels"}  # SigLIP's pooling head is not used
MAX_IMAGE_SIZE = 1024


def read_backbone_config(saved: SavedModel) -> PreTrainedConfig:
    """The configuration of a backbone or of the vision tower of a pair, with the sizes of its `config.json` alone.

    Raises:
        UserError: values that no model has, or a model much larger than the file of weights.
    """
    kind, content = saved.model_type, saved.read_json("config.json")
    if kind in _VISION_TOWERS:
        kind, content = _VISION_TOWERS[kind], content.get("vision_config")
        if not isinstance(content, dict):
            raise saved.error("config.json: vision_config holds no object")
    tensors, held = saved.count_weights({"I64"})
    names = [name for name in _own_fields(CONFIG_MAPPING[kind]) if name in content and name not in _NOT_READ]
    for name in names:
        if not _is_plain(content[name]):
            raise saved.error(f"config.json: {name} is {str(content[name])[:80]!r}; it must hold numbers or a name")
    try:  # each layer has a tensor at least, and a configuration makes a name for each
        if max(content.get("num_hidden_layers") or 0, sum(content.get("depths") or [0])) > tensors:
            raise saved.error(f"config.json describes more layers than model.safetensors has tensors, {tensors:,}")
        config = CONFIG_MAPPING[kind](**{name: content[name] for name in names})
        if kind == "siglip_vision_model":
            config.vision_use_head = False
        with torch.device("meta"):
            model = MODEL_MAPPING[type(config)](config, **_options(config))
    except UserError:
        raise
    except Exception as error:  # whatever an architecture raises at sizes that do not fit together
        raise saved.error(f"config.json describes no model ({first_line(error)})") from error
    described = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    if described > 2 * held:  # smaller differences are reported tensor by tensor
        raise saved.error(f"config.json describes {described:.2g} weights, and model.safetensors holds {held:,}")
    if getattr(config, "num_channels", 3) != 3:
        raise saved.error(f"it takes images of {config.num_channels} channels; galaxies have 3 here")
    return config


def load_backbone(saved: SavedModel) -> tuple[PreTrainedModel, int]:
    """A backbone with every tensor, without pooling layer, and the width and height of its images.

    The image size is that of its image processor; positions are interpolated to it where the model can.

    Raises:
        UserError: as `read_backbone_config`; weights that do not fit; a model that cannot process such images.
    """
    config = read_backbone_config(saved)
    size = saved.read_image_size(getattr(config, "image_size", None), MAX_IMAGE_SIZE)
    model = saved.load(MODEL_MAPPING[type(config)], _IGNORED, config=config, **_options(config))
    try:
        with torch.no_grad():
            hidden_states(model, torch.zeros(1, 3, size, size))
    except Exception as error:  # as above
        raise saved.error(f"it cannot process images of {size} x {size} ({first_line(error)})") from error
    return model, size


def baseline_config(name: str) -> PreTrainedConfig:
    """A network to train from scratch: `resnet18` (He et al. 2016) or `convnextv2_nano` (Woo et al. 2023).

    The sizes are those of microsoft/resnet-18 and facebook/convnextv2-nano on the Hub.
    """
    if name == "resnet18":
        return ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return ConvNextV2Config(hidden_sizes=[80, 160, 320, 640], depths=[2, 2, 8, 2])


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


def hidden_states(model: PreTrainedModel, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The patch tokens (B, rows, columns, channels) and class token (B, channels) or None of every layer.

    Layers are the stages of a hierarchical model. Register and distillation tokens are left out; the class token of
    DINOv3's ConvNeXt, the mean of its feature map, comes with the last stage only.

    Args:
        model: a backbone, or a ViT.
        images: (B, 3, S, S) float32, normalized.
    """
    size = images.shape[-1]
    resized = size != getattr(model.config, "image_size", size)
    output = model(images, output_hidden_states=True, **({"interpolate_pos_encoding": True} if resized else {}))
    # The first hidden states are the embeddings, the last ones lack the LayerNorm at the end.
    states = output.get("reshaped_hidden_states") or output.hidden_states
    layers = [*states[1:-1], output.last_hidden_state]
    grid = states[-1].shape[2:] if states[-1].ndim == 4 else (size // model.config.patch_size,) * 2
    return [_split(x, grid) for x in layers]


def _split(x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1), None
    others = x.shape[1] - grid[0] * grid[1]
    return x[:, others:].unflatten(1, grid), x[:, 0] if others else None


def num_channels(config: PreTrainedConfig) -> int:
    """The number of features of a backbone's last layer."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings that an architecture's outputs depend on, by name."""
    vision = getattr(config, "vision_config", config)
    return {name: getattr(vision, name) for name in sorted(_own_fields(type(vision)))}


# --------------------------------------------------------------------------------------------------------- classifiers


def classifier_config(config: PreTrainedConfig, class_names: tuple[str, ...]) -> PreTrainedConfig | None:
    """The configuration of the classifier that transformers makes of a backbone; None if it makes none."""
    settings = {name: value for name, value in own_settings(config).items() if not callable(value)}
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: c for c, name in enumerate(class_names)},
        "problem_type": "single_label_classification",
    }
    if wrapper := _WITH_TEXT.get(config.model_type):
        return wrapper(vision_config=settings, **labels)
    if not has_classifier(config):
        return None
    return type(config)(**settings, **labels)


def has_classifier(config: PreTrainedConfig) -> bool:
    """Whether transformers makes a classifier of a backbone."""
    return config.model_type in _WITH_TEXT or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration of `classifier_config`. A DeiT has two; this is the one without a teacher."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def build_backbone_classifier(encoder: PreTrainedModel, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """transformers' own classifier with a copy of a backbone's weights, and the head of `classifier.build_classifier`.

    Raises:
        UserError: transformers makes no classifier of this architecture.
    """
    config = classifier_config(encoder.config, class_names)
    if config is None:
        raise UserError(
            f"--encoder: transformers has no classifier of a {encoder.config.model_type}, so it cannot be fine-tuned; "
            "run the other methods (--method ssl_linear_probe)"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classifier_class(config)._from_config(config)
    weights = encoder.state_dict()
    base = next(child for child in model.children() if set(weights) <= set(child.state_dict()))
    missing = base.load_state_dict(weights, strict=False).missing_keys
    if not all(name.startswith(("pooler.", "head.")) for name in missing):
        raise RuntimeError(f"{type(model).__name__}: the backbone has no {missing[0]}")
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


# -------------------------------------------------------------------------------------------------------------- pieces


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """The fields of an architecture, without those of every configuration and those that choose outputs."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = (field.name for field in dataclasses.fields(config_class))
    return [name for name in names if name not in common and not name.startswith("_")]


def _options(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments of the model's class: no pooling layer, where there may be one."""
    has_pooling = "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if has_pooling else {}


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether this is a finite number, a short name, None, or a short list of such."""
    if isinstance(value, list):
        return depth == 0 and len(value) <= 64 and all(_is_plain(x, 1) for x in value)
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) < 1e9
    return value is None or (isinstance(value, str) and len(value) <= 64)
