"""The one list of the methods of an evaluation. A name says nothing: all that is asked about a method stands here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How galaxies are classified."""

    name: str  # of its result, `NAME.json` and `NAME.parquet`
    title: str  # in the report
    classifier: str  # what classifies; of frozen features it is a function of `evaluation.frozen`
    classifier_title: str  # in a table with a column for each initialization
    initialization: str | None  # weights of the network, `random` or `ssl` (pre-trained); None without a network
    trained_on: str  # what learns from labels: `nothing`, a classifier of frozen `features`, the network of `images`
    run_by: str  # name of the method whose run writes this result: itself, or the one that it accompanies
    baseline: str | None = None  # the same method from random weights, with which it is compared; None: chance
    network: str | None = None  # one to train from scratch (`model.backbone.baseline_config`); None is the encoder's
    few_labels: bool = False  # whether `--label_fractions`, and of features `--transfer`, repeat it on fewer labels
    phrase: str = ""  # what the report's sentences call it; empty if they leave it out


def _pair(
    classifier: str, title: str, trained_on: str, run_by: str, *, few_labels: bool = False, **phrases: str
) -> tuple[Method, Method]:
    """A classifier from random and from pre-trained weights, and the one that it accompanies, or itself."""
    return tuple(
        Method(
            f"{initialization}_{classifier}",
            f"{title} ({weights})" if run_by == classifier else f"{title}, {weights}",
            classifier,
            title,
            initialization,
            trained_on,
            run_by=f"{initialization}_{run_by}",
            baseline=f"random_{classifier}" if initialization == "ssl" else None,
            few_labels=few_labels,
            phrase=phrases.get(initialization, ""),
        )
        for initialization, weights in (("random", "random weights"), ("ssl", "SSL weights"))
    )


_TTA = "with test-time augmentation (8 dihedral views)"


def _from_scratch(network: str, title: str) -> tuple[Method, Method]:
    """A network of `--baseline`, without and with test-time augmentation."""
    name, title, phrase = f"{network}_from_scratch", f"{title} from scratch", f"training a {title} from scratch"
    tta = f"{title} {_TTA}"
    return (
        Method(
            name, title, "fine_tune", title, "random", "images", name, None, network, few_labels=True, phrase=phrase
        ),
        Method(f"{name}_tta", tta, "fine_tune_tta", tta, "random", "images", name, None, network),
    )


_RESNET, _RESNET_TTA = _from_scratch("resnet18", "ResNet-18")
_CONVNEXT, _CONVNEXT_TTA = _from_scratch("convnextv2_nano", "ConvNeXt V2 nano")
_RAW = "Logistic regression on raw 32 x 32 pixels"
_RINGS, _ORIENTATIONS = "Linear probe of means over rings", "Linear probe over 16 orientations"
_PROBE = "a linear probe on the frozen pre-trained encoder"
_ORIENTED = f"{_PROBE}, over 16 orientations of the images,"

METHODS = (
    # Those with an index of the Slurm array, in its order.
    Method("zero_shot", "Zero-shot (random weights)", "untrained", "Zero-shot", "random", "nothing", "zero_shot"),
    *_pair("linear_probe", "Linear probe", "features", "linear_probe", few_labels=True, ssl=_PROBE),
    *_pair(
        "fine_tune",
        "Fine-tune",
        "images",
        "fine_tune",
        few_labels=True,
        random="fine-tuning from random weights",
        ssl="fine-tuning the pre-trained encoder",
    ),
    # Additional baselines, in the order of the report.
    _RESNET,
    _CONVNEXT,
    Method("raw_pixels", _RAW, "raw_pixels", _RAW, None, "features", "random_linear_probe"),
    *_pair("radial_probe", _RINGS, "features", "linear_probe", few_labels=True),
    *_pair("orientation_probe", _ORIENTATIONS, "features", "linear_probe", few_labels=True, ssl=_ORIENTED),
    *_pair("best_layer", "Linear probe at the best layer", "features", "linear_probe"),
    *_pair("knn", "k-NN (20)", "features", "linear_probe"),
    *_pair("nearest_centroid", "Nearest centroid", "features", "linear_probe"),
    *_pair("attentive_probe", "Attentive probe", "features", "linear_probe"),
    *_pair("fine_tune_tta", f"Fine-tune {_TTA}", "images", "fine_tune"),
    _RESNET_TTA,
    _CONVNEXT_TTA,
)
BY_NAME = {method.name: method for method in METHODS}
ARRAY_METHODS = tuple(method for method in METHODS if method.run_by == method.name and method.network is None)
BASELINES = {method.network: method for method in METHODS if method.network and method.run_by == method.name}


def describe_methods() -> str:
    """The methods that the flags of linear_probe_checkpoints.py select."""
    lines = [f"  {i} {method.name:<22}{method.title}" for i, method in enumerate(ARRAY_METHODS)]
    return "\n".join(["methods of --method:", *lines, f"networks of --baseline: {', '.join(BASELINES)}"])


def written_by(method: Method) -> tuple[Method, ...]:
    """All methods whose results a method's run writes. Itself comes last: its result marks the run as finished."""
    return (*(x for x in METHODS if x.run_by == method.name and x is not method), method)


def command_of(method: Method) -> str:
    """The flag with which linear_probe_checkpoints.py writes a method's result."""
    run = BY_NAME[method.run_by]
    return f"--baseline {run.network}" if run.network else f"--method {run.name}"
