"""The layer-wise learning rates of fine-tuning, and which of its parameters get weight decay."""

import re

from torch import nn
from transformers import PreTrainedModel

_LAYER = re.compile(r"\.(?:layers?|stages)\.(\d+)\.")  # the first match is the outermost
_NO_WEIGHT_DECAY = ("_token", "_tokens", "position_embeddings", "position_embedding.weight", "position_bias_table")


def layer_wise_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups whose learning rates fall by a factor of `layer_decay` per layer, from the head to the patches.

    As facebookresearch/mae (util/lr_decay.py): embeddings are layer 0, the head and the norm before it the last one.
    The layers of a hierarchical model are its stages. A model without layers that are known has one learning rate. No
    weight decay on vectors, tokens and position embeddings. The head's groups come first.
    """
    layers = {name: _LAYER.search(name) for name, _ in model.named_parameters()}
    numbers = [int(layer[1]) for layer in layers.values() if layer]
    last = max(numbers, default=-1) + 2
    outside = 0 if numbers else last
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if layer := layers[name]:
            outside = last  # what is defined before the layers are embeddings, what comes after them norm and head
        depth = int(layer[1]) + 1 if layer else outside
        decayed = parameter.squeeze().ndim > 1 and not name.endswith(_NO_WEIGHT_DECAY)
        groups.setdefault((depth, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (last - depth),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda item: -item[0][0])
    ]
