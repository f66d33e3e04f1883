"""The classifier: transformers' BEiT with the encoder's exact weights, complete or refused, at layer-wise rates."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_encoder import MEAN, STD
from test_mae import small_config
from transformers import BeitForImageClassification, ViTConfig, ViTModel

from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.fine_tuning import layer_wise_groups
from galaxy_mae.model.classifier import build_classifier, load_classifier
from galaxy_mae.model.encoder import load_encoder, random_encoder
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.model.saved_model import SavedModel, save_model

NAMES = ("smooth", "spiral", "edge-on")
KEY = "beit.encoder.layer.1.intermediate.dense.weight"  # one tensor of the classifier's file


@pytest.fixture
def trained(tmp_path):
    """A loaded encoder in which every tensor differs from every initialization, as after training."""
    mae = build_mae(small_config(), seed=1)
    with torch.no_grad():
        for name, parameter in mae.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1 if name.endswith("k_proj.bias") else 0.05))
    save_encoder(mae, tmp_path / "encoder", MEAN, STD, ("a", "b"))
    return load_encoder(str(tmp_path / "encoder")).model


@pytest.fixture
def folder(tmp_path, trained):
    """A saved classifier, as after fine-tuning."""
    save_model(randomized(build_classifier(trained, NAMES, seed=0)), tmp_path / "classifier", MEAN, STD)
    return tmp_path / "classifier"


@torch.no_grad()
def randomized(model):
    """The model in evaluation mode, with a head and a norm as after training."""
    for parameter in (model.classifier.weight, model.classifier.bias, *model.beit.pooler.layernorm.parameters()):
        parameter.add_(torch.randn_like(parameter))
    return model.eval()


def test_logits_are_those_of_the_encoder_with_mean_pooling_and_the_head(trained):
    """He et al. 2022, appendix A.1: no LayerNorm at the encoder's end, but one on the mean of the patch tokens."""
    model, pixels = randomized(build_classifier(trained, NAMES, seed=0)), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        states = trained.embeddings(pixels)
        for layer in trained.layers:
            states = layer(states)
        norm = model.beit.pooler.layernorm
        pooled = F.layer_norm(states[:, 1:].mean(dim=1), (48,), norm.weight, norm.bias, eps=1e-6)
        expected = F.linear(pooled, model.classifier.weight, model.classifier.bias)
        assert torch.allclose(model(pixels).logits, expected, atol=1e-5)
    assert expected.std() > 0.3
    assert trained.layers[0].attention.k_proj.bias.std() > 0.5  # which the classifier does not have


