"""Predictions: the one table that leaves, with its schema, its file formats and its neighbors."""
