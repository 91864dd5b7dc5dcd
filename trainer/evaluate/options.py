"""What is scored, and how: the options of `tilestream evaluate`.

Apart from the code that obeys them, so that the command line can read them without importing torch or scikit-learn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from streaming.errors import ConfigError
from trainer.embed.options import Precision, SlideOptions, Token, own_batch, own_precision
from trainer.evaluate.annotations import AnnotatedTiles

Task = Literal["knn", "linear", "logistic", "quality", "slide", "segmentation", "detection"]
TASKS: tuple[Task, ...] = get_args(Task)
Protocol = Literal["quick", "eva"]

PROBE_STEPS = 12_500
"""arXiv 2404.15217, as kaiko's eva has it"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is scored, and how."""

    tasks: tuple[Task, ...] = ()
    """knn, linear, logistic, quality; slide; segmentation; detection; none: those that suit the dataset"""
    protocol: Protocol = "quick"
    """quick: ours, cross-validated where there is no split; eva: that of kaiko's eva 0.4.5, several runs on a split"""
    token: Token | None = None
    """class token, mean patch token, or both; none: cls, or what an exported model says"""
    k: int = 20
    """neighbours of kNN, purity and robustness index"""
    probe_steps: int = PROBE_STEPS
    """steps of the linear probe; for eva, at most"""
    epochs: int = 20
    """passes that attention MIL takes over the slides, and decoders over the tiles"""
    radius: float = 12.0
    """px of a tile within which a point counts as found; nearer to its edge, points do not count"""
    folds: int = 5
    """parts of the cross-validation, where there is no split"""
    seed: int = 0
    """of folds, probes and resamples"""
    precision: Precision | None = None
    """of the model: bf16: products in bfloat16; none: so on a GPU, 32 on a CPU and for eva"""
    model_batch: int | None = None
    """tiles that the model sees at once; none: 64, on a GPU 256; what its memory does not hold goes through in parts"""
    resize: int | None = None
    """side in px that tiles are resized to; none: as they are, and 224 for eva"""
    grid: AnnotatedTiles = field(default_factory=AnnotatedTiles)
    """which tiles of annotated slides"""
    slides: SlideOptions = field(default_factory=SlideOptions)
    """where the slides of the dataset lie"""
    gpu: bool = False
    """whether model, heads and search of neighbours run on a GPU"""
    scratch: str | None = None
    """folder for patch tokens, masks and slides' embeddings while they are scored; none: the system's temporary one"""

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ConfigError(f"task {unknown[0]!r}; take some of {', '.join(TASKS)}")
        if self.precision not in (None, *get_args(Precision)):
            raise ConfigError(f"precision {self.precision!r}; take one of {', '.join(get_args(Precision))}")
        for name in ("k", "probe_steps", "epochs", "model_batch", "resize"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.protocol not in get_args(Protocol):
            raise ConfigError(f"protocol {self.protocol!r}; take one of {', '.join(get_args(Protocol))}")
        if self.protocol == "eva":
            own = {field.name: field.default for field in fields(self) if field.name in ("epochs", "folds")}
            if changed := [name for name, default in own.items() if getattr(self, name) != default]:
                raise ConfigError(f"protocol eva has its own {changed[0]}; leave out --{changed[0]}")
        if not self.radius > 0:
            raise ConfigError(f"radius is {self.radius}; it must be above 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if self.folds < 2:
            raise ConfigError(f"folds is {self.folds}; it must be at least 2")

    def told(self) -> dict[str, Any]:
        """As they are written beside scores, by which these are known again: with the precision that is taken."""
        return asdict(self) | {"precision": self.products}

    @property
    def products(self) -> Precision:
        """The precision that is taken; eva's own is 32."""
        return own_precision(self.precision, gpu=self.gpu and self.protocol != "eva")

    @property
    def batch(self) -> int:
        """The tiles that the model sees at once, where memory holds them."""
        return own_batch(self.model_batch, gpu=self.gpu)
