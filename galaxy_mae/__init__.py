"""Masked-autoencoder pre-training for galaxy images.

The modules are the stages of the work, in order; each imports only from those above it:

    errors      what a user can mend, told in one line
    download    the survey file: find, fetch, verify
    synthetic   procedural galaxies of the ten classes
    sources     any source of images -> one memory-mapped uint8 array and a catalogue
    galaxy10    classes, duplicates and overlaps on the sky, the split
    figures     every picture
    batches     row numbers -> augmented float images on the device
    mae         the model, its initialisation, its self-check, the encoder it leaves
    recipe      arguments: YAML and flags -> typed configuration
    trainer     the Hugging Face Trainer, made safe to kill and resume
    callbacks   what a run shows while it runs
"""
