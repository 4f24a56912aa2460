"""What a release uploads, and that what is said about it in several files is the same."""

import datetime
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lightning_sap import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ADVICE = re.compile(r"pip install ([^\n`#)]+)")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(folder, *what):
    """Both archives, or those of the options, in that folder; without the network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    run("-m", "build", "--no-isolation", *what, "--outdir", folder, ROOT, folder=folder)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")[0]


LOOK = """
import importlib.metadata, pathlib, torch
import lightning_sap as sap
print(pathlib.Path(sap.__file__).parent, importlib.metadata.version("lightning-sap"), sap.__version__)
masks = sap.prune_masks({"w": torch.tensor([1.0, 4.0, 2.0, 3.0])}, policy=sap.FixedFraction(0.5))
print(masks["w"].tolist())
"""


class TestTheWheel:
    @pytest.mark.slow
    def test_installed_by_itself_is_imported_from_there_and_prunes(self, wheel, tmp_path):
        run("-m", "pip", "install", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel, folder=tmp_path)
        found = run(
            "-P" if sys.version_info >= (3, 11) else "-s",
            "-c",
            LOOK,
            folder=tmp_path,
            PYTHONPATH=str(tmp_path / "site"),
        )
        assert found.splitlines() == [
            f"{tmp_path / 'site' / 'lightning_sap'} {__version__} {__version__}",
            "[False, True, False, True]",
        ]
        assert (tmp_path / "site" / "bin" / "lightning-sap").is_file() or os.name == "nt"

    def test_holds_every_file_of_the_package_and_no_other(self, wheel):
        held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        package = (path for path in (ROOT / "lightning_sap").rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert held == {path.relative_to(ROOT).as_posix() for path in package}
        assert "lightning_sap/py.typed" in held

    @pytest.mark.full
    @pytest.mark.timeout(1500)
    def test_in_an_empty_environment_is_all_that_is_needed(self, wheel, tmp_path):
        run("-m", "venv", tmp_path / "empty", folder=tmp_path)
        python = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, timeout=1200, cwd=tmp_path)
        found = subprocess.run([python, "-c", LOOK], check=True, cwd=tmp_path, capture_output=True, text=True)
        assert found.stdout.splitlines()[1] == "[False, True, False, True]"
        subprocess.run([python.with_name("lightning-sap"), "--help"], check=True, capture_output=True)

    @pytest.mark.full
    def test_and_the_source_archive_pass_the_check_of_an_index(self, tmp_path):
        pytest.importorskip("twine")
        archives = build(tmp_path)
        assert [path.name for path in archives] == [
            f"lightning_sap-{__version__}-py3-none-any.whl", f"lightning_sap-{__version__}.tar.gz",
        ]  # fmt: skip
        run("-m", "twine", "check", "--strict", *archives, folder=tmp_path)


def test_the_readme_of_an_index_has_no_relative_link_and_every_link_of_ours_is_a_file():
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = module.readme(text("README.md"), "https://source", "1.2.3")
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", shown)
    ours = [link for link in map("".join, links) if link.startswith("https://source/")]
    assert len(ours) > 10
    assert all(link.startswith(("https://", "#")) for link in map("".join, links))
    for link in ours:
        kind, _, path = link.removeprefix("https://source/").partition("/v1.2.3/")
        assert kind == ("raw" if path.endswith((".png", ".svg")) else "blob")
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_version_and_date_are_those_of_the_latest_entry_of_the_changelog():
    version, day = re.findall(r"^## \[([\d.]+)\] - (.+)$", text("CHANGELOG.md"), re.MULTILINE)[0]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert version == __version__ == citation["version"]
    assert datetime.date.fromisoformat(day) == citation["date-released"]


def test_the_workflows_test_every_python_that_is_promised():
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    tests = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]
    assert tests["newest"]["strategy"]["matrix"]["python"] == promised
    assert tests["elsewhere"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_that_the_makefile_has_and_may_write_nothing_by_default(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", [])]
    called = {name for step in steps for name in re.findall(r"^make (\S+)", step.get("run", ""), re.MULTILINE)}
    assert called <= set(re.findall(r"^([a-z-]+):.*## ", text("Makefile"), re.MULTILINE))
    assert all("@" in step["uses"] for step in steps if "uses" in step)


def test_a_release_needs_the_tests_and_no_password():
    jobs = yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]
    assert jobs["publish"]["needs"] == ["tests", "build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text(".github/workflows/release.yml")


def test_the_addresses_stand_in_one_place():
    places = [ROOT / "README.md", *ROOT.glob("*.cff"), *ROOT.glob("*.md")]
    places += [path for folder in ("lightning_sap", "docs", ".github") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in places if path.suffix in {".md", ".cff", ".py", ".yml"} and "_build" not in path.parts]
    source = PROJECT["urls"]["Source"]
    assert [path.name for path in texts if f"{source}/" in path.read_text(encoding="utf-8")] == []


def test_advice_names_packages_that_are_declared_or_said_to_be_others():
    """Never this package by its name: an index may not have it, or have another of that name."""
    declared = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    known = {re.match(r"[\w.-]+", line)[0].lower() for line in declared} - {"lightning-sap"}
    known |= {"onnx", "onnxscript", "onnxruntime", "wandb", "optuna"}  # of the how-tos
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.*")]
    found = {}
    for path in [*pages, *(ROOT / "lightning_sap").rglob("*.py")]:
        for words in ADVICE.findall(path.read_text(encoding="utf-8")):
            names = (re.match(r"[\"']?([A-Za-z][\w-]*)", word) for word in words.split())  # no options, no folders
            found.update({name[1].lower(): path.name for name in names if name})
    assert {"matplotlib", "torch-pruning"} <= found.keys()
    assert {name: where for name, where in found.items() if name not in known} == {}
