"""The public functions: their docstrings' examples, and that they are the commands."""

import doctest
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png, random_images
from PIL import Image

import galaxy_mae as gm
from galaxy_mae.data import synthetic
from galaxy_mae.library import Run

FUNCTIONS = [name for name in gm.__all__ if inspect.isfunction(getattr(gm, name))]


@pytest.fixture
def my_galaxies(tmp_path, monkeypatch):
    """A folder of 50 JPEGs and a labelled table in the working directory, where there is nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("galaxy_mae"), "level", logging.INFO)
    (tmp_path / "my_galaxies").mkdir()
    for i, image in enumerate(synthetic.render(np.arange(50), 64)):
        Image.fromarray(image).save(tmp_path / "my_galaxies" / f"{i}.jpg")
    columns = {"image": [png(image) for image in random_images(200, 64)], "label": np.arange(200) % 2}
    pq.write_table(pa.table(columns), "my_galaxies.parquet")
    return tmp_path / "my_galaxies"


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_the_docstring(name, my_galaxies):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(gm, name)))
    names = {"gm": gm, "np": np}
    for example in examples:
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(example.source, names)
    assert examples


@pytest.mark.slow
def test_the_python_of_the_readme(my_galaxies, tmp_path):
    """With the small model where a clone has it."""
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "pretrained").symlink_to(root / "pretrained")
    names = {"images": [Image.fromarray(image) for image in random_images(3, 64)]}
    (short, transformers) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    exec(short, names)
    assert (len(names["table"]), names["features"].shape) == (50, (50, 96))
    exec(transformers, names)
    assert names["features"].shape == (3, 96)


def test_the_list_of_functions():
    """`import galaxy_mae` is light; the names are there for completion, and no others."""
    assert {"load_encoder", "embed", "predict", "pretrain", "evaluate"} == set(FUNCTIONS)
    assert set(gm.__all__) <= set(dir(gm))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        gm.train  # noqa: B018
    program = "import sys, galaxy_mae; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_all_forms_of_images_give_the_same_features(my_galaxies):
    """A folder, paths, PIL images, an array; by an encoder's name and by the encoder."""
    paths = sorted(my_galaxies.iterdir(), key=str)[:5]
    images = [Image.open(path) for path in paths]
    expected = gm.embed(paths, gm.load_encoder("pretrained"))
    assert expected.shape == (5, 96)
    assert expected.dtype == np.float32
    for same in (images, np.stack([np.asarray(image) for image in images]), [str(path) for path in paths]):
        np.testing.assert_array_equal(gm.embed(same), expected)
    np.testing.assert_allclose(gm.embed(my_galaxies)[:5], expected, atol=1e-5)
    turned = np.stack([np.rot90(image) for image in images])
    both = [gm.embed(each, orientations=True) for each in (images, turned)]
    assert both[0].shape[1] > 96
    np.testing.assert_allclose(*both, atol=2e-2)  # of means of pixels, rounded to integers


def test_what_is_no_image_is_named(my_galaxies):
    with pytest.raises(gm.UserError, match=r"images: nothing\.jpg cannot be read \(No such file"):
        gm.embed(["nothing.jpg"])
    with pytest.raises(gm.UserError, match=r"images: image 0 is float64 \(8, 8, 3\); it must be uint8"):
        gm.pretrain(np.zeros((3, 8, 8, 3)), output_dir="runs/mine")


@pytest.mark.slow
def test_a_run_of_images_in_memory(my_galaxies):
    """It resumes as a run of a file; other images are another run."""
    images = random_images(60, 64)
    options = {"recipe": "demo", "batch_size": 16, "output_dir": "runs/mine", "num_hidden_layers": 1, "max_steps": 2}
    run = gm.pretrain(list(images), **options)
    assert gm.pretrain(images, **options) == run == Run(run.folder)
    assert len(list(run.folder.parent.glob("mine_images_*.parquet"))) == 1
    with pytest.raises(gm.UserError, match="holds a run of another recipe: data"):
        gm.pretrain(images[::-1], **options)
    assert "<table" in run._repr_html_()
    assert gm.embed(images[:3], run.encoder).shape == (3, 96)
