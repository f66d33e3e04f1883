"""The model: the official initialization, a self-check that finds silent faults, an encoder that transformers opens."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRANSFORMERS_5_17
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.models.vit.modeling_vit import eager_attention_forward

from galaxy_mae.errors import UserError
from galaxy_mae.model import attention
from galaxy_mae.model.attention import cpu_bfloat16_attention, fuse_qkv
from galaxy_mae.model.classifier import build_classifier
from galaxy_mae.model.compute import (
    measure_classifier,
    measure_cost,
    num_patches,
    select_attn_implementation,
    use_free_cores,
)
from galaxy_mae.model.mae import (
    attention_layers,
    build_mae,
    check_mae,
    encoder_of,
    init_mae,
    loss_per_image,
    measure_mae,
    return_only_loss_in_training,
    save_encoder,
    validate_config,
)
from galaxy_mae.model.saved_model import SavedModel

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 1,
    "decoder_intermediate_size": 128,
    "layer_norm_eps": 1e-6,
}


def small_config(**changes) -> ViTMAEConfig:
    return ViTMAEConfig(**(SMALL | changes))


def official_positions(hidden_size: int, grid: int) -> list[list[float]]:
    """util/pos_embed.py of facebookresearch/mae, number by number: columns first, class token zero."""
    table = [[0.0] * hidden_size]
    for row in range(grid):
        for column in range(grid):
            line = []
            for place in (column, row):
                angles = [place / 10000 ** (k / (hidden_size / 4)) for k in range(hidden_size // 4)]
                line += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(line)
    return table


def check_initialization(model: ViTMAEForPreTraining) -> None:
    config, embeddings, decoder = model.config, model.vit.embeddings, model.decoder
    grid = config.image_size // config.patch_size
    for table, hidden_size in (
        (embeddings.position_embeddings, config.hidden_size),
        (decoder.decoder_pos_embed, config.decoder_hidden_size),
    ):
        assert not table.requires_grad
        assert np.allclose(table[0].detach().numpy(), official_positions(hidden_size, grid), atol=1e-6)
    for token in (embeddings.cls_token, decoder.mask_token):
        assert 0.015 < float(token.detach().std()) < 0.025
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 6 * (config.num_hidden_layers + config.decoder_num_hidden_layers) + 2
    for layer in linear:
        check_xavier(layer.weight, layer.in_features, layer.out_features)
        assert not layer.bias.any()
    projection = embeddings.patch_embeddings.projection
    fan_in = config.num_channels * config.patch_size**2
    check_xavier(projection.weight, fan_in, config.hidden_size)
    assert 0.8 * fan_in**-0.5 < projection.bias.abs().max() <= fan_in**-0.5  # PyTorch's own for a convolution
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert torch.all(module.weight == 1)
            assert not module.bias.any()


def load_mae(folder: Path) -> ViTMAEForPreTraining:
    """A saved masked autoencoder, with every tensor."""
    return SavedModel.find(str(folder), "the run", ("",)).load(ViTMAEForPreTraining)


def check_xavier(weight: torch.Tensor, fan_in: int, fan_out: int) -> None:
    """Uniform within +-sqrt(6 / (fan in + fan out)): within the limit, close to it, with the std of a uniform."""
    weight, limit = weight.detach(), math.sqrt(6 / (fan_in + fan_out))
    assert 0.99 * limit < weight.abs().max() <= limit
    assert abs(float(weight.std()) / (limit / math.sqrt(3)) - 1) < 0.05


@pytest.mark.parametrize("config", [small_config(), ViTMAEConfig(**(SMALL | {"hidden_size": 192, "image_size": 64}))])
def test_initialization_is_the_official_one(config):
    check_initialization(build_mae(config, seed=0))
    check_initialization(build_mae(config, seed=0))  # transformers flags modules; a second build must not differ


def test_initialization_is_a_function_of_the_seed():
    states = [build_mae(small_config(), seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["decoder.mask_token"], states[2]["decoder.mask_token"])


def test_check_accepts_a_good_model_and_does_not_change_it():
    model = build_mae(small_config()).train()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    check_mae(model)
    assert model.training
    assert torch.equal(torch.rand(3), expected)


def test_check_refuses_the_model_that_transformers_builds():
    with pytest.raises(UserError, match="are all zero"):
        check_mae(ViTMAEForPreTraining(small_config()))


@pytest.mark.parametrize(
    "name", ["vit.embeddings.position_embeddings", "vit.embeddings.cls_token", "decoder.mask_token"]
)
def test_check_refuses_zero_tables(name):
    model = build_mae(small_config())
    model.get_parameter(name).data.zero_()
    with pytest.raises(UserError, match="all zero"):
        check_mae(model)


def test_check_refuses_a_model_that_predicts_the_same_everywhere():
    model = build_mae(small_config())
    model.decoder.decoder_pos_embed.data[:] = 0.5  # not zero, but the same for every patch
    with pytest.raises(UserError, match="the same for every masked patch"):
        check_mae(model)


def test_saved_model_loads_completely(tmp_path):
    model = build_mae(small_config(), seed=3)
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded = load_mae(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_missing_tensor_is_refused(tmp_path):
    model = build_mae(small_config())
    state = {name: value for name, value in model.state_dict().items() if "vit.layers.1.mlp.fc1.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state, save_original_format=False)
    with pytest.raises(UserError, match=r"1 missing keys, among them vit\.layers\.1\.mlp\.fc1\.weight"):
        load_mae(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_mae(tmp_path / "nothing")


@pytest.mark.skipif(TRANSFORMERS_5_17, reason="AutoImageProcessor of transformers 5.17 needs torchvision")
def test_encoder_opens_as_a_plain_vit_with_the_same_outputs(tmp_path):
    model = build_mae(small_config(), seed=5).eval()
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    save_encoder(model, tmp_path / "encoder", mean, std, ("round", "edge-on"))
    encoder = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), (image / 255 - mean) / std, atol=1e-5)
    # The trained encoder itself, every patch visible, in order, through its own modules.
    embeddings = model.vit.embeddings
    with torch.no_grad():
        tokens = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
        hidden = torch.cat([embeddings.cls_token + embeddings.position_embeddings[:, :1], tokens], dim=1)
        for layer in model.vit.layers:
            hidden = layer(hidden)
        expected = model.vit.layernorm(hidden)
        assert torch.allclose(encoder(pixels).last_hidden_state, expected, atol=1e-5)
    assert encoder.config.id2label == {0: "round", 1: "edge-on"}


def test_encoder_file_has_tensor_names_that_every_version_of_transformers_reads(tmp_path):
    from safetensors import safe_open

    save_encoder(build_mae(small_config()), tmp_path / "encoder", np.full(3, 0.5), np.full(3, 0.5), ())
    layer = ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
    layer += ["attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"]
    names = {f"encoder.layer.{i}.{name}.{kind}" for i in range(2) for name in layer for kind in ("weight", "bias")}
    names |= {f"{name}.{kind}" for name in ("layernorm", "embeddings.patch_embeddings.projection") for kind in
              ("weight", "bias")}  # fmt: skip
    names |= {"embeddings.cls_token", "embeddings.position_embeddings"}
    with safe_open(tmp_path / "encoder" / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == names


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_size": 36}, "--image_size 36 is not divisible by --patch_size 8"),
        ({"hidden_size": 52}, "--hidden_size 52 is not divisible by --num_attention_heads 3"),
        ({"decoder_num_attention_heads": 3}, "--decoder_hidden_size 32 is not divisible"),
        ({"hidden_size": 42}, "multiple of 4"),
        ({"mask_ratio": 0.0}, "--mask_ratio 0.0"),
        ({"mask_ratio": 1.0}, "--mask_ratio 1.0"),
        ({"mask_ratio": 0.99}, "at least one must be masked and one visible"),
        ({"num_hidden_layers": 0}, "--num_hidden_layers 0"),
    ],
)
def test_impossible_sizes(change, told):
    with pytest.raises(UserError) as error:
        validate_config(small_config(**change))
    assert told in str(error.value)


def macs_per_layer(tokens: int, hidden_size: int, intermediate_size: int) -> int:
    """Multiply-accumulates of a transformer layer: four projections, two attention products, two MLP layers."""
    return tokens * (4 * hidden_size**2 + 2 * hidden_size * intermediate_size) + 2 * tokens**2 * hidden_size


def mae_flops(config: ViTMAEConfig) -> int:
    """The formulas of docs/scaling.md: two FLOPs per multiply-accumulate, the backward pass counted as two forwards."""
    patches, patch_values = num_patches(config), 3 * config.patch_size**2
    visible = int(patches * (1 - config.mask_ratio)) + 1  # with the class token
    macs = patches * patch_values * config.hidden_size
    macs += config.num_hidden_layers * macs_per_layer(visible, config.hidden_size, config.intermediate_size)
    macs += visible * config.hidden_size * config.decoder_hidden_size
    decoder = macs_per_layer(patches + 1, config.decoder_hidden_size, config.decoder_intermediate_size)
    macs += config.decoder_num_hidden_layers * decoder
    macs += (patches + 1) * config.decoder_hidden_size * patch_values
    return 6 * macs


@pytest.mark.parametrize("changes", [{}, {"mask_ratio": 0.5, "hidden_size": 96, "image_size": 64}])
def test_measured_flops_are_those_of_the_formulas(changes):
    """On the CPU, too; it keeps somewhat fewer bytes, because its attention is fused."""
    config = small_config(**changes)
    flops, kept = measure_mae(config)
    assert flops == mae_flops(config)
    image = torch.zeros(1, 3, config.image_size, config.image_size)
    on_cpu = measure_cost(build_mae(config), image, torch.zeros(1, num_patches(config)))
    assert on_cpu[0] == flops
    assert 0.8 * kept < on_cpu[1] <= kept


def test_kept_bytes_are_about_twenty_values_per_token_channel_and_layer():
    config = small_config(hidden_size=192, num_hidden_layers=12, intermediate_size=768)
    values = 12 * 5 * 192 + 2 * 17 * 32
    assert measure_mae(config)[1] == pytest.approx(4 * 20 * values, rel=0.2)


def test_measuring_changes_neither_the_random_state_nor_the_model():
    model = build_mae(small_config()).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    measure_mae(model.config)
    measure_cost(model, torch.zeros(1, 3, 32, 32), torch.zeros(1, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measured_flops_of_a_backbone_include_the_attention():
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=8)
    model = ViTModel(config, add_pooling_layer=False)
    macs = 64 * 3 * 8**2 * 24 + 2 * macs_per_layer(65, 24, config.intermediate_size)
    assert measure_classifier(model, 64)[0] == 6 * macs


@pytest.mark.parametrize("normalised", [False, True])
def test_mean_loss_per_image_is_the_loss_of_the_model(normalised):
    model = build_mae(small_config(norm_pix_loss=normalised)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 32, 32, generator=generator) * torch.arange(1, 6).view(5, 1, 1, 1)
    noise = torch.rand(5, 16, generator=generator)
    with torch.no_grad():
        together = model(images, noise=noise)
        alone = [float(model(images[i : i + 1], noise=noise[i : i + 1]).loss) for i in range(5)]
    losses = loss_per_image(model, images, together.logits, together.mask)
    assert losses.tolist() == pytest.approx(alone, rel=1e-5)
    assert float(losses.mean()) == pytest.approx(float(together.loss), rel=1e-5)
    assert max(alone) > 1.01 * min(alone)


def test_a_graph_of_training_returns_only_the_loss_and_the_same_gradients():
    """Whatever a compiled graph returns is written; evaluation still returns all, and the state stays as it is."""
    images, noise, outputs, gradients = torch.randn(2, 3, 32, 32), torch.rand(2, 16), [], []

    def count(graph, inputs):
        outputs.append(len(graph.graph.output_node().args[0]))
        return graph.forward

    for change in (lambda model: None, return_only_loss_in_training):
        torch._dynamo.reset()
        model = build_mae(small_config())
        names = list(model.state_dict())
        change(model)
        assert type(model) is ViTMAEForPreTraining
        assert list(model.state_dict()) == names
        compiled = torch.compile(model.train(), backend=count)
        loss = compiled(images, noise=noise).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert {"loss", "logits", "mask", "ids_restore"} <= set(model.eval()(images, noise=noise))
    assert outputs == [4, 1]
    assert all(map(torch.equal, *gradients))


def test_attention_layers_are_those_of_a_training_step(monkeypatch):
    model, seen, attention = build_mae(small_config()).train(), {}, nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **kwargs):
        assert query.shape == key.shape == value.shape
        seen[tuple(query.shape)] = seen.get(tuple(query.shape), 0) + 1
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    model(torch.randn(5, 3, 32, 32))
    assert attention_layers(model.config, 5) == seen == {(5, 3, 5, 16): 2, (5, 1, 17, 32): 2}


def attention_inputs(*shape: int) -> list[torch.Tensor]:
    """Queries, keys and values as the layers leave them, (B, heads, tokens, channels) bfloat16."""
    batch, heads, tokens, channels = shape
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(batch, tokens, heads, channels, generator=generator).bfloat16() for _ in range(3))
    return [x.transpose(1, 2).requires_grad_() for x in tensors]


@pytest.mark.parametrize("shape", [(2, 3, 257, 32), (5, 2, 17, 48), (1, 1, 5, 4)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_bfloat16_attention_on_a_cpu_is_exact_to_rounding(shape, chunk, monkeypatch):
    """Relative to float64, output and gradients err by less than 0.8 % each: bfloat16 rounds by up to 0.4 %."""
    monkeypatch.setattr(attention, "_CHUNK", chunk * shape[2] ** 2 // torch.get_num_threads())
    inputs = attention_inputs(*shape)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = (exact[0] @ exact[1].mT * 0.3).softmax(dim=-1)
    expected = (weights @ exact[2]).transpose(1, 2)
    output, _ = cpu_bfloat16_attention(nn.Module(), *inputs, None, 0.3)
    assert output.dtype == torch.bfloat16
    assert output.shape == expected.shape
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    output.backward(gradient)
    expected.backward(gradient.double())
    for found, exactly in zip((output, *(x.grad for x in inputs)), (expected, *(x.grad for x in exact)), strict=True):
        assert (found.double() - exactly).norm() < 0.008 * exactly.norm()


@pytest.mark.parametrize("case", ["mask", "dropout", "float32"])
def test_bfloat16_attention_leaves_what_it_cannot_do_to_transformers(case):
    inputs = attention_inputs(2, 3, 17, 16)
    inputs = [x.float() for x in inputs] if case == "float32" else inputs
    mask = torch.zeros(2, 1, 17, 17).where(torch.rand(2, 1, 17, 17) < 0.5, -1e4) if case == "mask" else None
    options = {"scaling": 0.2, "dropout": 0.5 if case == "dropout" else 0.0}
    results = []
    for function in (cpu_bfloat16_attention, eager_attention_forward):
        torch.manual_seed(0)
        results.append(function(nn.Module(), *inputs, mask, **options))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def small_models() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """An autoencoder, its encoder and a classifier with random weights everywhere, and inputs of each."""
    mae = build_mae(small_config(decoder_num_attention_heads=2))
    encoder = encoder_of(build_mae(small_config(), seed=1))
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    classifier = build_classifier(encoder, ("a", "b"), 0)
    models = {"mae": (mae, (images, noise)), "encoder": (encoder, (images,)), "classifier": (classifier, (images,))}
    for model, _ in models.values():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "classifier" in name:
                nn.init.normal_(parameter.data, std=0.1)
    return models


@pytest.mark.parametrize("name", ["mae", "encoder", "classifier"])
def test_bfloat16_on_a_cpu_has_its_own_attention_in_every_layer(name, tmp_path, monkeypatch):
    """In the decoder, too, whose configuration is not the model's. In float32 and in the files there is no trace."""
    model, inputs = small_models()[name]
    apply, calls = attention._ChunkedAttention.apply, []
    monkeypatch.setattr(attention._ChunkedAttention, "apply", lambda *x: calls.append(x) or apply(*x))
    select_attn_implementation(model, torch.device("cpu"), False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)[0]
        assert calls == []
        select_attn_implementation(model, torch.device("cpu"), True)
        found = model(*inputs)[0]
    assert len(calls) == sum(hasattr(module, "q_proj") for module in model.modules())
    assert torch.allclose(found, expected, rtol=0.03, atol=0.03)
    model.save_pretrained(tmp_path)
    assert attention.CPU_BFLOAT16 not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["mae", "encoder", "classifier"])
