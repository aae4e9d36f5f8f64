"""Sign a bundle, and check its signature, with the `model-signing` library of the OpenSSF.

model.sig is what that library's own command writes and reads, so whoever has the public key can check a
bundle without this tool. It covers every file but itself and verification.json, whose binding to the manifest
is checked apart.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Final

from fastvlm_convert.atomic_file import whole_file
from fastvlm_convert.errors import MissingDependencyError, OutputError, SignatureError
from fastvlm_convert.manifest import BESIDE, SIGNATURE_FILE
from fastvlm_convert.regular_file import read_file

_MAX_KEY_BYTES: Final = 1 << 20
_MAX_SIGNATURE_BYTES: Final = 4 << 20  # a few hundred bytes a file
# No PEM, an encrypted key, and a key of another kind.
_UNUSABLE: Final = (ValueError, TypeError, AttributeError)
_MAKE_KEYS: Final = (
    "keys are elliptic curve keys in PEM, not encrypted: "
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem, and "
    "openssl ec -in key.pem -pubout -out key.pub"
)


def sign_bundle(bundle: Path, private_key: Path) -> Path:
    """Write model.sig into a bundle, which must be sound (see `check`); an earlier one is replaced.

    Args:
        bundle: Its folder.
        private_key: PEM file of an elliptic curve key, not encrypted.

    Raises:
        SignatureError: The key cannot be used.
        OutputError: The signature cannot be written.
        MissingDependencyError: The extra `sign` is not installed.
    """
    library, config = _library("signing")
    _see_key(private_key)
    try:
        signer = library.Config().use_elliptic_key_signer(private_key=private_key)
    except _UNUSABLE as error:
        raise _bad_key(private_key) from error
    signer.set_hashing_config(config.set_ignored_paths(paths=BESIDE, ignore_git_paths=False))
    path = bundle / SIGNATURE_FILE
    try:
        with TemporaryDirectory() as scratch:
            made = Path(scratch) / SIGNATURE_FILE
            signer.sign(bundle, made)
            content = made.read_bytes()
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        hint = "see that you may write into the bundle"
        raise OutputError(f"cannot sign: {error.strerror}", where=path, hint=hint) from error
    return path


def signature_problem(bundle: Path, public_key: Path) -> str | None:
    """Why a bundle's signature does not hold, or None if it does.

    Args:
        bundle: Its folder, which must be sound.
        public_key: PEM file of the elliptic curve key.

    Raises:
        SignatureError: The bundle has no signature, or the key cannot be used.
        MissingDependencyError: The extra `sign` is not installed.
    """
    library, config = _library("verifying")
    _see_key(public_key)
    from cryptography.exceptions import InvalidSignature

    path = bundle / SIGNATURE_FILE
    try:
        read_file(path, _MAX_SIGNATURE_BYTES)
    except FileNotFoundError as error:
        hint = "sign it with: fastvlm-convert bundle sign BUNDLE --key FILE"
        raise SignatureError("the bundle is not signed", where=bundle, hint=hint) from error
    except OSError as error:
        return f"{SIGNATURE_FILE} cannot be read: {error.strerror}"
    try:
        verifier = library.Config().use_elliptic_key_verifier(public_key=public_key)
    except _UNUSABLE as error:
        raise _bad_key(public_key) from error
    verifier.set_hashing_config(config.set_ignored_paths(paths=BESIDE, ignore_git_paths=False))
    try:
        with redirect_stdout(sys.stderr):  # where the library would print
            verifier.verify(bundle, path)
    except InvalidSignature:
        return "it was not made with the private key of this public key"
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # whatever damaged JSON leads to
        return (
            f"{SIGNATURE_FILE} does not hold: {str(error).splitlines()[0] if str(error) else 'it is damaged'}"
        )
    return None


def _library(name: str) -> tuple[ModuleType, Any]:
    """One of the library's modules, and its settings of what is hashed."""
    try:
        if name == "signing":
            from model_signing import hashing, signing

            return signing, hashing.Config()
        from model_signing import hashing, verifying
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error, "a bundle's signature") from error
    return verifying, hashing.Config()


def _see_key(path: Path) -> None:
    """The library would wait at a pipe."""
    try:
        read_file(path, _MAX_KEY_BYTES)
    except FileNotFoundError as error:
        raise SignatureError("there is no such key", where=path, hint=_MAKE_KEYS) from error
    except OSError as error:
        raise SignatureError(f"cannot read the key: {error.strerror}", where=path, hint=_MAKE_KEYS) from error


def _bad_key(path: Path) -> SignatureError:
    return SignatureError("no key that can be used here", where=path, hint=_MAKE_KEYS)
