"""Encoders: loaded with exactly the weights of a file or not at all; random ones are officially initialized."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mae import official_positions, small_config
from transformers import ResNetConfig

from galaxy_mae.errors import UserError
from galaxy_mae.model.encoder import encoder_fingerprint, load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, save_encoder

MEAN, STD = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
KEY = "encoder.layer.1.intermediate.dense.weight"  # one tensor of the encoder's file


@pytest.fixture
def mae():
    """An autoencoder in which every tensor differs from every initialization, as after training."""
    model = build_mae(small_config(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def folder(tmp_path, mae):
    save_encoder(mae, tmp_path / "encoder", MEAN, STD, ("a", "b"))
    return tmp_path / "encoder"


def change_tensors(folder, change) -> None:
    """Apply a function to the tensors of an encoder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loaded_encoder_has_the_weights_and_normalization_of_the_file(mae, folder):
    encoder = load_encoder(str(folder))
    expected = mae.vit.state_dict()
    assert encoder.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.model.state_dict().items())
    assert encoder.mean.tolist() == MEAN.tolist()
    assert encoder.std.tolist() == STD.tolist()
    assert not encoder.model.training


def test_features_of_a_loaded_encoder_equal_those_of_the_autoencoder(mae, folder):
    """The complete image, unmasked and unshuffled, through the autoencoder's own layers."""
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeddings = mae.vit.embeddings
        tokens = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(2, -1, -1)
        states = torch.cat([first, tokens], dim=1)
        for layer in mae.vit.layers:
            states = layer(states)
        expected = mae.vit.layernorm(states)
        features = load_encoder(str(folder)).model(pixels).last_hidden_state
    assert torch.allclose(features, expected, atol=1e-6)


def test_run_folder_encoder_folder_and_autoencoder_folder_give_the_same_encoder(mae, folder, tmp_path):
    mae.save_pretrained(tmp_path / "mae", save_original_format=False)
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "mae")
    encoders = [load_encoder(str(place)) for place in (tmp_path, folder, tmp_path / "mae")]
    assert len({encoder_fingerprint(e.model, e.mean, e.std) for e in encoders}) == 1


def test_random_encoder_has_the_official_initialization_and_no_weight_of_the_file(folder):
    trained = load_encoder(str(folder)).model
    encoder = random_encoder(trained.config, seed=3)
    assert type(encoder) is type(trained)
    positions = encoder.embeddings.position_embeddings[0]
    assert torch.allclose(positions, torch.tensor(official_positions(48, 4)), atol=1e-6)
    for name, parameter in encoder.named_parameters():
        pretrained = trained.get_parameter(name)
        assert parameter.requires_grad == pretrained.requires_grad  # the same position embeddings frozen or trained
        assert not torch.equal(parameter, pretrained)
        if name.endswith("weight") and parameter.ndim == 2:
            limit = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * limit < parameter.abs().max() <= limit
    again = random_encoder(trained.config, seed=3)
    assert encoder_fingerprint(again, MEAN, STD) == encoder_fingerprint(encoder, MEAN, STD)
    other = random_encoder(trained.config, seed=4)
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, other.layers[0].mlp.fc1.weight)
    assert encoder_fingerprint(encoder, MEAN, STD) != encoder_fingerprint(other, MEAN, STD)


def test_fingerprint_depends_on_weights_normalization_and_sizes(folder):
    model = load_encoder(str(folder)).model
    fingerprints = {encoder_fingerprint(model, MEAN, STD), encoder_fingerprint(model, STD, MEAN)}
    model.config.layer_norm_eps = 1e-12
    fingerprints.add(encoder_fingerprint(model, MEAN, STD))
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-6
    fingerprints.add(encoder_fingerprint(model, MEAN, STD))
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "missing"),
        (lambda t: t.update({KEY.replace("dense", "dence"): t.pop(KEY)}), "missing"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), "mismatched"),
        (lambda t: t.update({"encoder.layer.2.output.dense.bias": torch.zeros(48)}), "unexpected"),
        (lambda t: t.update({"embeddings.position_embeddings": torch.ones(1, 65, 48)}), "mismatched"),
        (lambda t: t["embeddings.position_embeddings"].zero_(), "position embeddings are all zero"),
        (lambda t: t[KEY].fill_(torch.nan), "not finite"),
    ],
)
def test_weights_that_do_not_fit_raise_user_error(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        load_encoder(str(folder))


def test_wrong_folders_and_architectures_raise_user_error(folder, tmp_path):
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


def test_code_beside_an_encoder_is_never_run(folder, tmp_path, monkeypatch):
    """Even if the standard input says "y" to transformers' question."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "planted.py").write_text(f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="cannot be opened"):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(folder))