def test_queries_keys_and_values_as_one_product(name):
    """Outputs and gradients are those of three products, within the rounding of float64, and so are the parameters."""
    model, inputs = small_models()[name]
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    results = []
    for fused in (False, True, False):
        fuse_qkv(model, fused)
        model.zero_grad()
        output = model(*inputs)[0]
        output.square().sum().backward()
        gradients = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
        results.append({"output": output.detach()} | gradients)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    three, one, again = results
    assert one.keys() == three.keys()
    assert any("k_proj.weight" in key for key in one)
    for key, x in three.items():
        assert torch.allclose(one[key], x, rtol=1e-9, atol=1e-12), key
        assert torch.equal(again[key], x), key


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_is_compiled_into_one_graph_with_two_products_per_layer(bf16):
    """The joint product and the one of the output; the others are those of patches, layers and decoder."""
    model, inputs = small_models()["mae"]
    products = []

    def count(graph, _):
        products.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph.forward

    fuse_qkv(model)
    select_attn_implementation(model, torch.device("cpu"), bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        compiled = torch.compile(model, backend=count, fullgraph=True)
        assert torch.equal(compiled(*inputs).logits, model(*inputs).logits)
    layers = sum(hasattr(module, "q_proj") for module in model.modules())
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert products == [linear - 2 * layers]


# -------------------------------------------------------------------------------------------- weights to start from


@pytest.fixture
def trained() -> ViTMAEForPreTraining:
    """An autoencoder in which every tensor but the fixed position embeddings differs from the initialization."""
    model = build_mae(small_config(), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def write_as_published(model: ViTMAEForPreTraining, folder: Path) -> None:
    """With the configuration and the names of tensors of facebook/vit-mae-base, from transformers 4.16."""
    names = {"vit.layers": "vit.encoder.layer", "o_proj": "output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {f"attention.{x[0]}_proj": f"attention.attention.{x}" for x in ("query", "key", "value")}
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    unknown_then = ("dtype", "transformers_version", "qkv_bias")
    kept = {name: value for name, value in content.items() if name not in unknown_then}
    kept |= {"torch_dtype": "float32", "transformers_version": "4.16.0.dev0", "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("names", ["own", "transformers 4", "published", "encoder"])
def test_a_saved_autoencoder_gives_its_weights(tmp_path, trained, names, image_size):
    """Whatever its tensors are called. The fixed position embeddings are those of the new size of images."""
    if names == "published":
        write_as_published(trained, tmp_path)
    elif names == "encoder":
        trained.vit.save_pretrained(tmp_path)
    else:
        trained.save_pretrained(tmp_path, save_original_format=names == "transformers 4")
    new, fresh = (build_mae(small_config(image_size=image_size), seed=2) for _ in range(2))
    words = init_mae(new, SavedModel.find(str(tmp_path), "--init_from"))
    assert words == ("the encoder's weights, with a new decoder" if names == "encoder" else "all weights")
    for name, tensor in new.state_dict().items():
        resized = "pos" in name and image_size != 32
        is_new = resized or (names == "encoder" and name.startswith("decoder."))
        assert torch.equal(tensor, (fresh if is_new else trained).state_dict()[name]), name
    check_mae(new)


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_saved_vit_gives_its_encoder_with_learned_positions(tmp_path, image_size):
    """As transformers itself interpolates them to another size."""
    sizes = {name: SMALL[name] for name in SMALL if name in ViTConfig().to_dict()}
    source = ViTModel(ViTConfig(**sizes))
    torch.nn.init.normal_(source.embeddings.position_embeddings)
    source.save_pretrained(tmp_path)
    new, fresh = (build_mae(small_config(image_size=image_size), seed=2) for _ in range(2))
    words = init_mae(new, SavedModel.find(str(tmp_path), "--init_from"))
    assert words.startswith("the encoder's weights, with a new decoder")
    assert ("interpolated from 4 x 4 to 8 x 8" in words) == (image_size == 64)
    expected = source.state_dict() | {
        "embeddings.position_embeddings": source.embeddings.interpolate_pos_encoding(
            torch.zeros(1, (image_size // 8) ** 2 + 1, 48), image_size, image_size
        )
    }
    for name, tensor in new.vit.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert all(torch.equal(x, fresh.decoder.state_dict()[name]) for name, x in new.decoder.state_dict().items())


def _without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[next(key for key in tensors if name in key)]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _of_another_architecture(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "dinov2"}))


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"num_attention_heads": 2}, None, "num_attention_heads is 3 there and 2 here; set these fields"),
        (
            {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 96},
            None,
            "hidden_size is 48 there and 24 here; intermediate_size .*; num_hidden_layers is 2 there and 1 here",
        ),
        ({"decoder_num_attention_heads": 2}, None, "decoder_num_attention_heads is 1 there and 2 here"),
        ({"patch_size": 4}, None, "patch_size is 8 there and 4 here"),
        ({}, _without("vit.layers.1"), "do not fit the model: 1 missing keys, among them vit.layers.1"),
        ({}, _without("decoder_pred"), "do not fit the model: 1 missing keys, among them decoder.decoder_pred.bias"),
        ({}, _as_pickle, "model.safetensors cannot be loaded"),
        ({}, _of_another_architecture, "its architecture is dinov2; only a ViTMAE or a ViT"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, trained, sizes, change, message):
    trained.save_pretrained(tmp_path, save_original_format=False)
    if change:
        change(tmp_path)
    new, fresh = (build_mae(small_config(**sizes), seed=2) for _ in range(2))
    with pytest.raises(UserError, match=message):
        init_mae(new, SavedModel.find(str(tmp_path), "--init_from"))
    assert all(torch.equal(x, fresh.state_dict()[name]) for name, x in new.state_dict().items())


@pytest.mark.parametrize(("busy", "expected"), [((0, 5), 2), ((100, 3), 1), ((100, 100), 1), ((30, 40), 1)])
def test_threads_follow_the_free_cores_unless_the_user_says_otherwise(monkeypatch, busy, expected):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("psutil.cpu_percent", lambda *_, percpu: list(busy))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    use_free_cores()
    assert threads == []  # the tests set OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_free_cores()
    use_free_cores(7)
    assert threads == [expected, 7]
