"""Orbax checkpoints: `jaxpaged convert` and back, what is loaded from them, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_tokenizers as tiny
import torch
from families import Row, rows
from safetensors.numpy import load_file, save_file
from test_cli import call
from test_quantization import FORMATS, gguf_file, write
from tiny_hf import edit, make, opened

from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged import convert as convert_module
from jaxpaged.checkpoint import SafetensorsCheckpoint, open_checkpoint
from jaxpaged.convert import convert
from jaxpaged.export import export
from jaxpaged.folder import MANIFEST, MARK
from jaxpaged.models import door
from jaxpaged.orbax_checkpoint import FORMAT
from jaxpaged.tokenizer import load_tokenizer
from jaxpaged.weights import forms_of, regex_of

ROWS = {row.name: row for door_rows in rows().values() for row in door_rows}
FEW = ("llama", "gemma3", "mixtral", "gpt2")  # plain; tied; experts one by one; transposed and joined tensors
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
ENGINE = {"skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False, "block_size": 16, "max_model_len": 64,
          "max_num_batched_tokens": 32, "max_num_seqs": 2, "num_gpu_blocks_override": 12}  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA = Row("", "Llama", SIZES)


def generated(model, **changes) -> list[tuple]:
    """(token, its logprob) of a prompt's continuation: to the bit."""
    with LLM(model, **{**ENGINE, **changes}) as llm:
        (output,) = llm.generate([list(range(3, 20))], GREEDY, use_tqdm=False)
    (completion,) = output.outputs
    return [(token, entry[token].logprob) for token, entry in zip(completion.token_ids, completion.logprobs)]


def in_bfloat16(folder: Path) -> None:
    """The checkpoint's matrices become bfloat16; norms stay float32, as some have them."""
    for file in folder.glob("*.safetensors"):
        x = {name: t.astype(ml_dtypes.bfloat16) if t.ndim > 1 else t for name, t in load_file(file).items()}
        save_file(x, file, {"format": "pt"})


def tensors_of(folder: Path) -> dict[str, tuple]:
    """name -> file, dtype, shape, bytes."""
    c = SafetensorsCheckpoint(folder)
    return {n: (c.file_of(n), c.dtype(n), c.shape(n), c.read(n).tobytes()) for n in c.names()}


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.fixture
def model(tmp_path):
    """A tiny llama."""
    make(tmp_path / "model", LLAMA)
    return tmp_path / "model"


@pytest.fixture
def out(model):
    """Its Orbax checkpoint."""
    return convert(model, model.parent / "out", progress=False)


# -- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_a_converted_model_is_the_model(tmp_path, name):
    make(tmp_path / "model", ROWS[name])
    if name == "llama":
        in_bfloat16(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    dtypes = ("float32", "bfloat16") if name == "llama" else ("float32",)
    for dtype in dtypes:
        found = generated(str(tmp_path / "out"), dtype=dtype)
        assert found == generated(str(tmp_path / "model"), dtype=dtype) and len(found) == 12


@pytest.mark.parametrize("name", ROWS)
def test_an_export_is_the_original(tmp_path, name):
    """Every family's: names, files, dtypes, shapes and bytes; but for tensors that the model does not use."""
    make(tmp_path / "model", ROWS[name])
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    export(tmp_path / "out", tmp_path / "back", progress=False)
    ignored = json.loads((tmp_path / "out" / MANIFEST).read_text())["ignored"]
    wanted = tensors_of(tmp_path / "model")
    assert tensors_of(tmp_path / "back") == {n: t for n, t in wanted.items() if n not in ignored}
    _, _, _, patterns = opened(tmp_path / "model")
    assert all(any(regex_of(pattern).fullmatch(name) for pattern in patterns) for name in ignored)
    for file in ("config.json", "generation_config.json"):
        if (tmp_path / "model" / file).exists():
            assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_shards_and_mixed_dtypes_come_back_as_they_were(tmp_path):
    """q of bfloat16 and k of float16 become one leaf of float32, and are what they were again."""
    model = make(tmp_path / "model", LLAMA)
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    in_bfloat16(tmp_path / "model")
    files = sorted((tmp_path / "model").glob("model-*.safetensors"))
    for file in files:
        x = {n: t.astype(np.float16) if "k_proj" in n else t for n, t in load_file(file).items()}
        save_file(x, file, {"format": "pt"})
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    export(tmp_path / "out", tmp_path / "back", progress=False)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "model") and len(files) > 2
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / name / index).read_text())["weight_map"] for name in ("back", "model"))
    assert ours == theirs
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.dtype("layers.0.attention.qkv.weight") == np.float32
    assert checkpoint.dtype("layers.0.mlp.down.weight") == ml_dtypes.bfloat16


