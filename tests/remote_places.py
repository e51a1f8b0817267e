"""What tests are told of a bucket on a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """`url` is s3://NAME, `kind` the server's, `endpoint` where it listens; `environment` lets a command find it."""

    url: str
    kind: str
    endpoint: str
    environment: dict[str, str]
