"""Every kind of input gives the pixels, catalogue, split and reasons that it always gave.

`golden_sources.json` holds the values. The bytes of Parquet, HDF5 and FITS files depend on the versions of libraries,
so the fingerprints are computed here, in plain hashlib, by the rules that they have always followed.
"""

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from astropy.io import fits
from astropy.table import Table
from conftest import png, random_images, write_hdf5
from PIL import Image

from galaxy_mae.data import synthetic
from galaxy_mae.data.cache import channel_statistics, open_galaxies
from galaxy_mae.data.columns import GALAXY10_CLASSES
from galaxy_mae.data.download import SurveyFile
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.split import split_fingerprint, split_galaxies
from galaxy_mae.data.stream import StreamDataset, open_stream

GOLDEN = json.loads(Path(__file__).with_name("golden_sources.json").read_text())
COUNT = 24
NUMBERS = np.arange(COUNT)
SKY = {"ra": NUMBERS // 2 * 7.5, "dec": NUMBERS % 2 * 0.001 - 0.5, "pxscale": np.full(COUNT, 0.262)}
DEFAULT_STRETCH = "Stretch(preset='auto', changes='{}')"
CHANGES = '{"bands": [3, 0, 2], "offset": 0.1, "scales": [3.0, 2.0, 1.0]}'
OTHER_STRETCH = f"Stretch(preset='legacy', changes='{CHANGES}')"


# ------------------------------------------------------------------------------------------- fingerprints, by the rules


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def of_file(path: Path) -> str:
    return digest(path.read_bytes())


def of_files(files: list[Path], root: Path | None = None) -> str:
    named = sorted((str(file.relative_to(root)) if root else file.name, file) for file in files)
    return digest("".join(f"{of_file(file)} {file.stat().st_size} {name}\n" for name, file in named))


def of_folder(folder: Path) -> str:
    return of_files([file for file in folder.rglob("*") if file.is_file()], folder)


# --------------------------------------------------------------------------------------- what is written, in every kind


def images() -> np.ndarray:
    """24 images of 32 pixels; 5 is blank, 7 equals 6."""
    made = random_images(COUNT, 32, seed=11)
    made[5], made[7] = 9, made[6]
    return made


def encoded(broken: bool = False) -> list[bytes | None]:
    """As PNG. Broken ones are no image, missing, of another size, not square; one that is not has 16 bits."""
    made = images()
    written = [png(image) for image in made]
    if broken:
        deep = Image.fromarray(made[0, ..., 0].astype(np.uint16) + 4000)
        file = io.BytesIO()
        deep.save(file, "PNG")
        written[0], written[2], written[4] = b"junk", None, png(made[4, :16, :16])
        written[9], written[10] = png(made[9, :16]), file.getvalue()
    return written


def cubes(bands: int) -> np.ndarray:
    rng = np.random.default_rng(bands)
    y, x = np.mgrid[:32, :32]
    galaxy = np.exp(-np.hypot(x - 12, y - 18) / rng.uniform(2, 5, (COUNT, 1, 1, 1)))
    return (rng.uniform(0.1, 0.5, (COUNT, bands, 1, 1)) * galaxy).astype(np.float32)


def write_images(folder: Path, by_class: bool = False, rows: range = range(COUNT)) -> Path:
    contents = encoded()
    for row in rows:
        file = folder / (("spiral", "round")[row % 2] if by_class else "") / f"{row:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[row])
    return folder


def write_cutouts(folder: Path, bands: int) -> Path:
    folder.mkdir()
    for row, cube in enumerate(cubes(bands)):
        fits.writeto(folder / f"{row:03d}.fits", cube[0] if bands == 1 else cube)
    return folder


def table(**columns) -> pa.Table:
    return pa.table({"image": encoded()} | SKY | columns)


def features(images_of: str, **class_names: list[str]) -> dict[bytes, bytes]:
    """The metadata by which the `datasets` library declares its columns in Parquet."""
    declared = {images_of: {"_type": "Image"}}
    declared |= {name: {"names": names, "_type": "ClassLabel"} for name, names in class_names.items()}
    return {b"huggingface": json.dumps({"info": {"features": declared}}).encode()}


def hdf5(tmp_path: Path):
    path = write_hdf5(tmp_path / "a.h5", images(), NUMBERS % 10, object_id=NUMBERS + 10**18, **SKY)
    return path, of_file(path)


def hdf5_without_sky(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=images(), chunks=(5, 32, 32, 3), compression="gzip")
        file["ans"], file["ra"] = NUMBERS % 3, NUMBERS.astype(float)
    return tmp_path / "a.h5", of_file(tmp_path / "a.h5")


def hdf5_with_a_damaged_chunk(tmp_path: Path):
    path, _ = hdf5_without_sky(tmp_path)
    with h5py.File(path, "a") as file:
        file["images"].id.write_direct_chunk((5, 0, 0, 0), b"not deflated" * 99)
    return path, of_file(path)


def parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(label=NUMBERS % 10, id=[f"J{i}" for i in NUMBERS], redshift=NUMBERS / 10), path)
    return path, of_file(path)


