"""Other backbones: opened with every tensor or refused, the tokens of every layer, frozen and fine-tuned."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from conftest import random_images
from safetensors.torch import load_file, save_file
from test_encoder import MEAN, STD
from test_fine_tuning import NAMES, QUICK, LabelledSplit
from transformers import AutoModel

import linear_probe_checkpoints
from galaxy_mae.catalogue.models import open_model
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation.features import encode, frozen_features
from galaxy_mae.evaluation.fine_tuning import FineTuningTrainer, classify, fine_tune, layer_wise_groups
from galaxy_mae.evaluation.probes import attention_queries
from galaxy_mae.model.backbone import baseline_config
from galaxy_mae.model.classifier import build_classifier, load_classifier
from galaxy_mae.model.encoder import encoder_fingerprint, load_encoder, random_encoder
from galaxy_mae.training.recipe import read_evaluation_recipe, set_batch_and_learning_rate

SIZES = {"image_size": 32, "patch_size": 8}
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = SIZES | TRANSFORMER | {"intermediate_size": 64}
DINOV2 = SIZES | TRANSFORMER | {"mlp_ratio": 2}
STAGES = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}
SWIN = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
TEXT |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
FAMILIES = {  # configuration, tokens of the last layer (rows, channels), whether there is a class token, layers
    "deit": (t.DeiTConfig(**VIT), (4, 32), True, 2),
    "dinov2": (t.Dinov2Config(**DINOV2), (4, 32), True, 2),
    "dinov2_registers": (t.Dinov2WithRegistersConfig(**DINOV2), (4, 32), True, 2),
    "dinov3": (t.DINOv3ViTConfig(**VIT, num_register_tokens=3, rope_theta=50.0), (4, 32), True, 2),
    "dinov3_convnext": (t.DINOv3ConvNextConfig(**STAGES), (1, 64), True, 4),
    "ijepa": (t.IJepaConfig(**VIT), (4, 32), False, 2),
    "beit": (t.BeitConfig(**VIT, use_relative_position_bias=True), (4, 32), True, 2),
    "clip": (t.CLIPVisionConfig(**VIT), (4, 32), True, 2),
    "clip_pair": (t.CLIPConfig(vision_config=VIT, text_config=TEXT), (4, 32), True, 2),
    "siglip": (t.SiglipVisionConfig(**VIT), (4, 32), False, 2),
    "siglip_pair": (t.SiglipConfig(vision_config=VIT, text_config=TEXT), (4, 32), False, 2),
    "swin": (t.SwinConfig(**SWIN), (8, 32), False, 2),
    "convnext": (t.ConvNextConfig(**STAGES), (1, 64), False, 4),
    "convnextv2": (t.ConvNextV2Config(**STAGES), (1, 64), False, 4),
    "resnet": (t.ResNetConfig(**STAGES, embedding_size=8, layer_type="basic"), (1, 64), False, 4),
}
WITHOUT_CLASSIFIER = ("dinov3", "dinov3_convnext")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of each family in which every tensor differs from its initialization, as transformers saves it."""
    root = tmp_path_factory.mktemp("backbones")
    for family, (config, *_) in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / family)
        processor = {"size": {"height": 32, "width": 32}, "image_mean": MEAN.tolist(), "image_std": STD.tolist()}
        (root / family / "preprocessor_config.json").write_text(json.dumps(processor))
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def copied(folders, tmp_path):
    """Copy a family's folder, so that it may be changed."""

    def copy(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        for path in folders[family].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


def change_json(folder: Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("_pair")])
def test_random_weights_have_positions(family):
    """Built by transformers from a configuration, those of DeiT, BEiT and Swin are zero."""
    model, again = (random_encoder(FAMILIES[family][0], seed=3) for _ in range(2))
    zero = [name for name, parameter in model.named_parameters() if not parameter.any()]
    assert not [name for name in zero if "position" in name or "token" in name]
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_auto_model(folders, family):
    _, (side, channels), has_cls, layers = FAMILIES[family]
    encoder = load_encoder(str(folders[family]))
    batches = GalaxyBatches(random_images(5), encoder.mean, encoder.std, encoder.image_size)
    (tokens,) = encode(encoder.model, batches, np.arange(5))
    model = AutoModel.from_pretrained(folders[family]).eval()
    with torch.no_grad():
        pixels = batches.eval_transform(batches.collate(list(range(5))))
        output = getattr(model, "vision_model", model)(pixels, output_hidden_states=True)
    last = output.last_hidden_state
    expected = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, -side * side :]
    assert len(tokens) == layers
    assert tokens[-1].patches.shape == (5, side, side, channels)
    assert torch.allclose(tokens[-1].patches.flatten(1, 2), expected, atol=1e-5)
    assert (tokens[-1].cls is not None) == has_cls
    if has_cls:
        assert torch.allclose(tokens[-1].cls, last[:, 0], atol=1e-5)
    first = (output.get("reshaped_hidden_states") or output.hidden_states)[1]
    if first.ndim == 4:
        assert torch.allclose(tokens[0].patches.permute(0, 3, 1, 2), first, atol=1e-5)
    else:
        assert torch.allclose(tokens[0].patches.flatten(1, 2), first[:, -side * side :], atol=1e-5)
    assert channels % attention_queries(encoder.model.config, channels) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_random_arm_has_the_same_architecture_and_no_weight_of_the_file(folders, family):
    encoder = load_encoder(str(folders[family]))
    state = torch.random.get_rng_state()
    one, again, other = (random_encoder(encoder.model.config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (encoder.model, one)]
    assert shapes[0] == shapes[1]
    fingerprints = [encoder_fingerprint(m, MEAN, STD, 32) for m in (one, again, other, encoder.model)]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
    assert encoder_fingerprint(one, MEAN, STD, 64) != fingerprints[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_would_be_partly_random_are_refused(copied, family):
    folder = copied(family)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if not any(part in name for part in ("text", "pool", "head", "proj", "logit"))]
    tensors.pop(next(name for name in names[::-1] if name.endswith("weight") and "mask" not in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("dinov2", "num_hidden_layers", 10**8, "more layers than"),
        ("dinov2", "hidden_size", 10**7, "describes"),
        ("deit", "image_size", 10**6, "describes"),
        ("dinov3", "num_attention_heads", 0, "describes no model"),
        ("swin", "window_size", 10**4, "describes"),
        ("swin", "depths", [1, 10**7], "more layers than"),
        ("resnet", "hidden_sizes", [10**6] * 4, "describes"),
        ("resnet", "depths", [[1]] * 4, "describes no model"),
        ("resnet", "layer_type", "planted", "describes no model"),
        ("convnext", "num_channels", 1, "1 channels|mismatched"),
        ("convnextv2", "hidden_sizes", [math.inf], "describes no model"),
        ("clip_pair", "vision_config", 3, "describes no model"),
    ],
)
def test_impossible_configurations_raise_user_error(copied, family, name, value, message):
    folder = copied(family)
    change_json(folder, "config.json", **{name: value})
    with pytest.raises(UserError, match=message):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}, 48),
        ({"size": {"shortest_edge": 40}}, 40),
        ({"size": 64}, 64),
        ({"size": {"height": 32, "width": 64}}, None),
        ({"size": 10**6}, None),
        ({"size": -1}, None),
        ({"size": {}}, None),
    ],
)
def test_image_size_is_that_of_the_image_processor_and_positions_are_interpolated(copied, settings, size):
    folder = copied("dinov2")
    change_json(folder, "preprocessor_config.json", **settings)
    if size is None:
        with pytest.raises(UserError, match="it makes images of size"):
            load_encoder(str(folder))
        return
    encoder = load_encoder(str(folder))
    assert encoder.image_size == size
    batches = GalaxyBatches(random_images(2), encoder.mean, encoder.std, size)  # enlarged
    ((*_, last),) = encode(encoder.model, batches, np.arange(2))
    assert last.patches.shape[1:3] == (size // 8, size // 8)


def test_frozen_features_of_layers_with_different_channels(folders, tmp_path):
    encoder = load_encoder(str(folders["convnextv2"]))
    batches = GalaxyBatches(random_images(20), encoder.mean, encoder.std, 32)
    for _ in range(2):  # the second time from the file
        features = frozen_features(encoder.model, batches, tmp_path / "a.npz")
        assert [layer.shape for layer in features.layers] == [(20, 8), (20, 16), (20, 32)]
        assert features.mean.shape == (20, 64)
        assert features.cls is None


def arguments(*flags: str):
    recipe = read_evaluation_recipe([*QUICK, *flags])
    set_batch_and_learning_rate(recipe.training, recipe.explicitly_set, bytes_per_image=1)
    return recipe.training


@pytest.fixture(scope="module")
def survey():
    label = np.random.default_rng(0).integers(0, 2, 100)
    images = random_images(100) // 2 + (30 * label).astype(np.uint8)[:, None, None, None]
    return GalaxyBatches(images, MEAN, STD, 32), LabelledSplit(np.arange(80), np.arange(80, 100), label, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*WITHOUT_CLASSIFIER}))
