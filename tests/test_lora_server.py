"""LoRA adapters over HTTP: each is a model of its own, loaded at the start or while the server runs."""

import httpx
import openai
import pytest
from live_server import serve
from scripted import scripted_service
from tiny_hf import logits_of, prompts
from tiny_lora import three as three

from jaxpaged.build import build_engine
from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import lora_modules, open_service

ENGINE = {"skip_tokenizer_init": True, "enforce_eager": True, "block_size": 16, "max_num_seqs": 4, "enable_lora": True,
          "max_num_batched_tokens": 64, "max_model_len": 160, "max_lora_rank": 8, "max_loras": 2}  # fmt: skip
IDS = prompts(40).tolist()


@pytest.fixture(scope="module")
def live(three):
    folder, _ = three
    built = build_engine(EngineConfig(model=str(folder / "model"), **ENGINE), progress=False)
    options = ServerOptions(served_model_name=("base",), lora_modules=(f"b={folder / 'b'}",), allow_runtime_lora_updating=True)
    with serve(open_service([built], options)) as live:
        yield live


def greedy(model, count=8) -> list[int]:
    ids = list(IDS)
    for _ in range(count):
        ids.append(int(logits_of(model, [ids])[0, -1].argmax()))
    return ids[len(IDS) :]


def test_an_adapter_is_a_model(three, live):
    with openai.OpenAI(base_url=live.base_url + "/v1", api_key="none", max_retries=0) as client:
        check_openai(three, client)


def check_openai(three, client):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"base", "b"} and cards["b"].parent == "base" and cards["b"].root == str(three[0] / "b")
    assert client.models.retrieve("b").id == "b"
    for name, key in (("base", None), ("b", "b")):
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = client.completions.create(model=name, prompt=IDS, max_tokens=8, temperature=0, extra_body=extra)
        assert answer.model == name and answer.choices[0].token_ids == greedy(three[1][key])
        chunks = client.completions.create(model=name, prompt=IDS, max_tokens=8, temperature=0, stream=True, extra_body=extra)
        assert [t for c in chunks for t in c.choices[0].token_ids or ()] == greedy(three[1][key])
    with pytest.raises(openai.NotFoundError, match="`wobble` does not exist; this server has base, b"):
        client.completions.create(model="wobble", prompt=IDS)


def test_every_api_takes_its_name(three, live):
    body = {"token_ids": IDS, "sampling_params": {"temperature": 0, "max_tokens": 8, "ignore_eos": True}}
    for asked in ({"model": "b"}, {"lora_name": "b"}):
        answer = httpx.post(live.base_url + "/inference/v1/generate", json={**body, **asked}, timeout=60).json()
        assert answer["model"] == "b" and answer["choices"][0]["token_ids"] == greedy(three[1]["b"])
    vectors = [httpx.post(live.base_url + "/v1/embeddings", json={"input": IDS, "model": model}, timeout=60).json()
               for model in ("base", "b")]  # fmt: skip
    assert vectors[1]["model"] == "b" and vectors[0]["data"][0]["embedding"] != vectors[1]["data"][0]["embedding"]


def test_chats_reach_it_through_every_api():
    """Chat, Responses and Messages hand the model's name on."""
    with serve(scripted_service("hello")) as live:
        asked, live.service.adapter = [], lambda name: asked.append(name)
        said = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        for path, body in (("chat/completions", said), ("messages", said), ("responses", {"model": "scripted", "input": "hi"})):
            assert httpx.post(f"{live.base_url}/v1/{path}", json=body, timeout=30).status_code == 200
        assert asked == ["scripted"] * 3


def test_loading_and_unloading_while_it_runs(three, live):
    folder, models = three
    send = lambda path, body: httpx.post(live.base_url + path, json=body, timeout=60)
    post = lambda path, **body: send(f"/v1/{path}_lora_adapter", body)
    answer = post("load", lora_name="c", lora_path=str(folder / "c"))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    generate = {"model": "c", "token_ids": IDS, "sampling_params": {"temperature": 0, "max_tokens": 8, "ignore_eos": True}}
    choose = lambda: send("/inference/v1/generate", generate).json()["choices"][0]["token_ids"]
    assert choose() == greedy(models["c"])
    again = post("load", lora_name="c", lora_path=str(folder / "b"))
    assert again.status_code == 400 and "'c' is loaded already" in again.json()["error"]["message"]
    assert post("load", lora_name="c", lora_path=str(folder / "b"), load_inplace=True).status_code == 200
    assert choose() == greedy(models["b"])
    assert post("unload", lora_name="c").text == "Success: LoRA adapter 'c' removed successfully."
    assert send("/inference/v1/generate", generate).status_code == 404
    assert post("unload", lora_name="c").status_code == 404
    own = post("load", lora_name="base", lora_path=str(folder / "b"))
    assert own.status_code == 400 and "is the name of the model itself" in own.json()["error"]["message"]
    missing = post("load", lora_name="d", lora_path="/nowhere")
    assert missing.status_code == 400 and "is no folder with adapter_config.json" in missing.json()["error"]["message"]


def test_an_adapter_at_the_start_cannot_have_the_models_name(three):
    folder = three[0]
    built = build_engine(EngineConfig(model=str(folder / "model"), **ENGINE), progress=False)
    options = ServerOptions(served_model_name=("base",), lora_modules=(f"base={folder / 'b'}",))
    with pytest.raises(RequestError, match="'base' is the name of the model itself"):
        open_service([built], options)
    built.engine.close()


def test_it_is_off_until_the_operator_allows_it():
    with serve(scripted_service("x")) as live:
        answer = httpx.post(live.base_url + "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"})
        assert answer.status_code == 403 and "--allow-runtime-lora-updating" in answer.json()["error"]["message"]


def test_modules_at_the_start():
    both = lora_modules(["sql=/a/b=c", '{"name": "x", "path": "/p", "base_model_name": "base"}'])
    assert [(one.lora_name, one.lora_path) for one in both] == [("sql", "/a/b=c"), ("x", "/p")]
    for wrong in ("sql", "=x", '{"name": "x"}', '{"name"'):
        with pytest.raises(RequestError, match="lora_modules"):
            lora_modules([wrong])
