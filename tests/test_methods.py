"""The list of methods: what each row names is there, and the array has a task for each of them."""

import inspect
from collections import Counter
from pathlib import Path

import pytest

from galaxy_mae.evaluation import frozen
from galaxy_mae.evaluation.methods import (
    ARRAY_METHODS,
    BASELINES,
    BY_NAME,
    METHODS,
    command_of,
    describe_methods,
    written_by,
)
from galaxy_mae.model.backbone import baseline_config

ROOT = Path(__file__).resolve().parents[1]


def test_the_array_has_a_task_for_every_method_with_an_index():
    assert f"#SBATCH --array=0-{len(ARRAY_METHODS) - 1}\n" in (ROOT / "run_linear_probe_array.sh").read_text()


def test_names_are_unique_and_every_result_is_written_by_one_run():
    assert len(BY_NAME) == len(METHODS)
    runs = [*ARRAY_METHODS, *BASELINES.values()]
    assert Counter(method for run in runs for method in written_by(run)) == Counter(METHODS)
    assert all(written_by(run)[-1] is run for run in runs)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_a_row_names_is_there(method):
    assert BY_NAME[method.run_by].trained_on == method.trained_on
    if method.trained_on == "features":
        assert list(inspect.signature(getattr(frozen, method.classifier)).parameters) == ["encoders"]
    if method.network:
        assert baseline_config(method.network).model_type
    if method.baseline:
        baseline = BY_NAME[method.baseline]
        assert (method.initialization, baseline.initialization) == ("ssl", "random")
        assert method.classifier == baseline.classifier
        assert method.title == baseline.title.replace("random weights", "SSL weights")


def test_the_help_lists_what_the_flags_take():
    text = describe_methods()
    for i, method in enumerate(ARRAY_METHODS):
        assert f"{i} {method.name} " in text
        assert command_of(method) == f"--method {method.name}"
    for network, method in BASELINES.items():
        assert network in text
        assert command_of(method) == f"--baseline {network}"
    assert command_of(BY_NAME["raw_pixels"]) == "--method random_linear_probe"
