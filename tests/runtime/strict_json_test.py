"""Strictly valid JSON, and that all JSON is written with it."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import binlatent
from binlatent.runtime.strict_json import not_finite, to_json, write_json


def strict(text):
    """Parses JSON strictly: NaN and infinities are errors."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_nan_and_infinities_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": [1.5, inf, (2, -inf)], "c": {"d": [{"e": nan}]}}
    content |= {"f": True, "g": "NaN"}
    expected = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": [{"e": None}]}}
    expected |= {"f": True, "g": "NaN"}
    write_json(tmp_path / "sub" / "x.json", content)
    for text in (to_json(content), (tmp_path / "sub" / "x.json").read_text()):
        assert strict(text) == expected
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x.json"]


def test_numpy_numbers_are_plain():
    content = {"a": np.float32(0.5), "b": np.int64(3), "c": np.array([[1.0, np.nan]])}
    text = to_json(content | {"d": np.True_, "e": np.float32("inf")})
    assert strict(text) == {"a": 0.5, "b": 3, "c": [[1.0, None]], "d": True, "e": None}


def test_keys_of_nan_and_infinities():
    nan, inf = float("nan"), float("inf")
    content = {"a": 1.0, "b": {"c": (0.0, (nan,)), "d": "nan"}, "e": -inf}
    assert list(not_finite(content)) == ["b.c", "e"]


def test_an_unserialisable_value_leaves_the_file_unchanged(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert (tmp_path / "x.json").read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# Functions that create JSON only to compare or hash it.
NOT_WRITTEN = {
    ("runtime/weights.py", "digest"),
    ("training/checkpoint.py", "_fingerprint_of_json"),
    ("paper/tables.py", "_of_samples"),
    ("paper/bottlenecks.py", "_check_budget"),
    ("benchmark/speed.py", "subject"),
    ("experiment/resume.py", "check_same_model"),
    ("data/codes.py", "write_codes"),
}


def test_no_other_module_writes_json():
    package, found = Path(binlatent.__file__).parent, set()
    for path in package.rglob("*.py"):
        for function in ast.parse(path.read_text()).body:
            for node in ast.walk(function):
                made = isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps")
                if made and getattr(node.value, "id", "") == "json":
                    found.add((path.relative_to(package).as_posix(), function.name))
    assert found - NOT_WRITTEN == {("runtime/strict_json.py", "to_json")}
