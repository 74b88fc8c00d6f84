"""What `residua serve` prints when it has started: the address, and new tokens once."""

import sys

from ..web.access_tokens import TOKEN_FILE
from .application import Service


def print_service_start(service: Service, address: str) -> None:
    """Print address, root and what is allowed to stderr; new tokens are shown this once."""
    settings, tokens = service.settings, service.tokens
    lines = [f"Serving {settings.root} at {address}"]
    if settings.private:
        lines.append("Reading and writing need a token.")
    if tokens.is_new:
        lines += [
            f"Token for writing: {tokens.write}",
            f"Token for reading: {tokens.read}",
            f"Shown this once, and kept in {settings.state / TOKEN_FILE}; clients take one from "
            "$RESIDUA_TOKEN.",
        ]
    if not settings.models and not settings.hub:
        lines.append("Jobs can fit and evaluate; to extract, name folders with --models.")
    lines.append("Ctrl-C stops.")
    print("\n".join(lines), file=sys.stderr, flush=True)
