"""S3 servers of this machine: well behaved, one that refuses and stalls, one that lists late."""

import itertools
import threading
import time
from contextlib import contextmanager
from urllib.parse import parse_qs
from xml.etree.ElementTree import Element, SubElement, tostring

import boto3
from moto.moto_server.werkzeug_app import MotoRequestHandler
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

XML = [("content-type", "application/xml")]


def storage():
    """S3 as it should be, as a WSGI application."""
    return DomainDispatcherApplication(create_backend_app)


@contextmanager
def serving(application, monkeypatch):
    """Serve storage with an empty s3://bucket, at the address that all processes then find."""
    s3_backends.reset()  # all servers of this process share them
    S3FileSystem.clear_instance_cache()  # which would go to the server of another test
    server = make_server("127.0.0.1", 0, application, True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.shutdown()
    server.server_close()


class FlakyStorage:
    """S3 that refuses every ninth request, and lets every thirtieth wait."""

    def __init__(self) -> None:
        self._storage = storage()
        self._count = itertools.count(1)
        self.refused = self.stalled = 0

    def __call__(self, environ, start_response):
        number = next(self._count)
        if number % 9 == 0:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", XML)
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"]
        if number % 30 == 0:
            self.stalled += 1
            time.sleep(1)
        return self._storage(environ, start_response)


class LateStorage:
    """S3 whose listings are those of `late_s` seconds ago; all else is of this moment.

    A listing lacks what was written since, and has what was deleted since. Without `late_s` they
    are of the moment when `freeze` was called last. `wrong` counts the listings that lied.
    """

    def __init__(self, late_s: float | None = None) -> None:
        self._storage = storage()
        self._late_s, self.wrong = late_s, 0
        self._frozen: dict[str, int] = {}  # sizes of objects by key
        self._past: list[tuple[float, dict[str, int]]] = []
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        asked = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        if environ["REQUEST_METHOD"] == "GET" and "list-type" in asked:
            start_response("200 OK", XML)
            return [_listing(self._seen(), {name: value[0] for name, value in asked.items()})]
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._storage(environ, start_response)
        with self._lock:  # moto looks whether an object is there, and only then writes it
            answer = self._storage(environ, start_response)
            self._past.append((time.monotonic(), objects()))
        return answer

    def freeze(self) -> None:
        """Let all listings from now on show what is there now."""
        self._frozen = objects()

    def _seen(self) -> dict[str, int]:
        seen, there = self._frozen, objects()
        if self._late_s is not None:
            latest = time.monotonic() - self._late_s
            with self._lock:
                seen = next((keys for when, keys in reversed(self._past) if when <= latest), {})
        self.wrong += seen.keys() != there.keys()
        return seen


def objects() -> dict[str, int]:
    """What is in s3://bucket: sizes by key."""
    buckets = s3_backends["123456789012"]["aws"].buckets
    found = buckets["bucket"].keys.lists() if buckets else ()  # a copy: requests go on meanwhile
    return {name: versions[-1].size for name, versions in found if versions}


def _listing(seen: dict[str, int], asked: dict[str, str]) -> bytes:
    """An answer to ListObjectsV2, whole and on one page."""
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
    answer, folders = Element("ListBucketResult"), set()
    for name, size in sorted(seen.items()):
        if not name.startswith(prefix):
            continue
        head, cut, _ = name.removeprefix(prefix).partition(delimiter or "\0")
        if cut:
            folders.add(prefix + head + cut)
            continue
        entry = SubElement(answer, "Contents")
        facts = {"Key": name, "Size": size, "LastModified": "2026-01-01T00:00:00.000Z"}
        for fact, value in facts.items():
            SubElement(entry, fact).text = str(value)
    for name in sorted(folders):
        SubElement(SubElement(answer, "CommonPrefixes"), "Prefix").text = name
    SubElement(answer, "KeyCount").text = str(len(answer))
    SubElement(answer, "IsTruncated").text = "false"
    return tostring(answer)
