"""Tests of the package as it is imported from a checkout, and as a wheel installs it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'VERSION = "(.+)"', (ROOT / "binlatent/runtime/version.py").read_text())[1]

# Of a user, outside of any checkout.
OWN_CONFIG = """
from binlatent.configs import default

def get_config():
    config = default.get_config()
    config.data.name = "digits"
    return config
"""


def run_python(folder, *arguments, path=None):
    """Returns what Python prints in a folder, with the modules in `path`, if given."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_checkout(folder):
    for name in ("binlatent", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built in a copy: setuptools leaves files where it builds."""
    for name in ("setuptools", "wheel"):
        pytest.importorskip(name)
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    copy_checkout(checkout)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run_python(checkout, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), ".")
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an unpacked wheel."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_importing_binlatent_loads_neither_jax_nor_tensorflow():
    code = "import sys, binlatent; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = run_python(ROOT, "-c", code)
    assert "'binlatent'" in loaded
    for name in ("jax", "flax", "numpy", "tensorflow"):
        assert f"'{name}'" not in loaded


def test_the_pipeline_is_an_attribute_of_the_package():
    import binlatent
    from binlatent import BinaryLatentDiffusion
    from binlatent.pipeline import BinaryLatentDiffusion as the_same

    assert BinaryLatentDiffusion is the_same
    assert "BinaryLatentDiffusion" in dir(binlatent)
    with pytest.raises(AttributeError, match="no attribute 'BinaryLatent'"):
        binlatent.BinaryLatent  # noqa: B018


def test_a_wheel_holds_the_package_its_configs_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = f"binlatent-{VERSION}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "binlatent").rglob("*.py")}
    configs = {f"binlatent/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    data = {f"binlatent/autoencoder/lpips_linear.{end}" for end in ("npz", "LICENSE")}
    assert names == modules | configs | data
    assert "binlatent = binlatent.__main__:run" in entry_points
    assert "Requires-Dist: orbax-checkpoint<1\n" in metadata
    needed = re.findall(r"^Requires-Dist: (tensor\w+)$", metadata, re.MULTILINE)
    assert not needed, "of the extra tfds alone"


def test_an_installed_package_runs_outside_of_a_checkout(installed, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_CONFIG)
    code = "import mine, binlatent.configs as c; print(mine.get_config().data.name, c.__file__)"
    expected = f"digits {installed}/binlatent/configs/__init__.py\n"
    assert run_python(tmp_path, "-c", code, path=installed) == expected
    version = run_python(tmp_path, "-m", "binlatent", "--version", path=installed)
    assert version == f"binlatent {VERSION}\n"


def test_a_checkout_takes_its_own_configs_whatever_is_installed(installed, tmp_path):
    copy_checkout(tmp_path)
    code = "import binlatent.configs as c; print(c.__file__)"
    assert run_python(tmp_path, "-c", code, path=installed) == f"{tmp_path}/configs/__init__.py\n"
