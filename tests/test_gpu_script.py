"""benchmarks/gpu.sh, run with a stub for python3: its steps, its time, its table, its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.test_aot import OPS

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
STUB = """import json, os, pathlib, subprocess, sys

arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[:1] == ["-c"]:
    print("9.0" if "capability" in arguments[1] else "nvidia-h200")
elif arguments[:2] == ["-m", "benchmarks.summary"]:
    sys.exit(subprocess.run([{python!r}, *arguments]).returncode)
elif arguments[0] == "setup.py" and os.environ.get("FAILS") == "build" and os.environ.get("CUDA_HOME") != "/nowhere":
    sys.exit("nvcc fatal")
elif "--results" in arguments:
    suite = pathlib.Path(arguments[3]).stem
    if suite == os.environ.get("FAILS"):
        sys.exit("no such kernel")
    row = {{"what": f"row of {{suite}}", "ours": 0.002, "unit": "s", "note": "", "limit": 0.001}}
    run = {{"device": "H200", "torch": "2.13", "commit": "abc", "card": ["a card"], "rows": [row]}}
    pathlib.Path(arguments[5], suite + ".json").write_text(json.dumps(run))
    print("1 passed")
"""


def run(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "stub.py").write_text(STUB.format(python=sys.executable))
    scripts = dict.fromkeys(("python3", "compute-sanitizer"), f'exec "{sys.executable}" "{stubs}/stub.py" "$@"')
    scripts["timeout"] = f'echo "$*" >>"{tmp_path}/limits"\nexec {shutil.which("timeout")} "$@"'
    for name, script in scripts.items():  # through a shell, as an interpreter's path may contain a space
        (stubs / name).write_text(f"#!/bin/sh\n{script}\n")
        (stubs / name).chmod(0o755)
    calls = tmp_path / "calls"
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "results")],
        env={**os.environ, "PATH": path, "CALLS": str(calls), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()]


def test_limits_add_up_to_less_than_nine_minutes() -> None:
    limits = [int(n) for n in re.findall(r"^\s*(?:step|suite) \w+ (\d+)", SCRIPT.read_text(), re.MULTILINE)]
    stated, startup = (int(re.search(p, SCRIPT.read_text())[1]) for p in (r"add up to (\d+) s", r"planned=(\d+)"))
    assert len(limits) == 11 and sum(limits) == stated and startup + stated == 540


def test_every_step_runs_and_tables_end_it(tmp_path) -> None:
    done, calls = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    suites = [Path(c[3]).stem for c in calls if "--results" in c]
    named = re.findall(r"^suite (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert suites == [f"bench_{n}" for n in named if (SCRIPT.parent / f"bench_{n}.py").is_file()]
    assert len(suites) >= 5
    assert any(c[:2] == ["setup.py", "build_ext"] for c in calls) and ["-m", "coconut_fast", "doctor"] in calls
    table = done.stdout.split("H200, torch 2.13, commit abc\n")[1]
    assert [f"{s}\na card\n" in table and f"row of {s}" in table for s in suites] == [True] * len(suites)
    assert "2 ms" in table and "1 ms (0.50x)" in table
    assert (tmp_path / "results" / "bench_graph.log").read_text().strip() == "1 passed"


def test_a_suite_that_fails_is_named_and_the_rest_goes_on(tmp_path) -> None:
    done, _ = run(tmp_path, FAILS="bench_graph")
    assert done.returncode == 1
    assert re.search(r"bench_graph +FAILED \(1\) in \d+ s: no such kernel", done.stdout)
    assert "row of bench_train" in done.stdout and "row of bench_graph" not in done.stdout


def test_cuda_sources_that_do_not_compile_cost_the_persistent_kernel_alone(tmp_path) -> None:
    done, calls = run(tmp_path, FAILS="build")
    assert done.returncode == 1 and re.search(r"build +FAILED \(1\) in \d+ s: nvcc fatal", done.stdout)
    assert re.search(r"build_without_cuda +ok", done.stdout) and "row of bench_graph" in done.stdout
    assert [c[:2] for c in calls].count(["setup.py", "build_ext"]) == 2


def test_nothing_runs_beyond_the_last_second(tmp_path) -> None:
    done, calls = run(tmp_path, GPU_SECONDS="0")
    assert done.returncode == 1 and done.stdout.count("FAILED: no time is left") == 12
    assert not any("build_ext" in c or "pytest" in c for c in calls), calls
    assert "no figures in" in done.stdout


def test_named_steps_alone_are_run(tmp_path) -> None:
    done, calls = run(tmp_path, GPU_STEPS="build tests bench_ops")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +ok in", done.stdout, re.MULTILINE) == ["build", "tests", "bench_ops"]
    assert not any("doctor" in call for call in calls)


def test_named_steps_have_the_time_of_the_others(tmp_path) -> None:
    run(tmp_path, GPU_STEPS="build kernel_tests")
    build, kernels = [int(re.search(r"kill-after=\d+ (\d+)", line)[1]) for line in (tmp_path / "limits").open()]
    assert 60 < build <= 80 and 500 < kernels <= 540


def test_a_named_build_that_fails_is_tried_without_cuda_too(tmp_path) -> None:
    done, _ = run(tmp_path, FAILS="build", GPU_STEPS="build tests")
    assert re.findall(r"^(\w+) +(?:ok|FAILED)", done.stdout, re.MULTILINE) == ["build", "build_without_cuda", "tests"]


def test_figures_of_an_earlier_call_go_when_new_ones_are_due(tmp_path) -> None:
    (tmp_path / "results").mkdir()
    earlier = tmp_path / "results" / "bench_graph.json"
    earlier.write_text('{"device": "H200", "torch": "2.13", "commit": "abc", "card": [], "rows": []}')
    run(tmp_path, GPU_SECONDS="0")
    assert earlier.is_file(), "no time is left, and nothing in its place"
    shutil.rmtree(tmp_path / "bin")
    run(tmp_path, FAILS="bench_graph")
    assert not earlier.exists()


def test_every_test_that_wants_a_gpu_is_run_once(tmp_path) -> None:
    _, calls = run(tmp_path)
    steps = [c for c in calls if c[:2] == ["-m", "pytest"] and "--results" not in c]
    named = [a for c in steps if "gpu" in c for a in c if "tests/" in a]
    (kernels,) = [c for c in steps if "gpu" not in c]
    assert kernels[5:] == [f"tests/test_{op}.py" for op in OPS if (SCRIPT.parents[1] / f"tests/test_{op}.py").is_file()]
    marked = {f"tests/{p.name}" for p in (SCRIPT.parents[1] / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()}
    assert sorted(named) == sorted(marked) and "tests/test_persistent.py" in marked


def test_no_gpu_is_said_at_once(tmp_path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "gpu.sh: python3 has no torch that sees a GPU\n"


def test_a_step_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    done, _ = run(tmp_path, GPU_STEPS="build bench_graphs")
    assert done.returncode == 1
    assert re.search(r"no step bench_graphs; they are build .*bench_graph .*kernel_tests\n", done.stdout), done.stdout
