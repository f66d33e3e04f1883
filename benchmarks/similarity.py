"""How well `catalogue similar` and `catalogue odd` find galaxies of one class, and images that are no galaxies.

    python benchmarks/similarity.py --encoder runs/galaxies --dataset galaxies.parquet
    python benchmarks/similarity.py --encoder runs/galaxies --dataset galaxies.parquet --sheet foreign.png

Compares the features of the encoder, of encoders of the same sizes with random weights (seeds 0, 1 and 2) and the raw
pixels at 32 x 32. Prints

    precision at 10   the fraction of a test galaxy's 10 nearest training and validation galaxies that are of its class;
                      mean over the test galaxies, with a 95 % bootstrap interval over them
    foreign images    the ranks of ten planted images that are no galaxies (artifacts of telescopes and cameras) among
                      all galaxies, by each score of oddness in each scaling of the encoders' features; ten sets of them

Labels are used for counting alone.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measurement import print_table
from scipy.ndimage import gaussian_filter
from sklearn.preprocessing import StandardScaler

from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.images import area_average
from galaxy_mae.data.seen import frame_of
from galaxy_mae.data.split import split_galaxies
from galaxy_mae.errors import UserError, one_line_errors
from galaxy_mae.evaluation.features import encode, mean_pool
from galaxy_mae.figures import ranked_galaxies
from galaxy_mae.model.encoder import Encoder, load_encoder, random_encoder
from galaxy_mae.predictions.neighbors import isolation_forest, knn_distance, neighbors, whiten
from galaxy_mae.provenance import session, short_commit

K = 10
RANDOM_SEEDS = (0, 1, 2)
RAW_SIZE = 32  # pixels
BOOTSTRAP_SAMPLES = 10_000
FOREIGN_SETS = 10
SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda features: features,
    "standardized": lambda features: StandardScaler().fit_transform(features),
    "whitened": whiten,
}
ANOMALY_SCORES = {"k-NN distance": knn_distance, "isolation forest": isolation_forest}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a run, an encoder's folder or a Hub id")
    parser.add_argument("--dataset", required=True, help="labelled galaxies of at least the encoder's image size")
    parser.add_argument("--split_seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG of the first set of foreign images")
    options = parser.parse_args(arguments)
    encoder = load_encoder(options.encoder)
    frame = frame_of(encoder.training_images)
    galaxies = open_galaxies(options.dataset, encoder.image_size, frame=frame)
    if galaxies.label is None:
        raise UserError(f"--dataset {options.dataset}: it has no labels; use labelled galaxies")
    native = open_galaxies(options.dataset, frame=frame)
    names, foreign = foreign_sets(native.pixels)
    if options.sheet:
        captions = [[name] for name in names]
        ranked_galaxies(options.sheet, [list(zip(foreign[0], captions, strict=True))], "Foreign images")
    print(f"commit {short_commit(session())}; {len(galaxies):,} galaxies")
    pixels = np.concatenate([galaxies.pixels, *(area_average(images, galaxies.image_size) for images in foreign)])
    features = {
        "pre-trained": [encoder_features(encoder.model, encoder, pixels)],
        "random weights": [
            encoder_features(random_encoder(encoder.model.config, seed), encoder, pixels) for seed in RANDOM_SEEDS
        ],
        f"raw pixels, {RAW_SIZE} x {RAW_SIZE}": [
            area_average(pixels, RAW_SIZE).reshape(len(pixels), -1).astype(np.float32)
        ],
    }
    report_precision(galaxies, options.split_seed, features)
    report_ranks(names, len(galaxies), {kind: features[kind][0] for kind in ("pre-trained", "random weights")})


def encoder_features(model, encoder: Encoder, pixels: np.ndarray) -> np.ndarray:
    """Mean patch tokens of images (M, S, S, 3) uint8, (M, hidden size) float32, normalized as for `encoder`."""
    batches = GalaxyBatches(pixels, encoder.mean, encoder.std, encoder.image_size)
    return np.concatenate([mean_pool(last) for *_, last in encode(model, batches, np.arange(len(pixels)))])


# ----------------------------------------------------------------------------------------------------- precision at ten


def report_precision(galaxies: Galaxies, split_seed: int, features: dict[str, list[np.ndarray]]) -> None:
    """Print the precision at 10 of each kind of features, and of chance."""
    split, label = split_galaxies(galaxies, split_seed), galaxies.label
    pool, queries = np.concatenate([split["train"], split["validation"]]), split["test"]
    print(f"{len(queries):,} queries, {len(pool):,} other galaxies")
    rows, precisions = [], {}
    for name, seeds in features.items():
        of_seeds = [precision(each, label, pool, queries) for each in seeds]
        precisions[name] = np.mean(of_seeds, axis=0)  # (queries,)
        spread = f"{min(map(np.mean, of_seeds)):.1%} to {max(map(np.mean, of_seeds)):.1%}" if len(seeds) > 1 else ""
        gain = "" if len(rows) == 0 else interval(precisions["pre-trained"] - precisions[name])
        rows.append((name, interval(precisions[name]), spread, gain))
    frequency = np.bincount(label[pool], minlength=len(galaxies.class_names)) / len(pool)
    chance = frequency[label[queries]]
    rows.append(("chance", f"{chance.mean():.1%}", "", interval(precisions["pre-trained"] - chance)))
    print_table(("features", "precision at 10", "seeds", "pre-trained, minus this"), rows)
    rows = [
        (name, *(f"{of_query[label[queries] == c].mean():.1%}" for of_query in (*precisions.values(), chance)))
        for c, name in enumerate(galaxies.class_names)
        if np.any(label[queries] == c)
    ]
    print_table(("class", *precisions, "chance"), rows)


def precision(features: np.ndarray, label: np.ndarray, pool: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(Q,) float64: the fraction of each query's 10 nearest rows of `pool` that have its label."""
    row, _ = neighbors(features[pool], features[queries], K)
    return (label[pool][row] == label[queries][:, None]).mean(axis=1)


