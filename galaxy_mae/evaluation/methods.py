"""The one list of the methods of an evaluation. A name says nothing: all that is asked about a method stands here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How galaxies are classified.

    Attributes:
        name: of its result, `NAME.json` and `NAME.parquet`.
        title: in the report.
        initialization: weights of the network, `random` or `ssl` (pre-trained); None without a network.
        classifier: what classifies.
        trained_on: what is learned from the labels: `nothing`, a classifier of frozen `features` or of `pixels`, or the
            network on `images`.
        run_by: the method whose run writes this result: itself, or the one that it accompanies.
        baseline: the method that it is compared with, the same from random weights; None compares with chance.
        network: an architecture that is trained from scratch (`model.backbone.baseline_config`); None is the encoder's.
    """

    name: str
    title: str
    initialization: str | None
    classifier: str
    trained_on: str
    run_by: str
    baseline: str | None = None
    network: str | None = None


def _of_features(classifier: str, title: str) -> tuple[Method, Method]:
    """A further classifier of frozen features, from random and from pre-trained weights."""
    random, ssl = f"random_{classifier}", f"ssl_{classifier}"
    return (
        Method(random, f"{title}, random weights", "random", classifier, "features", "random_linear_probe"),
        Method(ssl, f"{title}, SSL weights", "ssl", classifier, "features", "ssl_linear_probe", random),
    )


_TTA = "with test-time augmentation (8 dihedral views)"
_RESNET, _CONVNEXT = "resnet18_from_scratch", "convnextv2_nano_from_scratch"

METHODS = (
    # The five, in the order of the array's indices.
    Method("zero_shot", "Zero-shot (random weights)", "random", "untrained", "nothing", "zero_shot"),
    Method(
        "random_linear_probe", "Linear probe (random weights)", "random", "linear_probe", "features",
        "random_linear_probe",
    ),
    Method(
        "ssl_linear_probe", "Linear probe (SSL weights)", "ssl", "linear_probe", "features", "ssl_linear_probe",
        "random_linear_probe",
    ),
    Method(
        "random_fine_tune", "Fine-tune (random weights)", "random", "fine_tune", "images", "random_fine_tune"
    ),
    Method(
        "ssl_fine_tune", "Fine-tune (SSL weights)", "ssl", "fine_tune", "images", "ssl_fine_tune", "random_fine_tune"
    ),
    # Additional baselines.
    Method(_RESNET, "ResNet-18 from scratch", "random", "fine_tune", "images", _RESNET, network="resnet18"),
    Method(
        _CONVNEXT, "ConvNeXt V2 nano from scratch", "random", "fine_tune", "images", _CONVNEXT,
        network="convnextv2_nano",
    ),
    Method(
        "raw_pixels", "Logistic regression on raw 32 x 32 pixels", None, "linear_probe", "pixels",
        "random_linear_probe",
    ),
    *_of_features("radial_probe", "Linear probe of means over rings"),
    *_of_features("orientation_probe", "Linear probe of mean and std over 16 orientations"),
    *_of_features("best_layer", "Linear probe at the best layer"),
    *_of_features("knn", "k-NN (20)"),
    *_of_features("nearest_centroid", "Nearest centroid"),
    *_of_features("attentive_probe", "Attentive probe"),
    Method(
        "random_fine_tune_tta", f"Fine-tune {_TTA}, random weights", "random", "fine_tune_tta", "images",
        "random_fine_tune",
    ),
    Method(
        "ssl_fine_tune_tta", f"Fine-tune {_TTA}, SSL weights", "ssl", "fine_tune_tta", "images", "ssl_fine_tune",
        "random_fine_tune_tta",
    ),
    Method(
        f"{_RESNET}_tta", f"ResNet-18 from scratch {_TTA}", "random", "fine_tune_tta", "images", _RESNET,
        network="resnet18",
    ),
    Method(
        f"{_CONVNEXT}_tta", f"ConvNeXt V2 nano from scratch {_TTA}", "random", "fine_tune_tta", "images", _CONVNEXT,
        network="convnextv2_nano",
    ),
)  # fmt: skip

BY_NAME = {method.name: method for method in METHODS}
ARRAY_METHODS = METHODS[:5]  # those with an index of the Slurm array
