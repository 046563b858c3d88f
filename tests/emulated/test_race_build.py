# `pytest -m race`: the CUDA kernels with every memory access of every thread watched. The engine's kernels are clean. Each planted fault
# is found in each of five thread orders. Takes minutes, most of them in test_cuda_conv2d_race and test_cuda_linear_race.
from __future__ import annotations

import re
import shutil

import kernel_launches
import pytest

pytestmark = [pytest.mark.race, pytest.mark.slow]

PLANTED = {  # the faults that hardware may hide, and the word of the sentence that must name each
    "missing_barrier": "race",
    "missing_barrier_after_wait": "race",
    "missing_barrier_before_reuse": "race",
    "missing_syncwarp": "race",
    "shuffle_for_syncwarp": "race",
    "same_word_of_two_blocks": "race",
    "missing_wait": "missing wait",
    "waits_for_too_few": "missing wait",
    "barrier_after_return": "__syncthreads",
    "mask_names_returned": "returned",
    "reads_past_the_end": "out of bounds",
    "writes_far_before": "out of bounds",
    "dynamic_shared_overrun": "out of bounds",
}


@pytest.fixture(scope="module")
def logs():
    if not shutil.which("make"):
        pytest.skip("no make on the PATH")
    kernel_launches.make("race")
    return {path.stem: path.read_text() for path in kernel_launches.CORE.glob("test_*.log")}


def counts(log):
    match = re.search(r"^(\d+) passed, (\d+) failed", log, re.MULTILINE)
    assert match, f"the program did not reach its last line:\n{log[-2000:]}"
    return int(match[1]), int(match[2])


@pytest.mark.parametrize(
    "program, at_least",
    [
        ("test_cuda_device_race", 70),
        ("test_cuda_ops_race", 7_000),
        ("test_cuda_linear_race", 1_900),
        ("test_cuda_conv2d_race", 2_500),
        ("test_cuda_tensor_race", 480),
        ("test_cuda_walk_race", 50),
        ("test_cuda_resident_race", 500),
        ("test_race", 250),
    ],
)
def test_race_build_is_clean(logs, record_property, program, at_least):
    passed, failed = counts(logs[program])
    record_property("race_checks", passed)
    assert failed == 0
    assert passed >= at_least


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_in_every_order(logs, fault):
    found = re.findall(rf"^ok    {fault} (?:ascending|descending|random \d+)  (.*)$", logs["test_race"], re.MULTILINE)
    assert len(found) == 5, found
    assert all(PLANTED[fault] in sentence for sentence in found), found
