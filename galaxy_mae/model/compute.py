"""What a model costs and how a device computes it: FLOPs, activation memory, precision, micro-batches, attention."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil  # which accelerate needs
import torch
import torch.compiler.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining

from galaxy_mae.model.attention import CPU_BFLOAT16

logger = logging.getLogger(__name__)

AttentionShape = tuple[int, int, int, int]  # batch, heads, tokens, head dimension

_CPU_ACTIVATION_BYTES = 1e9  # of a micro-batch; larger ones are not faster on a CPU
_GPU_ACTIVATION_FRACTION = 0.6  # of the GPU's memory


def use_free_cores(before: int | None = None) -> None:
    """Give torch a thread for each core that is free now, or as many as `before`, unless OMP_NUM_THREADS is set.

    Threads that wait for one another spin. Beside other processes, two on two cores were thirty times as slow as one.
    Their number changes the last digits of a result, so a run that is resumed keeps its own.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    if before is None:
        usage = psutil.cpu_percent(0.5, percpu=True)
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(usage))
        before = max(1, int(sum(1 - usage[core] / 100 for core in own) + 0.3))
        if before < len(own):
            logger.info("free cores: %d of %d, so as many threads (or set OMP_NUM_THREADS)", before, len(own))
    torch.set_num_threads(before)


def num_patches(config: ViTMAEConfig | ViTConfig) -> int:
    """Number of patches per image, without the class token."""
    return (config.image_size // config.patch_size) ** 2


def measure_cost(model: PreTrainedModel, *inputs: torch.Tensor) -> tuple[float, float]:
    """What the forward and backward pass of a batch costs, measured on forward passes in evaluation mode.

    On the device `meta` nothing is computed, and attention counts as the eager one.

    Returns:
        FLOPs, the backward pass counted as two forwards; and bytes that are kept for the backward pass in float32.
    """
    kept, training = {}, model.training
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:  # of a storage on `meta`, `data_ptr` is 0
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model.eval()(*inputs)
    del output  # until here no storage was used again
    # The counter sees no attention in a CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    model.train(training)
    return 3.0 * counter.get_total_flops(), float(sum(kept.values()))


def measure_classifier(model: PreTrainedModel, image_size: int) -> tuple[float, float]:
    """What `measure_cost` says of one image's passes through a backbone or a classifier, on the CPU or a GPU."""
    return measure_cost(model, torch.zeros(1, 3, image_size, image_size, device=model.device))


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product in FLOP/s: the measured peak that the MFU is relative to."""
    from torch.utils.benchmark import Timer  # slow to import

    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=1).mean


def select_micro_batch_size(batch_size: int, bytes_per_image: float, device: torch.device) -> int:
    """The largest divisor of a device's batch whose activations fit into the device's memory, at least 1."""
    budget = _CPU_ACTIVATION_BYTES
    if device.type == "cuda":
        budget = _GPU_ACTIVATION_FRACTION * torch.cuda.get_device_properties(device).total_memory
    divisors = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    return next((n for n in divisors if n * bytes_per_image <= budget), 1)


def bfloat16_is_fast(use_cpu: bool) -> bool:
    """GPUs since Ampere, CPUs with AVX512-BF16 or AMX. Other devices emulate bfloat16, slower than float32."""
    if use_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def select_attn_implementation(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """Use `cpu_bfloat16_attention` where it is faster than SDPA: on a CPU in bfloat16. The choice is not saved."""
    if device.type == "cpu" and bf16 and model._supports_sdpa:
        model.set_attn_implementation(CPU_BFLOAT16)
        if isinstance(model, ViTMAEForPreTraining):  # the decoder has its own configuration, which that does not reach
            model.decoder.config._attn_implementation = CPU_BFLOAT16


def rank_attention_backends(
    layers: dict[AttentionShape, int], device: torch.device, dtype: torch.dtype
) -> dict[SDPBackend, float]:
    """SDPA's backends that can compute all these attentions, the fastest first, with the seconds that they take.

    `layers` says how many layers of the model have attention of a shape.
    """
    total = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with suppress(RuntimeError):
            total[backend] = sum(n * time_attention(backend, shape, device, dtype) for shape, n in layers.items())
    return dict(sorted(total.items(), key=lambda item: item[1]))


def time_attention(backend: SDPBackend, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the forward and backward pass of SDPA by one backend, the mean of five.

    Raises:
        RuntimeError: the backend cannot compute this shape and precision on this device.
    """
    from torch.utils.benchmark import Timer  # slow to import

    batch, heads, tokens, head_dim = shape
    q, k, v, gradient = (  # in memory as the linear layers leave them
        torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)

    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reasons why a backend cannot
        return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads()).timeit(5).mean


@contextmanager
def prefer_attention(order: Sequence[SDPBackend]) -> Iterator[None]:
    """Within the block, SDPA uses the first of these backends that can compute its inputs; without any, as it is.

    A graph is compiled for one backend. Neither dynamo's guards nor the keys of the caches on disk know the order
    (torch 2.13), so it is added to these keys.
    """
    if not order:
        yield
        return
    tag = " ".join(backend.name for backend in order)
    with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True), torch.compiler.config.patch(cache_key_tag=tag):
        yield
