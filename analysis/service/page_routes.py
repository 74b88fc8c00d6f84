"""The dashboard's page and its files over HTTP."""

from starlette.requests import Request
from starlette.responses import Response

from ...cache.errors import NotFoundError
from ..dashboard.static_files import StaticFile, read_static_files
from ..web.endpoints import Answer, Endpoint, Parameter, parameters_of

FILE_NAME = Parameter(
    "path",
    "path",
    {"type": "string", "pattern": r"^[A-Za-z0-9_./-]{1,200}$"},
    "Name of a file of the page, such as `app.js`",
)


def list_endpoints() -> tuple[Endpoint, ...]:
    """The endpoints of this file."""
    return (
        Endpoint(
            "GET",
            "/",
            answer_page,
            "The dashboard",
            "open",
            "dashboard",
            answers={
                200: Answer("The page", media="text/html"),
                304: Answer("Not changed", media=""),
            },
        ),
        Endpoint(
            "GET",
            "/static/{path:path}",
            answer_file,
            "A file of the dashboard",
            "open",
            "dashboard",
            parameters=(FILE_NAME,),
            answers={
                200: Answer("The file", media="*/*"),
                304: Answer("Not changed", media=""),
            },
        ),
    )


async def answer_page(request: Request) -> Response:
    """`index.html`."""
    return _respond(request, read_static_files()["index.html"])


async def answer_file(request: Request) -> Response:
    """A file of the page by its name."""
    name = parameters_of(request)["path"]
    file = read_static_files().get(name)
    if file is None:
        raise NotFoundError(f"the dashboard has no file {name[:100]!r}")
    return _respond(request, file)


def _respond(request: Request, file: StaticFile) -> Response:
    """The file, or 304 where the browser has it: another version of residua has other files."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = [
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("if-none-match", "").split(",")
    ]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