def interval(values: np.ndarray) -> str:
    """The mean of (Q,) values with its 95 % bootstrap interval over them."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():.1%} ({low:.1%} to {high:.1%})"


# -------------------------------------------------------------------------------------------- ranks of foreign images


def report_ranks(names: list[str], galaxies: int, features: dict[str, np.ndarray]) -> None:
    """Print the ranks of planted foreign images by each score and each scaling of each kind of features."""
    rows, medians = [], {}
    for kind, of_images in features.items():
        for scaling, scale in SCALINGS.items():
            ranks = {score: np.empty((FOREIGN_SETS, len(names)), int) for score in ANOMALY_SCORES}
            for i in range(FOREIGN_SETS):
                planted = of_images[galaxies:].reshape(FOREIGN_SETS, len(names), -1)[i]
                scaled = scale(np.concatenate([of_images[:galaxies], planted]))
                for score, compute in ANOMALY_SCORES.items():
                    ranks[score][i] = rank(compute(scaled))[galaxies:]
            for score, of_sets in ranks.items():
                top = (of_sets <= 50).sum(axis=1)
                worst = np.median(of_sets.max(axis=1))
                found = f"{top.mean():.1f} ({top.min()} to {top.max()})"
                rows.append((kind, scaling, score, f"{np.median(of_sets):.0f}", f"{worst:.0f}", found))
                medians[kind, scaling, score] = np.median(of_sets, axis=0)
    columns = ("features", "scaling", "score", "median rank", "worst rank (median of sets)", "in the first 50, of 10")
    print_table(columns, rows)
    print_table(
        ("median rank", *names), [(", ".join(key), *(f"{x:.0f}" for x in each)) for key, each in medians.items()]
    )


def rank(score: np.ndarray) -> np.ndarray:
    """(N,) int: 1 for the highest score."""
    ranks = np.empty(len(score), int)
    ranks[np.argsort(-score, kind="stable")] = np.arange(1, len(score) + 1)
    return ranks


def foreign_sets(galaxies: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Their names, and (10, 10, S, S, 3) uint8: ten sets of one image each.

    Args:
        galaxies: (N, S, S, 3) uint8; some artifacts lie on a galaxy.
    """
    sets = []
    for seed in range(FOREIGN_SETS):
        rng = np.random.default_rng(seed)
        images = {kind.__name__: kind(rng, galaxies[rng.integers(len(galaxies))].astype(float)) for kind in FOREIGN}
        sets.append(np.stack([image.clip(0, 255).astype(np.uint8) for image in images.values()]))
    return [name.replace("_", " ") for name in images], np.stack(sets)


