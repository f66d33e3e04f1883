"""A HATS catalogue of images in, the same catalogue with classes and embeddings out, partition by partition.

Several tasks, as of a Slurm array, share the partitions (`command`, `partitions`). Each partition is written into a
staging folder and renamed when it is complete, so a killed task loses only the partitions in its hands, and the same
command resumes. The last step compares all partitions with the input and makes the output a catalogue (`output`).

An image's outputs do not depend on the batch it is in (`CatalogueModel.outputs`), and so not on the number of tasks or
on interruptions. LSDB computes the same rows (`lazy`), and faiss searches them (`index`).
"""

__all__ = ["embed"]


def __getattr__(name: str):
    """`embed`, imported when it is first used: torch is slow to import, and the index goes without it."""
    if name == "embed":
        from galaxy_mae.survey.lazy import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