def test_classifier_has_a_copy_of_the_encoders_weights_and_a_new_head(trained):
    model = build_classifier(trained, NAMES, seed=0)
    expected, taken = trained.state_dict(), model.state_dict()
    new = {"classifier.weight", "classifier.bias", "beit.pooler.layernorm.weight", "beit.pooler.layernorm.bias"}
    copied = {name: value for name, value in taken.items() if name not in new}
    assert all(torch.equal(value, expected[name.removeprefix("beit.")]) for name, value in copied.items())
    assert all(value.data_ptr() != expected[name.removeprefix("beit.")].data_ptr() for name, value in copied.items())
    left_out = expected.keys() - {name.removeprefix("beit.") for name in copied}
    assert left_out == {"layernorm.weight", "layernorm.bias", *(f"layers.{i}.attention.k_proj.bias" for i in range(2))}
    assert taken["beit.pooler.layernorm.weight"].tolist() == [1] * 48
    assert not taken["beit.pooler.layernorm.bias"].any()
    assert not taken["classifier.bias"].any()
    assert float(taken["classifier.weight"].std()) == pytest.approx(2e-5, rel=0.2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_encoder_without_biases_gets_zero_ones(trained):
    config = ViTConfig(**{**trained.config.to_dict(), "qkv_bias": False})
    encoder, pixels = random_encoder(config, seed=0), torch.randn(2, 3, 32, 32)
    model = build_classifier(encoder, NAMES, seed=0).eval()
    with torch.no_grad():
        tokens = model.beit(pixels).last_hidden_state
        assert torch.allclose(encoder.layernorm(tokens), encoder(pixels).last_hidden_state, atol=1e-5)


def test_both_initializations_train_the_same_parameters_at_the_same_rates(trained):
    models = [build_classifier(e, NAMES, seed=0) for e in (trained, random_encoder(trained.config, 0))]
    groups = [layer_wise_groups(model, 1e-3, 0.05, 0.5) for model in models]
    shapes = [
        [(group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in model_groups]
        for model_groups in groups
    ]
    assert shapes[0] == shapes[1]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)


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
    assert by_name["classifier.bias"] == by_name["beit.pooler.layernorm.weight"] == (8e-3, 0.0)
    assert by_name["beit.layers.1.mlp.fc1.weight"] == (4e-3, 0.05)
    assert by_name["beit.layers.0.mlp.fc1.weight"] == (2e-3, 0.05)
    assert by_name["beit.layers.0.mlp.fc1.bias"] == (2e-3, 0.0)
    assert by_name["beit.embeddings.patch_embeddings.projection.weight"] == (1e-3, 0.05)
    assert by_name["beit.embeddings.cls_token"] == by_name["beit.embeddings.position_embeddings"] == (1e-3, 0.0)
    assert groups[0]["lr"] == 8e-3  # the Trainer logs the first one


# ------------------------------------------------------------------------------------------------------ saving, loading


def test_loaded_classifier_is_the_saved_one(folder, trained):
    model, pixels = randomized(build_classifier(trained, NAMES, seed=3)), torch.randn(2, 3, 32, 32)
    save_model(model, folder, MEAN, STD)
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert len({path.stat().st_mode for path in files}) == 1  # safetensors makes its files private
    loaded = load_classifier(str(folder))
    assert torch.equal(loaded.model(pixels).logits, model(pixels).logits)
    assert type(loaded.model) is BeitForImageClassification
    assert not loaded.model.training
    assert (loaded.mean.tolist(), loaded.std.tolist()) == (MEAN.tolist(), STD.tolist())
    assert loaded.class_names == NAMES
    assert loaded.name == str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "1 missing keys"),
        (lambda t: t.pop("classifier.bias"), "1 missing keys, among them classifier.bias"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), "mismatched"),
        (lambda t: t.update({"beit.encoder.layer.2.output.dense.bias": torch.zeros(48)}), "unexpected"),
        (lambda t: t.update({"beit.layernorm.weight": torch.ones(48)}), "unexpected"),
        (lambda t: t.update({"beit.encoder.layer.0.lambda_1": torch.ones(48)}), "unexpected"),
        (lambda t: t.update({"classifier.weight": torch.ones(4, 48)}), "mismatched"),
        (lambda t: t["beit.embeddings.position_embeddings"].zero_(), "position embeddings are all zero"),
        (lambda t: t["classifier.weight"].fill_(torch.nan), "not finite"),
    ],
)
def test_weights_that_do_not_fit_raise_user_error(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("problem_type", "multi_label_classification", r"holds an encoder \(beit\)"),
        ("num_hidden_layers", 10**9, "must be an integer from 1 to 1000"),
        ("num_hidden_layers", "2", "num_hidden_layers"),
        ("hidden_size", 0, "hidden_size 0: it must be an integer from 1 to 65536"),
        ("id2label", None, "id2label must name the classes"),
        ("id2label", {"0": "one"}, "two at least"),
        ("id2label", {"0": "a", "2": "b"}, "id2label must name the classes"),
        ("id2label", {"0": "a", "1": ""}, "id2label must name the classes"),
        ("id2label", {"0": "a", "1": ["b"]}, "id2label must name the classes"),
        ("id2label", {"0": "a", "1": "a", "2": "b"}, "each another name"),
        ("id2label", {str(c): str(c) for c in range(4)}, "mismatched"),
        ("id2label", {str(c): str(c) for c in range(10**4)}, "config.json describes"),
    ],
)
def test_impossible_configurations_raise_user_error(folder, name, value, message):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(UserError, match=message):
        load_classifier(str(folder))


def test_what_a_classifier_does_not_need_of_a_configuration_is_not_read(folder):
    content = json.loads((folder / "config.json").read_text())
    planted = {"dtype": "float16", "num_labels": 10**9, "auto_map": 3, "out_indices": ["x"], "label2id": []}
    (folder / "config.json").write_text(json.dumps(content | planted))
    assert load_classifier(str(folder)).model.dtype == torch.float32


def test_each_kind_of_model_is_named_and_refused_by_the_others_loader(folder, tmp_path):
    """The error names the flag that was given."""
    build_mae(small_config()).save_pretrained(tmp_path / "mae", save_original_format=False)
    encoder = str(tmp_path / "encoder")
    places = (folder, encoder, tmp_path, tmp_path / "mae")
    kinds = [SavedModel.find(str(place), "--model").is_classifier for place in places]
    assert kinds == [True, False, False, False]
    with pytest.raises(UserError, match=r"^--query .*classifier: it holds a classifier \(beit\)"):
        load_encoder(str(folder), "--query")
    with pytest.raises(UserError, match=r"^--model .*encoder: it holds an encoder \(vit\)"):
        load_classifier(encoder)
    with pytest.raises(UserError, match=r"^--model .*nothing: no such folder"):
        SavedModel.find(str(tmp_path / "nothing"), "--model")
    ViTModel(ViTConfig(num_hidden_layers=1)).config.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "efficientnet"}')
    with pytest.raises(UserError, match=r"^--model .*its architecture is efficientnet"):
        load_classifier(str(tmp_path / "other"))
