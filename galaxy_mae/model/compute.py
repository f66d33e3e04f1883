"""What a model costs and how a device computes it: FLOPs, activation memory, precision, micro-batches, attention."""

import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ViTConfig, ViTMAEConfig

_CPU_ACTIVATION_BYTES = 1e9  # of a micro-batch; larger ones are not faster on a CPU
_GPU_ACTIVATION_FRACTION = 0.6  # of the GPU's memory


def num_patches(config: ViTMAEConfig | ViTConfig) -> int:
    """Number of patches per image, without the class token."""
    return (config.image_size // config.patch_size) ** 2


# --------------------------------------------------------------------------------------------------------------- FLOPs


def training_flops_per_image(config: ViTMAEConfig) -> float:
    """FLOPs of one image's forward and backward pass through the autoencoder, the backward counted as two forwards.

    Counts the matrix products: patch projection, attention and MLP of encoder and decoder, and the decoder's embedding
    and prediction layers.
    """
    patches, visible = num_patches(config), _visible_tokens(config)
    patch_values = config.patch_size**2 * config.num_channels
    macs = patches * patch_values * config.hidden_size
    macs += config.num_hidden_layers * macs_per_layer(visible, config.hidden_size, config.intermediate_size)
    macs += visible * config.hidden_size * config.decoder_hidden_size
    macs += config.decoder_num_hidden_layers * macs_per_layer(
        patches + 1, config.decoder_hidden_size, config.decoder_intermediate_size
    )
    macs += (patches + 1) * config.decoder_hidden_size * patch_values
    return 3 * 2.0 * macs


def classifier_flops_per_image(config: ViTConfig) -> float:
    """FLOPs of one image's forward and backward pass through the classifier, counted in the same way."""
    patches = num_patches(config)
    macs = patches * config.patch_size**2 * config.num_channels * config.hidden_size
    macs += config.num_hidden_layers * macs_per_layer(patches + 1, config.hidden_size, config.intermediate_size)
    return 3 * 2.0 * macs


def measure_classifier(model: PreTrainedModel, image_size: int) -> tuple[float, float]:
    """What one image's forward and backward pass through any backbone or classifier costs, measured on forward passes.

    Args:
        model: on the CPU or a GPU.
        image_size: width and height of the image.

    Returns:
        FLOPs, the backward pass counted as two forwards; and bytes that are kept for the backward pass in float32.
    """
    image = torch.zeros(1, 3, image_size, image_size, device=model.device)
    kept, training = {}, model.training
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model.eval()(image)
    del output  # until here no storage was used again
    # The counter sees no attention in a CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(training)
    return 3.0 * counter.get_total_flops(), float(sum(kept.values()))


def macs_per_layer(tokens: int, hidden_size: int, intermediate_size: int) -> int:
    """Multiply-accumulates of a transformer layer: four projections, two attention products, two MLP layers."""
    return tokens * (4 * hidden_size**2 + 2 * hidden_size * intermediate_size) + 2 * tokens**2 * hidden_size


def _visible_tokens(config: ViTMAEConfig) -> int:
    """Tokens that pass through the encoder: the visible patches and the class token."""
    return int(num_patches(config) * (1 - config.mask_ratio)) + 1


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Rate of a large square matrix product in FLOP/s: the measured peak that the MFU is relative to."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    synchronize(device)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        synchronize(device)
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------- memory and micro-batches


def activation_bytes_per_image(config: ViTMAEConfig) -> float:
    """Memory that one image's forward pass keeps for the backward pass, an estimate in bytes for float32.

    About 20 values per token, channel and layer. At full size this gives 68 MB per image; the measured growth of a
    process was 69 MB in float32 and 51 MB with bfloat16 autocast (8 to 32 images, on a CPU).
    """
    values = config.num_hidden_layers * _visible_tokens(config) * config.hidden_size
    values += config.decoder_num_hidden_layers * (num_patches(config) + 1) * config.decoder_hidden_size
    return 4 * (20.0 * values + 3 * num_patches(config) * config.patch_size**2 * config.num_channels)


def classifier_activation_bytes_per_image(config: ViTConfig) -> float:
    """Memory that one image's forward pass keeps for the backward pass, estimated as for the autoencoder."""
    return 4 * 20.0 * config.num_hidden_layers * (num_patches(config) + 1) * config.hidden_size


def select_micro_batch_size(batch_size: int, bytes_per_image: float, device: torch.device) -> int:
    """The largest divisor of a device's batch whose activations fit into the device's memory, at least 1."""
    if device.type == "cuda":
        budget = _GPU_ACTIVATION_FRACTION * torch.cuda.get_device_properties(device).total_memory
    else:
        budget = _CPU_ACTIVATION_BYTES
    divisors = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    return next((n for n in divisors if n * bytes_per_image <= budget), 1)


# ---------------------------------------------------------------------------------------------- precision, attention


def bfloat16_is_fast(use_cpu: bool) -> bool:
    """GPUs since Ampere, CPUs with AVX512-BF16 or AMX. Other devices emulate bfloat16, slower than float32."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    if not use_cpu:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def select_attn_implementation(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Use transformers' eager attention where it is faster than SDPA: on a CPU in bfloat16.

    It is faster by a tenth in pre-training and by a fifth in fine-tuning (docs/performance.md). The autoencoder's
    decoder has its own configuration and keeps SDPA, which is faster there. The choice is not saved.
    """
    if device.type == "cpu" and bf16 and model._supports_sdpa:
        model.set_attn_implementation("eager")
