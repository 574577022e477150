"""``sd_runtime.serve.ray:app``: the doors of ``sd-serve`` as an application of Ray Serve.

Ray starts and ends the replicas, spreads the requests and scales; each replica has all bundles
open, and its own engine room.

    serve run sd_runtime.serve.ray:app bundle=/srv/sd14.bundle max_replicas=4
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sd_engines.errors import ConfigError
from sd_engines.spec import Precision
from sd_runtime.engine_room import EngineRoom
from sd_runtime.serve.api_key import load_api_key
from sd_runtime.serve.app import make_app
from sd_runtime.serve.metrics import Metrics
from sd_runtime.serve.models import Models, check_bundles

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OTHER_REQUESTS = 16
"""How many health checks and the like a replica takes beside its queue."""
SHUTDOWN_S = 120
"""What a replica may take to draw what it had accepted."""


class ReplicaSettings(BaseModel):
    """The arguments of `app`: those of ``sd-serve``, and what a replica takes of the cluster.

    ``bundle`` is one or a list. It, ``loras`` and ``api_key_file`` lie where every machine sees
    them. ``threads`` None: as many as ``num_cpus``.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: tuple[Path, ...] = Field(min_length=1)
    backend: str = "auto"
    precision: Precision | None = None
    threads: int | None = Field(None, ge=1)
    loras: tuple[str, ...] = ()
    queue_size: int = Field(16, ge=1)
    max_images: int = Field(10, ge=1)
    max_steps: int = Field(150, ge=1)
    api_key_file: Path | None = None
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_cpus: int = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)

    @field_validator("bundle", mode="before")
    @classmethod
    def take_one(cls, value: Any) -> Any:
        """One bundle is a list of one."""
        return (value,) if isinstance(value, str | Path) else value


def app(arguments: dict[str, Any]) -> Any:
    """Build the application, of one deployment called ``sd-serve``; Ray calls this.

    A Serve config file may override anything that is said of the deployment here. Raises
    `ConfigError` for an unknown or bad argument, `BundleError` where there is no bundle.
    """
    try:
        settings = ReplicaSettings.model_validate(arguments)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"argument {'.'.join(map(str, wrong['loc']))!r}: {wrong['msg']}",
            f"They are {', '.join(ReplicaSettings.model_fields)}.",
        ) from error
    if settings.min_replicas > settings.max_replicas:
        raise ConfigError(
            f"min_replicas is {settings.min_replicas}, max_replicas {settings.max_replicas}",
            "Give both, the greater as max_replicas.",
        )
    check_bundles(settings.bundle, loras=settings.loras)
    load_api_key(settings.api_key_file)
    from ray import serve

    def replica_app() -> ASGIApp:
        return Replica(settings)

    deployment = serve.deployment(
        serve.ingress(replica_app)(),
        name="sd-serve",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
        },
        # More than fit into the queue, so that it is the room that refuses: 429, with a hint.
        max_ongoing_requests=settings.queue_size + OTHER_REQUESTS,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    return deployment.bind()


class Replica:
    """One replica's ASGI application, with the engines behind it."""

    def __init__(self, settings: ReplicaSettings) -> None:
        metrics = Metrics()
        self._models = Models.load(
            settings.bundle,
            backend=settings.backend,
            precision=settings.precision,
            threads=settings.threads or settings.num_cpus or None,
            loras=settings.loras,
            max_images=settings.max_images,
            max_steps=settings.max_steps,
        )
        self._room = EngineRoom(
            self._models.default.pipeline,
            queue_size=settings.queue_size,
            on_drawn=metrics.count_batch,
        )
        metrics.watch(self._room)
        key = load_api_key(settings.api_key_file)
        self._app = make_app(self._room, self._models, metrics=metrics, api_key=key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, below whatever ``route_prefix`` the application has; or end."""
        if scope["type"] != "lifespan":
            prefix = scope.get("root_path", "")
            path = scope["path"].removeprefix(prefix) or "/"
            await self._app({**scope, "path": path, "root_path": ""}, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._room.close()  # Ray has waited for what was being answered
        self._models.close()
        await send({"type": "lifespan.shutdown.complete"})
