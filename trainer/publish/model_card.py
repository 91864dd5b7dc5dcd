"""The model card of an export: what the model is, how to load it, what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streaming import storage
from streaming.plan.magnifications import mpp_text
from trainer.publish.options import ExportOptions, Layout
from trainer.run.config import Config
from trainer.run.slide_sources import SlideSource

FOLDER = "PATH-OF-THIS-FOLDER"
"""What the card's lines call the export's folder."""

_IMPORT = {
    "timm": "import timm, torch",
    "transformers": "import torch\nfrom transformers import AutoImageProcessor, AutoModel",
}
_LOAD = {
    "timm": f"""model = timm.create_model("local-dir:{FOLDER}", pretrained=True).eval()""",
    "transformers": f"""model = AutoModel.from_pretrained("{FOLDER}").eval()""",
}
_PIXELS = {
    "timm": """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
pixels = transform(image).unsqueeze(0)  # image: PIL, RGB""",
    "transformers": f"""processor = AutoImageProcessor.from_pretrained("{FOLDER}")
pixels = processor(image, return_tensors="pt")["pixel_values"]  # image: PIL, RGB""",
}
# The libraries' own resampling rounds to whole grey levels.
_RESAMPLED = """pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255  # image: PIL, RGB
pixels = torch.nn.functional.interpolate(pixels, ({side}, {side}), mode="bicubic", antialias=True).clamp(0, 1)
pixels = (pixels - torch.tensor({mean})[:, None, None]) / torch.tensor({std})[:, None, None]"""
_TOKENS = {
    "timm": """tokens = model.forward_features(pixels)
cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens :]""",
    "transformers": """tokens = model(pixels).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :]""",
}
# How each resamples positions for other sizes, where there are no registers; with them all antialias.
_POSITIONS = {"timm": "antialiased", "transformers": "by the exact ratio"}
_TRAINED_POSITIONS = {"timm": "antialiased", "reference": "by DINOv2's rule, not antialiased"}
_EMBED = {
    "cls": "embedding = cls",
    "patch": "embedding = patches.mean(dim=1)",
    "cls+patch": "embedding = torch.cat((cls, patches.mean(dim=1)), dim=1)",
}


def model_card(config: Config, about: dict[str, Any], sources: Sequence[SlideSource], options: ExportOptions) -> str:
    """The card as Markdown with the header that model hubs read.

    `about` is `trainer.publish.export.description`, `sources` what was trained on.
    """
    tiles = config.data.tiles
    mpps = mpp_text(config.data.drawn_mpp) if tiles is None else ", ".join(f"{value:g}" for value in about["mpp"])
    weights = "weights {" + ", ".join(f"{key}: {weight}" for key, weight in sorted(config.data.mpp.items())) + "}"
    if config.data.views:
        weights = "views of one place, a tile of each a sample"
    tissue = f"at least {config.data.min_tissue:.0%} of a tile"
    if tiles is not None:
        weights, tissue = f"the µm/px of the list of tiles `{storage.name_of(tiles)}`", "as the list has it"
    off = f", µm/px up to {config.data.mpp_tolerance:.0%} off" if config.data.mpp_tolerance else ""
    cohorts = f", cohorts {config.data.cohorts}" if config.data.cohorts else ""
    tile, side, layout, positions = about["tile_size"], about["input_size"], options.layout, ""
    if not about["num_registers"]:
        trained = _TRAINED_POSITIONS[config.model.interpolation]
        positions = f" At other sizes positions are resampled: in training {trained}, by {layout} {_POSITIONS[layout]}."
    return f"""---
license: {options.license}
library_name: {layout}
pipeline_tag: image-feature-extraction
tags: [pathology, histology, dinov2, {layout}]
---
# {options.name}

A vision transformer (`{config.model.backbone}`) for tiles of H&E-stained whole-slide images, trained with DINOv2 by
tilestream on tiles streamed from the original slides.

## Use

Input: RGB tiles at {mpps} µm/px, {tile} × {tile} px, which the network sees at {side} × {side} px (any multiple of the
patch size works), mean {about["mean"]}, standard deviation {about["std"]}. Embedding: {about["embedding"]},
{about["embedding_dim"]} numbers.{positions}

```python
{use_lines(about, layout)}
```

## Training

| | |
|---|---|
| data | catalog `{about["catalog"]}`{cohorts}; tiles of {about["tile_size"]} px at {weights}{off} |
| tissue | {tissue}, HSV rule {config.data.hsv_rule.min_share:.0%} |
| length | {about["steps"]:,} steps of {config.train.batch:,} tiles: {about["tiles_seen"]:,} tiles |
| crops | 2 of {config.augment.global_size} px, {config.augment.num_local} of {config.augment.local_size} px |
| optimiser | AdamW, base learning rate {config.optim.base_lr:g}, precision {config.train.precision} |
| seed | {config.run.seed} |
| checkpoint | SHA-256 `{about["checkpoint_sha256"]}` |

## Slides
{_slides(sources)}
## Limits

For research. Not validated for diagnosis. Slides of other scanners, stains or organs than those of the training data
may be embedded less well.
"""


def use_lines(about: dict[str, Any], layout: Layout) -> str:
    """Python that embeds a tile as `tilestream embed` does."""
    if about["input_size"] == about["tile_size"]:
        imports, pixels = _IMPORT[layout], _PIXELS[layout]
    else:
        imports = "import numpy as np\n" + _IMPORT[layout].replace("AutoImageProcessor, ", "")
        pixels = _RESAMPLED.format(side=about["input_size"], mean=about["mean"], std=about["std"])
    return "\n".join([imports, "", _LOAD[layout], pixels, _TOKENS[layout], _EMBED[about["embedding"]]])


def _slides(sources: Sequence[SlideSource]) -> str:
    """Where the slides are from, and under which licences: those of the data ask to be named."""
    if not sources:
        return "\nThe checkpoint does not tell which slides were trained on.\n"
    rows = [
        f"| {source.collection or 'not told'} | {source.slides:,} | {source.patients:,} | {source.share:.1%} "
        f"| {source.license or 'not told'} | {_linked(source.doi)} |"
        for source in sources
    ]
    head = "| collection | slides | patients | tiles | licence | DOI |\n|---|---|---|---|---|---|"
    total = f"{sum(source.slides for source in sources):,} slides, as the catalog told when the training was started."
    return "\n".join(["", total, "", head, *rows, ""])


def _linked(doi: str | None) -> str:
    return f"[{doi}](https://doi.org/{doi})" if doi else "not told"
