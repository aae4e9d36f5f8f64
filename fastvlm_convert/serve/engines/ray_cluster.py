"""Ray itself, and a bundle's deployment on it. What is here blocks: call it in a thread."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from fastvlm_convert.errors import MissingDependencyError, UsageError, WorkerError
from fastvlm_convert.serve.engine import WorkerState
from fastvlm_convert.serve.engines.ray_replica import Asked, Ended, MakeEngine, Message, Replica

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

_STATES: Final[dict[str, WorkerState]] = {
    "RUNNING": "ready",
    "STOPPING": "stopping",
    "RECOVERING": "restarting",
}  # Ray's; the others are ways of starting
_RESTART_S: Final = 10.0  # about what Ray needs to notice a death and to start another replica
_LOCK: Final = threading.Lock()  # engines start in threads of their own, and a process has one Ray


@dataclass
class _Process:
    """What this process has to do with Ray.

    Attributes:
        has_joined: Whether it started or joined Ray here, rather than its host before.
        applications: What it has deployed.
    """

    has_joined: bool = False
    applications: set[str] = field(default_factory=set)


_process: Final = _Process()


@dataclass(frozen=True)
class RaySettings:
    """How a bundle is deployed.

    Attributes:
        name: Of the bundle; also of Ray's application.
        slots: Questions that a replica runs at once (`max_ongoing_requests`).
        cpus: Processors that Ray sets aside for a replica (`num_cpus`).
        min_replicas: Fewest replicas.
        max_replicas: Most replicas; Ray decides how many there are.
        max_queue: Questions that wait in Ray's router (`max_queued_requests`); at least 1.
        deployment: Ray's name for it.
    """

    name: str
    slots: int = 2
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 1
    max_queue: int = 64
    deployment: str = "bundle"

    def __post_init__(self) -> None:
        """Refuse what Ray refuses.

        Raises:
            UsageError: The queue holds nothing.
        """
        if self.max_queue < 1:
            raise UsageError(
                f"the queue holds {self.max_queue} requests, and Ray's holds at least 1",
                where="FAST_VLM_MAX_QUEUE",
                hint="set it to 1, or choose another engine",
            )

    def options(self) -> dict[str, Any]:
        """Options of the deployment, by Ray's names."""
        replicas: dict[str, Any] = {"num_replicas": self.min_replicas}
        if self.min_replicas < self.max_replicas:
            bounds = {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.slots,
            }
            replicas = {"autoscaling_config": bounds}
        return {
            **replicas,
            "name": self.deployment,
            "max_ongoing_requests": self.slots,
            "max_queued_requests": self.max_queue,
            "ray_actor_options": {"num_cpus": self.cpus},
            "user_config": {},  # so that `reconfigure` is called before a replica gets questions
            "graceful_shutdown_timeout_s": 5.0,  # what runs at the end was cancelled before
        }


class Stream(Protocol):
    """The messages of a replica about one question."""

    def __aiter__(self) -> AsyncIterator[Message]: ...

    async def __anext__(self) -> Message: ...

    def cancel(self) -> None:
        """End the question, wherever it is."""
        ...


class Deployed:
    """A bundle's deployment.

    Args:
        handle: Ray's way to it.
        load_s: Seconds that a replica takes to start.
        is_ours: Whether this process deployed it, and takes it down.
    """

    def __init__(self, handle: "DeploymentHandle", load_s: float, is_ours: bool) -> None:
        self.load_s = load_s
        self._handle = handle
        self._is_ours = is_ours

    def describe(self) -> Ended:
        """How one of the replicas is."""
        described: Ended = self._handle.describe.remote().result()
        return described

    def answer(self, asked: Asked) -> Stream:
        """Ask a question; this one does not block."""
        stream: Stream = self._handle.options(stream=True).answer.remote(asked)
        return stream

    def states(self) -> Counter[WorkerState]:
        """Replicas by state."""
        from ray import serve

        found: Counter[WorkerState] = Counter()
        application = serve.status().applications.get(self._handle.app_name)
        if application is not None:
            for state, count in application.deployments[self._handle.deployment_name].replica_states.items():
                found[_STATES.get(str(getattr(state, "value", state)), "starting")] += count
        return found

    def take_down(self) -> None:
        """Take the application down, and leave or end Ray with the last one."""
        import ray
        from ray import serve

        if not self._is_ours:
            return
        with _LOCK:
            serve.delete(self._handle.app_name)
            _process.applications.discard(self._handle.app_name)
            if _process.has_joined and not _process.applications:
                ray.shutdown()
                _process.has_joined = False


def deploy(make_engine: MakeEngine, settings: RaySettings) -> Deployed:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names, and run a bundle there.

    Args:
        make_engine: Makes a replica's engine.
        settings: How the bundle is deployed.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: The cluster has too few processors for the fewest replicas.
        WorkerError: No replica could load the bundle.
    """
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "`serve` with the engine ray") from error

    with _LOCK:
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
            logging.getLogger("ray").setLevel(logging.ERROR)
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
            _process.has_joined = True
        _see_that_they_fit(settings, float(ray.cluster_resources().get("CPU", 0)))
        serve.start(proxy_location="Disabled")  # no port but ours, which has keys and limits
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of each request that is refused
        began = time.monotonic()
        try:
            handle = serve.run(bound(make_engine, settings), name=settings.name, route_prefix=None)
        except RuntimeError as error:
            reason = _reason(settings.name) or str(error)
            with suppress(RuntimeError):
                serve.delete(settings.name)
            raise WorkerError(
                f"Ray cannot start '{settings.name}': {reason}",
                hint="`ray status` and the logs below /tmp/ray tell more; --engine embedded does without Ray",
            ) from error
        _process.applications.add(settings.name)
        return Deployed(handle, time.monotonic() - began, is_ours=True)


def joined(application: str, deployment: str) -> Deployed:
    """A deployment that Ray itself runs beside this process.

    Args:
        application: Ray's name for the application of both.
        deployment: Ray's name for the deployment.
    """
    from ray import serve

    return Deployed(serve.get_deployment_handle(deployment, application), _RESTART_S, is_ours=False)


def bound(make_engine: MakeEngine, settings: RaySettings) -> "Application":
    """The deployment of a bundle, ready to run; it needs Ray, but not that Ray runs."""
    from ray import serve

    application: Application = serve.deployment(Replica).options(**settings.options()).bind(make_engine)
    return application


def _see_that_they_fit(settings: RaySettings, cpus: float) -> None:
    """Otherwise Ray would wait for further machines, without end."""
    needed = settings.min_replicas * settings.cpus
    if needed > cpus:
        raise UsageError(
            f"{settings.min_replicas} workers of {settings.cpus:g} processors each need {needed:g}, "
            f"and Ray's cluster has {cpus:g}",
            where="FAST_VLM_MIN_WORKERS",
            hint="lower it, FAST_VLM_SLOTS or FAST_VLM_THREADS, or join a larger cluster with RAY_ADDRESS",
        )


def _reason(application: str) -> str:
    """What Ray says about an application that does not start: the error itself, without the way to it."""
    from ray import serve

    status = serve.status().applications.get(application)
    deployments = [] if status is None else status.deployments.values()
    lines = [line.strip() for each in deployments for line in each.message.splitlines()]
    return next((line for line in reversed(lines) if "Error: " in line), "")