def test_a_copy_of_a_tied_head_is_not_kept(tmp_path):
    make(tmp_path / "model", LLAMA, tie=True)
    file = tmp_path / "model" / "model.safetensors"
    x = load_file(file)
    save_file({**x, "lm_head.weight": x["model.embed_tokens.weight"]}, file)
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    export(tmp_path / "out", tmp_path / "back", progress=False)
    assert tensors_of(tmp_path / "back").keys() == x.keys()
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["ignored"] == ["lm_head.weight"]


def test_dtype_is_what_was_asked_for(model, tmp_path):
    convert(model, tmp_path / "out", dtype="bfloat16", progress=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {np.dtype(ml_dtypes.bfloat16)}
    assert generated(str(tmp_path / "out"), dtype="bfloat16") == generated(str(model), dtype="bfloat16")
    export(tmp_path / "out", tmp_path / "back", progress=False)
    theirs, ours = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == ml_dtypes.bfloat16 and np.array_equal(x, theirs[name].astype(ml_dtypes.bfloat16))


def test_values_beyond_a_dtype_are_refused_when_written_and_when_read(model, tmp_path):
    file = model / "model.safetensors"
    x = load_file(file)
    x["model.norm.weight"][3] = 1e5
    save_file(x, file)
    with pytest.raises(ValueError, match="norm.weight has values beyond float16"):
        convert(model, tmp_path / "out", dtype="float16", progress=False)
    assert nothing_but(tmp_path, "model")
    convert(model, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="norm.weight has values beyond float16"):
        LLM(str(tmp_path / "out"), dtype="float16", **ENGINE)


# -- quantised ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["llama", "mixtral"])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantised_when_written_or_when_loaded_is_the_same(tmp_path, row, form):
    make(tmp_path / "model", ROWS[row])
    convert(tmp_path / "model", tmp_path / "out", quantization=form, progress=False)
    convert(tmp_path / "model", tmp_path / "floats", progress=False)
    wanted = generated(str(tmp_path / "model"), quantization=form)
    assert wanted != generated(str(tmp_path / "model"))
    assert generated(str(tmp_path / "out")) == wanted
    assert generated(str(tmp_path / "out"), quantization=form) == wanted
    assert generated(str(tmp_path / "floats"), quantization=form) == wanted
    assert size(tmp_path / "out") < 0.8 * size(tmp_path / "floats")
    for folder, why in (("floats", "quantization='gguf' is a checkpoint's format, and this one is not quantised"),
                        ("out", f"quantised already \\({form}\\)")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            LLM(str(tmp_path / folder), quantization="gguf", **ENGINE)


def size(folder: Path) -> int:
    checkpoint = open_checkpoint(folder)
    return sum(int(np.prod(checkpoint.shape(n))) * checkpoint.dtype(n).itemsize for n in checkpoint.names())


@pytest.mark.parametrize("name", ["fp8", "gptq", "compressed int8"])
def test_a_quantised_checkpoint_stays_as_it_is(tmp_path, name):
    write(tmp_path / "model", tmp_path / "twin", LLAMA, *FORMATS[name])
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    for dtype in ("float32", "bfloat16"):
        assert generated(str(tmp_path / "out"), dtype=dtype) == generated(str(tmp_path / "model"), dtype=dtype)


def test_blocks_of_a_gguf_file_are_kept(tmp_path):
    gguf_file(tmp_path / "model.gguf", {"attn_v": "Q6_K", "ffn_down": "Q8_0"})
    with pytest.raises(ValueError, match="tokenizer"):
        convert(tmp_path / "model.gguf", tmp_path / "out", quantization="gguf", progress=False)
    assert nothing_but(tmp_path, "model.gguf")


def test_a_gguf_file_brings_its_tokenizer_along(tmp_path, demo_gguf):
    convert(demo_gguf, tmp_path / "out", quantization="gguf", progress=False)
    theirs, ours = load_tokenizer(demo_gguf), load_tokenizer(tmp_path / "out")
    for text in tiny.TRICKY:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.chat_template == theirs.chat_template and ours.eos_token_ids == theirs.eos_token_ids
    assert ours.special_ids == theirs.special_ids and ours.named.items() >= theirs.named.items()
    assert generated(str(tmp_path / "out")) == generated(str(demo_gguf), quantization="gguf")


def test_what_is_quantised_is_not_quantised_otherwise_and_not_exported(model, tmp_path):
    out = str(convert(model, tmp_path / "out", quantization="int8", progress=False))
    with pytest.raises(RequestError, match=r"quantization='fp8', but .*out is quantised already \(int8\); leave it out"):
        LLM(out, quantization="fp8", **ENGINE)
    with pytest.raises(RequestError, match="is quantised .int8.: its original's tensors are not in it"):
        export(out, tmp_path / "back", progress=False)
    assert nothing_but(tmp_path, "model", "out")


# -- in memory, and with Orbax alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "int8", "int4", "fp8"])
def test_orbax_itself_reads_it_and_llm_takes_the_tree(model, tmp_path, form):
    out = convert(model, tmp_path / "out", quantization=form, progress=False)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(out / "params")
    assert set(tree["layers"]["0"]["attention"]) == {"qkv", "out"}
    kinds = {f.kind for f in forms_of(tree).values()}
    assert kinds == ({form} if form else set())
    config = json.loads((model / "config.json").read_text())
    assert generated(config, params=tree) == generated(str(out))
    if form:
        other = "int8" if form == "fp8" else "fp8"
        with pytest.raises(RequestError, match=f"quantization='{other}', but the tree is quantised already .{form}."):
            LLM(config, params=tree, quantization=other, **ENGINE)


ON_MESHES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxpaged import weights
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.loading import as_they_are
checkpoint = open_checkpoint(sys.argv[1])
names = as_they_are(checkpoint.names())
whole = {name: checkpoint.read(name) for name in checkpoint.names()}
shares, read = {}, checkpoint.read_slice_into
def seen(name, index, out):
    shares[name] = max(shares.get(name, 0), out.nbytes / whole[name].nbytes)
    read(name, index, out)
checkpoint.read_slice_into = seen
for n in (1, 2, 4, 8):
    mesh = Mesh(np.array(jax.devices()[:n]), "x")
    for axis in (0, 1):
        cut = lambda x: x.ndim == 2 and x.shape[axis] % n == 0
        spec = lambda x: P(*("x" if k == axis else None for k in range(2))) if cut(x) else P()
        shardings = {name: NamedSharding(mesh, spec(x)) for name, x in whole.items()}
        leaves = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k]) for k, x in whole.items()}
        shares.clear()
        arrays = weights.load(checkpoint, leaves, names, progress=False)
        for name, x in whole.items():
            assert arrays[name].sharding.is_equivalent_to(shardings[name], x.ndim), name
            assert len(arrays[name].addressable_shards) == n
            assert np.array_equal(np.asarray(arrays[name]).view(np.uint8), x.view(np.uint8)), name
            assert shares[name] == (1 / n if cut(x) else 1), name  # no more of it was read at once than a shard
        assert sum(map(cut, whole.values())) >= 8
