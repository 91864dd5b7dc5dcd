"""Lightning's loggers by name: where the rows of a run's metrics go beside `metrics.parquet`."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from streaming import storage
from streaming.errors import ConfigError

# The packages behind each, of which one is needed.
_PACKAGES = {
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check_installed(names: Sequence[str]) -> None:
    """Refuses loggers that can't work here.

    Raises:
        ConfigError: a name's package is not installed.
    """
    for name in names:
        packages = _PACKAGES[name]
        if packages and not any(find_spec(package) for package in packages):
            raise ConfigError(f"run.loggers names {name}, which is not installed; pip install {name}, or leave it out")


class Trackers:
    """The loggers of a run. One that fails is warned of and left out: a training does not stop for its diary."""

    def __init__(self, names: tuple[str, ...], out: str, start: int) -> None:
        """Loggers of the run at `out`, which goes on at step `start`; each attempt has its own files."""
        # CSV is appended to, which object storage can't; metrics.parquet is there anyhow.
        kept = [name for name in names if name != "csv" or storage.is_local(out)]
        self._loggers = {name: _logger(name, out, start) for name in kept}

    def add(self, row: Mapping[str, float]) -> None:
        """Logs a row of the metrics under its step."""
        values = {name: value for name, value in row.items() if name != "step"}
        self._each("log_metrics", values, int(row["step"]))

    def save(self) -> None:
        """Writes what is held back."""
        self._each("save")

    def close(self) -> None:
        """Writes all and leaves."""
        self._each("save")
        self._each("finalize", "success")

    def _each(self, method: str, *arguments: object) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                with warnings.catch_warnings(action="ignore"):  # that files of a first try are replaced
                    getattr(logger, method)(*arguments)
            except Exception as error:  # whatever a service's client raises
                sys.stderr.write(f"train: {name} takes no more metrics: {' '.join(str(error).split())}\n")
                del self._loggers[name]


def _logger(name: str, out: str, start: int) -> Logger:
    """A logger that keeps its files below the run's folder, or speaks to the service that its environment names."""
    folder, version = storage.join(out, "logs"), f"from-step-{start}"
    if name == "csv":
        return CSVLogger(folder, name="csv", version=version, flush_logs_every_n_steps=10**9)
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version=version)
    if name == "wandb":
        # The same run goes on under the same id.
        identity = hashlib.sha256(out.encode()).hexdigest()[:16]
        return WandbLogger(name=storage.name_of(out), id=identity, project="tilestream", resume="allow")
    return MLFlowLogger(
        experiment_name="tilestream", run_name=storage.name_of(out), tags={"out": out, "start": version}
    )
