"""The reference DINOv2's own training loop (`do_train`), with our tiles in place of its dataset and loader.

`torchrun --standalone --nproc-per-node 2 tests/e2e/dinov2_loop.py CLONE CATALOG`: CLONE is a folder with a clone of the
published code; its requirements omegaconf, fvcore and iopath are installed. What needs CUDA there has plain PyTorch in
its place, so that ranks without a GPU run it: xformers' operators, `.cuda()`, and shards of the model.
"""

import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from streaming import Catalog, TilePlan, torch_dataset
from tests.e2e.told_tiles import tell_tiles

STEPS, BATCH = 3, 8


class BlockDiagonalMask:
    """Which tokens of a row see each other: those of the same crop."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self._batch_sizes = list(lengths), [1] * len(lengths)

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> "BlockDiagonalMask":
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        mask = cls([len(row) for tensor in tensors for row in tensor])
        mask._batch_sizes = [len(tensor) for tensor in tensors]
        return mask, torch.cat([tensor.flatten(0, 1) for tensor in tensors])[None]

    def split(self, row: Tensor) -> list[Tensor]:
        """The tensors (batch, tokens, width) that make up a row (1, all tokens, width)."""
        parts, at = row[0].split(self.lengths), 0
        found = list[Tensor]()
        for size in self._batch_sizes:
            found.append(torch.stack(parts[at : at + size]))
            at += size
        return found


def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None, op: Any = None) -> Tensor:
    """Of tensors (batch, tokens, heads, width)."""

    def each(*parts: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2)

    if attn_bias is None:
        return each(q, k, v)
    crops = zip(*(part.split(attn_bias.lengths, dim=1) for part in (q, k, v)), strict=True)
    return torch.cat([each(*crop) for crop in crops], dim=1)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    return x.index_add(0, index, source * scaling, alpha=alpha)


def without_cuda() -> None:
    """Puts plain PyTorch where the reference asks for CUDA."""
    operators = types.ModuleType("xformers.ops")
    operators.fmha = types.SimpleNamespace(  # type: ignore[attr-defined]
        BlockDiagonalMask=BlockDiagonalMask, MemoryEfficientAttentionFlashAttentionOp=None
    )
    for name, function in {
        "memory_efficient_attention": attention,
        "unbind": torch.unbind,
        "index_select_cat": index_select_cat,
        "scaled_index_add": scaled_index_add,
    }.items():
        setattr(operators, name, function)
    sys.modules |= {"xformers": types.ModuleType("xformers"), "xformers.ops": operators}
    torch.Tensor.cuda = lambda self, **_: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda *_: None


def replicas(_: Any, modules_to_wrap: Any = ()) -> Callable[[nn.Module], nn.Module]:
    """FSDP as the reference wraps with it, whole on each rank."""
    return partial(
        FullyShardedDataParallel,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        mixed_precision=MixedPrecision(param_dtype=torch.float32),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def main() -> None:
    clone, uri = sys.argv[1:]
    without_cuda()
    sys.path.insert(0, clone)
    import dinov2.distributed
    import dinov2.logging.helpers
    from dinov2.configs import dinov2_default_config
    from dinov2.train import ssl_meta_arch, train
    from omegaconf import OmegaConf

    dist.init_process_group("gloo")
    dinov2.distributed._LOCAL_RANK, dinov2.distributed._LOCAL_WORLD_SIZE = dist.get_rank(), dist.get_world_size()
    dinov2.logging.helpers.SmoothedValue.synchronize_between_processes = lambda _: None  # on the GPU
    ssl_meta_arch.get_fsdp_wrapper = replicas
    catalog = Catalog.load(uri)
    tiles = torch_dataset(catalog, TilePlan(catalog, mpp={0.5: 1}), batch=BATCH, stop=STEPS)

    # What a user changes in `dinov2/train/train.py`: its two calls that make dataset and loader.
    def loader(dataset: Callable[[Any], Any], collate_fn: Callable[[Any], Any], **_: Any) -> DataLoader[Any]:
        def collate(batch: Tensor) -> Any:
            tell_tiles(tiles, batch)
            return collate_fn([(dataset(to_pil_image(tile.permute(2, 0, 1))), ()) for tile in batch])

        return DataLoader(tiles, batch_size=None, collate_fn=collate)

    train.make_dataset = lambda transform, **_: transform
    train.make_data_loader = loader

    config = OmegaConf.create(dinov2_default_config)
    config.compute_precision.grad_scaler = False
    config.student.arch, config.student.patch_size, config.student.drop_path_rate = "vit_small", 16, 0.2
    config.dino.head_n_prototypes = config.ibot.head_n_prototypes = 256
    config.dino.head_hidden_dim = config.ibot.head_hidden_dim = 64
    config.crops.global_crops_size, config.crops.local_crops_size, config.crops.local_crops_number = 96, 48, 2
    config.train.batch_size_per_gpu = BATCH // dist.get_world_size()
    config.train.OFFICIAL_EPOCH_LENGTH, config.train.output_dir = 10, tempfile.mkdtemp()
    config.evaluation.eval_period_iterations = 0
    config.optim.lr = 1e-4
    torch.manual_seed(0)  # FSDP would send rank 0's weights from GPU to GPU

    class Told(ssl_meta_arch.SSLMetaArch):
        """Tells of each step."""

        def forward_backward(self, images: dict[str, Any], teacher_temp: float) -> dict[str, Tensor]:
            losses = super().forward_backward(images, teacher_temp=teacher_temp)
            total = sum(value.item() for value in losses.values())
            sys.stdout.write(f"loss {tiles.state_dict()['step']} {total:.4f}\n")
            return losses

    model = Told(config)
    model.prepare_for_distributed_training()
    model.need_to_synchronize_fsdp_streams = False
    torch.manual_seed(dist.get_rank())
    train.do_train(config, model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
