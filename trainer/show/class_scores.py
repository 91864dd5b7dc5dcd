"""How much a slide's tiles look like a class that some labelled tiles teach."""

from __future__ import annotations

from collections.abc import Sequence

from streaming import storage
from streaming.errors import ConfigError
from trainer.embed.files import SlideEmbeddings
from trainer.embed.model import load_model
from trainer.embed.table_slides import TableSlides
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import read_dataset
from trainer.evaluate.features import extract
from trainer.evaluate.probes import fitted_logistic
from trainer.show.colours import Floats


def class_scores(
    slides: Sequence[SlideEmbeddings],
    dataset: str,
    name: str,
    opener: TableSlides,
    options: storage.StorageOptions | None = None,
) -> list[Floats]:
    """Probability that each tile of the slides is of a class, by logistic regression on a dataset's labelled tiles.

    dataset is what `tilestream evaluate` takes; its tiles go through the model that the slides went through. opener
    opens the slides that it names.

    Raises:
        ConfigError: the dataset has no labels or no such class, or the model is not there any more.
        TilestreamError: the dataset can't be read.
    """
    about = slides[0].about
    if others := [slide.uri for slide in slides if not slide.about.model_sha256]:
        raise ConfigError(
            f"{others[0]}: of another program, which tells no model to score labelled tiles by; take `tilestream embed`"
        )
    samples = read_dataset(dataset, AnnotatedTiles(mpp=about.mpp, size=about.size), options, opener)
    if samples.labels is None or name not in samples.classes:
        have = ", ".join(samples.classes) or "none"
        raise ConfigError(f"{dataset}: no tiles of class {name!r}; its classes: {have}")
    model = load_model(about.model, about.token, options)
    if any(slide.about.model_sha256 != model.digest for slide in slides):
        raise ConfigError(f"{about.model}: not the model that made all the embeddings; embed the slides by it again")
    features = extract(model, samples.tiles, options=options, slides=opener)
    classifier = fitted_logistic(features.embeddings, samples.labels == samples.classes.index(name))
    return [classifier.predict_proba(slide.features)[:, 1] for slide in slides]
