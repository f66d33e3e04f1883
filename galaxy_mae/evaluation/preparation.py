"""What an evaluation opens once: an encoder and a split data set that fit together, and the folder of the results."""

import copy
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from galaxy_mae import provenance
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.cache import Galaxies, open_galaxies
from galaxy_mae.data.fits import Stretch
from galaxy_mae.data.seen import describe_seen, find_seen_galaxies, frame_of
from galaxy_mae.data.split import check_split_sizes, split_fingerprint, split_galaxies
from galaxy_mae.errors import UserError
from galaxy_mae.evaluation import fine_tuning
from galaxy_mae.evaluation.fine_tuning import LabelledSplit, labelled_split
from galaxy_mae.evaluation.methods import Method, written_by
from galaxy_mae.evaluation.results import ResultWriter, check_or_write_config
from galaxy_mae.files import make_output_folder
from galaxy_mae.model.backbone import baseline_config, num_channels
from galaxy_mae.model.compute import measure_classifier
from galaxy_mae.model.encoder import Encoder, encoder_fingerprint, load_encoder, random_encoder
from galaxy_mae.training.arguments import DataArguments, EvaluationArguments
from galaxy_mae.training.recipe import EvaluationRecipe, global_batch_size, set_batch_and_learning_rate
from galaxy_mae.training.tracking import finish_run, start_evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A pre-trained encoder and labelled galaxies, on which methods are run.

    Everything that is learned or selected comes from `labelled`. Only `writer` compares predictions with the classes
    of the test galaxies. `split` holds sample indices.
    """

    recipe: EvaluationRecipe
    encoder: Encoder
    galaxies: Galaxies
    split: dict[str, np.ndarray]
    labelled: LabelledSplit
    batches: GalaxyBatches
    writer: ResultWriter

    @property
    def seeds(self) -> list[int]:
        """Of the random encoders, and of the fine-tuning runs of an initialization."""
        first = self.recipe.training.seed
        return list(range(first, first + self.recipe.evaluation.seeds))

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.writer.folder

    def written_by(self, method: Method) -> tuple[Method, ...]:
        """What a method's run writes: itself, and without `--additional_baselines False` its additional baselines."""
        return written_by(method) if self.recipe.evaluation.additional_baselines else (method,)

    def initial_encoder(self, method: Method, seed: int) -> PreTrainedModel:
        """What a method starts from: random weights of a seed, or the pre-trained ones."""
        if method.network:
            return random_encoder(baseline_config(method.network), seed)
        return self.encoder.model if method.initialization == "ssl" else random_encoder(self.encoder.model.config, seed)

    def fine_tune(
        self, method: Method, name: str, encoder_seed: int, seed: int, labelled: LabelledSplit
    ) -> tuple[PreTrainedModel, dict]:
        """Fine-tune what a method starts from; `name` is that of the run on dashboards, and of its folder."""
        training, encoder = copy.copy(self.recipe.training), self.initial_encoder(method, encoder_seed)
        if method.network:
            training.layer_decay = 1.0  # it protects pre-trained layers, and there are none
        self.start_tracking(name, "fine-tuning")
        fitted = fine_tuning.fine_tune(
            encoder, self.batches, labelled, training, self.folder / name, self.writer.run_id(name), seed
        )
        finish_run()
        return fitted

    def classify(self, model: PreTrainedModel, tta: bool = False) -> np.ndarray:
        """Probabilities of the test galaxies, (M, classes) float64; `tta` as for `fine_tuning.classify`."""
        return fine_tuning.classify(model, self.batches, self.split["test"], self.recipe.training.bf16, tta)

    def start_tracking(self, name: str, job_type: str) -> None:
        """Start a run of the dashboards, which `finish_run` ends."""
        start_evaluation(self.recipe.training.report_to, self.folder, name, self.writer.config, job_type)


def prepare_evaluations(recipe: EvaluationRecipe) -> list[Evaluation]:
    """Open the encoder and the galaxies, check that they fit together, and reserve the results folder.

    One evaluation is on the galaxies of `--dataset`; if it is set, a second one on those of `--transfer`.
    """
    training = recipe.training
    if training.world_size > 1:
        raise UserError("an evaluation runs in one process; run several methods at once as the tasks of an array")
    training.check_gpus()
    encoder = load_encoder(recipe.evaluation.encoder)
    recipe.evaluation = _on_pretraining_data(recipe, encoder)
    recipe.evaluation.frame = recipe.evaluation.frame or frame_of(encoder.training_images)
    _, activation_bytes = measure_classifier(encoder.model, encoder.image_size)
    set_batch_and_learning_rate(training, recipe.explicitly_set, activation_bytes)
    evaluation = _open(recipe, encoder, "dataset")
    sizes = {part: len(rows) for part, rows in evaluation.split.items()}
    check_split_sizes(sizes["train"], sizes["validation"], global_batch_size(training))
    transfers = [_open(recipe, encoder, "transfer")] if recipe.evaluation.transfer else []
    folder = make_output_folder(evaluation.folder, "--output_dir", markers=["evaluation.json", ".evaluation.lock"])
    check_or_write_config(folder, evaluation.writer.config)
    counts = "{train:,} training, {validation:,} validation, {test:,} test galaxies".format(**sizes)
    parameters = f"{encoder.model.num_parameters() / 1e6:.1f} M parameters"
    logger.info(
        "%s: %s; encoder %s, %s; on %s", evaluation.galaxies.name, counts, encoder.name, parameters, training.device
    )
    return [evaluation, *transfers]


