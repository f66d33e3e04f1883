"""What turns rows of a HATS catalogue into rows of the output: copied columns, classes, flags and embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from galaxy_mae.catalogue.models import CatalogueModel, open_model
from galaxy_mae.catalogue.predict import select_device
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.readers import UnreadableImage, find_column
from galaxy_mae.survey.images import ImageReader, image_reader

_RUN_IMAGES = {"cpu": 64, "cuda": 512}  # that go through the model together, at most: full batches
_RUN_BYTES = 32 << 20  # of their pixels


@dataclass(frozen=True)
class Embedder:
    """What turns rows of a catalogue into rows of the output.

    Attributes:
        model: what predicts.
        reader: of the images.
        kept: columns that are copied: HEALPix index, object id, coordinates.
        device, bf16: where and how the model runs.
        embedding_type: float32 or float16.
    """

    model: CatalogueModel
    reader: ImageReader
    kept: tuple[str, ...]
    device: str
    bf16: bool
    embedding_type: type[np.floating]

    @property
    def columns(self) -> list[str]:
        """What is read of the catalogue."""
        return [*self.kept, *self.reader.columns]

    def rows(self, table: pa.Table, images: list[np.ndarray | UnreadableImage]) -> pa.Table:
        """The output's rows.

        Args:
            table: N rows; the columns `kept` are copied.
            images: N images, or why they cannot be used.
        """
        problem = np.array([str(image) if isinstance(image, UnreadableImage) else "" for image in images], object)
        sizes = np.array([0 if isinstance(image, UnreadableImage) else len(image) for image in images])
        sizes[sizes == 0] = sizes.max(initial=0) or self.model.image_size
        kept = table.select(list(self.kept))
        kept = kept.cast(pa.schema([field.remove_metadata() for field in kept.schema]))
        outputs, order = [], []
        for size in np.unique(sizes):  # one, but for a model that enlarges images of several sizes
            index = np.flatnonzero(sizes == size)
            pixels = np.zeros((len(index), size, size, 3), np.uint8)
            for pixel, i in zip(pixels, index, strict=True):
                if not isinstance(images[i], UnreadableImage):
                    pixel[:] = images[i]
            flat = pixels.reshape(len(pixels), -1)
            blank = flat.min(axis=1) == flat.max(axis=1)
            outputs.append(
                self.model.predict(
                    kept.take(index), pixels, problem[index], blank, self.device, self.bf16, self.embedding_type
                )
            )
            order.append(index)
        output = pa.concat_tables(outputs)
        return output if len(order) == 1 else output.take(np.argsort(np.concatenate(order)))

    def empty(self, schema: pa.Schema) -> pa.Table:
        """The output without a row, for a catalogue of this schema."""
        one = pa.table({name: pa.nulls(1, schema.field(name).type) for name in self.kept})
        return self.rows(one, [np.zeros((self.model.image_size, self.model.image_size, 3), np.uint8)]).slice(0, 0)

    def images_per_run(self) -> int:
        """How many images go through the model together: full batches."""
        batch = 16 if self.device == "cpu" else 256
        most = min(_RUN_IMAGES[self.device], _RUN_BYTES // (3 * self.model.image_size**2))
        return max(1, most // batch) * batch


def open_embedder(
    model: str,
    schema: pa.Schema,
    properties: dict[str, str],
    source: str,
    *,
    image_column: str | None,
    bands: Sequence[str],
    stretch: Stretch,
    bf16: bool,
    float16: bool,
    orientations: bool,
    use_cpu: bool,
) -> Embedder:
    """Open a model for the images of a catalogue.

    Args:
        model: as for `--model`.
        schema, properties: of the catalogue.
        source: flag and name of the catalogue, for messages.
        image_column, bands, stretch, bf16, float16, orientations, use_cpu: as the flags of the command.

    Raises:
        UserError: no such model or column; orientations for a classifier.
    """
    device = select_device(use_cpu)
    opened = open_model(model, device=device, bf16=bf16, orientations=orientations)
    reader = image_reader(schema, image_column, bands, stretch, opened, source)
    kept = _kept_columns(schema.names, properties)
    return Embedder(opened, reader, kept, device, bf16, np.float16 if float16 else np.float32)


def _kept_columns(names: Sequence[str], properties: dict[str, str]) -> tuple[str, ...]:
    """The HEALPix index, object id, right ascension and declination, as far as a catalogue has them."""
    wanted = [
        properties.get("hats_col_healpix", "_healpix_29"),
        find_column(names, "object_id"),
        properties.get("hats_col_ra", "ra"),
        properties.get("hats_col_dec", "dec"),
    ]
    return tuple(name for name in wanted if name in names)
