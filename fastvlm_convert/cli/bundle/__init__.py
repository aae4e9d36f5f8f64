"""`fastvlm-convert bundle`: what can be done with a finished bundle. One module a command."""

from typing import Final

from fastvlm_convert.cli.commands import Entry, group_app

COMMANDS: Final = {
    "check": Entry("fastvlm_convert.cli.bundle.check", "Check every file of a bundle against its manifest."),
    "diff": Entry(
        "fastvlm_convert.cli.bundle.diff", "Compare two bundles: files, layers, schemes, sizes and quality."
    ),
    "pack": Entry("fastvlm_convert.cli.bundle.pack", "Pack a bundle for a store, or into one zip file."),
    "unpack": Entry("fastvlm_convert.cli.bundle.unpack", "Unpack a bundle from a zip file, whoever made it."),
    "sign": Entry("fastvlm_convert.cli.bundle.sign", "Sign a bundle: writes model.sig into it."),
    "constants": Entry(
        "fastvlm_convert.cli.bundle.constants", "Write what an app must know of a bundle as source code."
    ),
    "vectors": Entry(
        "fastvlm_convert.cli.bundle.vectors", "Write what a bundle computes, for the tests of apps."
    ),
}

app = group_app(COMMANDS, "Check, compare, pack and sign bundles; feed an app's tests.")
