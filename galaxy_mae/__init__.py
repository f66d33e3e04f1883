"""Masked-autoencoder pre-training for galaxy images.

One folder per stage, over four common modules. Each imports only from those below it (`make lint` checks that):

    sweep        hyper-parameter sweeps: one trial per run
    catalogue    predictions for new galaxies, similar and odd ones, model cards
    evaluation   probes, fine-tuning, the five methods, scores, report
    training     arguments, recipes, the Trainer, checkpoints, tracking, preemption
    model, data  the masked autoencoder, encoders, classifier; sources, split, batches
    figures      every figure
    provenance   run.json, versions, commit, locks
    files        files and folders that appear complete or not at all
    errors       errors that a user can fix, in one line
"""
