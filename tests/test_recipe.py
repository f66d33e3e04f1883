"""Recipes: how flags and array tasks select, and how the batch and the learning rate are finished."""

from types import SimpleNamespace

import pytest
import torch

from galaxy_mae.errors import UserError
from galaxy_mae.model.compute import measure_classifier, select_micro_batch_size
from galaxy_mae.model.encoder import random_encoder
from galaxy_mae.model.mae import encoder_config
from galaxy_mae.training.recipe import (
    RECIPES,
    global_batch_size,
    pop_flag,
    read_evaluation_recipe,
    read_recipe,
    read_yaml,
    select_index,
    set_batch_and_learning_rate,
    to_flags,
)

NAMES = ("red", "green", "blue")
CPU = torch.device("cpu")
ON_CPU = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none"]


# ---------------------------------------------------------------------------------------------------- select_index


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


@pytest.mark.parametrize(("value", "expected"), [("0", 0), ("2", 2), ("green", 1), (None, None)])
def test_flag_selects_by_index_or_name(value, expected):
    assert select_index(value, "--color", NAMES) == expected


def test_flag_overrides_the_array_task(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert select_index(None, "--color", NAMES) == 2
    assert select_index("0", "--color", NAMES) == 0
    assert select_index("green", "--color", NAMES) == 1


@pytest.mark.parametrize("value", ["3", "-1", "1.0", "violet", ""])
def test_unknown_name_or_index_raises_user_error(monkeypatch, value):
    with pytest.raises(UserError, match=rf"^--color {value}: not one of 0 to 2 \(0 red, 1 green, 2 blue\)$"):
        select_index(value, "--color", NAMES)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", value)
    with pytest.raises(UserError, match=f"^SLURM_ARRAY_TASK_ID {value}: not one of 0 to 2"):
        select_index(None, "--color", NAMES)


def test_message_lists_at_most_ten_names():
    with pytest.raises(UserError, match=r"not one of 0 to 99 \(0 x0, .*, 9 x9, \.\.\.\)$"):
        select_index("100", "--color", [f"x{i}" for i in range(100)])


# --------------------------------------------------------------------------------------- batch size, learning rate


def training_arguments(**changes) -> SimpleNamespace:
    """The fields that `set_batch_and_learning_rate` reads and writes, with the defaults of `TrainingArguments`."""
    defaults = {"batch_size": 512, "world_size": 1, "device": CPU, "base_learning_rate": 1e-3, "learning_rate": 5e-5}
    defaults |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**(defaults | changes))


@pytest.mark.parametrize(
    ("world_size", "bytes_per_image", "micro_batch", "accumulation_steps"),
    [(1, 1.0, 512, 1), (1, 1e9 / 100, 64, 8), (4, 1e9 / 100, 64, 2), (4, 1.0, 128, 1), (1, 1e10, 1, 512)],
)
def test_micro_batches_fit_the_device_and_add_up_to_the_global_batch(
    world_size, bytes_per_image, micro_batch, accumulation_steps
):
    training = training_arguments(world_size=world_size)
    set_batch_and_learning_rate(training, set(), bytes_per_image)
    assert training.per_device_train_batch_size == training.per_device_eval_batch_size == micro_batch
    assert training.gradient_accumulation_steps == accumulation_steps
    assert global_batch_size(training) == 512
    assert training.learning_rate == pytest.approx(2e-3)  # the base learning rate, scaled by 512 / 256


def test_explicitly_set_values_are_kept():
    training = training_arguments(per_device_train_batch_size=16, gradient_accumulation_steps=3, learning_rate=0.1)
    explicitly_set = {"per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"}
    set_batch_and_learning_rate(training, explicitly_set, bytes_per_image=1e10)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (16, 3)
    assert training.per_device_eval_batch_size == 8
    assert training.learning_rate == 0.1


