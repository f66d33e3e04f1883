"""Training: arguments and recipes, the Trainer for pre-training and fine-tuning, checkpoints, tracking, preemption."""
