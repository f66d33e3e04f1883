"""Masked-autoencoder pre-training for galaxy images.

One folder per stage, over common modules. Each imports only from those below it (`make lint` checks that):

    sweep        hyper-parameter sweeps: one trial per run
    survey       HATS catalogues by partitions, in LSDB, and their index
    catalogue    predictions for new galaxies, similar and odd ones
    reports      report, pages and model cards
    evaluation   features, probes, fine-tuning, the methods, scores
    training     arguments, recipes, the Trainer, checkpoints, tracking, preemption
    predictions  the table that leaves: schema, file formats, neighbors
    model        the masked autoencoder, encoders, the classifier
    data         sources, split, batches
    figures      every figure
    provenance   run.json, versions, commit
    files        files and folders that appear complete or not at all, locks
    errors       errors that a user can fix, in one line
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galaxy_mae.catalogue.predict import predict

__all__ = ["predict"]


def __getattr__(name: str) -> Any:
    """`galaxy_mae.predict`, imported when it is first used: torch is slow to import."""
    if name == "predict":
        from galaxy_mae.catalogue.predict import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