def parquet_of_structs(tmp_path: Path):
    """Declared as images and classes, beside a second column of images. Some images are broken."""
    structs = pa.array([{"bytes": b, "path": "a.png"} for b in encoded(broken=True)])
    others = pa.array([{"bytes": png(image), "path": None} for image in random_images(COUNT, 32, seed=12)])
    made = pa.table({"mask": others, "rgb": structs, "label": NUMBERS % 3, "objid": NUMBERS})
    made = made.replace_schema_metadata(features("mask", label=["a", "b", "c"]))
    pq.write_table(made, tmp_path / "a.parquet", row_group_size=7)
    return tmp_path / "a.parquet", of_file(tmp_path / "a.parquet")


def parquet_declared(tmp_path: Path):
    """The image column has no usual name; labels are texts; one name is missing."""
    columns = {
        "picture": [{"bytes": b, "path": "a.png"} for b in encoded()],
        "ans": [("spiral", "round", "é")[i % 3] for i in NUMBERS],
    }
    columns["galaxyid"] = [None, *map(str, NUMBERS[1:])]
    pq.write_table(pa.table(columns).replace_schema_metadata(features("picture")), tmp_path / "[a].parquet")
    return tmp_path / "[a].parquet", of_file(tmp_path / "[a].parquet")


def parquet_partly_labelled(tmp_path: Path):
    columns = {"label": [None, *NUMBERS[1:].tolist()], "id": NUMBERS.astype(float)}
    pq.write_table(table(**columns).drop_columns(["dec"]), tmp_path / "a.parquet")
    return tmp_path / "a.parquet", of_file(tmp_path / "a.parquet")


def parquet_folder(tmp_path: Path):
    """Splits in the names, files in subfolders, and a table of metadata that is none of galaxies."""
    folder, made = tmp_path / "survey", table(label=NUMBERS % 4, source_id=NUMBERS * 3)
    (folder / "data").mkdir(parents=True)
    for name, start, stop in (("test-0", 0, 6), ("train-1", 6, 10), ("validation-0", 10, 14), ("train-0", 14, COUNT)):
        pq.write_table(made.slice(start, stop - start), folder / "data" / f"{name}.parquet")
    (folder / "README.md").write_text("A survey.\n")
    return folder, of_folder(folder)


def image_folder(tmp_path: Path):
    folder = write_images(tmp_path / "survey")
    return folder, of_folder(folder)


def image_folder_by_class(tmp_path: Path):
    folder = write_images(tmp_path / "survey [1]", by_class=True)
    return folder, of_folder(folder)


def image_folder_with_metadata(tmp_path: Path):
    folder = write_images(tmp_path / "survey")
    rows = [f"{i:03d}.png,{i / 8},{i / 4},{i % 3},galaxy {i}\n" for i in reversed(range(COUNT))]
    (folder / "metadata.csv").write_text("file_name,ra,dec,label,object_id\n" + "".join(rows))
    return folder, of_folder(folder)