def _on_pretraining_data(recipe: EvaluationRecipe, encoder: Encoder) -> EvaluationArguments:
    """What is evaluated, without `--dataset` on the data of the encoder's pre-training: its split and stretch, too."""
    before = encoder.pretraining.recipe if encoder.pretraining else {}
    if "dataset" in recipe.explicitly_set or "dataset" not in before:
        return recipe.evaluation
    names = {f.name for f in fields(DataArguments)} - recipe.explicitly_set
    logger.info("--dataset %s, as in the pre-training; the flag chooses another one", before["dataset"])
    return replace(recipe.evaluation, **{name: before[name] for name in names & set(before)})


def _open(recipe: EvaluationRecipe, encoder: Encoder, flag: str) -> Evaluation:
    """The evaluation on the labelled data set that a flag names, `dataset` or `transfer`, if it fits the encoder."""
    dataset, size, training = getattr(recipe.evaluation, flag), encoder.image_size, recipe.training
    stretch, frame = Stretch.named(recipe.evaluation.stretch), recipe.evaluation.frame
    columns = recipe.evaluation.columns if flag == "dataset" else None
    galaxies = open_galaxies(dataset, size, stretch=stretch, frame=frame, flag=f"--{flag}", columns=columns)
    split = split_galaxies(galaxies, recipe.evaluation.split_seed)
    labelled = labelled_split(galaxies, split, f"--{flag}")
    seen = _count_seen_galaxies(encoder, galaxies, split["test"], recipe.evaluation.allow_seen)
    batches = GalaxyBatches(galaxies.pixels, encoder.mean, encoder.std, size, training.device, training.seed)
    architecture = encoder.model.config
    names = ("num_hidden_layers", "num_attention_heads", "patch_size")
    sizes = {name: value for name in names if isinstance(value := getattr(architecture, name, None), int)}
    sizes |= {"hidden_size": num_channels(architecture), "image_size": size}
    config = {  # what the results depend on, and what they say of it
        "dataset_name": galaxies.name,
        "dataset": galaxies.fingerprint,
        "frame": asdict(frame),
        "split": split_fingerprint(split),
        "split_sizes": {part: len(rows) for part, rows in split.items()},
        "class_names": list(galaxies.class_names),
        "encoder_name": encoder.name,
        "encoder": encoder_fingerprint(encoder.model, encoder.mean, encoder.std, size),
        "model": sizes | {"num_parameters": encoder.model.num_parameters()},
        "architecture": architecture.model_type,
        "pretraining": encoder.pretraining and encoder.pretraining.recipe,
        "images_seen": encoder.pretraining and encoder.pretraining.images_seen,
        "recipe": recipe.as_dict(),
        "hub_ids": {"dataset": provenance.hub_id(dataset), "encoder": provenance.hub_id(recipe.evaluation.encoder)},
        "seen_in_pretraining": seen,
    }
    reading = {"stretch": asdict(stretch), "frame": config["frame"], "columns": sorted(columns or ())}
    writer = ResultWriter(Path(training.output_dir), galaxies, split["test"], config, reading)
    return Evaluation(recipe, encoder, galaxies, split, labelled, batches, writer)


def _count_seen_galaxies(
    encoder: Encoder, galaxies: Galaxies, test: np.ndarray, allow_seen: bool
) -> dict[str, int] | None:
    """How many test galaxies the encoder was pre-trained on, as for `describe_seen`; None if that is not known."""
    if encoder.pretraining is None:
        return None
    found = find_seen_galaxies(galaxies, test, encoder.pretraining.galaxies)
    counts = {"test_galaxies": len(test)} | {criterion: int(rows.sum()) for criterion, rows in found.items()}
    rows = test[found["seen"]]
    if counts["seen"] and not allow_seen:
        recipe = encoder.pretraining.recipe
        fix = f"remove them from the data set (rows {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)})"
        if recipe["data"] == galaxies.fingerprint:
            fix = f"use the pre-training's --split_seed {recipe['split_seed']}"
        seen = f"{describe_seen(counts)} were used in its pre-training"
        raise UserError(f"--encoder {encoder.name}: {seen}; {fix}, or set --allow_seen, which marks the report")
    return counts
