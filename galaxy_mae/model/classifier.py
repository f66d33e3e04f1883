"""The classifier of fine-tuning: an encoder, mean pooling and a linear head, as transformers' own BEiT.

He et al. (2022, appendix A.1) fine-tune a ViT without the LayerNorm at its end: the mean of the patch tokens, a new
LayerNorm, a linear head. That is `BeitForImageClassification` with the settings below, so what is trained and saved
opens in plain transformers. Other backbones get the classifier that `AutoModelForImageClassification` makes of them.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, PreTrainedModel, ViTModel

from galaxy_mae.model import backbone
from galaxy_mae.model.saved_model import LoadedModel, SavedModel

# What makes a BEiT of a ViT: its position embeddings, and nothing that a ViT does not have.
_SETTINGS = {
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mask_token": False,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
    "problem_type": "single_label_classification",
}
_NOT_IN_BEIT = r"^beit\.layernorm\.|\.k_proj\.bias$"


@dataclass(frozen=True)
class Classifier(LoadedModel):
    """A loaded classifier, with the names of the classes 0, 1, ..."""

    class_names: tuple[str, ...]


@torch.no_grad()
def build_classifier(encoder: PreTrainedModel, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """A classifier with a copy of the encoder's weights and the official head: truncated normal, std 2e-5.

    Of the encoder's tensors two kinds have no place in it: the biases of the keys, which add the same number to all
    attention scores of a query and so do not change any output, and the LayerNorm at the end. A `UserError` if
    transformers makes no classifier of this architecture.
    """
    if type(encoder) is not ViTModel:
        return backbone.build_backbone_classifier(encoder, class_names, seed)
    with torch.device("meta"):
        sizes = {name: getattr(encoder.config, name) for name in backbone.VIT_FIELDS}
        model = BeitForImageClassification(BeitConfig(**sizes, **_SETTINGS | backbone.class_labels(class_names)))
    model = model.to_empty(device="cpu")
    weights = {f"beit.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if not re.search(_NOT_IN_BEIT, name)}
    if not encoder.config.qkv_bias:  # a BEiT has them
        biases = {name: x for name, x in model.state_dict().items() if re.search(r"\.[qv]_proj\.bias$", name)}
        weights |= {name: torch.zeros_like(bias) for name, bias in biases.items()}
    nn.init.ones_(model.beit.pooler.layernorm.weight)
    nn.init.zeros_(model.beit.pooler.layernorm.bias)
    backbone.init_head(model.classifier, seed)
    new = {name: x for name, x in model.state_dict().items() if name.startswith(("beit.pooler.", "classifier."))}
    model.load_state_dict(weights | new, strict=True)
    return model


def load_classifier(source: str, flag: str = "--model") -> Classifier:
    """Load a fine-tuned classifier from its folder or the Hub with every tensor, or fail, as `encoder.load_encoder`."""
    saved = SavedModel.find(source, flag)
    content = saved.read_json("config.json")
    if not saved.is_classifier:
        raise saved.error(f"it holds an encoder ({saved.model_type}): fine-tune it, and give that one's folder")
    # A BEiT that was a ViT has no relative position bias, and takes one size of images.
    relative = ("use_relative_position_bias", "use_shared_relative_position_bias")
    was_vit = saved.model_type == "beit" and not any(content.get(name) for name in relative)
    class_names = _class_names(saved, content.get("id2label"))
    architecture = backbone.read_config(saved, len(class_names))
    mean, std, image_size = saved.read_processor(getattr(architecture, "image_size", None), resizable=not was_vit)
    config = backbone.classifier_config(architecture, class_names)
    model = saved.load(backbone.classifier_class(config), config=config)
    return Classifier(source, model, mean, std, image_size, saved.read_training_images(), class_names)


def _class_names(saved: SavedModel, id2label: object) -> tuple[str, ...]:
    """The names of the classes "0", "1", ... of a `config.json`."""
    names = id2label if isinstance(id2label, dict) else {}
    ordered = tuple(names.get(str(c)) for c in range(len(names)))
    if (
        len(ordered) < 2
        or not all(name and isinstance(name, str) for name in ordered)
        or len(set(ordered)) < len(ordered)
    ):
        raise saved.error("config.json: id2label must name the classes 0, 1, ..., two at least, and each another name")
    return ordered
