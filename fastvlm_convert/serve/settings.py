"""The settings of the server. `settings_sources` reads them from where people give them."""

import ipaddress
import math
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fastvlm_convert.errors import SettingsError
from fastvlm_convert.pictures import MAX_PIXELS

PREFIX: Final = "FAST_VLM_"
MAX_WORKERS: Final = 16

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


class Settings(BaseSettings):
    """All settings of the server: those that are passed, those of the environment, and defaults.

    Raises:
        pydantic.ValidationError: A value is impossible. `load_settings` says it in our words.
        SettingsError: Two settings exclude each other.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    # Where it listens, and what it is called.
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    env: Literal["development", "production"] = Field(
        "development", description="production requires an API key and hides /docs."
    )
    model_name: Name | None = Field(
        None,
        description="What requests call all bundles together; null takes the only one's name, or fastvlm.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="How log lines look; auto is text at a terminal, and json elsewhere."
    )

    # Who answers.
    engine: Literal["embedded", "processes", "ray"] = Field(
        "embedded",
        description="Who runs bundles: threads of the server, child processes, or a Ray Serve deployment.",
    )
    slots: int = Field(2, ge=1, le=64, description="Questions that run at the same time, in each worker.")
    threads: int | None = Field(
        None, ge=1, le=256, description="Threads of one question; null divides the cores among the slots."
    )
    batch_decode: bool = Field(
        False, description="Decode several answers in one call. Not offered: it saves too little."
    )
    min_workers: int = Field(
        1, ge=1, le=MAX_WORKERS, description="Fewest workers; for the engines processes and ray."
    )
    max_workers: int = Field(
        1, ge=1, le=MAX_WORKERS, description="Most workers; for the engines processes and ray."
    )
    scaling_strategy: Literal["conservative", "aggressive", "adaptive", "predictive"] = Field(
        "adaptive", description="How the number of workers follows the load; for the engine processes."
    )

    # Admission.
    timeout_seconds: float = Field(
        30.0, gt=0, le=3600, description="Seconds from a request's arrival to the end of its answer."
    )
    max_queue: int = Field(64, ge=0, le=10_000, description="Most requests that wait, for each bundle.")
    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="Seconds that running answers get to finish when the server ends."
    )
    breaker_failures: int = Field(
        5,
        ge=1,
        le=1000,
        description="Runtime errors in a row after which a bundle gets no more requests.",
    )
    breaker_reset_seconds: float = Field(
        10.0, gt=0, le=3600, description="Seconds until it is tried again; doubles up to sixteen times that."
    )

    # What a request may ask for.
    max_tokens: int = Field(256, ge=1, le=32_768, description="Most tokens of an answer.")
    max_question_chars: int = Field(
        4096, ge=1, le=1_000_000, description="Most characters of a request's texts together."
    )
    max_images: int = Field(4, ge=1, le=64, description="Most pictures of a request.")
    max_image_size_mb: float = Field(
        20.0, gt=0, le=1000, description="Largest encoded picture, in megabytes (1,000,000 bytes)."
    )
    max_image_pixels: int = Field(
        16_000_000, ge=1, le=MAX_PIXELS, description="Most pixels of a picture, by its header."
    )
    exif_orientation: bool = Field(True, description="Turn pictures as their EXIF data says.")

    # Caches.
    cache_enabled: bool = Field(True, description="Keep whole answers, image features and prompt prefixes.")
    cache_scope: Literal["shared", "key"] = Field(
        "shared", description="Who shares what is cached: all clients, or those with the same API key."
    )
    cache_ttl_seconds: float = Field(
        3600.0, gt=0, le=31_536_000, description="Seconds that a cached answer is used."
    )
    cache_dir: Path | None = Field(
        None, description="Folder for answers that outlive the server; null keeps them in memory alone."
    )
    feature_cache_mb: float = Field(
        128.0,
        ge=0,
        le=1_000_000,
        description="Megabytes of image features to keep, of all bundles, in each worker; 0 keeps none.",
    )
    prefix_cache_mb: float = Field(
        256.0,
        ge=0,
        le=1_000_000,
        description="Megabytes of prompts' keys and values to keep, likewise; 0 keeps none.",
    )

    # Security.
    api_key_file: Path | None = Field(
        None, description="File with the API keys, one a line; required on other than loopback addresses."
    )
    security_enabled: bool = Field(True, description="Look for threats, limit rates and record incidents.")
    rate_limit_per_minute: int = Field(
        100, ge=0, le=1_000_000, description="Most requests of a client in a minute; 0 sets no limit."
    )
    threat_action: Literal["record", "block"] = Field(
        "record", description="What happens to a text that a threat rule matches. It is never altered."
    )
    ban_after: int = Field(
        0, ge=0, le=1_000_000, description="Incidents of a client that get it banned; 0 bans nobody."
    )
    ban_seconds: float = Field(600.0, gt=0, le=2_592_000, description="Seconds that a ban lasts.")
    incident_log: Path | None = Field(
        None, description="File for incidents, as JSON lines; null counts them only."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Addresses or networks whose X-Forwarded-For is believed; with commas between them."
    )

    # Escalation.
    escalation_to: Name | None = Field(
        None, description="Bundle that answers again what another is unsure about; null asks none."
    )
    escalation_threshold: float | None = Field(
        None, le=0, description="Mean log-probability of an answer's tokens below which it is asked again."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would convert: true to 1, 1 to true, nothing to the current folder."""
        field = cls.model_fields[str(info.field_name)]
        if value == "null" and field.default is None:  # the environment has texts alone
            return None
        wants_truth = field.annotation is bool
        if isinstance(value, bool) != wants_truth and not (wants_truth and isinstance(value, str)):
            raise ValueError("another kind of value")
        if value == "" or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError("no value")
        return value

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment has one text for all of them."""
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network, strict=False)
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        for name in ("min_workers", "max_workers", "scaling_strategy"):
            self._needs_workers(name)
        if self.batch_decode:
            raise SettingsError(
                "batch_decode true is not offered: each answer is decoded by itself",
                ("batch_decode",),
                hint="decoding four at a time would save some 3 % of an answer's time at 0.5B",
            )
        if self.min_workers > self.max_workers:
            raise SettingsError(
                f"min_workers {self.min_workers} is more than max_workers {self.max_workers}",
                ("min_workers", "max_workers"),
            )
        if self.env == "production" and self.api_key_file is None:
            raise SettingsError(
                "env production needs an API key",
                ("env", "api_key_file"),
                hint=f"name a file with a key a line: {PREFIX}API_KEY_FILE",
            )
        if (self.escalation_to is None) != (self.escalation_threshold is None):
            raise SettingsError(
                "escalation_to and escalation_threshold are given together or not at all",
                ("escalation_to", "escalation_threshold"),
            )
        for name, is_set in (
            ("threat_action", self.threat_action == "block"),
            ("ban_after", self.ban_after > 0),
        ):
            if is_set and not self.security_enabled:
                raise SettingsError(
                    f"{name} {getattr(self, name)} has no effect with security_enabled false",
                    (name, "security_enabled"),
                )
        return self

    def _needs_workers(self, name: str) -> None:
        engines = ("processes",) if name == "scaling_strategy" else ("processes", "ray")
        if getattr(self, name) != type(self).model_fields[name].default and self.engine not in engines:
            raise SettingsError(
                f"{name} {getattr(self, name)} has no effect with engine {self.engine}",
                (name, "engine"),
                hint=f"choose the engine {' or '.join(engines)}, or omit {name}",
            )
