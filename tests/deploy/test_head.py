"""What Ray's head keeps in memory: it serves a stream for weeks."""

import os
import subprocess
import sys

import pytest
import yaml

from streaming.cluster import GCS_NOTES
from tests.deploy.manifests import KUBERAY

# Ends some actors, and waits until the head keeps notes of no more than it may.
_SCRIPT = """
import time, ray
from ray._private import state
from streaming import cluster

cluster.connect(1)

class Actor:
    def leave(self):
        ray.actor.exit_actor()

actors = [ray.remote(num_cpus=0)(Actor).remote() for _ in range(9)]
for actor in actors:
    try:
        ray.get(actor.leave.remote())
    except ray.exceptions.RayActorError:
        pass
del actor, actors  # of an actor that somebody can still call it keeps its note
for _ in range(300):
    notes = state.actors()
    if len(notes) <= 4:
        print("notes:", len(notes))
        break
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_the_head_forgets_actors_that_have_ended() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_maximum_gcs_destroyed_actor_cached_count"] = "4"
    ended = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True)
    assert ended.stdout == "notes: 4\n", ended.stderr


def test_heads_that_others_start_keep_as_few_notes_as_ours() -> None:
    (made,) = yaml.safe_load((KUBERAY / "base/kustomization.yaml").read_text())["configMapGenerator"]
    script = f". {KUBERAY.parent / 'slurm/resume.sh'}; env"
    sourced = subprocess.run(
        ["bash", "-c", script], env={"USER": "u", "SLURM_JOB_ID": "1"}, cwd="/", capture_output=True, text=True
    )
    for name, most in GCS_NOTES.items():
        assert f"{name}={most}" in made["literals"]
        assert f"{name}={most}" in sourced.stdout.splitlines()
