"""Masked-autoencoder pre-training for galaxy images.

    import galaxy_mae as gm

    gm.predict("my_galaxies/")                          classes of a folder of images, by the small model
    gm.embed("my_galaxies/", gm.load_encoder("pretrained"))
    run = gm.pretrain("my_galaxies/", recipe="demo", output_dir="runs/mine")
    gm.evaluate(run, "my_galaxies.parquet").show()

One folder per stage, over common modules. Each imports only from those below it; CONTRIBUTING.md lists them in this
order, and `make lint` checks it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galaxy_mae.catalogue.predict import predict
    from galaxy_mae.errors import UserError
    from galaxy_mae.library import embed, evaluate, pretrain
    from galaxy_mae.model.encoder import load_encoder

__all__ = ["UserError", "embed", "evaluate", "load_encoder", "predict", "pretrain"]
_MODULES = {"predict": "catalogue.predict", "load_encoder": "model.encoder", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    """The public functions, imported when one is first used: torch is slow to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'library')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
