"""AI packs of Play for On-device AI: a Gradle module for each, which the app's build takes as it is.

The layout is that of https://developer.android.com/google/play/on-device-ai; docs/delivery.md says more.
"""

from typing import Final

from fastvlm_convert.delivery.stores import StoreFit

DELIVERY: Final = "on-demand"  # the app asks for it; the models then are files, which ONNX Runtime can map
ASSETS: Final = "src/main/assets"  # of a module


def play_files(name: str, fit: StoreFit) -> tuple[dict[str, bytes], dict[str, str]]:
    """What an app's project is to contain.

    Args:
        name: Name of the first pack; others have a number behind it.
        fit: The packs.

    Returns:
        Content of files to make, and files of the bundle to copy: both by path, relative to the project.
    """
    made: dict[str, bytes] = {}
    copied: dict[str, str] = {}
    for number, pack in enumerate(fit.packs, 1):
        module = name if number == 1 else f"{name}_{number}"
        made[f"{module}/build.gradle.kts"] = _gradle(module).encode()
        made[f"{module}/manifest/AndroidManifest.xml"] = _manifest(module).encode()
        # Within a folder of its own: assets of a pack that is installed with the app are the app's.
        copied |= {f"{module}/{ASSETS}/{name}/{file}": file for file in pack.files}
    return made, copied


def _gradle(module: str) -> str:
    return f"""// Include it in settings.gradle.kts:             include(":{module}")
// and name it in the app's build.gradle.kts:     android {{ assetPacks += listOf(":{module}") }}
plugins {{
    id("com.android.ai-pack")
}}

aiPack {{
    packName.set("{module}")
    dynamicDelivery {{
        deliveryType.set("{DELIVERY}") // or fast-follow, or install-time
    }}
}}
"""


def _manifest(module: str) -> str:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<!-- For bundletool alone, which wants the app's id here; the Gradle plugin writes its own. -->
<manifest xmlns:android="http://schemas.android.com/apk/res/android"
    xmlns:dist="http://schemas.android.com/apk/distribution"
    package="com.example.app"
    split="{module}">
    <dist:module dist:type="ai-pack">
        <dist:delivery>
            <dist:{DELIVERY} />
        </dist:delivery>
        <dist:fusing dist:include="true" />
    </dist:module>
</manifest>
"""
