"""Encoders: loaded with exactly the weights of a file or not at all; random ones are officially initialized."""

import contextlib
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mae import load_mae, official_positions, small_config
from transformers import EfficientNetConfig, ViTImageProcessorPil

from galaxy_mae.errors import UserError
from galaxy_mae.model.classifier import build_classifier, load_classifier
from galaxy_mae.model.encoder import encoder_fingerprint, load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.model.saved_model import save_model

MEAN, STD = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
SIZES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
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
    with pytest.raises(UserError, match="no model there"):
        load_encoder(str(tmp_path / "empty"))
    unfinished = {"id": "x", "recipe": {}, "finished": False, "sessions": []}
    (tmp_path / "empty" / "run.json").write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match="not finished"):
        load_encoder(str(tmp_path / "empty"))
    EfficientNetConfig().save_pretrained(tmp_path / "efficientnet")
    with pytest.raises(UserError, match="architecture is efficientnet"):
        load_encoder(str(tmp_path / "efficientnet"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded.*preprocessor_config"):
        load_encoder(str(folder))


@pytest.mark.parametrize("model_type", ["vit", "vit_mae", "beit", "planted"])
@pytest.mark.parametrize("load", [load_encoder, load_mae, load_classifier])
def test_code_beside_a_model_is_never_run(mae, folder, tmp_path, monkeypatch, load, model_type):
    """Even if the standard input says "y" to transformers' question."""
    if load is load_mae:
        mae.save_pretrained(folder, save_original_format=False)
    if load is load_classifier:
        save_model(build_classifier(load_encoder(str(folder)).model, ("a", "b"), seed=0), folder, MEAN, STD)
    names = ("AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoImageProcessor", "AutoProcessor")
    for file in ("config.json", "preprocessor_config.json"):
        change_json(folder, file, auto_map=dict.fromkeys(names, "planted.Planted"))
    change_json(folder, "config.json", model_type=model_type)
    (folder / "planted.py").write_text(f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(UserError):
        load(folder if load is load_mae else str(folder))
    assert not (tmp_path / "ran").exists()


def change_json(folder, file, **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, value, name) for name in SIZES for value in (0, -8, None, "8", 8.0, [8, 8], math.nan)),
        *((name, 10**9, "must be an integer from 1 to") for name in SIZES),
        ("num_hidden_layers", 10**5, "must be an integer from 1 to 1000"),
        ("image_size", 36, "image_size 36 is not divisible by patch_size 8"),
        ("num_attention_heads", 5, "hidden_size 48 is not divisible by num_attention_heads 5"),
        ("hidden_size", 51, "multiple of 4"),
        ("hidden_act", "nonsense", "config.json describes no model .*nonsense"),
        ("hidden_act", None, "hidden_act"),
        ("hidden_act", ["gelu"], "hidden_act"),
        ("num_channels", 1, "1 channels"),
        ("num_channels", None, "num_channels"),
        ("qkv_bias", "x", "qkv_bias"),
        ("qkv_bias", False, "unexpected"),
        ("model_type", ["vit"], "architecture is"),
        ("model_type", None, "architecture is"),
    ],
)
def test_impossible_configurations_raise_user_error(folder, name, value, message):
    change_json(folder, "config.json", **{name: value})
    with pytest.raises(UserError, match=message):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "nonsense"),
        ("dtype", "float16"),
        ("num_labels", 10**9),
        ("id2label", []),
        ("quantization_config", []),
        ("attn_implementation", "nonsense"),
        ("return_dict", False),
        ("initializer_range", None),
        ("auto_map", 3),
    ],
)
def test_what_an_encoder_does_not_need_of_a_configuration_is_not_read(folder, name, value):
    before = load_encoder(str(folder))
    change_json(folder, "config.json", **{name: value})
    encoder = load_encoder(str(folder))
    assert encoder.model.dtype == torch.float32
    assert encoder_fingerprint(encoder.model, encoder.mean, encoder.std) == encoder_fingerprint(
        before.model, before.mean, before.std
    )


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "3", '"vit"', "{", "[" * 100_000, "\xff", "NaN"])
def test_damaged_json_raises_user_error(folder, file, content):
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=f"{file}: (cannot be read|does not hold).*save or copy it again"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("image_std", value) for value in ([0, 0, 0], [0.1, 0.2, 0], [-0.1, 0.2, 0.3], [1e-320] * 3, [math.inf] * 3)),
        *((name, value) for name in ("image_mean", "image_std") for value in (None, [0.1, 0.2], [], [0.5] * 4, 0.5)),
        *((name, value) for name in ("image_mean", "image_std") for value in ("x", ["a"] * 3, [None] * 3, {})),
        *((name, [value] * 3) for name in ("image_mean", "image_std") for value in (math.nan, 10**400, [0.5])),
        *(("rescale_factor", value) for value in (0, -1, None, "x", [1], math.nan)),
        *(
            ("size", value)
            for value in (64, 0, None, [], "x", {"height": 64, "width": 64}, {"height": 32, "width": 64})
        ),
    ],
)
def test_impossible_image_processors_raise_user_error(folder, name, value):
    change_json(folder, "preprocessor_config.json", **{name: value})
    with pytest.raises(UserError, match=r"preprocessor_config\.json: .*(image_|size|rescale_factor)"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_rescale": False, "image_mean": [25.5, 51, 76.5], "image_std": [102, 127.5, 153]},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_normalization_is_that_of_the_image_processor(folder, settings):
    """Whatever its rescaling: here pixels are divided by 255 first."""
    change_json(folder, "preprocessor_config.json", **settings)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = ViTImageProcessorPil.from_pretrained(folder)(image, return_tensors="np")["pixel_values"][0]
    encoder = load_encoder(str(folder))
    pixels = (image / 255 - encoder.mean) / encoder.std
    assert pixels.transpose(2, 0, 1) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}", None])
def test_damaged_weights_raise_user_error(folder, content):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8] if content is None else content)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded.*save or copy it again"):
        load_encoder(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(folder, dtype):
    """As those of the random encoders that they are compared with."""
    change_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    change_json(folder, "config.json", dtype=str(dtype).removeprefix("torch."))
    assert load_encoder(str(folder)).model.dtype == torch.float32
    change_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}))
    with pytest.raises(UserError, match=r"holds .*I8"):
        load_encoder(str(folder))


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(folder))
