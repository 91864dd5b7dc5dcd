"""A configuration as it is trained: what one field asks for and another one forbids is settled, and said."""

from __future__ import annotations

import math
from dataclasses import replace

from streaming.errors import ConfigError
from trainer.recipe.flops import step_flops
from trainer.recipe.schedule import Schedules
from trainer.run.config import Config


def fitted(config: Config) -> tuple[Config, list[str]]:
    """The configuration with the steps that `train.flops` allows and masks that fit the micro-batch, and what it says.

    Raises:
        ConfigError: fewer FLOPs than a step takes, or a model, crops or schedules that make no sense.
    """
    train, lines = config.train, list[str]()
    try:
        if train.flops is not None:
            of_step = step_flops(config.recipe, train.batch).total
            steps = int(train.flops // of_step)
            if not steps:
                raise ConfigError(f"train.flops {train.flops:.3g}: a step takes {of_step:.3g}; raise it")
            lines.append(f"train.flops {train.flops:.3g} are {steps:,} steps of {of_step:.3g}")
            config = replace(config, train=replace(train, steps=steps))
        lines += Schedules(config.optim, config.train.steps, train.batch).shortened
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    micro, group = train.shape.micro, config.mask.group_size
    if micro % group:
        fits = math.gcd(micro, group)
        config = replace(config, mask=replace(config.mask, group_size=fits))
        lines.append(
            f"mask.group_size {group} does not divide the {micro} tiles of a micro-batch: taken as {fits}; a "
            "micro-batch that it divides has other masks"
        )
    return config, lines