def test_fine_tuned_classifiers_are_opened_again(folders, survey, tmp_path, family):
    """By `catalogue predict`, with the same probabilities, and not as an encoder."""
    batches, labelled = survey
    encoder = load_encoder(str(folders[family]))
    start = build_classifier(encoder.model, NAMES, 0).state_dict()
    given = encoder.model.state_dict()
    copies = [name for name in start if any(name.endswith(f".{other}") for other in given)]
    assert len(copies) >= len(given)
    model, _ = fine_tune(encoder.model, batches, labelled, arguments("--num_train_epochs", "1"), tmp_path, "run", 0)
    opened = load_classifier(str(tmp_path))
    assert (opened.image_size, opened.class_names) == (32, NAMES)
    before, after = (classify(m, batches, labelled.validation) for m in (model, opened.model))
    assert np.array_equal(before, after)
    probabilities, features = next(open_model(str(tmp_path)).outputs(random_images(20)))
    assert probabilities.shape[2] == 2
    assert features.shape[1] == open_model(str(tmp_path)).num_features
    with pytest.raises(UserError, match="it holds a classifier"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("family", WITHOUT_CLASSIFIER)
def test_what_cannot_be_fine_tuned_says_so(folders, family):
    with pytest.raises(UserError, match="transformers has no classifier of a dinov3"):
        build_classifier(load_encoder(str(folders[family])).model, NAMES, 0)


@pytest.mark.parametrize(
    ("family", "layers"), [("dinov2", 2), ("clip", 2), ("swin", 2), ("convnext", 4), ("resnet", 4), ("deit", 2)]
)
def test_learning_rates_fall_from_the_head_to_the_embeddings(folders, family, layers):
    model = build_classifier(load_encoder(str(folders[family])).model, NAMES, 0)
    groups = layer_wise_groups(model, 1.0, 0.1, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == len(names)
    assert {rate for name, rate in rates.items() if "classifier" in name} == {1.0}
    assert {rate for name, rate in rates.items() if "embeddings" in name or "embedder" in name} == {0.5 ** (layers + 1)}
    assert set(rates.values()) == {0.5**n for n in range(layers + 2)}


@pytest.mark.slow
def test_networks_from_scratch_resume_bit_for_bit(survey, tmp_path, monkeypatch):
    batches, labelled = survey
    network = random_encoder(baseline_config("resnet18"), 3)
    assert network.num_parameters() == pytest.approx(11.18e6, rel=0.01)  # ResNet-18 without its head
    flags = arguments("--num_train_epochs", "2", "--layer_decay", "1")
    whole, params = fine_tune(network, batches, labelled, flags, tmp_path / "whole", "run", 3)
    train = FineTuningTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuningTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(network, batches, labelled, flags, tmp_path / "killed", "run", 3)
    resumed, again = fine_tune(network, batches, labelled, flags, tmp_path / "killed", "run", 3)
    assert params == again
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in whole.state_dict().items())


@pytest.mark.slow
def test_a_baseline_is_a_row_of_the_report(folders, tmp_path):
    command = ["--encoder", str(folders["resnet"]), "--dataset", "synthetic:300", "--output_dir", str(tmp_path)]
    command += ["--seeds", "1", *QUICK[2:], "--num_train_epochs", "1"]
    linear_probe_checkpoints.main([*command, "--baseline", "convnextv2_nano", "--label_fractions", "0.2", "1"])
    linear_probe_checkpoints.main([*command, "--method", "ssl_linear_probe"])
    linear_probe_checkpoints.main([*command, "--report"])
    report = (tmp_path / "report.md").read_text()
    few = json.loads((tmp_path / "label_efficiency_convnextv2_nano_from_scratch.json").read_text())
    found = {(point["classifier"], point["labels"]) for point in few["points"]}
    assert found == {("fine_tune", 48), ("fine_tune", 240)}
    assert all("best_epoch" in params for point in few["points"] for params in point["best_params"])  # no probe's
    for row in (
        "ConvNeXt V2 nano from scratch | 48 |",
        "ConvNeXt V2 nano from scratch |",
        "k-NN (20), SSL weights |",
        "Linear probe at the best layer",
    ):
        assert row in report
