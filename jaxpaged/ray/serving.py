"""`serve_app`: the front end and the replicas as one Ray Serve application."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any

import yaml
from starlette.types import Message

from jaxpaged.cli_serve import server_options
from jaxpaged.config import EngineConfig
from jaxpaged.ray.calls import Answer, Call, ReplicaGone, TooBusy
from jaxpaged.ray.front import Front
from jaxpaged.ray.needed import need
from jaxpaged.ray.replica import build_service, deployed_class
from jaxpaged.ray.sizes import Sizes
from jaxpaged.request import RequestError, refuse_unknown
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

DRAIN_SECONDS = 120.0  # that running requests get when a replica is to end, where the server's options do not say
CLOSE_SECONDS = 15.0  # for closing an engine
MANY_REQUESTS = 100_000  # that a front end has at once: it only waits for replicas
RAYS = ("host", "port", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers",
        "log_level", "log_format", "disable_uvicorn_access_log")  # fmt: skip  # options of what Ray Serve does here
KINDS = {"bool": (bool, "true or false"), "int": (int, "an integer"), "float": ((int, float), "a number"),
         "str": (str, "a text"), "tuple[str, ...]": (tuple, "a list of texts"), "dict[str, Any]": (dict, "an object"),
         "None": (type(None), "none")}  # fmt: skip  # type of a field -> what it takes
ROUTER = "jaxpaged.ray.router.PrefixRouter"


def serve_app(config: EngineConfig | Mapping[str, Any], server: ServerOptions | Mapping[str, Any] | None = None,
              **sizes: Any) -> Any:  # fmt: skip
    """A Ray Serve application, for `ray.serve.run(serve_app({"model": "demo"}, max_replicas=4))`.

    config: EngineConfig's fields, of each replica. server: ServerOptions' fields, but not RAYS.
    sizes: fields of `Sizes`. RequestError for what cannot be.
    """
    config = config if isinstance(config, EngineConfig) else EngineConfig(**config)
    options = server if isinstance(server, ServerOptions) else _options(server or {})
    for field in dataclasses.fields(ServerOptions):
        if field.name in RAYS and getattr(options, field.name) != field.default:
            raise RequestError(f"{field.name} is Ray Serve's to know: give it http_options, route_prefix or logging_config.",
                               field.name)  # fmt: skip
    return application(partial(build_service, config, options), config, options, Sizes(**sizes))


def app(args: Mapping[str, Any]) -> Any:
    """For `serve run jaxpaged.ray:app NAME=VALUE ...` and `import_path: jaxpaged.ray:app` in a Serve config: the fields of
    EngineConfig, ServerOptions and Sizes by name."""
    kinds = (EngineConfig, ServerOptions, Sizes)
    known = {f.name: f for kind in kinds for f in dataclasses.fields(kind)}
    refuse_unknown("jaxpaged.ray:app", dict(args), list(known))
    values = {name: _typed(known[name], value) for name, value in args.items()}
    engine, server, sizes = ({f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values} for kind in kinds)
    return serve_app(engine, server, **sizes)


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """Text from a command line as the field has it. RequestError for what the field cannot have."""
    kinds = str(field.type).split(" | ")
    if value == "none" and "None" in kinds:
        return None
    if isinstance(value, str) and kinds[0] != "str":
        value = _read(field, value)
    if isinstance(field.default, tuple) and value is not None:
        many = value if isinstance(value, (list, tuple)) else [value]
        value = tuple(one if isinstance(one, str) else json.dumps(one, default=str) for one in many)
    if not any(isinstance(value, KINDS[kind][0]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds):
        allowed = " or ".join(KINDS[kind][1] for kind in kinds)
        raise RequestError(f"{field.name} must be {allowed}, got {value!r}.", field.name)
    return value


def _read(field: dataclasses.Field, text: str) -> Any:
    """YAML. In a list of texts everything is a text: a key 0123 is no number."""
    try:
        return yaml.load(text, yaml.BaseLoader if isinstance(field.default, tuple) else yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise RequestError(f"{field.name} cannot be read as YAML, which is what it is on a command line: "
                           f"{getattr(error, 'problem', None) or error}, got {text!r}.", field.name) from None  # fmt: skip


def _options(given: Mapping[str, Any]) -> ServerOptions:
    refuse_unknown("the server", dict(given), [f.name for f in dataclasses.fields(ServerOptions)])
    return server_options({"shutdown_timeout": DRAIN_SECONDS, **given})


def application(open: Callable[[], Service], config: EngineConfig, options: ServerOptions, sizes: Sizes) -> Any:
    """The application, with services that `open` makes on each replica."""
    check_ray()
    serve = need("ray.serve")
    engines = serve.deployment(deployed_class()).options(**_engine_options(config, options, sizes)).bind(open)
    front = serve.deployment(_front_class()).options(
        name="Front", num_replicas=sizes.num_fronts, max_ongoing_requests=MANY_REQUESTS,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=options.shutdown_timeout + CLOSE_SECONDS,
    )  # fmt: skip
    return front.bind(engines, options.max_body_size, sizes.prefix_length, sizes.retries)


def _engine_options(config: EngineConfig, options: ServerOptions, sizes: Sizes) -> dict[str, Any]:
    settings = need("ray.serve.config")
    least = sizes.min_replicas
    return {
        "name": "Engine",
        "autoscaling_config": {
            "min_replicas": least, "max_replicas": sizes.max_replicas, "target_ongoing_requests": sizes.target(config),
            "initial_replicas": least if sizes.initial_replicas is None else sizes.initial_replicas,
            "upscale_delay_s": sizes.upscale_delay_s, "downscale_delay_s": sizes.downscale_delay_s,
        },
        "max_ongoing_requests": sizes.most(config),
        "max_queued_requests": sizes.max_queued_requests,
        "ray_actor_options": {"num_cpus": sizes.num_cpus, "num_gpus": num_gpus(config, sizes)},
        "health_check_period_s": sizes.health_check_period_s,
        "graceful_shutdown_timeout_s": options.shutdown_timeout + CLOSE_SECONDS,
        "request_router_config": settings.RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"spill": sizes.most_ahead(config)}
        ),
    }  # fmt: skip


def num_gpus(config: EngineConfig, sizes: Sizes) -> float:
    """GPUs of a replica."""
    if sizes.num_gpus is not None:
        return sizes.num_gpus
    ray = need("ray")
    if not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return 0
    return config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size


def _front_class() -> type:
    """`Front` as Ray Serve wants it."""
    serve = need("ray.serve")

    @serve.ingress()
    class Ingress:
        def __init__(self, engines: Any, *settings: Any):
            self.front = Front(HandleFleet(engines), *settings)

        def __serve_build_asgi_app__(self) -> Front:
            return self.front

    return Ingress


class HandleFleet:
    """A `Fleet` behind a handle of Ray Serve."""

    def __init__(self, handle: Any):
        self.handle = handle

    async def stream(self, key: str, call: Call) -> AsyncGenerator[list[Message], None]:
        pieces = self.handle.options(stream=True).stream.remote(key, call)
        try:
            async for messages in pieces:
                yield messages
        except Exception as error:
            raise _plain(error) from error
        finally:
            pieces.cancel()

    async def ask_all(self, call: Call) -> list[Answer]:
        """Of those that live."""
        answers = await self.handle.broadcast("ask", call).results_async(return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(_plain(answer), ReplicaGone):
                raise answer
        return [answer for answer in answers if isinstance(answer, Answer)]


def _plain(error: BaseException) -> BaseException:
    """What an error of Ray means for a request; any other as it is."""
    known, refused = need("ray.exceptions"), need("ray.serve.exceptions")
    if isinstance(error, refused.BackPressureError):
        return TooBusy("every replica is busy, and as many requests wait as may")
    if isinstance(error, refused.DeploymentUnavailableError):
        return TooBusy("there is no replica")
    if isinstance(error, known.RayError) and not isinstance(error, (known.RayTaskError, known.TaskCancelledError)):
        return ReplicaGone(f"a replica has gone ({type(error).__name__})")
    return error


def check_ray() -> None:
    """RequestError unless Ray Serve can be imported and is new enough."""
    serve = need("ray.serve")
    if not hasattr(serve.handle.DeploymentHandle, "broadcast"):
        raise RequestError('Ray Serve is too old: pip install -U "jaxpaged[ray]".', "ray")
