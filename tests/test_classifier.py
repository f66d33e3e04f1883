"""The classifier: starts from the encoder's exact weights, pools the patches, and learns at layer-wise rates."""

import pytest
import torch
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import ViTConfig

from galaxy_mae.model.classifier import MeanPooledViTForImageClassification, build_classifier
from galaxy_mae.model.encoder import load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.training.parameter_groups import layer_wise_groups

NAMES = ("smooth", "spiral", "edge-on")


@pytest.fixture
def trained(tmp_path):
    """A loaded encoder in which every tensor differs from every initialization, as after training."""
    mae = build_mae(small_config(), seed=1)
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_encoder(mae, tmp_path / "encoder", MEAN, STD, ("a", "b"))
    return load_encoder(str(tmp_path / "encoder")).model


def test_classifier_starts_from_exactly_the_encoder(trained):
    model = build_classifier(trained, NAMES, seed=0)
    expected = trained.state_dict()
    assert model.vit.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.vit.state_dict().items())
    assert all(value.data_ptr() != expected[name].data_ptr() for name, value in model.vit.state_dict().items())


def test_both_initializations_train_the_same_parameters_at_the_same_rates(trained):
    models = [build_classifier(e, NAMES, seed=0) for e in (trained, random_encoder(trained.config, 0))]
    groups = [layer_wise_groups(model, 1e-3, 0.05, 0.5) for model in models]
    shapes = [
        [(group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in model_groups]
        for model_groups in groups
    ]
    assert shapes[0] == shapes[1]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)


def test_classifier_pools_the_patches_and_survives_a_round_trip(tmp_path):
    config = ViTConfig(**{k: v for k, v in small_config().to_dict().items() if k in ViTConfig().to_dict()})
    model = build_classifier(random_encoder(config, 0), NAMES, seed=0).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
        pixels = torch.randn(4, 3, 32, 32)
        tokens = model.vit(pixels).last_hidden_state[:, 1:]
        normalized = torch.nn.functional.layer_norm(tokens.mean(dim=1), (48,), eps=1e-6)
        expected = normalized @ model.classifier.weight.T
        output = model(pixels, labels=torch.tensor([0, 1, 2, 0]))
        soft = model(pixels, labels=torch.eye(3)[[0, 1, 2, 0]])
    assert torch.allclose(output.logits, expected, atol=1e-4)
    assert output.loss == pytest.approx(float(-expected.log_softmax(1)[range(4), [0, 1, 2, 0]].mean()), rel=1e-5)
    assert soft.loss == pytest.approx(float(output.loss), rel=1e-6)
    model.save_pretrained(tmp_path, save_original_format=False)
    again = MeanPooledViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.config.id2label == dict(enumerate(NAMES))


def test_learning_rates_fall_from_the_head_to_the_patches(trained):
    """util/lr_decay.py of facebookresearch/mae: two layers, so the scales are 1, 1/2, 1/4, 1/8."""
    model = build_classifier(trained, NAMES, seed=0)
    groups = layer_wise_groups(model, 8e-3, 0.05, 0.5)
    by_name = {
        name: (group["lr"], group["weight_decay"])
        for group in groups
        for name, parameter in model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert len(by_name) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    assert by_name["classifier.weight"] == (8e-3, 0.05)
    assert by_name["classifier.bias"] == by_name["norm.weight"] == by_name["vit.layernorm.weight"] == (8e-3, 0.0)
    assert by_name["vit.layers.1.mlp.fc1.weight"] == (4e-3, 0.05)
    assert by_name["vit.layers.0.mlp.fc1.weight"] == (2e-3, 0.05)
    assert by_name["vit.layers.0.mlp.fc1.bias"] == (2e-3, 0.0)
    assert by_name["vit.embeddings.patch_embeddings.projection.weight"] == (1e-3, 0.05)
    assert by_name["vit.embeddings.cls_token"] == by_name["vit.embeddings.position_embeddings"] == (1e-3, 0.0)
    assert groups[0]["lr"] == 8e-3  # the Trainer logs the first one
