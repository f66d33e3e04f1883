"""Open a classifier and an encoder as a stranger would, with transformers, torch, NumPy and Pillow alone.

    python tests/plain_transformers.py IMAGE_PROCESSOR CLASSIFIER ENCODER IMAGES.npy ...

IMAGE_PROCESSOR is the class that opens the image processors: AutoImageProcessor; in transformers 5.17, where that needs
torchvision, ViTImageProcessorPil. The files hold (N, S, S, 3) uint8 each, of any S. Prints JSON.
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline


@torch.no_grad()
def main(image_processor: str, classifier: str, encoder: str, *paths: str) -> None:
    """Print what transformers makes of the images."""
    images = [Image.fromarray(image) for path in paths for image in np.load(path)]
    auto = image_processor == "AutoImageProcessor"
    given = {"backend": "pil"} if auto else {}  # as the cards say
    opener = getattr(transformers, image_processor)
    processors = [opener.from_pretrained(folder, **given) for folder in (classifier, encoder)]
    pixels = [processor(images, return_tensors="pt")["pixel_values"] for processor in processors]
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    tokens = AutoModel.from_pretrained(encoder).eval()(pixels[1]).last_hidden_state
    given = {} if auto else {"image_processor": processors[0]}
    classify = pipeline("image-classification", model=classifier, **given)
    extract = pipeline("image-feature-extraction", model=encoder, **given)
    best_classes = [best for (best,) in classify(images, top_k=1)]
    result = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "probabilities": model(pixels[0]).logits.softmax(dim=1).tolist(),
        "features": tokens[:, 1:].mean(dim=1).tolist(),
        "pipeline_labels": [best["label"] for best in best_classes],
        "pipeline_scores": [best["score"] for best in best_classes],
        "pipeline_features": [np.mean(output[0][1:], axis=0).tolist() for output in extract(images)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
