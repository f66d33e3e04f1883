"""A small HATS catalogue, written with pyarrow alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy_healpix import lonlat_to_healpix
from conftest import png, random_images

COUNT = 600


def galaxies_on_the_sky(count: int = COUNT) -> pa.Table:
    """Galaxies in groups of three, 36 arcsec apart, all over the sky."""
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, count // 3).repeat(3), np.degrees(np.arcsin(rng.uniform(-1, 1, count // 3))).repeat(3)
    dec = dec * 0.99 + 0.01 * (np.arange(count) % 3)
    images = [{"bytes": png(image), "path": None} for image in random_images(count)]
    order29 = lonlat_to_healpix(ra * units.deg, dec * units.deg, nside=2**29, order="nested")
    columns = {"_healpix_29": order29, "rgb_image": images, "ra": ra, "dec": dec, "gz10_label": np.arange(count) % 10}
    return pa.table(columns | {"object_id": [f"galaxy {i}" for i in range(count)]}).sort_by("_healpix_29")


def write_hats(folder: Path, table: pa.Table, order: int) -> Path:
    """Write a HATS catalogue of partitions of one order."""
    pixel = table["_healpix_29"].to_numpy() >> 2 * (29 - order)
    for number in np.unique(pixel):
        path = folder / f"dataset/Norder={order}/Dir={number // 10_000 * 10_000}/Npix={number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pixel == number), path, row_group_size=7)
    pq.write_metadata(table.schema, folder / "dataset/_common_metadata")
    rows = "".join(f"{order},{number}\n" for number in np.unique(pixel))
    (folder / "partition_info.csv").write_text(f"Norder,Npix\n{rows}")
    (folder / "hats.properties").write_text("obs_collection=small\ndataproduct_type=object\n")
    return folder
