"""Clients of an S3 server in processes of their own, which a test may kill.

`clients.py create BUCKET BYTE` creates the object that each line of standard input names, out of
1000 times BYTE, and answers each with the status. `clients.py upload PATH` writes 12 MiB, says so,
and never closes the file. Both take the server from the environment (`Server.environment`).
"""

import sys
import time


def create(bucket: str, byte: str) -> None:
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
    import fsspec

    with fsspec.filesystem("s3").open(path, "wb", block_size=5 << 20) as file:
        file.write(bytes(12 << 20))
        print("written", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    {"create": create, "upload": upload}[sys.argv[1]](*sys.argv[2:])
