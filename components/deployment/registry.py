"""An entry in the Kubeflow Model Registry for a release: optional, and never what decides. Extra `[registry]`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import warnings
from typing import Any

from trimtab.base.errors import InputError, StageError

#: Where the token for the registry is read from; never a flag, which `ps` would show.
TOKEN = "TRIMTAB_REGISTRY_TOKEN"
AUTHOR = "trimtab"


def check_address(address: str) -> None:
    """Refuses what is no address of a registry.

    Raises:
        InputError: says what to write.
    """
    if not re.fullmatch(r"https?://[^\s/]+/?", address):
        raise InputError(f"registry: '{address}' is not valid; write https://host[:port]")


def check(address: str) -> None:
    """Refuses a registry that could not be entered from here, without asking it.

    Raises:
        InputError: a bad address, no token for it, or the client is not installed.
    """
    check_address(address)
    if address.startswith("https:") and not os.environ.get(TOKEN):
        raise InputError(f"registry: {address} wants a token; set {TOKEN}")
    if not importlib.util.find_spec("model_registry"):
        raise InputError("registry: its client is not installed; write pip install 'trimtab[registry]'")


def register(address: str, name: str, version: str, uri: str, record: dict[str, Any]) -> bool:
    """Registers a release as a version of the model of its name; False when that version is there already.

    Args:
        address: http(s)://host[:port] of the registry.
        name: the release's name.
        version: its version in the store.
        uri: the release's URI, under which everything is found.
        record: what the store holds of it; recipe, goal, target and digest become properties.

    Raises:
        InputError: a bad address or token, or the client is not installed, or that version is of something else there.
        StageError: the registry does not answer.
    """
    check(address)
    from model_registry import ModelRegistry
    from model_registry.exceptions import StoreError
    from mr_openapi.exceptions import ApiException

    token = os.environ.get(TOKEN, "")
    loop = asyncio.new_event_loop()  # else the client patches asyncio for the whole process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing token, which a registry without TLS may not want
            client = ModelRegistry(
                address, author=AUTHOR, user_token=token or None, async_runner=loop.run_until_complete
            )
            if client.get_registered_model(name) and client.get_model_version(name, version):
                there = client.get_model_artifact(name, version)
                if there and there.uri == uri:
                    return False
                raise InputError(
                    f"registry: {address} has {name} {version} already, of {there.uri if there else 'no artifact'} and "
                    f"not of {uri}; archive or rename the model there, and run the command again"
                )
            client.register_model(
                name,
                uri,
                version=version,
                model_format_name="safetensors",
                model_format_version="1",
                version_description=str((record.get("verdict") or {}).get("reason", "")),
                metadata={
                    "artifact": record["artifact"]["digest"],
                    "goal": str(record.get("goal", "")),
                    "target": str(record.get("target", "")),
                    "format": str(((record.get("recipe") or {}).get("quantize") or {}).get("format", "")),
                },
            )
        return True
    except ApiException as error:
        if error.status in (401, 403):
            raise InputError(f"registry: {address} refuses ({error.status}); set another {TOKEN}") from None
        raise StageError(f"registry: {address} answered {error.status}; run the command again") from None
    except (OSError, StoreError) as error:
        raise StageError(f"registry: {address} does not answer ({type(error).__name__}); run it again") from None
    finally:
        loop.close()
