"""Clients of an S3 server as processes that tests may kill.

`clients.py create BUCKET BYTE` reads object names from standard input, creates each object (1000
times BYTE) unless it exists, and prints the HTTP status. `clients.py upload PATH` writes 12 MiB,
prints `written`, and never closes the file. The server is given by the environment
(`Server.environment`).
"""

import sys
import time


def create(bucket: str, byte: str) -> None:
    """Create the objects named on standard input; print a status per object."""
    import botocore.session
    from botocore.exceptions import ClientError

    client = botocore.session.Session().create_client("s3")
    for line in sys.stdin:
        try:
            client.put_object(
                Bucket=bucket, Key=line.strip(), Body=byte.encode() * 1000, IfNoneMatch="*"
            )
            status = 200
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        print(status, flush=True)


def upload(path: str) -> None:
    """Begin an upload that never ends."""
    import fsspec

    with fsspec.filesystem("s3").open(path, "wb", block_size=5 << 20) as file:
        file.write(bytes(12 << 20))
        print("written", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    {"create": create, "upload": upload}[sys.argv[1]](*sys.argv[2:])