print("equal")
"""


def test_it_loads_onto_any_mesh(tmp_path):
    make(tmp_path / "model", ROWS["llama"], vocab_size=104)
    in_bfloat16(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", progress=False)
    done = python(ON_MESHES, tmp_path / "out", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def python(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu", **environment})  # fmt: skip


# -- the command line ---------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, monkeypatch, capsys):
    backend = tiny.byte_level(400)
    make(tmp_path / "model", LLAMA, vocab_size=backend.get_vocab_size())
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "model" / "LICENSE.txt").write_text("Do as you like.")
    model, out, back = (str(tmp_path / name) for name in ("model", "out", "back"))
    status, text, err = call(monkeypatch, capsys, "convert", model, out)
    assert status == 0 and text == f"written: {out}\n" and "Converting: 100%" in err
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    about = json.loads((tmp_path / "out" / MARK).read_text())
    assert about["format"] == FORMAT and about["model_type"] == "llama" and about["source"] == model
    flags = ["--enforce-eager", "-q", "--max-tokens", "5", "--ignore-eos", "--temperature", "0", "--max-model-len", "64"]
    said = [call(monkeypatch, capsys, "generate", "hello", "--model", name, *flags)[:2] for name in (model, out)]
    assert said[0] == said[1] and said[0][0] == 0
    status, text, err = call(monkeypatch, capsys, "convert", out, back, "--to", "safetensors", "-q")
    assert (status, text, err) == (0, "", "")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "model")
    assert not (tmp_path / "back" / MARK).exists()
    assert generated(back) == generated(model)


def test_help_loads_no_jax():
    code = ("import sys; from jaxpaged.cli import app; app(['convert', '--help'], standalone_mode=False); "
            "assert not {'jax', 'orbax', 'tensorstore'} & set(sys.modules)")  # fmt: skip
    done = python(code, COLUMNS="120")
    assert done.returncode == 0 and "--quantization" in done.stdout, done.stderr


def test_overwrite(out, model):
    with pytest.raises(RequestError, match="out exists already; give another name, or --overwrite"):
        convert(model, out, progress=False)
    convert(model, out, overwrite=True, dtype="bfloat16", progress=False)
    assert json.loads((out / MARK).read_text())["dtype"] == "bfloat16" and nothing_but(out.parent, "model", "out")
    (out.parent / "mine").mkdir()
    (out.parent / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match="is no model's folder .it has no config.json.; it is not overwritten"):
        convert(model, out.parent / "mine", overwrite=True, progress=False)
    assert (out.parent / "mine" / "thesis.tex").exists()


BAD = [
    (["{model}", "{model}/out"], "is inside the model"),
    (["{model}", "{model}"], "model exists already"),
    (["{model}", "{model}", "--overwrite"], "is inside the model"),
    (["{inner}", "{model}", "--overwrite"], "which would be replaced"),
    (["{model}", "{tmp}/no/where"], "there is no folder"),
    (["{model}", "{tmp}/new", "--to", "gguf"], "--to must be one of orbax, safetensors; got 'gguf'"),
    (["{model}", "{tmp}/new", "--to", "safetensors"], "is no Orbax checkpoint, so there is nothing to export"),
    (["{out}", "{tmp}/new"], "is an Orbax checkpoint already"),
    (["{out}", "{tmp}/new", "--to", "safetensors", "--quantization", "int8"], "leave out --quantization"),
    (["{model}", "{tmp}/new", "--quantization", "int3"], "quantization must be one of"),
    (["{model}", "{tmp}/new", "--quantization", "gguf"], "'gguf' is a checkpoint's format, and this one is not quantised"),
    (["{model}", "{tmp}/new", "--dtype", "float8"], "dtype must be one of auto, float32"),
    (["{tmp}/nothing", "{tmp}/new"], "There is no file or folder"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_mistakes(out, model, monkeypatch, capsys, arguments, message):
    tmp = model.parent
    shutil.copytree(model, model / "inner")
    places = {"tmp": tmp, "model": model, "out": out, "inner": model / "inner"}
    status, text, err = call(monkeypatch, capsys, "convert", *(a.format(**places) for a in arguments))
    assert status == 2 and text == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert nothing_but(tmp, "model", "out")


def test_without_orbax_it_says_what_to_install(model, out, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ValueError, match=r"need the extra `orbax`: pip install 'jaxpaged\[orbax\]'"):
        convert(model, tmp_path / "new", progress=False)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ValueError, match="^[^ ]*out is an Orbax checkpoint. .*pip install"):
        LLM(str(out), **ENGINE)
    assert nothing_but(tmp_path, "model", "out")


# -- failures -----------------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the disk is full after that
from jaxpaged.cli import main
sys.argv = ["jaxpaged", "convert", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_full_disk_leaves_nothing(out, model, way):
    new = out.parent / "new"
    done = python(FULL, *((model, new) if way == "there" else (out, new, "--to", "safetensors")), "-q")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr or "could not be written" in done.stderr
    assert nothing_but(out.parent, "model", "out")


def test_too_little_room_is_said_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="the checkpoint needs 0.00 GB, the disk of .* has 0.00 GB free"):
        convert(model, tmp_path / "out", progress=False)
    assert nothing_but(tmp_path, "model")


SLOW = """
import sys, time
from jaxpaged import on_host
read = on_host.OnHost.read
def slow(self, path):
    if path == "layers.1.mlp.down.weight":
        print("half", flush=True)
    if path > "layers.1":
        time.sleep(0.2)
    return read(self, path)