def test_learning_rate_follows_an_explicitly_set_batch():
    training = training_arguments(per_device_train_batch_size=16, gradient_accumulation_steps=2, world_size=4)
    set_batch_and_learning_rate(training, {"per_device_train_batch_size"}, bytes_per_image=1.0)
    assert training.learning_rate == pytest.approx(1e-3 * 128 / 256)


def test_explicitly_set_evaluation_batch_is_kept():
    training = training_arguments(per_device_eval_batch_size=5)
    set_batch_and_learning_rate(training, {"per_device_eval_batch_size"}, bytes_per_image=1.0)
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (512, 5)


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 4), (2, 4)])
def test_batch_that_is_not_divisible_by_the_processes_raises_user_error(batch_size, world_size):
    training = training_arguments(batch_size=batch_size, world_size=world_size)
    with pytest.raises(UserError, match=f"--batch_size {batch_size} is not divisible by the 4 processes"):
        set_batch_and_learning_rate(training, set(), bytes_per_image=1.0)


@pytest.mark.parametrize(
    ("batch_size", "bytes_per_image", "expected"),
    [
        (512, 1.0, 512),
        (512, 1e9 / 512, 512),
        (512, 1.01e9 / 512, 256),
        (30, 1e9 / 14, 10),
        (7, 1e9 / 6, 1),
        (8, 1e12, 1),
    ],
)
def test_micro_batch_is_the_largest_divisor_that_fits_a_cpu(batch_size, bytes_per_image, expected):
    assert select_micro_batch_size(batch_size, bytes_per_image, CPU) == expected


def test_micro_batch_follows_the_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100e9))
    assert select_micro_batch_size(512, 1e9, torch.device("cuda")) == 32  # of 60 images that fit


def test_batch_of_the_other_kind_overrides_the_recipe(tmp_path):
    """A per-device batch on the command line replaces the recipe's global batch, and the other way round."""
    recipe = tmp_path / "recipe.yaml"
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path), *ON_CPU]
    recipe.write_text("batch_size: 64")
    assert global_batch_size(read_recipe([*flags, "--per_device_train_batch_size", "4"]).training) == 4
    recipe.write_text("per_device_train_batch_size: 4")
    assert global_batch_size(read_recipe([*flags, "--batch_size", "64"]).training) == 64


def test_epochs_on_the_command_line_override_the_steps_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 9\nnum_train_epochs: 2")
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path), *ON_CPU]
    assert read_recipe(flags).training.max_steps == 9
    training = read_recipe([*flags, "--num_train_epochs", "5"]).training
    assert (training.max_steps, training.num_train_epochs) == (-1, 5)


# ------------------------------------------------------------------------------------------------- flags, YAML files


def test_pop_flag():
    assert pop_flag("--trial", ["--a", "1", "--trial", "2", "--b"]) == ("2", ["--a", "1", "--b"])
    assert pop_flag("--trial", ["--trial=2", "--trials", "3"]) == ("2", ["--trials", "3"])
    assert pop_flag("--trial", ["--a", "1"]) == (None, ["--a", "1"])
    with pytest.raises(UserError, match="--trial"):
        pop_flag("--trial", ["--trial"])


