"""Reconstructions of masked galaxies, and the callback that plots them during training."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback, ViTMAEForPreTraining

from galaxy_mae import figures
from galaxy_mae.data.batches import GalaxyBatches
from galaxy_mae.data.random_numbers import mask_noise
from galaxy_mae.model.compute import num_patches
from galaxy_mae.model.mae import patch_statistics
from galaxy_mae.training.preemption import suppress_errors_after_signal
from galaxy_mae.training.trainer import GalaxyTrainer

Examples = tuple[np.ndarray, list[str]]  # indices of galaxies, (B,) int64, and their names


class ReconstructionCallback(TrainerCallback):
    """Plots the same galaxies with the same masks every few epochs, into the run's folder and to the dashboards.

    It plots after an evaluation, when the throughput is not measured.
    """

    def __init__(self, trainer: GalaxyTrainer, examples: Examples):
        self.trainer, self.every = trainer, trainer.options.reconstruct_every  # epochs between figures; 0: none
        self.indices, self.names = examples

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Plot, if a multiple of `every` epochs has passed since the evaluation before, by the log of all sessions."""
        epochs = [0.0, *(entry["epoch"] for entry in state.log_history if "eval_loss" in entry)]
        before, now = map(self._intervals, epochs[-2:])
        if not state.is_world_process_zero or before == now:
            return
        path = Path(args.output_dir, "reconstructions", f"step_{state.global_step:06d}.png")
        title = f"epoch {state.epoch:g}: validation galaxies, {model.config.mask_ratio:.0%} masked"
        figures.reconstructions(path, *reconstruct(model, self.trainer.batches, self.indices), self.names, title)
        for tracker in self.trainer.trackers:
            with suppress_errors_after_signal():
                tracker.log_figure("eval/reconstructions", path, title, state)

    def _intervals(self, epoch: float) -> int:
        """How many multiples of `every` have passed; 3 x 0.2 epochs may be a rounding error below 0.6."""
        return int(epoch / self.every + 1e-6) if self.every else 0


def plot_final_reconstructions(
    model: ViTMAEForPreTraining, batches: GalaxyBatches, examples: Examples, folder: Path, data: str
) -> Path:
    """Plot what a finished run reconstructs, with pixel normalization also with the statistics of the targets.

    `data` is the name of the data set, for the title. Returns the path of the figure.
    """
    (indices, names), path = examples, folder / "reconstruction_example.png"
    title = f"{data}: validation galaxies, {model.config.mask_ratio:.0%} masked"
    if model.config.norm_pix_loss:
        target_title = f"{title}; mean and std of each patch from the target, which the model does not know"
        target_path = path.with_name("reconstruction_example2.png")
        figures.reconstructions(target_path, *reconstruct(model, batches, indices, True), names, target_title)
        title += "; mean and std of each patch from the nearest visible one"
    figures.reconstructions(path, *reconstruct(model, batches, indices), names, title)
    return path


def reconstruct(
    model: ViTMAEForPreTraining, batches: GalaxyBatches, indices: np.ndarray, target_stats: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reconstruct galaxies with the masks of evaluation.

    Args:
        model, batches: the autoencoder, which is left in the mode it was in, and what makes the images.
        indices: (B,) int64, of the galaxies.
        target_stats: with pixel normalization the model does not predict the mean and std of a patch. Those of the
            nearest visible patch take their place, or those of the patch itself, which the model does not know.

    Returns:
        The galaxies and the predictions, (B, S, S, 3) float32 in units of 0 to 1, and the mask, (B, S, S) bool.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model would compile once more for this batch
    batch = batches.collate([int(index) for index in indices])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        pixels = batches.eval_transform(batch)
        noise = mask_noise(batch["index"].to(pixels.device), num_patches(model.config))
        output = model(pixels, noise=noise)
        patches = output.logits.float()
        if model.config.norm_pix_loss:
            mean, std = patch_statistics(model.patchify(pixels))
            if not target_stats:
                nearest = _nearest_visible(output.mask.bool(), model.config.image_size // model.config.patch_size)
                mean, std = (x.gather(1, nearest[..., None]) for x in (mean, std))
            patches = patches * std + mean
        prediction = model.unpatchify(patches)
        mask = output.mask[:, :, None].expand(-1, -1, patches.shape[-1])
        masked = model.unpatchify(mask)[:, 0].bool()
    model.train(was_training)

    def to_rgb(images: torch.Tensor) -> np.ndarray:
        return (images * batches.std + batches.mean).permute(0, 2, 3, 1).float().cpu().numpy()

    return to_rgb(pixels), to_rgb(prediction), masked.cpu().numpy()


def _nearest_visible(masked: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, N) bool, the masked patches of a grid, to (B, N) int64, the visible patch nearest to each."""
    positions = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float().to(masked.device)
    distance = torch.cdist(positions, positions)  # (N, N)
    return distance.expand(len(masked), -1, -1).masked_fill(masked[:, None, :], torch.inf).argmin(dim=-1)


def select_example_galaxies(
    indices: np.ndarray, label: np.ndarray | None, class_names: tuple[str, ...], count: int = 8
) -> Examples:
    """Select galaxies of different classes, in turn."""
    if label is None:
        return indices[:count], [f"galaxy {index}" for index in indices[:count]]
    turn = pd.Series(label[indices]).groupby(label[indices]).cumcount()  # how many of the same class come before it
    selected = indices[np.lexsort((label[indices], turn))[:count]]
    return selected, [class_names[label[index]] for index in selected]