def image_folder_with_a_test_split(tmp_path: Path):
    for part, rows in (("train", range(6, COUNT)), ("test", range(6))):
        write_images(tmp_path / "survey" / part, by_class=True, rows=rows)
    return tmp_path / "survey", of_folder(tmp_path / "survey")


def cutouts_of_one_band(tmp_path: Path):
    folder = write_cutouts(tmp_path / "cutouts", 1)
    return folder, digest(f"{of_folder(folder)} {DEFAULT_STRETCH}")


def cutouts_of_three_bands(tmp_path: Path):
    folder = write_cutouts(tmp_path / "cutouts", 3)
    return folder, digest(f"{of_folder(folder)} {DEFAULT_STRETCH}")


def cutouts_with_a_stretch(tmp_path: Path):
    folder = write_cutouts(tmp_path / "cutouts", 5)
    return folder, digest(f"{of_folder(folder)} {OTHER_STRETCH}")


def csv_table(tmp_path: Path):
    write_images(tmp_path / "files")
    files = [f"files/{(i * 5) % COUNT:03d}.png" for i in NUMBERS]
    rows = [f"{f},{i % 2},{i},{-i},0{i}\n" for i, f in enumerate(files)]
    (tmp_path / "a.csv").write_text("file_loc,label,RA,dec,iauname\n" + "".join(rows))
    paths = [tmp_path / file for file in files]
    return tmp_path / "a.csv", digest(f"{of_file(tmp_path / 'a.csv')} {of_files(paths)}")


def csv_table_of_cutouts(tmp_path: Path):
    """With paths alone, of which one is missing."""
    write_cutouts(tmp_path / "files", 3)
    files = [f"files/{i:03d}.fits" for i in NUMBERS]
    (tmp_path / "a.csv").write_text("path\n" + "\n".join(["nowhere.fits", *files]) + "\n")
    paths = of_files([tmp_path / file for file in files])
    return tmp_path / "a.csv", digest(f"{of_file(tmp_path / 'a.csv')} {paths} {DEFAULT_STRETCH}")


def fits_table(tmp_path: Path):
    write_images(tmp_path / "files")
    columns = {"filename": [f"files/{i:03d}.png" for i in NUMBERS], "label": ["b", "a"] * 12, "id": NUMBERS}
    Table(columns | {k: v.astype(">f4") for k, v in SKY.items()}).write(tmp_path / "a.fits")
    paths = of_files([tmp_path / file for file in columns["filename"]])
    return tmp_path / "a.fits", digest(f"{of_file(tmp_path / 'a.fits')} {paths}")


def hats(tmp_path: Path):
    """Partitions in another order than by name; a thumbnail repeats galaxies."""
    structs = [{"bytes": b, "path": "galaxy.png"} for b in encoded()]
    columns = {
        "_healpix_29": NUMBERS,
        "rgb_image": structs,
        "gz10_label": NUMBERS % 7,
        "object_id": NUMBERS.astype(str),
    }
    columns |= {"ra": SKY["ra"], "dec": SKY["dec"], "rgb_pixel_scale": np.full(COUNT, 0.524)}
    folder, made = tmp_path / "gz10", pa.table(columns)
    (folder / "dataset/Norder=2/Dir=0").mkdir(parents=True)
    files = [folder / f"dataset/Norder=2/Dir=0/Npix={pixel}.parquet" for pixel in (42, 9, 40)]
    for file, start, stop in zip(files, (0, 8, 11), (8, 11, COUNT), strict=True):
        pq.write_table(made.slice(start, stop - start), file, row_group_size=5)
    pq.write_metadata(made.schema, folder / "dataset/_common_metadata")
    pq.write_table(made.slice(0, 3), folder / "dataset/data_thumbnail.parquet")
    (folder / "partition_info.csv").write_text("Norder,Npix\n2,42\n2,9\n2,40\n")
    (folder / "hats.properties").write_text("obs_collection=mmu_gz10\n")
    return folder, of_files(files, folder)


