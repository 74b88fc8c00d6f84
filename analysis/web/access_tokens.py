"""Tokens of a service: made once, kept in a file that only its user can read."""

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...cache.errors import CorruptError, UsageError
from ...cache.files.confined_files import read_confined_json
from ...cache.files.json_files import make_folder, write_json

AccessScope = Literal["open", "read", "write"]
"""Who may use an endpoint: everybody, or the holder of a token that may read, or write."""
SCOPES = ("write", "read")
TOKEN_FILE = "tokens.json"
TOKEN_VARIABLE = "RESIDUA_TOKEN"
"""Environment variable with the token that clients send, and that a service may be given."""
MIN_TOKEN = 16
"""Fewest letters of a token."""
MAX_TOKEN = 256


@dataclass(frozen=True)
class AccessTokens:
    """The tokens of a service: `write` may all, `read` may read."""

    write: str
    read: str
    is_new: bool = False
    """Whether they were made just now, and nobody knows them yet."""

    def scope_of(self, token: str) -> str | None:
        """`write` or `read` for a token of this service, None for any other; in constant time."""
        given = token.encode(errors="replace")
        is_write = hmac.compare_digest(given, self.write.encode())
        is_read = hmac.compare_digest(given, self.read.encode())
        return "write" if is_write else "read" if is_read else None

    def session_of(self, scope: str) -> str:
        """The value of a browser's cookie for `scope`: it tells nothing about the token."""
        token = self.write if scope == "write" else self.read
        return hmac.new(token.encode(), f"session {scope}".encode(), hashlib.sha256).hexdigest()

    def scope_of_session(self, value: str) -> str | None:
        """`scope_of` for the value of a cookie."""
        given = value.encode(errors="replace")
        matches = {s: hmac.compare_digest(given, self.session_of(s).encode()) for s in SCOPES}
        return next((scope for scope, matched in matches.items() if matched), None)


def load_tokens(state: Path, renew: bool = False) -> AccessTokens:
    """The tokens kept under `state`, made if there are none or to `renew` them.

    $RESIDUA_TOKEN, if set, is the write token instead of the kept one. Raises `UsageError` for one
    that is too short, and for a file of tokens that others may read or that is another user's.
    """
    path = state / TOKEN_FILE
    is_new = renew or not os.path.lexists(path)
    if is_new:
        make_folder(state)
        tokens = {"write": secrets.token_urlsafe(32), "read": secrets.token_urlsafe(32)}
        mask = os.umask(0o077)
        try:
            write_json(path, tokens)
        finally:
            os.umask(mask)
        path.chmod(0o600)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise UsageError(
            f"{path} holds the tokens of the service, and others can read or write it: "
            f"`chmod 600 {path}` if it is yours, or remove it"
        )
    kept = read_confined_json(state, TOKEN_FILE)
    if not all(isinstance(kept.get(scope), str) and kept[scope] for scope in SCOPES):
        raise CorruptError(f"{path} holds no tokens; remove it, and new ones are made")
    if given := os.environ.get(TOKEN_VARIABLE):
        if not MIN_TOKEN <= len(given) <= MAX_TOKEN:
            raise UsageError(
                f"${TOKEN_VARIABLE} has {len(given)} letters; a token has {MIN_TOKEN} to "
                f"{MAX_TOKEN}, such as `openssl rand -hex 32` prints"
            )
        return AccessTokens(given, kept["read"])
    return AccessTokens(kept["write"], kept["read"], is_new)


def has_tokens(state: Path) -> bool:
    """Whether a token was chosen before: kept under `state`, or in $RESIDUA_TOKEN."""
    return bool(os.environ.get(TOKEN_VARIABLE)) or os.path.lexists(state / TOKEN_FILE)
