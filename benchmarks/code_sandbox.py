"""Programs a second that the sandbox grades on this machine, and the processor time of one, for docs/code_rewards.md.

python benchmarks/code_sandbox.py
"""

import os
import resource
import sys
import time
from contextlib import closing

from grpo_stage.rewards.code.cases import Tests, read_tests
from grpo_stage.rewards.code.grading import Graders, Grading
from grpo_stage.rewards.code.sandbox import Limits, check_sandbox


SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
FUNCTION = "def add(a, b):\n    return a + b"
NUM_PROGRAMS = 32


def cases(count: int) -> dict[str, tuple[str, Tests]]:
    pairs = [[i, i + 1] for i in range(count)]
    sums = [a + b for a, b in pairs]
    return {
        "standard input": (SCRIPT, read_tests({"inputs": [f"{a} {b}" for a, b in pairs], "outputs": sums})),
        "calls": (FUNCTION, read_tests({"fn_name": "add", "inputs": pairs, "outputs": sums})),
        "assertions": (FUNCTION, read_tests([f"assert add({a}, {b}) == {a + b}" for a, b in pairs])),
    }


def processor_s() -> float:
    """Of this process and all that have ended below it."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    check_sandbox("bwrap")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    grading = Grading(sandbox="bwrap", limits=Limits(), program_timeout_s=60.0, stops_at_failure=True)
    with closing(Graders()) as graders:
        for num_tests in (1, 10):
            for kind, (source, tests) in cases(num_tests).items():
                programs = [(f"{source}\n# {i}", tests) for i in range(NUM_PROGRAMS)]
                start, cpu_s = time.perf_counter(), processor_s()
                grades = graders.grade(grading, programs, 600.0)
                seconds, cpu_s = time.perf_counter() - start, processor_s() - cpu_s
                assert all(grade.has_passed for grade in grades)
                print(
                    f"{kind}, {num_tests} tests: {NUM_PROGRAMS / seconds:.0f} programs a second, "
                    f"{cpu_s / NUM_PROGRAMS * 1000:.0f} ms of processor time each"
                )


if __name__ == "__main__":
    main()
