"""Server-sent events out of bytes as they arrive, and whether one needs parsing.

A load generator shares its cores with the server it measures, so an event is read as JSON only when a look at its bytes
cannot say what it is. Knows nothing of HTTP, of time and of what events are for.
"""

_DONE = b"[DONE]"


class EventLines:
    """Cuts a stream of chunks into the payloads of its `data:` lines, wherever the chunks were cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads that `chunk` completed, [DONE] left out."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        return [payload for payload in payloads if payload != _DONE]


def is_plain_token(payload: bytes) -> bool:
    """True only for an event that has a choice and neither an error nor usage; False means: parse it.

    Inside a JSON string a quote is escaped, so these byte strings are keys and never a model's text.
    """
    if b'"choices":[{' not in payload and b'"choices": [{' not in payload:
        return False
    if b'"error"' in payload:
        return False
    return b'"usage":' not in payload or b'"usage":null' in payload or b'"usage": null' in payload
