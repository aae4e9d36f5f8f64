"""The server as an application of Ray Serve, for RayService: Ray starts it, and routes HTTP to it.

    import_path: fastvlm_convert.serve.ray_app:application
    args: {bundles: [NAME=FOLDER], weights: [NAME=WEIGHT]}

The web server is one deployment, each bundle another. All settings come from the environment, as ever.
"""

from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from fastvlm_convert.serve.app import make_app
from fastvlm_convert.serve.engine import Engine
from fastvlm_convert.serve.engines.ray import RayEngine, ray_deployment
from fastvlm_convert.serve.engines.ray_cluster import bound, joined
from fastvlm_convert.serve.escalation import make_escalation
from fastvlm_convert.serve.router import make_router, parse_bundle, parse_weights
from fastvlm_convert.serve.served_bundle import ServedBundle, open_served_bundle
from fastvlm_convert.serve.service import make_service
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.settings_sources import load_settings

if TYPE_CHECKING:
    from ray.serve import Application

_REQUESTS = 10_000  # at once: how many wait is limited by the server itself, and by each bundle's deployment


class Arguments(BaseModel):
    """What a Serve config says of the application.

    Attributes:
        bundles: As on the command line: `FOLDER` or `NAME=FOLDER`, on every node.
        weights: As on the command line: `NAME=WEIGHT`.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: list[str]
    weights: list[str] = []


def application(arguments: Arguments) -> "Application":
    """The web server and the bundles, for Ray Serve to run.

    Raises:
        ConversionError: A setting or a weight is impossible, or a bundle is none.
    """
    from ray import serve

    settings = load_settings({"engine": "ray"}, None).settings
    served = _served(arguments)
    names = [bundle.name for bundle in served]
    router = make_router(names, parse_weights(arguments.weights), settings.model_name, settings.escalation_to)
    make_escalation(settings.escalation_to, settings.escalation_threshold, router)

    def web() -> FastAPI:
        return web_app(arguments, serve.get_replica_context().app_name)

    bundles = [bound(*ray_deployment(bundle, settings, bundle.name)) for bundle in served]
    deployment = serve.deployment(serve.ingress(web)()).options(
        name="web", max_ongoing_requests=_REQUESTS, ray_actor_options={"num_cpus": 1}
    )
    application: Application = deployment.bind(*bundles)
    return application


def web_app(arguments: Arguments, application: str) -> FastAPI:
    """The web server, inside of Ray; its engines ask the deployments beside it.

    Args:
        arguments: The application's.
        application: Its name.
    """
    settings = load_settings({"engine": "ray"}, None).settings
    make_engine = partial(_engine, application)
    return make_app(make_service(settings, _served(arguments), make_engine, parse_weights(arguments.weights)))


def _served(arguments: Arguments) -> list[ServedBundle]:
    named = [parse_bundle(argument) for argument in arguments.bundles]
    return [open_served_bundle(path, name) for name, path in named]


def _engine(application: str, bundle: ServedBundle, settings: Settings, _: object) -> Engine:
    _, deployed = ray_deployment(bundle, settings, bundle.name)
    return RayEngine(deployed, partial(joined, application, bundle.name))
