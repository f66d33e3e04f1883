"""Which parameters get weight decay, and the layer-wise learning rates of fine-tuning."""

import re

from torch import nn
from transformers import BeitForImageClassification


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay in pre-training: matrices, not biases, LayerNorms or tokens."""
    return [name for name, parameter in model.named_parameters() if parameter.squeeze().ndim > 1]


def layer_wise_groups(
    model: BeitForImageClassification, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups whose learning rates fall by a factor of `layer_decay` per layer, from the head to the patches.

    As facebookresearch/mae (util/lr_decay.py): embeddings are layer 0, the head and the norm before it the last one.
    No weight decay on vectors, the class token and the position embeddings. The head's groups come first.
    """
    last = model.config.num_hidden_layers + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = re.match(r"beit\.layers\.(\d+)\.", name)
        outside = 0 if name.startswith("beit.embeddings.") else last
        depth = int(layer[1]) + 1 if layer else outside
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