def test_fields_of_a_recipe_as_flags():
    content = {"mask_ratio": 0.5, "report_to": ["wandb", "tensorboard"], "seed": None, "save_strategy": False}
    expected = ["--mask_ratio", "0.5", "--report_to", "wandb", "tensorboard", "--save_strategy", "no"]
    assert to_flags(content) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(("a: [", "not YAML"), ("- a", "a recipe is a list of lines"), ("trial: 1", "a recipe has no field trial")),
        ("seed: 2024-99-99", "not YAML: month must be in 1..12"),
        ("seed: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("a: \xff".encode("latin-1"), "not YAML"),
    ],
    ids=lambda value: value[:12],
)
def test_invalid_recipe_files_raise_user_error(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^--config {path}: {message}"):
        read_yaml(path)


@pytest.mark.parametrize(
    "content",
    [
        {"report_to": ["none", "--bf16"]},
        {"report_to": ["none", "--output_dir=elsewhere"]},
        {"full_determinism": "--bf16"},
        {"output_dir=elsewhere": []},
    ],
)
def test_a_value_of_a_recipe_is_never_another_flag(content):
    with pytest.raises(UserError, match="in a recipe, each flag has a line of its own"):
        to_flags(content)
    assert to_flags({"stretch_offset": -0.5, "bands": [-1, 2]}) == ["--stretch_offset", "-0.5", "--bands", "-1", "2"]


def test_fields_of_evaluations_belong_to_the_recipe_where_they_decide(tmp_path):
    """On the weights that are kept."""
    flags = ["--output_dir", str(tmp_path), *ON_CPU]
    assert "eval_steps" not in read_recipe(flags).as_dict()
    decides = [*flags, "--load_best_model_at_end"]
    one, other = (read_recipe([*decides, "--eval_steps", n, "--save_steps", n]).as_dict() for n in ("2", "5"))
    assert one != other


@pytest.mark.parametrize(("recipe", "batch", "steps"), [("demo", 64, 1), ("galaxy10", 8, 64)])
def test_micro_batches_of_the_recipes_on_a_cpu(recipe, batch, steps):
    """The weights depend on them in their last digits."""
    training = read_recipe(["--config", f"{RECIPES}/{recipe}.yaml", *ON_CPU]).training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (batch, steps)


@pytest.mark.parametrize(
    ("recipe", "encoder", "batch", "steps"), [("evaluation_demo", "demo", 64, 1), ("evaluation", "galaxy10", 8, 16)]
)
def test_micro_batches_of_fine_tuning_on_a_cpu(recipe, encoder, batch, steps):
    model = random_encoder(encoder_config(read_recipe(["--config", f"{RECIPES}/{encoder}.yaml"]).model_config), 0)
    read = read_evaluation_recipe(["--config", f"{RECIPES}/{recipe}.yaml", "--encoder", "x", *ON_CPU])
    _, kept = measure_classifier(model, model.config.image_size)
    set_batch_and_learning_rate(read.training, read.explicitly_set, kept)
    assert (read.training.per_device_train_batch_size, read.training.gradient_accumulation_steps) == (batch, steps)


def test_precision_and_batch_belong_to_an_evaluation_if_they_were_chosen():
    arguments = ["--encoder", "x", "--report_to", "none", "--use_cpu", "--learning_rate", "0.1"]
    assert "bf16" not in read_evaluation_recipe(arguments).as_dict()
    recipes = [[], ["--bf16", "True"], ["--bf16", "False"], ["--per_device_train_batch_size", "16"]]
    identities = [read_evaluation_recipe([*arguments, *flags]).as_dict() for flags in recipes]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])


def test_evaluation_recipe_names_its_output_folder_by_the_encoder():
    recipe = read_evaluation_recipe([*ON_CPU, "--encoder", "runs/galaxy10/"])
    assert recipe.training.output_dir == "results/galaxy10"
    assert "encoder" in recipe.explicitly_set
    assert read_evaluation_recipe([*ON_CPU, "--encoder", "x", "--output_dir", "y"]).training.output_dir == "y"
    with pytest.raises(UserError, match="--report: give --output_dir"):
        read_evaluation_recipe([*ON_CPU, "--report"])


@pytest.mark.parametrize(("avx512", "amx", "bf16"), [(False, False, False), (True, False, True), (False, True, True)])
def test_bfloat16_is_the_default_on_cpus_that_compute_it(avx512, amx, bf16, monkeypatch):
    """One with AVX2 alone emulates it, slower than float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert read_recipe(["--use_cpu", "--report_to", "none"]).training.bf16 is bf16


@pytest.mark.parametrize(("flags", "bf16"), [(["--bf16"], True), (["--bf16", "True"], True), (["--bf16=False"], False)])
def test_boolean_flags_need_no_value(flags, bf16):
    recipe = read_recipe([*flags, "--use_cpu", "--report_to", "none", "--no_eval_on_start"])
    assert recipe.training.bf16 is bf16
    assert not recipe.training.eval_on_start
