"""Errors as clients know them. OpenAI's: {"error": {"message", "type", "param", "code"}}, where code is the HTTP status;
Anthropic's: {"type": "error", "error": {"type", "message"}}."""

from __future__ import annotations

from typing import Any

from jaxpaged.request import RequestError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    415: "BadRequestError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    499: "ClientClosedRequest",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC_PATH = "/v1/messages"
RETRY_AFTER = 1  # seconds, with every 503
MAX_PARAM = 200  # characters of a field's path
MAX_MESSAGE = 1000  # characters: what was given may be a whole body


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": _short(message), "type": kind, "param": param and param[:MAX_PARAM], "code": status}}


def anthropic_error_body(message: str, status: int) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": _short(message)}}


def _short(message: str) -> str:
    """Without its middle, if it is long: what was wrong stands at one end, what to do at the other."""
    half = MAX_MESSAGE // 2
    return message if len(message) <= MAX_MESSAGE else f"{message[:half]} [...] {message[-half:]}"


def body_of(error: RequestError, path: str = "") -> dict[str, Any]:
    """The body of an error, in the shape of the API that `path` belongs to."""
    if path.startswith(ANTHROPIC_PATH):
        return anthropic_error_body(error.message, error.status)
    return error_body(error.message, error.status, error.param)


def failed_request(error: str) -> RequestError:
    """A request that the engine ended with an error: its step failed, or its logits are not numbers."""
    return RequestError(f"the request failed in the engine: {error}", status=500)
