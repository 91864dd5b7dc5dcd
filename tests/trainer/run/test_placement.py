"""What is said where ranks find no node; nodes as `ray.nodes()` tells them."""

from typing import Any

import pytest

from trainer.run.execution import TrainConfig
from trainer.run.placement import lacking

ROLE = "tilestream-role"


def node(*, alive: bool = True, role: str | None = None, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources, "Labels": {} if role is None else {ROLE: role}}


READER, TRAINER = node(CPU=32, role="reader"), node(CPU=8, GPU=4, memory=64e9, role="trainer")


@pytest.mark.parametrize(
    ("train", "nodes", "told"),
    [
        ({"ranks": 4, "gpu": True}, [READER, TRAINER], ""),
        ({"ranks": 8, "gpu": True}, [READER, TRAINER], "8 ranks want 1 CPU, 1 GPU each; the 2 nodes have room for 4"),
        ({"ranks": 8, "gpu": True}, [READER, TRAINER, TRAINER], ""),
        ({"ranks": 8, "gpu": True}, [READER, TRAINER, {**TRAINER, "Alive": False}], "lower train.ranks"),
        (
            {"ranks": 1, "gpu": True},
            [READER],
            "the most of a node is 32 CPU, 0 GPU: add nodes, or add --train.gpu false",
        ),
        (
            {"ranks": 1, "rank_cpus": 64},
            [READER, TRAINER],
            "the most of a node is 32 CPU: add nodes, or lower train.rank",
        ),
        ({"ranks": 1, "rank_resources": {"memory": 9e10}}, [TRAINER], "lower train.rank_resources.memory"),
        (
            {"ranks": 1, "rank_labels": {ROLE: "trainer"}},
            [READER],
            f"none of the 1 nodes has the labels {ROLE}=trainer",
        ),
        ({"ranks": 4, "gpu": True, "rank_labels": {ROLE: "trainer"}}, [READER, TRAINER], ""),
        ({"ranks": 9, "rank_labels": {ROLE: "trainer"}}, [READER, TRAINER], f"labels {ROLE}=trainer have room for 8"),
        ({"ranks": 9, "rank_labels": {ROLE: "in(reader, trainer)"}}, [READER, TRAINER], ""),
        ({"ranks": 9, "rank_labels": {ROLE: "!trainer"}}, [READER, TRAINER], ""),
        ({"ranks": 9, "rank_labels": {ROLE: "!in(reader,trainer)"}}, [READER, TRAINER], "none of the 2 nodes"),
    ],
)
def test_what_the_ranks_lack_is_told_with_the_remedy(
    train: dict[str, Any], nodes: list[dict[str, Any]], told: str
) -> None:
    said = lacking(nodes, TrainConfig(batch=360, **{"gpu": False, **train}))
    assert told in said
    assert bool(told) == bool(said)
