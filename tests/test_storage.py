"""Files and folders count whole or not at all, on a local disk and on a URL."""

import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from cluster.digests import digest_text
from cluster.errors import BadInputError, RunError
from cluster.publishing import (
    MARKER,
    discard_folder,
    fetch_folder,
    is_published,
    publish_folder,
    settle,
    staging_folder,
)
from cluster.storage import check_reachable, location, read_table, write_json, write_table


@pytest.fixture(params=["local", "memory"])
def target(request, tmp_path):
    if request.param == "local":
        return location(str(tmp_path / "target"))
    return location(f"memory://{uuid.uuid4().hex}/target")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "sub" / "b.txt").write_text("two")
    return folder


def test_a_published_folder_is_whole(source, target, tmp_path):
    assert not is_published(target)
    publish_folder(source, target)
    assert is_published(target)
    assert not source.exists()
    copy = fetch_folder(target, tmp_path / "cache")
    assert (copy / "a.txt").read_text() == "one"
    assert (copy / "sub" / "b.txt").read_text() == "two"


def test_without_its_marker_a_folder_does_not_count(source, target):
    publish_folder(source, target)
    (target / MARKER).unlink()
    assert not is_published(target)


def test_files_of_a_try_that_was_killed_do_not_stay(source, target):
    target.mkdir(parents=True, exist_ok=True)
    (target / "shard-2-of-2.txt").write_text("old")
    publish_folder(source, target)
    assert sorted(path.name for path in target.iterdir()) == [MARKER, "a.txt", "sub"]


@pytest.mark.fault
def test_a_damaged_download_is_refused(source, tmp_path):
    target = location(f"memory://{uuid.uuid4().hex}/target")
    publish_folder(source, target)
    (target / "a.txt").write_text("won")
    with pytest.raises(RunError, match=r"a.txt is damaged"):
        fetch_folder(target, tmp_path / "cache")


@pytest.mark.fault
def test_a_bucket_that_gives_back_other_bytes_is_not_believed(source, monkeypatch):
    target = location(f"memory://{uuid.uuid4().hex}/target")

    def garble(fs, ours, theirs):
        fs.pipe_file(theirs, Path(ours).read_bytes().upper())

    monkeypatch.setattr(type(target.fs), "put_file", garble)
    with pytest.raises(RunError, match=r"a.txt does not give back what was written"):
        publish_folder(source, target)
    assert not is_published(target)


def test_what_a_killed_process_has_not_published_makes_room(target):
    left = staging_folder(target)
    (left / "weights").write_text("half")
    other = staging_folder(target.with_name("other"))
    assert staging_folder(target).parent == left.parent
    assert not left.exists()
    assert other.exists(), "of another folder, which may be under way"


def test_a_discarded_folder_is_gone(source, target):
    publish_folder(source, target)
    discard_folder(target)
    assert not is_published(target)
    discard_folder(target)


def test_tables_survive(target):
    table = pa.table({"x": [1, 2]})
    write_table(table, target / "t.parquet")
    assert read_table(target / "t.parquet").equals(table)
    write_table(table, target / "u.parquet")
    assert read_table(target)["x"].to_pylist() == [1, 2, 1, 2]


def test_nothing_partial_is_left_beside_a_file(tmp_path):
    write_json(location(str(tmp_path / "x.json")), {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_digests_tell_lists_of_parts_apart():
    assert digest_text("ab", "c") != digest_text("a", "bc") != digest_text("abc")


def test_a_folder_that_another_process_finished_first_stays(tmp_path):
    target = tmp_path / "target"
    for text in ("first", "second"):
        partial = tmp_path / text
        partial.mkdir()
        (partial / "file").write_text(text)
        assert settle(partial, target) == target
        assert not partial.exists()
    assert (target / "file").read_text() == "first"


def test_a_bucket_is_listed_anew_each_time(bucket):
    seen = location(bucket) / "samples"
    write_json(seen / "a.json", 1)
    assert [path.name for path in seen.iterdir()] == ["a.json"]
    another_process = (
        "import sys; from cluster.storage import location, write_json;"
        "write_json(location(sys.argv[1]) / 'b.json', 2)"
    )
    subprocess.run([sys.executable, "-c", another_process, f"{bucket}/samples"], check=True)
    assert sorted(path.name for path in seen.iterdir()) == ["a.json", "b.json"]


def test_home_is_expanded():
    assert str(location("~/store")) == str(Path.home() / "store")


def test_a_bucket_without_credentials_is_named_with_its_option(bucket, monkeypatch):
    check_reachable("run.folder", location(f"{bucket}/run"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(BadInputError, match=r"run.folder=s3://bucket/run cannot be read .*credent"):
        check_reachable("run.folder", location(f"{bucket}/run"))


def test_a_file_url_is_a_path(tmp_path):
    assert location(f"file://{tmp_path}/run") == location(str(tmp_path / "run"))
