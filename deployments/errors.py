"""Every error that Relight raises on purpose, and what each becomes over HTTP.

RelightError
├── ConfigError                  fleet file or command line is wrong (no HTTP: raised before serving)
├── RequestError                 the client's fault
│   ├── InvalidRequest           400  malformed JSON, wrong type, missing `model`
│   ├── ModelNotFound            404  no such model or alias in the fleet
│   ├── MethodNotAllowed         405
│   ├── BodyStalled              408
│   ├── BodyTooLarge             413
│   └── UnsupportedMediaType     415
├── QueueFull                    429  the model's queue is at its bound; carries `retry_after_s`
├── DeadlineExceeded             504  held until the deadline; says what was being waited for
├── EngineStartFailed            503  the engine can't start; carries the engine's own reason
├── EngineUnreachable            502  no engine began to answer, after every retry
├── EngineInterrupted            502  the engine died after its first byte
├── GatewayClosing               503  the gateway ends, as in a redeploy, and its time to finish is over
└── ControllerUnavailable        503  the controller, which the control API asks, does not answer
"""

from __future__ import annotations


class RelightError(Exception):
    """Base of all. `status` is the HTTP status, `type` and `code` are OpenAI's error fields."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ConfigError(RelightError):
    """A fleet file or an option is wrong. The message names the path, the value and what would be right."""


class RequestError(RelightError):
    """The client's request can't be served as it is."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """Malformed JSON, a wrong type, or no model named."""


class ModelNotFound(RequestError):
    """No model or alias of that name in the fleet."""

    status = 404
    code = "model_not_found"


class NotFound(RequestError):
    """No such route."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class BodyStalled(RequestError):
    """The rest of the body did not come; however slowly it does, it is waited for."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    """The body is larger than the gateway's bound."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    """The content type is not one that the route takes."""

    status = 415
    code = "unsupported_media_type"


class QueueFull(RelightError):
    """The model's queue is at its bound; `retry_after_s` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class DeadlineExceeded(RelightError):
    """The request was held until its deadline; the message says what it waited for."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineStartFailed(RelightError):
    """The engine of this model can't start; the message is the engine's own reason."""

    status = 503
    code = "engine_start_failed"


class EngineUnreachable(RelightError):
    """No engine began to answer, after every retry that the deadline allowed."""

    status = 502
    code = "engine_unreachable"


class EngineInterrupted(RelightError):
    """The engine died after its first byte, so the request can't be retried."""

    status = 502
    code = "engine_interrupted"


class GatewayClosing(RelightError):
    """The gateway that held the request ends before it was answered; the next one takes it."""

    status = 503
    code = "gateway_closing"


class ControllerUnavailable(RelightError):
    """The controller does not answer now; models are served all the same."""

    status = 503
    code = "controller_unavailable"
