"""Lightly's own loop for DINO (its documentation's, in plain PyTorch), with our tiles in place of its dataset.

`torchrun --standalone --nproc-per-node 2 tests/e2e/lightly_loop.py CATALOG`, where lightly is installed.
"""

import copy
import sys

import timm
import torch
import torch.distributed as dist
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from streaming import Catalog, TilePlan, torch_dataset
from tests.e2e.told_tiles import tell_tiles

STEPS = 3


class DINO(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        backbone = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
        width = backbone.num_features
        self.student_backbone, self.student_head = backbone, DINOProjectionHead(width, 64, 32, 128)
        self.teacher_backbone, self.teacher_head = copy.deepcopy(backbone), DINOProjectionHead(width, 64, 32, 128)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.student_head(self.student_backbone(view)) for view in views]

    @torch.no_grad()
    def forward_teacher(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.teacher_head(self.teacher_backbone(view)) for view in views]


def main() -> None:
    dist.init_process_group("gloo")
    catalog = Catalog.load(sys.argv[1])
    dataset = torch_dataset(catalog, TilePlan(catalog, mpp={0.5: 1}), batch=8, stop=STEPS)
    transform = DINOTransform(global_crop_size=96, local_crop_size=48, n_local_views=2)

    def views_of(tiles: torch.Tensor) -> list[torch.Tensor]:
        """As lightly's collate gives them: a tensor a view."""
        tell_tiles(dataset, tiles)
        images = [transform(to_pil_image(tile.permute(2, 0, 1))) for tile in tiles]
        return [torch.stack(views) for views in zip(*images, strict=True)]

    loader = DataLoader(dataset, batch_size=None, collate_fn=views_of)
    model = DINO()
    student = DistributedDataParallel(model)
    criterion = DINOLoss(output_dim=128, warmup_teacher_temp_epochs=1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.001)
    for step, views in enumerate(loader):
        momentum = cosine_schedule(step, STEPS, 0.996, 1)
        update_momentum(model.student_backbone, model.teacher_backbone, m=momentum)
        update_momentum(model.student_head, model.teacher_head, m=momentum)
        loss = criterion(model.forward_teacher(views[:2]), student(views), epoch=0)
        loss.backward()
        model.student_head.cancel_last_layer_gradients(current_epoch=0)
        optimizer.step()
        optimizer.zero_grad()
        sys.stdout.write(f"loss {step + 1} {loss.item():.4f}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
