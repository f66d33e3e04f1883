"""Masked-autoencoder pre-training for galaxy images.

One folder per stage, over common modules. Each imports only from those below it; CONTRIBUTING.md lists them in this
order, and `make lint` checks it.
"""

from typing import Any

__all__ = ["predict"]


def __getattr__(name: str) -> Any:
    """`galaxy_mae.predict`, imported when it is first used: torch is slow to import."""
    if name == "predict":
        from galaxy_mae.catalogue.predict import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
