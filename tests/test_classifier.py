"""Encoders and classifiers: the file's weights bit for bit or a refusal, random twins, layer-wise learning rates."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mae import official_positions, small_config
from transformers import ResNetConfig, ViTConfig

from galaxy_mae.classifier import (
    MeanPooledViTForImageClassification,
    build_classifier,
    encoder_fingerprint,
    layer_wise_groups,
    load_encoder,
    random_encoder,
)
from galaxy_mae.errors import UserError
from galaxy_mae.mae import build_mae, save_encoder

MEAN, DEVIATION = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])


@pytest.fixture
def mae():
    """An autoencoder whose every tensor differs from every initialisation, as after training."""
    model = build_mae(small_config(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def folder(tmp_path, mae):
    save_encoder(mae, tmp_path / "encoder", MEAN, DEVIATION, ("a", "b"))
    return tmp_path / "encoder"


@pytest.fixture(scope="module")
def names():
    return ("smooth", "spiral", "edge-on")


def test_classifier_starts_from_the_files_encoder_bit_for_bit(mae, folder, names):
    encoder = load_encoder(str(folder))
    model = build_classifier(encoder.model, names, seed=0)
    expected = mae.vit.state_dict()
    assert model.vit.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.vit.state_dict().items())
    assert encoder.mean.tolist() == MEAN.tolist()
    assert encoder.deviation.tolist() == DEVIATION.tolist()
    assert not encoder.model.training


def test_features_of_a_loaded_encoder_are_those_of_the_autoencoder(mae, folder):
    """The whole image, unmasked and unshuffled, through the autoencoder's own layers."""
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeddings = mae.vit.embeddings
        tokens = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(2, -1, -1)
        hidden = torch.cat([first, tokens], dim=1)
        for layer in mae.vit.layers:
            hidden = layer(hidden)
        expected = mae.vit.layernorm(hidden)
        features = load_encoder(str(folder)).model(pixels).last_hidden_state
    assert torch.allclose(features, expected, atol=1e-6)


def test_run_folder_encoder_folder_and_whole_autoencoder_are_the_same_encoder(mae, folder, tmp_path):
    mae.save_pretrained(tmp_path / "mae", save_original_format=False)
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "mae")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"data": "x"}, "finished": True, "sessions": []}))
    encoders = [load_encoder(str(place)) for place in (tmp_path, folder, tmp_path / "mae")]
    assert len({encoder_fingerprint(e.model, e.mean, e.deviation) for e in encoders}) == 1
    assert [encoder.pretraining for encoder in encoders] == [{"data": "x"}] * 3


def test_random_encoder_has_the_official_initialisation_and_none_of_the_files_weights(folder):
    trained = load_encoder(str(folder)).model
    encoder = random_encoder(trained.config, seed=3)
    assert type(encoder) is type(trained)
    positions = encoder.embeddings.position_embeddings[0]
    assert torch.allclose(positions, torch.tensor(official_positions(48, 4)), atol=1e-6)
    for name, parameter in encoder.named_parameters():
        file = trained.get_parameter(name)
        assert parameter.requires_grad == file.requires_grad  # the same positions frozen or trained
        assert not torch.equal(parameter, file)
        if name.endswith("weight") and parameter.ndim == 2:
            limit = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * limit < parameter.abs().max() <= limit
    again = random_encoder(trained.config, seed=3)
    assert encoder_fingerprint(again, MEAN, DEVIATION) == encoder_fingerprint(encoder, MEAN, DEVIATION)
    other = random_encoder(trained.config, seed=4)
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, other.layers[0].mlp.fc1.weight)
    assert encoder_fingerprint(encoder, MEAN, DEVIATION) != encoder_fingerprint(other, MEAN, DEVIATION)


def test_both_arms_train_the_same_parameters_at_the_same_rates(folder, names):
    trained = load_encoder(str(folder)).model
    arms = [build_classifier(e, names, seed=0) for e in (trained, random_encoder(trained.config, 0))]
    groups = [layer_wise_groups(model, 1e-3, 0.05, 0.5) for model in arms]
    shapes = [
        [(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in arm_groups]
        for arm_groups in groups
    ]
    assert shapes[0] == shapes[1]
    assert torch.equal(arms[0].classifier.weight, arms[1].classifier.weight)


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(KEY), "missing"),
        (lambda t: t.update({KEY.replace("dense", "dence"): t.pop(KEY)}), "missing"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), "mismatched"),
        (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(48)}), "unexpected"),
        (lambda t: t.update({"embeddings.position_embeddings": torch.ones(1, 65, 48)}), "mismatched"),
        (lambda t: t["embeddings.position_embeddings"].zero_(), "positions are all zero"),
        (lambda t: t[KEY].fill_(torch.nan), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, named):
    change_tensors(folder, change)
    with pytest.raises(UserError, match=named):
        load_encoder(str(folder))


def test_wrong_places_and_architectures_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_encoder(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no encoder there"):
        load_encoder(str(tmp_path / "empty"))
    unfinished = {"recipe": {}, "finished": False, "sessions": []}
    (tmp_path / "empty" / "run.json").write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match="not finished"):
        load_encoder(str(tmp_path / "empty"))
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="architecture is resnet"):
        load_encoder(str(tmp_path / "resnet"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded.*preprocessor_config"):
        load_encoder(str(folder))


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(folder))


def test_classifier_pools_the_patches_and_survives_a_round_trip(tmp_path, names):
    config = ViTConfig(**{k: v for k, v in small_config().to_dict().items() if k in ViTConfig().to_dict()})
    model = build_classifier(random_encoder(config, 0), names, seed=0).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
        pixels = torch.randn(4, 3, 32, 32)
        tokens = model.vit(pixels).last_hidden_state[:, 1:]
        normalised = torch.nn.functional.layer_norm(tokens.mean(dim=1), (48,), eps=1e-6)
        expected = normalised @ model.classifier.weight.T
        output = model(pixels, labels=torch.tensor([0, 1, 2, 0]))
        soft = model(pixels, labels=torch.eye(3)[[0, 1, 2, 0]])
    assert torch.allclose(output.logits, expected, atol=1e-4)
    assert output.loss == pytest.approx(float(-expected.log_softmax(1)[range(4), [0, 1, 2, 0]].mean()), rel=1e-5)
    assert soft.loss == pytest.approx(float(output.loss), rel=1e-6)
    model.save_pretrained(tmp_path, save_original_format=False)
    again = MeanPooledViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.config.id2label == dict(enumerate(names))


def test_learning_rates_fall_from_the_head_to_the_patches(folder, names):
    """util/lr_decay.py of facebookresearch/mae: two layers, so scales 1, 1/2, 1/4, 1/8."""
    model = build_classifier(load_encoder(str(folder)).model, names, seed=0)
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
    assert groups[0]["lr"] == 8e-3  # the Trainer logs the first
