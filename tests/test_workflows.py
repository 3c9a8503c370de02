"""The workflow files, which only GitHub runs: YAML, shell, files, commands and permissions."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

import jax_flashmla
from jax_flashmla.bench import options

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no workflows")
NAMES = [path.stem for path in WORKFLOWS]


def load(name: str) -> dict:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    workflow["on"] = workflow.pop(True)  # YAML 1.1's `on`
    return workflow


def steps(name: str) -> Iterator[dict]:
    for job in load(name)["jobs"].values():
        yield from job["steps"]


def scripts(name: str) -> list[str]:
    """What steps run, with a word in place of each expression."""
    return [re.sub(r"\$\{\{.*?\}\}", "value", s["run"]) for s in steps(name) if "run" in s]


def test_there_is_one_for_each_purpose():
    assert NAMES == ["ci", "gpu_nightly", "release"]


@pytest.mark.parametrize("name", NAMES)
def test_jobs_are_whole(name):
    workflow = load(name)
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
        assert (
            set(job.get("needs", [])) <= set(workflow["jobs"]) or job["needs"] in workflow["jobs"]
        )
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+|release/v1)", step.get("uses", "a/b@v1"))
        # An expression of the matrix names one of its keys.
        matrix = job.get("strategy", {}).get("matrix", {})
        keys = set(matrix) | {key for entry in matrix.get("include", []) for key in entry}
        assert set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job))) <= keys


@pytest.mark.parametrize("name", NAMES)
def test_scripts_parse_and_their_files_exist(name):
    for script in scripts(name):
        subprocess.run(["bash", "-n", "-c", script], check=True)
        for file in re.findall(r"(?<![\w./-])(?:scripts|\.ci|docs)(?:/[\w.]+)?", script):
            assert (ROOT / file).exists(), file


def test_commands_and_options_exist():
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    (nightly,) = [script for script in scripts("gpu_nightly") if "--compare" in script]
    (command,) = re.findall(r"jax-flashmla bench (.*?)[\\>\n]", nightly)
    assert len(parser.parse_args(shlex.split(command)).compared) == 2
    build = [script for script in scripts("release") if "build_wheel" in script]
    usage = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_wheel.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in re.findall(r"--[\w-]+", " ".join(build)):
        assert option in usage


def test_a_release_has_every_wheel_and_is_published_by_a_tag_alone():
    release = load("release")
    assert release["on"]["push"] == {"tags": ["v*"]}
    wheels, publish = release["jobs"]["wheels"], release["jobs"]["publish"]
    matrix = wheels["strategy"]["matrix"]
    assert matrix["arch"] == ["x86_64", "aarch64"]
    assert matrix["python"] == ["cp311-cp311", "cp312-cp312"]
    assert wheels["container"] == "quay.io/pypa/manylinux_2_28_${{ matrix.arch }}"
    assert publish["if"] == "github.ref_type == 'tag'"
    assert set(publish["needs"]) == set(release["jobs"]) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"}
    others = [job for job in release["jobs"].values() if job is not publish]
    assert release["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in others)


def test_what_names_the_version_names_the_same():
    version = jax_flashmla.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    releases = re.findall(r"^## \[(\d.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert releases[0] == (version, str(citation["date-released"]))


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_yaml_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    assert yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())["version"] == 2