# ------------------------------------------------------------------------------------------------------- foreign images
#
# Each makes one image of 0 to 255, (S, S, 3) float64, and may use the image of a galaxy. Lengths are fractions of S.


def saturated_star(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    x, y = _coordinates(galaxy, rng.uniform(-0.12, 0.12, 2), rng.uniform(0, np.pi / 2))
    spikes = sum(np.exp(-((across / 0.008) ** 2) - np.abs(along) / 0.25) for across, along in ((x, y), (y, x)))
    return _sky(rng, galaxy) + _gray(_star(x, y) + 400 * spikes)


def satellite_trail(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    x, _ = _coordinates(galaxy, rng.uniform(-0.2, 0.2, 2), rng.uniform(0, np.pi))
    color = rng.permutation([1.0, 0.15, 0.05])  # the bands are exposed one after the other
    return galaxy + 220 * np.exp(-((x / 0.012) ** 2))[..., None] * color


def bleeding_column(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    x, y = _coordinates(galaxy, rng.uniform(-0.2, 0.2, 2))
    return _sky(rng, galaxy) + _gray(_star(x, y) + 255 * (np.abs(x) < 0.017))


def ghost(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    """Light that was reflected in the camera: the telescope's pupil, out of focus."""
    radius = np.hypot(*_coordinates(galaxy, rng.uniform(-0.12, 0.12, 2)))
    ring = 1 / (1 + np.exp((radius - 0.35) / 0.008)) / (1 + np.exp((0.14 - radius) / 0.008))
    return _sky(rng, galaxy) + 70 * ring[..., None] * rng.uniform(0.5, 1, 3)


def noise(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    return rng.normal(60, 45, galaxy.shape)


def cosmic_rays(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    image = galaxy.copy()
    for _ in range(40):
        x, y = _coordinates(galaxy, rng.uniform(-0.5, 0.5, 2), rng.uniform(0, np.pi))
        image[(np.abs(x) < 0.006) & (np.abs(y) < rng.uniform(0.01, 0.08)), rng.integers(3)] = 255
    return image


def chip_edge(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    x, _ = _coordinates(galaxy, rng.uniform(-0.08, 0.08, 2), rng.uniform(0, 2 * np.pi))
    return np.where(x[..., None] > 0, 0, galaxy)


def grid_pattern(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    x, y = _coordinates(galaxy, np.zeros(2))
    period = rng.uniform(0.06, 0.16)
    return galaxy + _gray(110 * ((x % period < 0.012) | (y % period < 0.012)))


def single_band(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    return galaxy * np.eye(3)[rng.integers(3)]


def star_field(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    light = np.zeros(galaxy.shape)
    y, x = rng.integers(0, len(galaxy), (2, 150))
    light[y, x] = 50 * rng.pareto(1.5, 150)[:, None] * rng.uniform(0.6, 1, (150, 3))
    sigma = 0.012 * len(galaxy)
    return _sky(rng, galaxy) + gaussian_filter(light, (sigma, sigma, 0)) * 2 * np.pi * sigma**2


FOREIGN = (
    saturated_star,
    satellite_trail,
    bleeding_column,
    ghost,
    noise,
    cosmic_rays,
    chip_edge,
    grid_pattern,
    single_band,
    star_field,
)


def _coordinates(image: np.ndarray, center: np.ndarray, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """x and y, (S, S) each, from a center (relative to the image's) and rotated, in fractions of S."""
    y, x = np.mgrid[: len(image), : len(image)] / len(image) - 0.5
    x, y = x - center[0], y - center[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _sky(rng: np.random.Generator, galaxy: np.ndarray) -> np.ndarray:
    return gaussian_filter(rng.normal(12, 10, galaxy.shape), (0.7, 0.7, 0))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1700 / (1 + (x**2 + y**2) / 0.03**2)


def _gray(values: np.ndarray) -> np.ndarray:
    return values[..., None]


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])
