"""The house: which room imports which, what lies in one room alone, and how large files are."""

import ast
import collections
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "binlatent"

# Of each room, lowest first, what it may import beside itself: rooms, or a folder of one.
_LOWEST = ("runtime", "data", "training")
_NETWORKS = (*_LOWEST, "texts", "autoencoder", "priors")
_STAGES = (*_NETWORKS, "experiment", "pipeline")
ROOMS = {
    "runtime": ("configs",),  # by name, for --config
    "data": ("runtime",),
    "texts": ("runtime", "data"),
    "training": ("runtime", "data"),
    "autoencoder": _LOWEST,
    "priors": (*_LOWEST, "texts"),
    "experiment": (*_NETWORKS, "configs"),  # for keys that an old checkpoint lacks
    "pipeline": (*_NETWORKS, "experiment"),
    "benchmark": (*_STAGES, "configs"),
    "evaluation": _STAGES,
    "stages": (*_STAGES, "evaluation"),
    "convert": (*_STAGES, "stages", "evaluation.networks", "configs"),
    "paper": (*_STAGES, "stages", "evaluation", "benchmark", "configs"),
    "main": (*_STAGES, "stages", "evaluation", "paper"),
    "__init__": ("runtime", "pipeline"),  # the latter on first use: tests/install_test.py
    "__main__": ("runtime", "main"),
}

# What runs on several devices lies in runtime/, but for these.
DEVICES = {"AXIS", "pmap", "pmean", "psum", "pmax", "axis_index", "axis_size", "device_put"}
ELSEWHERE = {
    # Batch norm takes the axis as a field, as Flax's own, and None for one device.
    "autoencoder/discriminator.py": {"axis_size"},
    # Who builds a network with batch norm names that axis.
    "autoencoder/spec.py": {"AXIS"},
    "evaluation/cas.py": {"AXIS"},
}

# Who reads a config, or defines the flag --config. All others take typed fields.
CONFIG_READERS = {
    "experiment/__init__.py",
    "main.py",
    "benchmark/__main__.py",
    "runtime/command.py",
}

# Names in two rooms for the same idea.
SAME_IDEA = {
    **dict.fromkeys(("main", "parse_flags", "run"), "of a command, or of a mode of one"),
    **dict.fromkeys(("Noise", "draw_noise", "update", "train_step"), "of each stage's step"),
    "to_float": "uint8 to [-1, 1], in NumPy and on the device",
    "write_codes": "of any encoder, and of a workdir's",
}


def parsed():
    """Yields each file's path in the package, its room, and its tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] != "configs":  # which a wheel has there
            yield name.as_posix(), name.parts[0].removesuffix(".py"), ast.parse(path.read_text())


FILES = list(parsed())


def imports(tree):
    """Yields the line and the whole name of everything that is imported, wherever in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_room_is_in_the_table():
    assert {room for _, room, _ in FILES} == set(ROOMS)


def test_imports_go_one_way():
    wrong = []
    for path, room, tree in FILES:
        for line, name in imports(tree):
            top, _, inside = name.partition(".")
            allowed = (room, *ROOMS[room])
            if not top or (
                top == "binlatent" and not any(f"{inside}.".startswith(f"{x}.") for x in allowed)
            ):
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_way_round():
    # Each room stands on those before it.
    order = ["configs", *ROOMS]
    for room, allowed in ROOMS.items():
        below = order[: order.index(room)]
        assert {name.split(".")[0] for name in allowed} <= set(below), room


def test_there_are_at_most_14_rooms():
    beside = {"__init__.py", "__main__.py", "__pycache__", "configs", "py.typed"}
    assert len({path.name for path in PACKAGE.iterdir()} - beside) <= 14


@pytest.mark.parametrize("path", [path for path, _, _ in FILES])
def test_no_file_is_longer_than_400_lines(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= 400


def test_devices_are_the_business_of_one_room():
    found = collections.defaultdict(set)
    for path, room, tree in FILES:
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            if room != "runtime" and name in DEVICES:
                found[path].add(name)
    assert found == ELSEWHERE


def test_configs_are_read_in_few_places():
    found = {
        path
        for path, _, tree in FILES
        if any(name.split(".")[0] == "ml_collections" for _, name in imports(tree))
    }
    assert found == CONFIG_READERS


def test_no_two_rooms_have_one_name_for_two_ideas():
    places = collections.defaultdict(dict)
    for path, room, tree in FILES:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name][room] = path
    shared = {name: sorted(rooms.values()) for name, rooms in places.items() if len(rooms) > 1}
    wrong = {name: paths for name, paths in shared.items() if name not in SAME_IDEA}
    assert not wrong, wrong
    assert SAME_IDEA.keys() <= shared.keys()  # and nothing is allowed that is not there
