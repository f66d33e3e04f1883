"""What a pre-training step has to do on a GPU, counted without one: kernels, bytes, FLOPs, and the time that takes.

    python benchmarks/count_step.py                       recipes/galaxy10.yaml: before and after, and smaller decoders
    python benchmarks/count_step.py --bandwidths 2.0      a GPU that moves 2 TB/s

"Before" is transformers' model as it is; "after" computes queries, keys and values in one product and returns the loss
alone, as main.py does on a GPU. The step is traced in bfloat16 with fake tensors, which have no memory. Inductor lowers
and fuses it as for an H100, and its kernels are counted before any code is generated. The floor of a kernel is the time
of its bytes at the memory bandwidth or of its FLOPs at the rate of matrix products, whichever is longer, as if
nothing were read twice and nothing stayed in a cache.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._inductor.config
from accelerate.utils import convert_to_fp32
from functorch.compile import make_boxed_func
from measurement import argument_parser, decoder_sizes, print_table, read_benchmark_recipe
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, ViTMAEConfig, ViTMAEForPreTraining

from galaxy_mae.data.batches import random_transforms, warp
from galaxy_mae.data.random_numbers import mask_noise
from galaxy_mae.errors import one_line_errors
from galaxy_mae.model.attention import fuse_qkv
from galaxy_mae.model.compute import num_patches
from galaxy_mae.model.mae import return_only_loss_in_training
from galaxy_mae.training.recipe import global_batch_size

PRODUCTS, FUSED, ATTENTION, ADAMW = "matrix products", "fused elementwise and reductions", "attention", "AdamW"
DATA = "crops, masks and warp"
GPU, H100 = torch.device("cuda", 0), DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
SMALLER_DECODERS = ((4, 384), (2, 512), (4, 256), (2, 256))  # layers, hidden size


class Kernel(NamedTuple):
    """One launch: what it belongs to, the bytes that it reads and writes, and its FLOPs."""

    piece: str
    bytes: int
    flops: int = 0


def main(arguments: list[str]) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[3.35, 4.8], help="in TB/s: H100 and H200")
    parser.add_argument("--matmul_rate", type=float, default=798, help="in TFLOP/s, as measured on an H100")
    parser.add_argument("--no_decoders", action="store_true", help="do not count smaller decoders")
    options, flags = parser.parse_known_args(arguments)
    recipe = read_benchmark_recipe(flags, steps=1)
    config, batch_size = recipe.model_config, global_batch_size(recipe.training)
    before, breaks_before = count_step(config, batch_size, improved=False)
    after, breaks = count_step(config, batch_size, improved=True)
    print(f"torch {torch.__version__}; batch size {batch_size}; graph breaks: {breaks_before} before, {breaks} after")
    names = ("launches", "GB", "TFLOP", *(f"floor at {bandwidth:g} TB/s, ms" for bandwidth in options.bandwidths))
    rows = []
    for piece in (PRODUCTS, FUSED, ATTENTION, ADAMW, DATA, None):
        cells = zip(describe(before, piece, options), describe(after, piece, options), strict=True)
        rows.append((piece or "together", *(x if x == y else f"{x} -> {y}" for x, y in cells)))
    print_table(("before -> after", *names), rows)
    if options.no_decoders:
        return
    decoders = {(config.decoder_num_hidden_layers, config.decoder_hidden_size): after}
    for layers, hidden_size in SMALLER_DECODERS:
        smaller = ViTMAEConfig(**config.to_dict() | decoder_sizes(config, layers, hidden_size))
        decoders[layers, hidden_size] = count_step(smaller, batch_size, improved=True)[0]
    print_table(
        ("decoder", *names, *(f"images/s at {bandwidth:g} TB/s" for bandwidth in options.bandwidths)),
        [
            (
                f"{layers} x {hidden_size}",
                *describe(kernels, None, options),
                *(f"{batch_size / floor(kernels, each, options):,.0f}" for each in options.bandwidths),
            )
            for (layers, hidden_size), kernels in decoders.items()
        ],
    )


def floor(kernels: list[Kernel], bandwidth: float, options: argparse.Namespace) -> float:
    """Seconds that kernels take at least, at a bandwidth in TB/s."""
    return sum(max(k.bytes / bandwidth, k.flops / options.matmul_rate) for k in kernels) / 1e12


def describe(kernels: list[Kernel], piece: str | None, options: argparse.Namespace) -> list[str]:
    """Number, GB, TFLOP and floors of the kernels of a piece, or of all."""
    kernels = [kernel for kernel in kernels if piece in (None, kernel.piece)]
    flops = sum(kernel.flops for kernel in kernels) / 1e12
    return [
        f"{len(kernels):,}",
        f"{sum(kernel.bytes for kernel in kernels) / 1e9:.1f}",
        f"{flops:.1f}" if flops else "",
        *(f"{1e3 * floor(kernels, bandwidth, options):.1f}" for bandwidth in options.bandwidths),
    ]


# ------------------------------------------------------------------------------------------------------------ one step


def count_step(config: ViTMAEConfig, batch_size: int, improved: bool) -> tuple[list[Kernel], int]:
    """The kernels of one optimizer step on the device, and the graph breaks of its compiled model."""
    with FakeTensorMode():
        config = copy.deepcopy(config)
        config._attn_implementation = "counted"
        model = ViTMAEForPreTraining(config).train()
        fuse_qkv(model, improved)
        if improved:
            return_only_loss_in_training(model)
        size = config.image_size
        images = torch.empty(batch_size, config.num_channels, size, size)
        noise = torch.empty(batch_size, num_patches(config))
        kernels, breaks = count_compiled(lambda *inputs: _loss_and_outputs(model, *inputs), images, noise)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        kernels.append(Kernel(ADAMW, 7 * 4 * trained))  # reads weight, gradient and two moments; writes all but one
        return kernels + count_data_path(batch_size, size, num_patches(config), improved), breaks


def _loss_and_outputs(model: nn.Module, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of a model as accelerate computes them in bfloat16: all that are returned are float32."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values=images, noise=noise)
    return convert_to_fp32(output).to_tuple()


def count_data_path(batch_size: int, size: int, patches: int, improved: bool) -> list[Kernel]:
    """The kernels that make normalized images and masks of uint8 images on the device."""
    index = torch.empty(batch_size, dtype=torch.int64)
    pixels = torch.empty(batch_size, size, size, 3, dtype=torch.uint8)
    if improved:
        crops, _ = count_compiled(lambda index: (random_transforms(index, 0, 0, 0.2),), index)
        masks, _ = count_compiled(lambda index: (mask_noise(index, patches),), index)
        fused_warp = Kernel(DATA, pixels.numel() * (1 + 4))
        return [fused_warp, *(kernel._replace(piece=DATA) for kernel in crops + masks)]
    with _CountOperators() as counted:
        mask_noise(index, patches)
        images = warp(pixels[index], random_transforms(index, 0, 0, 0.2), size)
        channels = torch.empty(3, 1, 1)
        images.div_(255).sub_(channels).div_(channels)
    return counted.kernels


class _CountOperators(TorchDispatchMode):
    """Counts the operators that are not compiled: one kernel each, unless they make a view."""

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        if not (func.is_view or "empty" in str(func)):
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
            written_in_place = isinstance(result, torch.Tensor) and any(result is t for t in tree_leaves(args))
            moved = [*tensors.values(), *([result] if written_in_place else [])]
            self.kernels.append(Kernel(DATA, sum(t.untyped_storage().nbytes() for t in moved)))
        return result


# ------------------------------------------------------------------------------------------ counting what inductor does


class _CountedError(BaseException):
    """Ends a compilation once its kernels are counted; nothing in torch catches it."""


def count_compiled(function: Callable, *inputs: torch.Tensor) -> tuple[list[Kernel], int]:
    """The kernels of a compiled function's forward and backward pass on an H100, and its graph breaks.

    Args:
        function: of fake tensors on the CPU. If its first output needs a gradient, the backward pass is counted, too.

    Autograd of a build without CUDA does not take fake tensors of a GPU. The graph is therefore traced on the CPU and
    moved when inductor begins to lower it.
    """
    kernels: list[Kernel] = []

    class CountingLowering(GraphLowering):
        def __init__(self, gm, example_inputs=None, **kwargs):
            _move_to_gpu(gm)
            _set_device(example_inputs, GPU)
            super().__init__(gm, example_inputs=example_inputs, **kwargs)

        def run(self, *args):
            super().run(*args)
            self.init_wrapper_code()
            self._update_scheduler()
            kernels.extend(_kernel(node) for node in self.scheduler.nodes if _is_launched(node))
            raise _CountedError

    def count_graph(gm, example_inputs, **kwargs):
        try:
            compile_fx_inner(torch.fx.GraphModule(gm, copy.deepcopy(gm.graph)), example_inputs, **kwargs)
        except _CountedError:
            _set_device(example_inputs, torch.device("cpu"))
        return make_boxed_func(gm)

    def backend(gm, example_inputs):
        return compile_fx(gm, example_inputs, inner_compile=count_graph)

    torch._dynamo.reset()
    counters.clear()
    with (
        patch.object(DeviceProperties, "create", lambda device: H100),
        patch("torch._inductor.scheduler.has_triton", lambda *args: True),
        patch("torch.cuda.get_device_capability", lambda *args: (H100.cc // 10, H100.cc % 10)),
        patch("torch._inductor.compile_fx.GraphLowering", CountingLowering),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        output = torch.compile(function, backend=backend)(*inputs)[0]
        if output.requires_grad:
            output.backward()
    return kernels, sum(counters["graph_break"].values())


def _move_to_gpu(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        _set_device(node.meta.get("val"), GPU)
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: GPU if isinstance(value, torch.device) else value
        )


def _set_device(values: Any, device: torch.device) -> None:
    for value in tree_leaves(values):
        if isinstance(value, FakeTensor):
            value.fake_device = device


def _is_launched(node: BaseSchedulerNode) -> bool:
    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)


def _kernel(node: BaseSchedulerNode) -> Kernel:
    """What a scheduled node reads, writes and computes."""
    name = str(getattr(node.node, "python_kernel_name", "")) if node.is_extern() else ""
    piece = ATTENTION if "scaled_dot_product" in name else PRODUCTS if name else FUSED
    flops = max((count_flops_fx(origin) or 0 for origin in node.node.get_origins()), default=0) if name else 0
    return Kernel(piece, node.get_read_write_buffers_sizes(), flops)


def _flash_attention(module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
    """What SDPA selects on a GPU; without one it would select a CPU's kernel."""
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", _flash_attention)

if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        main(sys.argv[1:])
