"""Data: galaxies of any kind of input, a split that respects the sky, and augmented batches.

A kind of input is a class (`source.Source`) and a line in `kinds.KINDS`. Its columns are understood in `columns`, its
images become pixels in `images`; `cache` keeps them as one uint8 array, and `stream` reads them again and again.
"""
