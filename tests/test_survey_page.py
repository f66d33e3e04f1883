"""The examples of docs/survey.md run in their order and say what they should."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.predictions.formats import read_catalogue

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "survey.md"
COMMAND = "python -m galaxy_mae.catalogue "


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of LSDB and Dask
def test_examples_of_the_page(tmp_path, monkeypatch, capsys):
    """Python blocks share their names, as when they are typed one after the other."""
    pytest.importorskip("lsdb")
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names: dict = {}
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        for line in block.splitlines():
            if line.startswith(COMMAND):
                main(shlex.split(line.removeprefix(COMMAND)))
    printed = capsys.readouterr().out
    assert "400 galaxies: complete" in printed
    assert "400 True" in printed  # cross-matched

    cone, nearest, lazy = names["cone"], names["nearest"], names["small"]
    assert 0 < len(lazy) < len(cone) < 400
    unit = np.array(cone["embedding"].tolist(), np.float64)
    unit = (unit - unit.mean(axis=0)) / unit.std(axis=0)
    cosine = unit @ unit[0] / np.linalg.norm(unit, axis=1) / np.linalg.norm(unit[0])
    assert nearest["object_id"].tolist() == cone["object_id"].iloc[np.argsort(-cosine)[:100]].tolist()
    same = cone.set_index("object_id").loc[lazy["object_id"]]
    pd.testing.assert_series_equal(
        same["embedding"].reset_index(drop=True), lazy["embedding"].reset_index(drop=True), check_exact=True
    )
    near = read_catalogue(tmp_path / "near.fits").table
    assert near["object_id"][0].as_py() == "S7"
    assert (
        read_catalogue(tmp_path / "region.fits").table["object_id"].to_pylist() == names["region"]["object_id"].tolist()
    )
