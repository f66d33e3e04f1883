"""Model: the masked autoencoder, encoders, the classifier on top of one, and what they cost to compute."""
