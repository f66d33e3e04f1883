"""Data: galaxy images of any source as one uint8 array, a split that respects the sky, and augmented batches."""