def hats_collection(tmp_path: Path):
    _, fingerprint = hats(tmp_path)
    (tmp_path / "collection.properties").write_text("hats_primary_table_url=gz10\n")
    return tmp_path, fingerprint


KINDS = [
    hdf5,
    hdf5_without_sky,
    hdf5_with_a_damaged_chunk,
    parquet,
    parquet_of_structs,
    parquet_declared,
    parquet_partly_labelled,
    parquet_folder,
    image_folder,
    image_folder_by_class,
    image_folder_with_metadata,
    image_folder_with_a_test_split,
    cutouts_of_one_band,
    cutouts_of_three_bands,
    cutouts_with_a_stretch,
    csv_table,
    csv_table_of_cutouts,
    fits_table,
    hats,
    hats_collection,
]


# ------------------------------------------------------------------------------------------------------------ the tests


def numbers(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [None if np.isnan(value) else float(value) for value in values]


def without_library(problem: str) -> str:
    """A reason, without what another version of h5py may say."""
    return re.sub(r"cannot be read \(.*\):", "cannot be read:", problem)


def record(galaxies) -> dict:
    """What is compared. It is equal in every size but for `pixels` and `statistics`."""
    split = split_galaxies(galaxies)
    mean, std = channel_statistics([(galaxies, split["train"])])
    return {
        "native_size": galaxies.native_size,
        "class_names": list(galaxies.class_names),
        "label": None if galaxies.label is None else galaxies.label.tolist(),
        "object_id": None if galaxies.object_id is None else galaxies.object_id.tolist(),
        **{name: numbers(getattr(galaxies, name)) for name in ("ra", "dec", "pixel_scale")},
        "image_hash": digest(galaxies.image_hash.tobytes()),
        "blank": np.flatnonzero(galaxies.blank).tolist(),
        "predefined_test": np.flatnonzero(galaxies.predefined_test).tolist(),
        "problem": {str(row): without_library(galaxies.problem[row]) for row in np.flatnonzero(galaxies.problem != "")},
        "split": split_fingerprint(split),
        "pixels": [list(galaxies.pixels.shape), digest(np.ascontiguousarray(galaxies.pixels).tobytes())],
        "statistics": [*mean.tolist(), *std.tolist()],
    }


def check(name: str, galaxies) -> None:
    assert json.loads(json.dumps(record(galaxies))) == GOLDEN[name]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kind_of_input(tmp_path, kind):
    (tmp_path / "input").mkdir()
    path, fingerprint = kind(tmp_path / "input")
    stretch = Stretch()
    if kind is cutouts_with_a_stretch:
        stretch = Stretch("legacy", CHANGES)
    for size in (None, 16, None):  # the third time from the cache
        galaxies = open_galaxies(str(path), size, stretch=stretch, skip_unreadable=True)
        assert galaxies.name == str(path)
        assert galaxies.fingerprint == fingerprint
        check(f"{kind.__name__} {size}", galaxies)


@pytest.mark.parametrize("size", [32, 16])
def test_synthetic_galaxies(size):
    galaxies = open_galaxies("synthetic:24", size)
    code = digest(Path(synthetic.__file__).read_bytes())
    assert galaxies.fingerprint == digest(f"{code} 24 {size}")
    assert np.array_equal(galaxies.pixels, synthetic.render(NUMBERS, size))
    expected = GOLDEN[f"synthetic {size}"]
    pixels = ("pixels", "statistics", "image_hash")  # of float32, which another processor may round differently
    assert {k: v for k, v in record(galaxies).items() if k not in pixels} == expected


def test_galaxy10(tmp_path, monkeypatch):
    """The file that `GALAXY10_H5` names; the size and the SHA-256 of a small one stand in for the official ones."""
    path, fingerprint = hdf5(tmp_path)
    survey = SurveyFile(path.name, path.stat().st_size, fingerprint, "http://127.0.0.1:9/files/a.h5", None)
    monkeypatch.setattr("galaxy_mae.data.download.find_galaxy10.__defaults__", (survey,))
    monkeypatch.setenv("GALAXY10_H5", str(path))
    galaxies = open_galaxies("galaxy10")
    assert galaxies.fingerprint == fingerprint
    assert galaxies.class_names == GALAXY10_CLASSES
    check("hdf5 None", dataclasses.replace(galaxies, class_names=[f"class {c}" for c in range(10)]))


@pytest.mark.parametrize("stretch", [None, OTHER_STRETCH])
def test_hub(tmp_path, monkeypatch, stretch):
    """What the Hub answers is replaced: three splits, of which the fingerprint has the library's own."""
    import datasets

    made = pa.table({"image": [{"bytes": b, "path": None} for b in encoded()], "label": NUMBERS % 3, "ra": SKY["ra"]})
    made = made.append_column("dec", pa.array(SKY["dec"])).append_column("objid", pa.array(NUMBERS))
    classes = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["x", "y", "z"]),
            **{name: datasets.Value("float64") for name in ("ra", "dec")},
            "objid": datasets.Value("int64"),
        }
    )

    def load_dataset(_name, *, trust_remote_code):
        rows = {"test": made.slice(0, 5), "train": made.slice(5, 10), "validation": made.slice(15)}
        parts = {name: datasets.Dataset(part.cast(classes.arrow_schema)) for name, part in rows.items()}
        for name, part in parts.items():
            part._fingerprint = f"of {name}"
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {}
    if stretch:
        options["stretch"] = Stretch("legacy", CHANGES)
    expected = " ".join(["test of test train of train validation of validation", *([stretch] if stretch else [])])
    for size in (None, 16):
        galaxies = open_galaxies("someone/galaxies", size, **options)
        assert galaxies.fingerprint == digest(expected)
        check(f"hub {size}", galaxies)


