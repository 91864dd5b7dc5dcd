"""The commands that begin with a trained model: `tilestream embed`, `evaluate`, `picture`, `report` and so on."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from streaming.catalog.idc import IdcOptions
from streaming.command_line import (
    SLIDES_HELP,
    add_command,
    add_options,
    add_storage_options,
    file,
    file_or_folder,
    folder,
    out,
    read_options,
    storage_options,
)
from trainer.embed.options import EmbedOptions, SlideOptions
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.options import EvaluateOptions
from trainer.publish.options import ExportOptions
from trainer.show.options import PictureOptions


def add_embed(commands: Any) -> None:
    """`tilestream embed`."""
    parser = add_command(
        commands,
        "embed",
        "embed every tissue tile of slides, a file a slide",
        "  tilestream embed s3://bucket/runs/a s3://bucket/catalog --out s3://bucket/embeddings --token cls+patch\n"
        "  tilestream embed vit_small_patch14_dinov2.lvd142m slides --out features --format h5 --gpu",
        run_embed,
        extra="embed",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run or one of its checkpoints/step-…, an export, or a timm model"
    )
    parser.add_argument("slides", nargs="+", metavar="SLIDES", help=f"catalogs, {SLIDES_HELP}")
    parser.add_argument(
        "--out", type=folder, required=True, metavar="URI", help="folder of the files; done slides stay"
    )
    add_options(parser, IdcOptions, where={"metavar": "SQL"}, idc_index={"metavar": "URI"})
    add_options(
        parser,
        EmbedOptions,
        readers={"metavar": "MIN:MAX"},
        model_batch={"metavar": "N"},
        slide_mpp={"metavar": "µm/px"},
        max_upsampling={"metavar": "TIMES"},
    )
    add_storage_options(parser)


def run_embed(args: Namespace) -> None:
    """Embeds, and says what became of the slides."""
    from streaming import storage
    from streaming.progress import clock
    from trainer.embed.files import REJECTED
    from trainer.embed.job import embed

    options = read_options(args, EmbedOptions)
    stores, idc = storage_options(args), read_options(args, IdcOptions)
    report = embed(args.checkpoint, args.slides, args.out, options, stores, idc, verbose=args.verbose)
    for entry in report.rejected[:5]:
        sys.stderr.write(f"rejected: {entry.slide}: {entry.reason}\n")
    rejected = f"{len(report.rejected)} rejected"
    if report.rejected:
        rejected += f" (reasons in {storage.join(args.out, REJECTED)})"
    done = f"{report.tiles:,} tiles of {report.slides} slides embedded"
    if report.slides:
        done += f" in {clock(report.seconds)}"
    if report.tiles_per_s:
        done += f", {report.tiles_per_s:,.0f} tiles/s once the first ones had come"
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
        extra="embed",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run, an exported folder, a name of timm's hub; embeddings for slides",
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder of images by class, a .csv, .tsv or .parquet file")
    add_scoring(parser)
    parser.add_argument("--out", type=folder, metavar="URI", help="folder of scores.parquet and scores.json")
    add_storage_options(parser)


def add_scoring(parser: Any) -> None:
    """What decides how a model is scored; of a parser, or a group of its arguments."""
    task = {"flag": "--task", "action": "store", "nargs": "+", "metavar": "TASK"}
    add_options(
        parser,
        EvaluateOptions,
        tasks=task,
        radius={"metavar": "PX"},
        resize={"metavar": "PX"},
        probe_steps={"metavar": "N"},
        model_batch={"metavar": "N"},
    )
    add_options(parser, AnnotatedTiles, only=("mpp", "size"))
    _add_slides(parser)


def _add_slides(parser: Any) -> None:
    """What is said of the slides that a table or a file names."""
    slides_in, max_upsampling = {"metavar": "URI"}, {"metavar": "TIMES"}
    add_options(
        parser, SlideOptions, slides_in=slides_in, slide_mpp={"metavar": "µm/px"}, max_upsampling=max_upsampling
    )


def scoring(args: Namespace) -> EvaluateOptions:
    """The options that `add_scoring` asked for."""
    grid, slides = read_options(args, AnnotatedTiles), read_options(args, SlideOptions)
    return read_options(args, EvaluateOptions, grid=grid, slides=slides)


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
        extra="embed",
    )
    add_options(
        parser,
        PictureOptions,
        kind={"metavar": "KIND"},
        dataset={"metavar": "URI"},
        name={"flag": "--class"},
        most={"metavar": "N"},
    )
    _add_slides(parser)
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="files or folders of `tilestream embed`")
    parser.add_argument(
        "--out",
        type=file_or_folder,
        required=True,
        metavar="URI",
        help="folder of the files; of neighbours, map: the file",
    )
    add_storage_options(parser)


def run_picture(args: Namespace) -> None:
    """Draws, and says where the files are."""
    from trainer.show.picture import draw

    options = read_options(args, PictureOptions, slides=read_options(args, SlideOptions))
    for uri in draw(args.embeddings, args.out, options, storage_options(args)):
        out(uri)


def add_report(commands: Any) -> None:
    """`tilestream report`."""
    parser = add_command(
        commands,
        "report",
        "show a run in one HTML file: slides, tiles, crops, curves, failures, scores, licences",
        "  tilestream report runs/first --scores scores --embeddings embeddings --out report.html",
        run_report,
        extra="train",
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder, or one of its checkpoints/step-…")
    parser.add_argument("--out", type=file, default="report.html", metavar="URI", help="the file (report.html)")
    of_scores, of_embeddings = "folders of `tilestream evaluate --out`", "files or folders of `tilestream embed`"
    parser.add_argument("--scores", nargs="+", default=[], metavar="FOLDER", help=of_scores)
    parser.add_argument("--embeddings", nargs="+", default=[], metavar="URI", help=of_embeddings)
    add_storage_options(parser)


def run_report(args: Namespace) -> None:
    """Writes the report, and says where."""
    from trainer.show.run_report import write_report

    options = storage_options(args)
    write_report(args.out, args.run_folder, scores=args.scores, embeddings=args.embeddings, storage_options=options)
    out(args.out)


def add_lazyslide(commands: Any) -> None:
    """`tilestream lazyslide`."""
    parser = add_command(
        commands,
        "lazyslide",
        "write embeddings as zarr stores that LazySlide opens beside a slide (needs wsidata)",
        "  tilestream lazyslide embeddings --out stores --feature midnight",
        run_lazyslide,
        extra="embed",
    )
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="files or folders of `tilestream embed`")
    parser.add_argument(
        "--out", type=folder, required=True, metavar="FOLDER", help="where the stores go, NAME.zarr each"
    )
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
        extra="embed",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/step-…")
    parser.add_argument("--out", type=folder, required=True, metavar="URI", help="folder of the model")
    add_options(parser, ExportOptions, license={"metavar": "SPDX"}, eva={"metavar": "TASK.yaml"})
    add_storage_options(parser)


def run_export(args: Namespace) -> None:
    """Exports, and says how to load it."""
    from trainer.publish.export import export

    for uri in export(args.checkpoint, args.out, read_options(args, ExportOptions), storage_options(args)):
        out(uri)
