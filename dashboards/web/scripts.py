"""Serves large scripts, compressed and with an ETag, so that a browser loads each only once.

Flask-Compress would compress them again for every request.
"""

import gzip
import hashlib
from collections.abc import Callable
from functools import cached_property

from flask import Response, request


class Script:
    """A script that is read and compressed once, at the first request."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    @cached_property
    def _by_encoding(self) -> dict[str, tuple[bytes, str]]:
        """The script and its ETag, plain and compressed. The same script has the same ETags."""
        plain = self._read()
        bodies = {"": plain, "gzip": gzip.compress(plain, mtime=0)}
        return {name: (body, hashlib.sha256(body).hexdigest()) for name, body in bodies.items()}

    def response(self) -> Response:
        encoding = "gzip" if request.accept_encodings.quality("gzip") else ""
        body, digest = self._by_encoding[encoding]
        response = Response(body, mimetype="text/javascript")
        if encoding:
            response.content_encoding = encoding
        response.headers.update({"Cache-Control": "max-age=86400", "Vary": "Accept-Encoding"})
        response.set_etag(digest)
        response.make_conditional(request)
        return response
