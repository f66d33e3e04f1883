"""Evaluation: frozen features and probes, fine-tuning, the five methods, scores with intervals, the report."""
