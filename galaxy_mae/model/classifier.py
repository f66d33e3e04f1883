"""The classifier of fine-tuning: an encoder, mean pooling and a linear head."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MeanPooledViTForImageClassification(ViTPreTrainedModel):
    """A ViT with a linear head on the LayerNorm of the mean patch token (He et al. 2022, appendix A.1)."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, 3, S, S) float32, normalized.
            labels: (B,) int64 classes or (B, K) float32 probabilities; with them the output has the mean cross-entropy.

        Returns:
            `logits` (B, K) and, with labels, `loss`.
        """
        tokens = self.vit(pixel_values).last_hidden_state  # (B, 1 + patches, hidden size)
        logits = self.classifier(self.norm(tokens[:, 1:].mean(dim=1)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def build_classifier(encoder: ViTModel, class_names: tuple[str, ...], seed: int) -> MeanPooledViTForImageClassification:
    """A classifier with a copy of the encoder's weights and the official head: truncated normal, std 2e-5."""
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
