"""What is known of a setting, without the libraries that read it."""

from dataclasses import dataclass

SettingValue = str | int | float | bool | None


@dataclass(frozen=True)
class SettingFacts:
    """A setting of the server.

    Attributes:
        name: Its name in a file.
        environment: Its name in the environment.
        value: Its value; paths are texts, and several values a text with commas.
        default: Its value where nothing is given.
        origin: Where the value is from: `command line, --port`, `environment FAST_VLM_PORT`, `FILE:LINE` or
            `default`.
        allowed: The values that it may have.
        description: What it means.
    """

    name: str
    environment: str
    value: SettingValue
    default: SettingValue
    origin: str
    allowed: str
    description: str
