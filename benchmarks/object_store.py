"""What commands ask of an object store: requests per shard by kind.

    python benchmarks/object_store.py [--quick] [--json]

The store is moto's server in this process, behind a counter. Requests per shard are the difference between many shards
and few, divided by the shards between them; what a command asks once, whatever the number, is in the column "once".
PUT and LIST are what storages charge most for; DELETE is free at most of them.

    annotate            shards and store at URLs, an empty spool
    annotate again      all parts there; their footers are read, or known from log/footers.parquet
    inspect, verify     the store alone; verify with the shards at hand, an empty spool
    train, an epoch     one epoch from the cached labels, an empty spool
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made
import setup
import torch

from pseudolabel.annotate import annotate
from pseudolabel.demo import pack_bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels import footers
from pseudolabel.labels.store import open_store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.labels.verify import verify
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.storage import RemotePath
from pseudolabel.train import train

KINDS = ("HEAD", "GET", "LIST", "PUT", "DELETE")


class Counted:
    """A WSGI application that counts what it is asked for."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.requests: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        listing = environ["REQUEST_METHOD"] == "GET" and "list-type" in environ.get("QUERY_STRING", "")
        self.requests["LIST" if listing else environ["REQUEST_METHOD"]] += 1
        return self._application(environ, start_response)


@contextmanager
def server() -> Iterator[Counted]:
    """moto's server on a free port, and this process's environment pointing to it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    counted = Counted(DomainDispatcherApplication(create_backend_app))

    class Silent(MotoRequestHandler):  # type: ignore[misc]
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            pass

    made = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Silent)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{made.server_port}"
    try:
        yield counted
    finally:
        made.shutdown()


def commands(url: str, labeled: str, teacher: str, count: int) -> dict[str, Callable[[], Any]]:
    """What to count, in this order, on `count` shards."""
    shards, out, engine = f"{url}/shard-{{0..{count - 1}}}.tar", f"{url}/store-{count}", LocalEngine("cpu", 1)
    student = TrainSettings(student="small:resnet8?width=4", image_size=28, channels=1, batch_size=64, epochs=1)
    return {
        "annotate": lambda: annotate(shards, teacher, out, engine=engine),
        "annotate again": lambda: annotate(shards, teacher, out, engine=engine),
        "annotate again, known footers": lambda: annotate(shards, teacher, out, engine=engine),
        "inspect": lambda: summarize_store(open_store(out)),
        "verify": lambda: verify(open_store(out)),
        "verify, with shards": lambda: verify(open_store(out), list_shards(shards)),
        "train, an epoch": lambda: train(student, f"{url}/run-{count}", unlabeled=shards, store=out, labeled=labeled),
    }


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    footers.WORTH_IT = 1  # footers are kept otherwise only when there are a hundred new ones
    few, many = (10, 20) if arguments.quick else (10, 90)
    report = setup.Report("requests", {"shards": f"{few} and {many}"})
    with tempfile.TemporaryDirectory() as scratch, server() as counted:
        directory = Path(scratch)
        os.environ["PSEUDOLABEL_SPOOL"] = str(directory / "spool")
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        pack_bundled(directory / "data")
        images = made.garments(list_shards(directory / "data" / "unlabeled")[0])
        teacher = made.bundled_teacher(directory)
        made.write_shards(directory / "corpus", images, rows=50, count=1)
        (whole,) = (directory / "corpus").glob("*.tar")
        for number in range(many):
            RemotePath(f"s3://bucket/c/shard-{number}.tar").put(whole)
        (labeled,) = list_shards(directory / "data" / "labeled")[:1]
        found: dict[str, dict[int, Counter[str]]] = {}
        for count in (few, many):
            for name, command in commands("s3://bucket/c", labeled.path, teacher, count).items():
                if not name.startswith("annotate again"):
                    shutil.rmtree(directory / "spool", ignore_errors=True)
                before = counted.requests.copy()
                command()
                found.setdefault(name, {})[count] = counted.requests - before
        for name, by_count in found.items():
            each = {kind: (by_count[many][kind] - by_count[few][kind]) / (many - few) for kind in KINDS}
            once = sum(by_count[few].values()) - few * sum(each.values())
            report.rows.append({"command": name, **each, "once": once})
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
