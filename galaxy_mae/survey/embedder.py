"""What turns rows of a HATS catalogue into rows of the output: their own columns, classes, flags and embeddings."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from galaxy_mae.catalogue.models import CatalogueModel, open_model
from galaxy_mae.catalogue.predict import select_device
from galaxy_mae.data.arrow import BANDS, ImageColumn
from galaxy_mae.data.arrow import image_column as find_image_column
from galaxy_mae.data.columns import find_column, is_plain, numbers
from galaxy_mae.data.fits import Stretch, UnreadableImage
from galaxy_mae.data.frame import UNREADABLE, Frame, Framed, geometry
from galaxy_mae.data.images import Encoded, as_cutout, decode
from galaxy_mae.errors import UserError, first_line
from galaxy_mae.predictions.schema import with_geometry

logger = logging.getLogger(__name__)

IMAGES_PER_RUN = {"cpu": 64, "cuda": 512}  # that go through the model together: full batches

Decoded = tuple[Framed | UnreadableImage, float]  # an image, and the fraction of it that is NaN


@dataclass(frozen=True)
class Embedder:
    """A model, and how it is used: the column of images, the columns that are copied, how images are made."""

    model: CatalogueModel
    image: ImageColumn
    kept: tuple[str, ...]
    stretch: Stretch
    frame: Frame
    embedding_type: type[np.floating]

    def images(self, table: pa.Table) -> list[Decoded]:
        """The image of each row in its frame, or why it cannot be used."""
        name = find_column(self.kept, "pixel_scale")
        unknown = name is None or not self.frame.needs_scale
        scale = np.full(len(table), np.nan) if unknown else numbers("--catalog", name, table[name])
        return list(map(self._usable, self.image.encoded(table[self.image.name]), scale))

    def _usable(self, value: Encoded, scale: float) -> Decoded:
        nan_fraction = np.nan
        try:
            value = as_cutout(value, self.stretch)
            nan_fraction = getattr(value, "nan_fraction", np.nan)
            return self.frame.apply(decode(value, self.stretch), self.model.image_size, scale), nan_fraction
        except UnreadableImage as problem:
            return problem, nan_fraction
        except MemoryError:  # of the machine
            raise
        except Exception as error:  # of one image, whatever it leads a decoder to
            return UnreadableImage(f"cannot be used ({first_line(error)[:200]})"), nan_fraction

    def rows(self, table: pa.Table, decoded: Sequence[Decoded]) -> pa.Table:
        """The output's rows, of N rows of the catalogue and their N images as of `images`."""
        images, nan_fraction = zip(*decoded, strict=True)
        nan_fraction = np.array(nan_fraction, np.float32) if self.image.kind == "flux" else None
        problem = np.array([str(image) if isinstance(image, UnreadableImage) else "" for image in images], object)
        none = Framed(np.zeros((self.model.image_size,) * 2 + (3,), np.uint8), UNREADABLE)
        framed = [none if problem[i] else image for i, image in enumerate(images)]
        pixels, numbers = np.stack([image.pixels for image in framed]), np.array([image.numbers for image in framed])
        blank = pixels.min(axis=(1, 2, 3)) == pixels.max(axis=(1, 2, 3))
        kept = table.select(list(self.kept))
        kept = kept.cast(pa.schema([column.remove_metadata() for column in kept.schema]))
        kept = with_geometry(kept, geometry(numbers, self.frame))
        return self.model.predict(kept, pixels, problem, blank, self.embedding_type, nan_fraction)

    def empty(self, schema: pa.Schema) -> pa.Table:
        """The output without a row, for a catalogue of this schema."""
        one = pa.table({name: pa.nulls(1, schema.field(name).type) for name in self.kept})
        return self.rows(one, [(UnreadableImage("is missing"), np.nan)]).slice(0, 0)


def open_embedder(
    model: str,
    schema: pa.Schema,
    properties: dict[str, str],
    source: str,
    *,
    image_column: str | None = None,
    bands: Sequence[str] = BANDS,
    stretch: str = "auto",
    frame: Frame | None = None,
    bf16: bool = False,
    float16: bool = False,
    orientations: bool = False,
    use_cpu: bool = False,
) -> Embedder:
    """Open a model for the images of a catalogue.

    Args:
        model: as for `--model`.
        schema, properties: of the catalogue.
        source: flag and name of the catalogue, for messages.
        image_column, bands, stretch, frame, bf16, float16, orientations, use_cpu: as the flags of `catalogue survey`.

    Raises:
        UserError: no such model or column; orientations for a classifier.
    """
    if len(bands) != 3 or len(set(bands)) != 3:
        raise UserError(f"--bands {' '.join(bands)}: give three different bands, for blue, green and red")
    image = find_image_column(source, schema, image_column, bands)
    if image.kind == "flux" and stretch == "auto":
        logger.warning("%s: fluxes have no header that names a survey: --stretch legacy is assumed", source)
    opened = open_model(model, device=select_device(use_cpu), bf16=bf16, orientations=orientations)
    number_type = np.float16 if float16 else np.float32
    return Embedder(
        opened, image, _kept_columns(schema, properties), Stretch.named(stretch), frame or opened.frame, number_type
    )


def _kept_columns(schema: pa.Schema, properties: dict[str, str]) -> tuple[str, ...]:
    """HEALPix index, object id, right ascension and declination, and then all others but images and nested columns."""
    names = (
        properties.get("hats_col_healpix", "_healpix_29"),
        find_column(schema.names, "object_id"),
        properties.get("hats_col_ra", "ra"),
        properties.get("hats_col_dec", "dec"),
        *schema.names,
    )
    kinds = {field.name: field.type for field in schema if is_plain(field.type) and field.type != pa.null()}
    return tuple(name for name in dict.fromkeys(names) if name in kinds)
