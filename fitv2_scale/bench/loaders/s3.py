"""S3 for the loaders without a client of their own: a botocore client per process, created after a fork."""

import os
from functools import lru_cache
from typing import BinaryIO


def get(url: str) -> BinaryIO:
    """The body of an object as a stream."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = _client(os.getpid())  # botocore gives it the methods of its service at run time
    return client.get_object(Bucket=bucket, Key=key)["Body"]  # pyrefly: ignore[missing-attribute]


def list_urls(folder: str, ending: str) -> list[str]:
    """All objects below ``folder`` whose names end with ``ending``, sorted."""
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    pages = _client(os.getpid()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return sorted(f"s3://{bucket}/{key}" for key in keys if key.endswith(ending))


@lru_cache(maxsize=1)
def _client(pid: int):
    import botocore.session

    return botocore.session.get_session().create_client("s3")
