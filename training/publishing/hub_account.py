"""The account on the Hugging Face Hub: its token, the client, and the checks before the first step."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipelines.tools.cli import UserError, cause, one_line
from pipelines.tools.credentials import remember_credential
from training.core.files import FULL_DISK

T = TypeVar("T")

MOST_TOKEN_BYTES = 10_000  # a larger file was named by mistake
CHECK_SECONDS = 60.0  # after this time without an answer, the Hub counts as unreachable
# The client waits for an answer without a limit. A request that takes this long is given up, and the upload is retried.
REQUEST_SECONDS = 300.0
POLL_SECONDS = 0.1


def read_token(path: str) -> str:
    """Return the access token in the file `--hub_token_file`.

    Raises:
        UserError: the file cannot be read, is empty, or contains more than a token. The message does not show any of
            its content.
    """
    fix = "name a file that contains only the token, or leave the flag out to use HF_TOKEN or `hf auth login`"
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MOST_TOKEN_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a path with a null character; an unknown user after ~
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise UserError(f"--hub_token_file {path} cannot be read ({reason}); {fix}") from None
    token = content.decode("utf-8-sig", errors="replace").strip()
    if not token:
        raise UserError(f"--hub_token_file {path} is empty; {fix}")
    if len(content) > MOST_TOKEN_BYTES or not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"--hub_token_file {path} contains something other than one token; {fix}")
    remember_credential(token)
    return token


class HubAccount:
    """The client of the Hub with the token of `--hub_token_file`, HF_TOKEN or the stored login.

    Args:
        token_file: the file with the token; None uses HF_TOKEN or the stored login.
        flag: the flag that needs the Hub, for messages.
    """

    def __init__(self, token_file: str | None, flag: str = "--push_to_hub"):
        self._token_file, self.flag = token_file, flag
        self.token: str | None = None  # None uses HF_TOKEN or the stored login
        self._api: Any = None

    @property
    def api(self) -> Any:
        """The `HfApi` of this account."""
        from huggingface_hub import HfApi, get_session

        if self._api is None:
            if self._token_file is not None:
                self.token = read_token(self._token_file)
            # HF_ENDPOINT is read here because the library reads it only once, when it is first imported.
            self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=self.token)
        with contextlib.suppress(AttributeError):
            get_session().timeout = REQUEST_SECONDS
        return self._api

    @property
    def endpoint(self) -> str:
        return str(self.api.endpoint)

    def who(self) -> dict[str, Any]:
        """Return what the Hub knows of the owner of the token. Raises UserError."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        api = self.api
        if not (self.token or get_token()):
            raise UserError(
                f"{self.flag}: no Hugging Face token was found; run `hf auth login`, set HF_TOKEN to a token with "
                f"write access ({api.endpoint}/settings/tokens), name a file that contains it with --hub_token_file, "
                f"or leave out {self.flag}"
            )
        try:
            return api.whoami()
        except HfHubHTTPError as error:
            if status_of(error) in (401, 403):
                raise UserError(
                    f"{self.flag}: {api.endpoint} does not accept the token ({self._token_source()}): "
                    f"{cause(error)}; create a new one at {api.endpoint}/settings/tokens"
                ) from None
            raise self.unreachable(error) from None
        except Exception as error:  # no network, a wrong HF_ENDPOINT, HF_HUB_OFFLINE=1: the client has many classes
            raise self.unreachable(error) from None

    def full_name(self, model_id: str) -> str:
        """Return a repository's name with the user's namespace, which is added if it has none. Raises UserError."""
        if "/" not in model_id:
            model_id = f"{self.who()['name']}/{model_id}"
        check_name(model_id)
        return model_id

    def make_repository(self, model_id: str, private: bool) -> tuple[str, bool]:
        """Create a model repository if it does not exist, and check that the account may write to it.

        Returns:
            Its full name, and whether it existed before.

        Raises:
            UserError: the token cannot write there, or the Hub cannot be reached.
        """
        from huggingface_hub.errors import HfHubHTTPError

        account = self.who()
        if "/" not in model_id:
            model_id = f"{account['name']}/{model_id}"
        check_name(model_id)
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                f"{self.flag}: the token of '{account['name']}' can only read; create one with write access at "
                f"{self.endpoint}/settings/tokens, then run `hf auth login`, set HF_TOKEN or use --hub_token_file"
            )
        try:
            existed = self.api.repo_exists(model_id)
            self.api.create_repo(model_id, private=private, exist_ok=True)
            self.api.auth_check(model_id, write=True)
        except HfHubHTTPError as error:
            if status_of(error) in (401, 403, 404):
                own = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
                raise UserError(
                    f"--hub_model_id {model_id}: '{account['name']}' may not write there ({cause(error)}); "
                    f"use one of this account's namespaces ({', '.join(own)}) or a token that may write there"
                ) from None
            raise self.unreachable(error) from None
        except Exception as error:  # the connection broke between two requests
            raise self.unreachable(error) from None
        return model_id, existed

    def unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.flag}: {self.endpoint} could not be reached ({cause(error)}); check the network and HF_ENDPOINT, "
            f"or leave out {self.flag}"
        )

    def _token_source(self) -> str:
        return "HF_TOKEN, or the stored login" if self._token_file is None else f"--hub_token_file {self._token_file}"


def check_name(model_id: str) -> None:
    """Raise UserError unless `model_id` is a valid name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {model_id}: {one_line(error, 300)}") from None


def answer(call: Callable[[], T], seconds: float = CHECK_SECONDS) -> T:
    """Return the result of `call`, which waits for the Hub, or raise what it raises.

    The call runs on a thread that does not outlive the process, and this thread can be interrupted by a signal.

    Raises:
        TimeoutError: `call` takes longer than `seconds`.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # raised again by the caller's thread
            failure.append(error)
        done.set()

    threading.Thread(target=run, name="hub-request", daemon=True).start()
    deadline = time.monotonic() + seconds
    while not done.wait(POLL_SECONDS):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer for {seconds:.0f} seconds")
    if failure:
        raise failure[0]
    return outcome[0]


def is_final(error: Exception) -> bool:
    """Return whether a retry cannot help: no permission or repository, content that the Hub rejects, a full disk."""
    is_full = isinstance(error, OSError) and error.errno in FULL_DISK
    return is_full or status_of(error) in (400, 401, 403, 404, 413, 422) or isinstance(error, (ValueError, TypeError))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of `error`, or of one of the errors it was raised from; None without a status."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__  # type: ignore[assignment]
    return None