on_host.OnHost.read = slow
from jaxpaged.cli import main
sys.argv = ["jaxpaged", "convert", *sys.argv[1:]]
main()
"""


def test_ctrl_c_leaves_nothing(model, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(model), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*.partial"))) == 1
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err, err
    time.sleep(0.3)
    assert nothing_but(tmp_path, "model")


def test_an_error_half_way_keeps_the_old_one(out, model, monkeypatch):
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    read = convert_module.OnHost.read

    def fails(self, path):
        if path.startswith("layers.1"):
            raise ValueError("the tensor became shorter")
        return read(self, path)

    monkeypatch.setattr(convert_module.OnHost, "read", fails)
    with pytest.raises(ValueError, match="became shorter"):
        convert(model, out, overwrite=True, progress=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert nothing_but(out.parent, "model", "out")


def largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_a_damaged_checkpoint_is_refused(out):
    file = largest(out / "params")
    name, content = file.relative_to(out / "params"), file.read_bytes()
    file.write_bytes(content[:-1])
    refused(out, f"cut short or damaged: {name} has {len(content) - 1} bytes of {len(content)}")
    file.unlink()
    refused(out, f"{name} is missing")
    file.write_bytes(bytes(len(content)))
    refused(out, "is damaged: the leaf ")
    file.write_bytes(content)
    edit_json(out / MANIFEST, lambda m: {**m, "leaves": {**m["leaves"], "norm.weight": ["float32", [63]]}})
    refused(out, "[63], expected [64] for norm.weight")
    edit_json(out / MANIFEST, lambda m: {**m, "leaves": {**m["leaves"], "norm.weight": ["float16", [64]]}})
    refused(out, "the leaf norm.weight cannot be read (it has ")


def edit_json(file: Path, change) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def refused(folder: Path, *messages: str) -> None:
    with pytest.raises(ValueError) as error:
        LLM(str(folder), **ENGINE)
    for message in messages:
        assert message in str(error.value)


def test_other_formats_are_refused(out):
    edit_json(out / MARK, lambda about: {**about, "format": FORMAT + 1})
    refused(out, f"has format {FORMAT + 1}; this version of jaxpaged reads formats up to {FORMAT}. Update jaxpaged")
    edit_json(out / MARK, lambda about: {"hello": 1})
    refused(out, "has no format number")
    (out / MARK).write_text("{")
    refused(out, "jaxpaged.json is not JSON")


def test_a_config_that_became_another_model_is_refused(out):
    edit(out, lambda config: {**config, "intermediate_size": 97})
    refused(out, "of another shape", "layers.0.mlp.gate_up.weight [192, 64], expected [194, 64]")


# -- what is never read -------------------------------------------------------------------------------------------------


def test_pickles_are_refused_with_the_command_that_converts_them(model, tmp_path):
    """The command works, for a file whose tensors share memory too."""
    x = {name: torch.from_numpy(array) for name, array in load_file(model / "model.safetensors").items()}
    wanted = generated(str(model))
    torch.save({**x, "lm_head.weight": x["lm_head.weight"].view_as(x["lm_head.weight"])}, model / "pytorch_model.bin")
    torch.save({"step": torch.ones(1)}, model / "optimizer.pt")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights only .optimizer.pt, pytorch_model.bin.*may run any code") as error:
        convert(model, tmp_path / "out", progress=False)
    command = str(error.value).splitlines()[-1].strip()
    assert command.startswith("python -c ")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert generated(str(model)) == wanted


def test_remote_code_is_refused_and_never_run(model, tmp_path):
    (model / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(model, lambda c: {**c, "model_type": "llamma", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    message = "'llamma' is not supported.*nearest.*: llama.*modeling_own.Own.: such code is never run"
    with pytest.raises(ValueError, match=message):
        convert(model, tmp_path / "out", progress=False)
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize("model_type, architectures, nearest", [
    ("qwen4", [], "qwen3, qwen2"), ("my_own", ["LlamaForCausalLM"], "llama"), ("gemma3n_text", [], "gemma3_text"),
])  # fmt: skip
def test_an_unknown_model_type_names_the_nearest(model_type, architectures, nearest):
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported; supported: .*nearest of these by name: {nearest}"):
        door(model_type, {"architectures": architectures})
    with pytest.raises(ValueError) as error:
        door("zzz")
    assert "nearest" not in str(error.value)
