"""Masked-autoencoder pre-training for galaxy images.

The modules are the stages of the work, in order; each imports only from those above it:

    errors      what a user can mend, told in one line
    download    the survey file: find, fetch, verify
    synthetic   procedural galaxies of the ten classes
    sources     any source of images -> one memory-mapped uint8 array and a catalogue
    galaxy10    classes, duplicates and overlaps on the sky, the split
    scores      accuracy with intervals, balanced accuracy, macro-F1, paired tests
    figures     every picture
    batches     row numbers -> augmented float images on the device
    mae         the model, its initialisation, its self-check, the encoder it leaves
    recipe      arguments: YAML and flags -> typed configuration
    provenance  where numbers come from: run.json, versions, commit, machine
    classifier  encoders to evaluate, pre-trained or random; encoder + pooling + head
    trainer     the Hugging Face Trainer, made safe to kill and resume: pre-training and fine-tuning
    callbacks   what a run shows while it runs
    probe       features once, then linear probe, k-NN, nearest class mean, attention probe
    fine_tuning an encoder and a head, trained together; predictions
    evaluation  the five methods -> scores and predictions
    report      results -> table, key findings, figures
"""