def write_stream(tmp_path: Path, kind: str) -> Path:
    made = shards.galaxies_on_the_sky(300)
    if kind == "hats":
        return shards.write_hats(tmp_path / "hats", made, order=1)
    for name, part in (("train-0", made.slice(0, 120)), ("train-1", made.slice(120, 100)), ("test-0", made.slice(220))):
        (tmp_path / "files").mkdir(exist_ok=True)
        pq.write_table(part.drop_columns(["_healpix_29", "object_id"]), tmp_path / "files" / f"{name}.parquet")
    return tmp_path / "files"


def of_stream(folder: Path) -> str:
    lines = []
    names = "Npix=*.parquet" if (folder / "dataset").exists() else "*.parquet"
    for file in folder.rglob(names):
        content = file.read_bytes()
        length = int.from_bytes(content[-8:-4], "little")
        lines.append(f"{file.relative_to(folder)} {len(content)} {digest(content[-8 - length : -8])}")
    return digest("\n".join(sorted(lines)))


@pytest.mark.parametrize("kind", ["hats", "files"])
@pytest.mark.parametrize("size", [32, 16])
def test_stream_of_parquet_shards(tmp_path, kind, size):
    folder = write_stream(tmp_path, kind)
    stream = open_stream(str(folder), size, 2)
    assert stream.galaxies.fingerprint == of_stream(folder)
    dataset = StreamDataset(stream, 64)
    sampler, order, pixels = dataset.sampler(12, 5), [], hashlib.sha256()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        places = list(sampler)
        for start in range(0, len(places), 12):
            batch = dataset.collate(dataset.__getitems__(places[start : start + 12]))
            order += batch["index"].tolist()
            pixels.update(batch["images"].numpy().tobytes())
    split = split_fingerprint(stream.split)
    names = None if stream.galaxies.object_id is None else stream.galaxies.object_id.tolist()
    sample = [names, stream.galaxies.label.tolist(), numbers(stream.galaxies.ra), numbers(stream.galaxies.dec)]
    sample.append(digest(np.ascontiguousarray(stream.galaxies.pixels).tobytes()))
    found = {"order": digest(np.array(order, "<i8").tobytes()), "pixels": pixels.hexdigest(), "split": split}
    found |= {"counts": stream.counts.sum(axis=0).tolist(), "sample": digest(json.dumps(sample))}
    assert found == GOLDEN[f"stream {kind} {size}"]
