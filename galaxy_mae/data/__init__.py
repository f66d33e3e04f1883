"""Data: any source of galaxy images to one uint8 array, a split that respects the sky, and augmented batches."""
