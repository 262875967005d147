"""Paths from users: home folder and URLs."""

import pytest

from binlatent.runtime import paths
from binlatent.runtime.errors import UserError


def test_only_the_home_folder_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expand("~") == str(tmp_path)
    assert paths.expand("~/runs/x") == f"{tmp_path}/runs/x"
    for path in ("runs/x", "../x", "/a/b", "./~x", "a~", "a:b/c", "C:/x", "runs/a://b"):
        assert paths.expand(path) == path


@pytest.mark.parametrize(
    "path", ["gs://b/x", "gs:/b/x", "s3://b", "hdfs://h/x", "https://h/x", "file:///x"]
)
def test_urls_are_refused(path):
    with pytest.raises(UserError, match=f"^config.data.path: {path} is not a local path: "):
        paths.expand(path, "config.data.path")


def test_empty_paths_and_unknown_homes_are_refused():
    with pytest.raises(UserError, match="^the path is empty"):
        paths.expand("")
    with pytest.raises(UserError, match=r"no home folder ~nobody_there/x: write \./~nobody_there/"):
        paths.expand("~nobody_there/x")
