import os
import subprocess
import sys

import pytest

_SAYS_WHETHER = """
import threading
said = []
thread = threading.Thread(target=lambda: said.append(cv2.ipp.useIPP()))
thread.start(); thread.join()
print(cv2.ipp.useIPP(), *said)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    # Where a command ran in this process before, it has silenced warnings for those that it starts.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, "-c", code + _SAYS_WHETHER]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_no_thread_uses_ipp_where_only_the_trainer_was_imported() -> None:
    said = run("import trainer.evaluate.image_files, cv2")
    assert (said.stdout, said.stderr) == ("False False\n", "")


def test_the_environment_stays_as_it_was() -> None:
    code = "import os; os.environ['OPENCV_IPP'] = 'avx2'\nimport cv2, streaming.vision\nprint(os.environ['OPENCV_IPP'])"
    assert run(code).stdout == "avx2\nFalse False\n"


def test_switching_ipp_off_counts_for_one_thread_and_whoever_used_opencv_before_is_warned() -> None:
    if run("import cv2").stdout != "True True\n":
        pytest.skip("this build of OpenCV has no IPP to be left out")
    assert run("import cv2; cv2.ipp.setUseIPP(False)").stdout == "False True\n"
    assert "import tilestream first" in run("import cv2; cv2.ipp.useIPP(); import streaming.vision").stderr
