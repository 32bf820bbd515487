"""`wingman pull`: choose a file, have it downloaded, show how far it is."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from wingman.commands import INTERRUPTED
from wingman.commands.api import Api, CommandFailed, Message, ask
from wingman.commands.follow import follow
from wingman.commands.names import known_models, read_download
from wingman.commands.output import Output, size_text
from wingman.commands.session import Session
from wingman.services.home import split_parts
from wingman.services.modelnames import model_name
from wingman.services.quantization import Candidate, Choice, choose_file

_TARGET: Final = re.compile(
    r"(?:hf://)?(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>[^/:\s]+))?(?:[:/](?P<file>.+))?", re.ASCII
)
_MB: Final = 2**20
_OPEN: Final = frozenset({"idle", "queued", "downloading", "unknown"})


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be pulled; `file` is a file's path or name, a quantization, or "" for a fitting one."""

    repo: str
    revision: str
    file: str

    @property
    def pinned(self) -> str:
        """The repository as /api/downloads/enqueue takes it."""
        return f"hf://{self.repo}@{self.revision}" if self.revision else self.repo


def parse_target(repo: str, file: str | None) -> Target:
    """REPO and FILE|QUANT of the command line. Raises CommandFailed."""
    match = _TARGET.fullmatch(repo)
    if match is None:
        raise CommandFailed(
            f"{repo} is no repository: give owner/repo, or hf://owner/repo@revision/file.gguf"
        )
    if file and match["file"]:
        raise CommandFailed(f"two files are named, {match['file']} and {file}: give one")
    return Target(match["repo"], match["revision"] or "", file or match["file"] or "")


def pull_command(session: Session) -> int:
    """`wingman pull`."""
    api, output = session.api(), session.output
    target = parse_target(session.arguments.repo, session.arguments.file)
    file_path, reason = choose(api, target)
    if reason:
        output.note(f"{file_path}: {reason}")
    item = ask(api, "/api/downloads/enqueue", "POST", modelRepo=target.pinned, filePath=file_path)
    try:
        item = wait(api, output, item)
    except KeyboardInterrupt:
        output.note(
            "the download goes on in the server; the same command shows it again, wingman rm ends it"
            if api.is_daemon
            else "the download is paused; the same command resumes it"
        )
        return INTERRUPTED
    return _report(api, output, item, reason)


def _report(api: Api, output: Output, item: Message, reason: str) -> int:
    if output.is_json:
        output.document(item | ({"reason": reason} if reason else {}))
    if item["status"] != "complete":
        raise CommandFailed(f"{item['filePath']}: {item['error'] or 'the download was ' + item['status']}")
    if not output.is_json:
        name = model_name(read_download(item), known_models(api))
        output.line(f"{name} is here, {size_text(item['totalBytes'])}: wingman run {name}")
    return 0


def wait(api: Api, output: Output, item: Message) -> Message:
    """Show a download until it is complete, failed or cancelled; its last state."""
    if item["status"] == "complete":
        return item
    repo, file_path = item["modelRepo"], item["filePath"]
    states = follow(
        api,
        "download_status",
        lambda message: (message.get("modelRepo"), message.get("filePath")) == (repo, file_path),
        lambda: _fetch(api, repo, file_path),
    )
    with output.progress(file_path.rpartition("/")[2]) as bar, closing(states):
        for state in states:
            item = {key: value for key, value in state.items() if key not in ("event", "seq")}
            words = item["downloadSpeed"] if item["status"] == "downloading" else item["status"]
            bar.show(item["downloadedBytes"], item["totalBytes"], words)
            if item["status"] not in _OPEN:
                break
    return item


def _fetch(api: Api, repo: str, file_path: str) -> Message:
    items = ask(api, "/api/downloads", modelRepo=repo, filePath=file_path)["DownloadItems"]
    if not items:
        raise CommandFailed(f"the download of {file_path} was removed")
    item: Message = items[0]
    return item


# -- which file -----------------------------------------------------------------------------------


def choose(api: Api, target: Target) -> tuple[str, str]:
    """The path of the file to pull, and why that one when nobody named it. Raises CommandFailed."""
    is_name = target.file.lower().endswith(".gguf")
    if is_name and target.revision:  # what is listed is another revision
        return split_parts(target.file)[0], ""
    try:
        offers = _offers(api, target.repo)
    except CommandFailed as error:
        if is_name and error.status != 404:  # the Hub is away; the file may be here
            return split_parts(target.file)[0], ""
        raise
    if not target.file:
        return _choose_fitting(api, target, offers)
    return (_by_name if is_name else _by_quantization)(target, offers), ""


def _offers(api: Api, repo: str) -> list[Message]:
    models = ask(api, "/api/models", modelRepo=repo)["models"]
    items = [item for model in models for item in model["items"]]
    if not items:
        raise CommandFailed(f"{repo} holds no GGUF model, or the Hub can't be reached")
    return items


def _by_name(target: Target, offers: list[Message]) -> str:
    wanted = split_parts(target.file)[0].lower()
    return _only(
        target,
        [item for item in offers if wanted in (item["filePath"].lower(), _base(item["filePath"]).lower())],
        offers,
    )


def _by_quantization(target: Target, offers: list[Message]) -> str:
    wanted = target.file.lower()
    return _only(target, [item for item in offers if item["quantization"].lower() == wanted], offers)


def _only(target: Target, found: list[Message], offers: list[Message]) -> str:
    if len(found) == 1:
        file_path: str = found[0]["filePath"]
        return file_path
    listed = ", ".join(
        item["filePath"] if found or not item["quantization"] else item["quantization"]
        for item in found or offers
    )
    problem = "could be any of" if found else "is not in it; it has"
    raise CommandFailed(f"{target.repo}: {target.file} {problem}: {listed}")


def _base(file_path: str) -> str:
    return file_path.rpartition("/")[2]


def _choose_fitting(api: Api, target: Target, offers: list[Message]) -> tuple[str, str]:
    candidates = [
        Candidate(item["filePath"], item["quantization"], item["normalizedQuantizedMemRequired"] * _MB)
        for item in offers
    ]
    available, on_gpu = free_memory(ask(api, "/api/hardware"))
    choice: Choice | None = choose_file(candidates, available, on_gpu)
    if choice is None:
        raise CommandFailed(f"{target.repo} holds no GGUF model")
    if not choice.fits and choice.file.memory_bytes:
        raise CommandFailed(f"{choice.reason}; name a file to get it nevertheless")
    return choice.file.file_path, choice.reason


def free_memory(hardware: dict[str, Any]) -> tuple[int, bool]:
    """Bytes a model may take, and whether on a GPU: /api/hardware's numbers."""
    on_gpu = hardware["gpu"]["totalMemoryMB"] > 0 and hardware.get("llama", {}).get("canOffload", True)
    return hardware["gpu" if on_gpu else "cpu"]["freeMemoryMB"] * _MB, on_gpu
