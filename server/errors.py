"""Every failure in the one shape that OpenAI's clients read.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from skippy.engine import EngineDead, InvalidRequest

logger = logging.getLogger(__name__)


CLIENT_CLOSED_REQUEST = 499
"""For the access log only: nobody is there to read it."""


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than success. Its `type` follows from the status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _type_of(status), param, code)
        self.headers = headers

    def encode(self) -> bytes:
        return msgspec.json.encode(ErrorEnvelope(self.body))

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, "application/json")


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


def _type_of(status: int) -> str:
    match status:
        case 429:
            return "rate_limit_error"
        case 503:
            return "service_unavailable_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"


def as_api_error(error: Exception) -> ApiError:
    """The answer to a failure. An unexpected one is logged and told without details."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param)
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case ValidationError():
            return _explain(error)
        case HTTPException():
            return ApiError(error.status_code, _explain_status(error), headers=error.headers)
        case _:
            logger.error("Unexpected failure.", exc_info=error)
            return ApiError(500, "The server failed unexpectedly; its log says more.", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of the app in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            where = f"{request.method} {request.url.path}"
            message = f"{_explain_status(error)}: {where}."
            if request.url.path.startswith("/v1/chat/"):
                message += " Skippy applies no chat template: send the text itself to /v1/completions."
            error = ApiError(error.status_code, message, headers=error.headers)
        return as_api_error(error).response()

    for kind in (ApiError, InvalidRequest, EngineDead, ValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer_unexpected(_request: Request, _error: Exception) -> Response:
    # The server logs this one itself, with its traceback.
    return ApiError(500, "The server failed unexpectedly; its log says more.", code="internal_error").response()


def _explain_status(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "There is nothing here"
        case 405:
            return "This path does not take this method"
        case _:
            return error.detail or HTTPStatus(error.status_code).phrase


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request body, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Only names of fields belong to OpenAI's notion of a param, neither list
    # positions nor the alternatives of a union.
    unknown = first["type"] == "extra_forbidden"  # and may be called anything
    path: list[str] = []
    for part in first["loc"]:
        if not isinstance(part, str) or not (unknown or part.isidentifier()):
            break
        path.append(part)
    param = ".".join(path) or None
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
        case "extra_forbidden":
            return ApiError(400, f"Unknown or unsupported field: {param}.", param=param, code="unknown_parameter")
        case "missing":
            return ApiError(400, f"Missing field: {param}.", param=param, code="missing_required_parameter")
        case "value_error":
            problem = str(first["ctx"]["error"])
        case _:
            problem = first["msg"]
    where = f"{param}: " if param else "The request body: "
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, f"{where}{problem[:1].lower()}{problem[1:]}.", param=param, code=code)
