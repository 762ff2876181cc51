"""Serves large scripts, compressed and with an ETag, so that a browser loads each only once.

Flask-Compress would compress them again for every request.
"""

import gzip
from collections.abc import Callable
from functools import cached_property

from flask import Response, request


class Script:
    """A script that is read and compressed once, at the first request."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    @cached_property
    def _by_encoding(self) -> dict[str, bytes]:
        plain = self._read()
        return {"": plain, "gzip": gzip.compress(plain)}

    def response(self) -> Response:
        encoding = "gzip" if request.accept_encodings.quality("gzip") else ""
        response = Response(self._by_encoding[encoding], mimetype="text/javascript")
        if encoding:
            response.content_encoding = encoding
        response.headers.update({"Cache-Control": "max-age=86400", "Vary": "Accept-Encoding"})
        response.add_etag()
        response.make_conditional(request)
        return response
