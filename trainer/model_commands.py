"""The commands that begin with a trained model: `tilestream embed`, `evaluate`, `picture`, `lazyslide` and `export`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from streaming.cli import add_command, add_storage_options, out, pair, storage_options

if TYPE_CHECKING:
    from trainer.evaluate.scoring import EvaluateOptions


def add_embed(commands: Any) -> None:
    """`tilestream embed`."""
    parser = add_command(
        commands,
        "embed",
        "embed every tissue tile of slides, a file a slide",
        "  tilestream embed s3://bucket/runs/a s3://bucket/slides --out s3://bucket/embeddings --token cls+patch\n"
        "  tilestream embed vit_small_patch14_dinov2.lvd142m slides --out features --format h5 --gpu --precision bf16",
        run_embed,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run or one of its checkpoints/step-…, an export, or a timm model"
    )
    parser.add_argument("slides", nargs="+", metavar="SLIDES", help="files, folders, globs, s3:// (or other) prefixes")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the files; done slides stay")
    parser.add_argument(
        "--format", choices=("parquet", "h5"), default="parquet", help="h5: HDF5 as CLAM and TRIDENT read it"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="µm/px of the tiles (0.5)")
    parser.add_argument("--size", type=int, default=256, help="side of a tile in px (256)")
    parser.add_argument("--min-tissue", type=float, default=0.4, help="share that must be tissue (0.4)")
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), default="cls", help="class token, mean patch token, both"
    )
    parser.add_argument("--tokens", action="store_true", help="keep all patch tokens too (float16), for segmentation")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16: products in bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="tiles that the model sees at once (64)")
    parser.add_argument("--readers", type=pair, default=(1, 2), metavar="MIN:MAX", help="reader actors (1:2)")
    parser.add_argument("--models", type=int, default=1, help="actors that hold the model (1)")
    parser.add_argument("--model-cpus", type=int, default=1, help="CPU slots and threads of each (1)")
    parser.add_argument("--gpu", action="store_true", help="each of them takes a GPU")
    parser.add_argument("--slide-mpp", type=float, metavar="µm/px", help="level-0 mpp of slides that have none")
    add_storage_options(parser)


def run_embed(args: Namespace) -> None:
    """Embeds, and says what became of the slides."""
    from streaming import storage
    from trainer.embed.files import REJECTED
    from trainer.embed.job import EmbedOptions, embed

    options = EmbedOptions(**{entry.name: getattr(args, entry.name) for entry in fields(EmbedOptions)})
    report = embed(args.checkpoint, args.slides, args.out, options, storage_options(args), verbose=args.verbose)
    for entry in report.rejected[:5]:
        sys.stderr.write(f"rejected: {entry.slide}: {entry.reason}\n")
    rejected = f"{len(report.rejected)} rejected"
    if report.rejected:
        rejected += f" (reasons in {storage.join(args.out, REJECTED)})"
    done = f"{report.tiles:,} tiles of {report.slides} slides embedded"
    out(f"{args.out}: {done}, {report.skipped} slides done before, {rejected}")


def add_evaluate(commands: Any) -> None:
    """`tilestream evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        "score a model's embeddings on labelled data, with confidence intervals over patients or slides",
        "  tilestream evaluate runs/first tiles.csv --task knn linear --out scores\n"
        "  tilestream evaluate vit_small_patch14_dinov2.lvd142m images-by-class",
        run_evaluate,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run, an exported folder, a name of timm's hub; embeddings for slides",
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder of images by class, a .csv or a .parquet file")
    add_scoring(parser)
    parser.add_argument("--out", metavar="URI", help="folder of scores.parquet and scores.json")
    add_storage_options(parser)


def add_scoring(parser: ArgumentParser) -> None:
    """What decides how a model is scored."""
    parser.add_argument(
        "--task",
        nargs="+",
        metavar="TASK",
        default=[],
        help="knn, linear, logistic, quality; slide; segmentation; detection",
    )
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), help="class token, mean patch token, both (cls)"
    )
    parser.add_argument("--k", type=int, default=20, help="neighbours (20)")
    parser.add_argument("--steps", type=int, default=12500, help="of the linear probe (12500)")
    parser.add_argument("--epochs", type=int, default=20, help="of attention MIL and of decoders (20)")
    parser.add_argument("--radius", type=float, default=12, metavar="PX", help="within which a point is found (12)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation, where there is no split (5)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, probes and resamples (0)")
    parser.add_argument("--batch", type=int, default=64, help="tiles that the model sees at once (64)")
    parser.add_argument("--resize", type=int, metavar="PX", help="side that tiles are resized to")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm/px of tiles cut from annotated slides (0.5)")
    parser.add_argument("--size", type=int, default=256, help="side of these tiles in px (256)")
    parser.add_argument("--slide-mpp", type=float, metavar="µm/px", help="level-0 mpp of slides that have none")
    parser.add_argument("--gpu", action="store_true", help="run the model on a GPU")


def scoring(args: Namespace) -> EvaluateOptions:
    """The options that `add_scoring` asked for."""
    from trainer.evaluate.annotations import TileGrid
    from trainer.evaluate.scoring import EvaluateOptions

    names = ("token", "k", "steps", "epochs", "radius", "folds", "seed", "batch", "resize", "gpu")
    return EvaluateOptions(
        tasks=tuple(args.task),
        grid=TileGrid(mpp=args.mpp, size=args.size, slide_mpp=args.slide_mpp),
        **{name: getattr(args, name) for name in names},
    )


def run_evaluate(args: Namespace) -> None:
    """Scores, and prints the table."""
    from trainer.evaluate.scoring import evaluate, table_lines

    for line in table_lines(
        evaluate(args.checkpoint, args.dataset, scoring(args), storage_options(args), out=args.out)
    ):
        out(line)


def add_picture(commands: Any) -> None:
    """`tilestream picture`."""
    parser = add_command(
        commands,
        "picture",
        "draw embeddings: heatmap, token map, neighbours, map in the plane, GeoJSON for QuPath",
        "  tilestream picture tokens embeddings/a-1f2e.parquet --out pictures\n"
        "  tilestream picture heatmap embeddings --dataset tissue.csv --class tumour --out pictures\n"
        "  tilestream picture map embeddings --out map.html",
        run_picture,
    )
    parser.add_argument(
        "kind",
        choices=("heatmap", "tokens", "neighbours", "map", "geojson"),
        metavar="KIND",
        help="heatmap, tokens, geojson: a file a slide; neighbours, map: one of all slides",
    )
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="files or folders of `tilestream embed`")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the files; of neighbours, map: the file")
    parser.add_argument("--dataset", metavar="URI", help="labelled tiles that teach a class (heatmap, geojson)")
    parser.add_argument("--class", dest="name", metavar="NAME", help="that class")
    parser.add_argument("--queries", type=int, default=6, help="query tiles, a row each (neighbours; 6)")
    parser.add_argument("-k", type=int, default=8, help="neighbours of each (8)")
    parser.add_argument("--across", action="store_true", help="neighbours from other slides than the query's alone")
    parser.add_argument("--method", choices=("tsne", "pca"), default="tsne", help="of the map (tsne)")
    parser.add_argument("--most", type=int, default=2000, metavar="N", help="tiles on the map, drawn at random (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    add_storage_options(parser)


def run_picture(args: Namespace) -> None:
    """Draws, and says where the files are."""
    from trainer.show.picture import PictureOptions, draw

    options = PictureOptions(**{entry.name: getattr(args, entry.name) for entry in fields(PictureOptions)})
    for uri in draw(args.embeddings, args.out, options, storage_options(args)):
        out(uri)


def add_lazyslide(commands: Any) -> None:
    """`tilestream lazyslide`."""
    parser = add_command(
        commands,
        "lazyslide",
        "write embeddings as zarr stores that LazySlide opens beside a slide (needs wsidata)",
        "  tilestream lazyslide embeddings --out stores --feature midnight",
        run_lazyslide,
    )
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="files or folders of `tilestream embed`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the stores go, NAME.zarr each")
    parser.add_argument("--feature", default="tilestream", help="their table is FEATURE_tiles (tilestream)")
    add_storage_options(parser)


def run_lazyslide(args: Namespace) -> None:
    """Writes, and says where the stores are."""
    from trainer.publish.lazyslide import write_stores

    for store in write_stores(args.embeddings, args.out, args.feature, storage_options(args)):
        out(str(store))


def add_export(commands: Any) -> None:
    """`tilestream export`."""
    parser = add_command(
        commands,
        "export",
        "write a checkpoint's teacher as a folder that timm or transformers load, with a model card",
        "  tilestream export s3://bucket/runs/a --out model --token cls+patch --license cc-by-nc-4.0",
        run_export,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/step-…")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the model")
    parser.add_argument("--layout", choices=("timm", "transformers"), default="timm", help="who is to load it (timm)")
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), default="cls", help="what an embedding is, for the card"
    )
    parser.add_argument("--license", default="other", metavar="SPDX", help="licence of the weights (other)")
    parser.add_argument("--name", default="tilestream-model", help="name of the model in its card")
    parser.add_argument(
        "--eva",
        metavar="TASK.yaml",
        action="append",
        default=[],
        help="a configuration of kaiko's eva, written beside the model with it as backbone; may be repeated",
    )
    add_storage_options(parser)


def run_export(args: Namespace) -> None:
    """Exports, and says how to load it."""
    from trainer.publish.export import ExportOptions, export

    options = ExportOptions(
        layout=args.layout, token=args.token, license=args.license, name=args.name, eva=tuple(args.eva)
    )
    for uri in export(args.checkpoint, args.out, options, storage_options(args)):
        out(uri)
