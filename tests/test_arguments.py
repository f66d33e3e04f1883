"""Arguments: each dataclass checks itself when it is made and names the flag that is wrong."""

import math

import pytest
import torch
from transformers import TrainingArguments

from galaxy_mae.errors import UserError
from galaxy_mae.training.arguments import (
    EvaluationArguments,
    FineTuningArguments,
    GalaxyArguments,
    ModelArguments,
    PretrainingArguments,
)

ON_CPU = {"output_dir": "x", "use_cpu": True, "report_to": ["none"]}


OF_TRAININGS = [
    *(("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("base_learning_rate", -1.0)),
    *(("per_device_train_batch_size", 0), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0)),
    *(("logging_steps", -1.0), ("weight_decay", -0.1), ("max_grad_norm", -1.0), ("max_grad_norm", math.nan)),
    *(("seed", -1), ("seed", 2**32)),
]
BAD_NUMBERS = {
    GalaxyArguments: [
        *(("split_seed", -1), ("split_seed", 2**32), ("image_size", 0), ("image_size", 4097)),
        *(("min_crop_scale", 0.0), ("min_crop_scale", 1.1), ("min_crop_scale", math.nan)),
    ],
    EvaluationArguments: [("seeds", 0), ("split_seed", -1)],
    PretrainingArguments: [
        *OF_TRAININGS,
        *(("save_steps", -1.0), ("eval_steps", -3.0), ("reconstruct_every", -1.0), ("probe_every", math.nan)),
    ],
    FineTuningArguments: [
        *OF_TRAININGS,
        *(("layer_decay", 0.0), ("layer_decay", 1.5), ("min_crop_scale", 0.0), ("label_smoothing", 1.1)),
        *(("label_smoothing", -0.1), ("mixup", -1.0), ("mixup", math.nan), ("photometric_jitter", 1.5)),
    ],
}


@pytest.mark.parametrize(
    ("arguments", "field", "value"), [(group, *bad) for group, numbers in BAD_NUMBERS.items() for bad in numbers]
)
def test_a_number_out_of_its_range_is_named(arguments, field, value):
    needed = {GalaxyArguments: {}, EvaluationArguments: {"encoder": "x"}}.get(arguments, ON_CPU)
    with pytest.raises(UserError, match=f"--{field} {value}: it must be "):
        arguments(**(needed | {field: value}))


def test_evaluation_needs_an_encoder_unless_it_only_reports():
    with pytest.raises(UserError, match="--encoder: give a run"):
        EvaluationArguments()
    assert EvaluationArguments(report=True).encoder is None


@pytest.mark.parametrize("arguments", [PretrainingArguments, FineTuningArguments])
def test_training_needs_a_folder_and_a_length(arguments):
    with pytest.raises(UserError, match="--output_dir: give the name of a folder"):
        arguments(**(ON_CPU | {"output_dir": ""}))
    with pytest.raises(UserError, match="--num_train_epochs or --max_steps must be above 0"):
        arguments(**(ON_CPU | {"num_train_epochs": 0}))


def test_pretraining_may_have_steps_in_place_of_epochs():
    with pytest.raises(UserError, match="--num_train_epochs or --max_steps must be above 0"):
        PretrainingArguments(**ON_CPU, max_steps=0)
    assert PretrainingArguments(**ON_CPU, num_train_epochs=0, max_steps=5).max_steps == 5


@pytest.mark.parametrize("arguments", [PretrainingArguments, FineTuningArguments])
def test_several_gpus_in_one_process_are_refused(monkeypatch, arguments):
    """DataParallel would multiply the batch size. The message says how to use one or all of them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(UserError, match=r"4 GPUs.*CUDA_VISIBLE_DEVICES=0.*torchrun --nproc_per_node 4"):
        arguments(**ON_CPU).check_gpus()


def test_the_best_model_needs_a_checkpoint_of_every_evaluation():
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(UserError, match="--eval_steps 2 and --save_steps 4 must be equal"):
        PretrainingArguments(**ON_CPU, **steps, load_best_model_at_end=True)
    PretrainingArguments(**ON_CPU, **steps)


def test_defaults_follow_the_device():
    arguments = PretrainingArguments(output_dir="x", report_to=["none"], use_cpu=True)
    assert arguments.device == torch.device("cpu")
    assert not arguments.torch_compile
    assert not arguments.dataloader_pin_memory
    assert PretrainingArguments(**ON_CPU, bf16=True).bf16
    assert not PretrainingArguments(**ON_CPU, bf16=False).bf16


def test_sizes_of_the_model_follow_from_the_hidden_sizes():
    config = ModelArguments(hidden_size=96, num_attention_heads=3, decoder_hidden_size=64).config(image_size=64)
    assert (config.intermediate_size, config.decoder_intermediate_size) == (384, 256)
    assert (config.decoder_num_attention_heads, config.image_size, config.layer_norm_eps) == (2, 64, 1e-6)
    config = ModelArguments(intermediate_size=10, decoder_intermediate_size=20, decoder_num_attention_heads=8).config(
        64
    )
    assert (config.intermediate_size, config.decoder_intermediate_size) == (10, 20)
    assert config.decoder_num_attention_heads == 8
    for field in ("intermediate_size", "decoder_intermediate_size", "decoder_num_attention_heads"):
        assert getattr(ModelArguments(**{field: 0}).config(64), field) == 0  # which `validate_config` refuses
