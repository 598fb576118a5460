"""The clients that people have, pointed at the front door: nothing but address and key is changed.

Against the stand-in for Ollama, whose answers are known, and against real engines where they are
installed.  B9TESTS_NO_DOOR=1 asks the stand-in itself, to see that a test is right about a client."""
import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess

import pytest

import engines
from helpers import Program, RunningDoor, environment, quiet_port, wait_until

ollama, openai = pytest.importorskip("ollama"), pytest.importorskip("openai")

NO_DOOR = bool(os.environ.get("B9TESTS_NO_DOOR"))
CHAT, EYES, VECTORS = "llama3.2", "llava", "nomic-embed-text"
HELLO = [{"role": "user", "content": "good morning to you"}]
SAID = "You said: good morning to you"
PICTURE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5Erk"
                           "Jggg==")
SEEN = "image of %d bytes" % len(PICTURE)
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city", "parameters": {
        "type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}}}
ASKED = "please use get_weather for Paris"
pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]


class Bare:
    """The stand-in without a door, where RunningDoor would be."""

    token = "none"

    def __init__(self, folder):
        self.port = quiet_port()
        self.url = "http://127.0.0.1:%d" % self.port
        self.program = Program(
            [os.path.join(engines.stand_in(folder / "bin", "ollama"), "ollama"), "serve"],
            environment(folder, OLLAMA_HOST="127.0.0.1:%d" % self.port))

    def __enter__(self):
        self.program.wait_line("Listening on")
        client = ollama.Client(self.url)
        for name in (CHAT, EYES, VECTORS):
            client.pull(name)
        return self

    def __exit__(self, *_):
        self.program.__exit__()


@pytest.fixture(scope="module")
def door(tmp_path_factory, connections_closed):
    """In front of the stand-in for Ollama, with three models."""
    folder = tmp_path_factory.mktemp("door")
    with Bare(folder) if NO_DOOR else RunningDoor(folder, models=[CHAT, EYES, VECTORS]) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def connections_closed():
    """Clients keep their connections until nobody knows when: they are closed at the end."""
    import httpx
    made, begin = [], httpx.Client.__init__

    def noted(self, *given, **named):
        made.append(self)
        begin(self, *given, **named)
    httpx.Client.__init__ = noted
    yield
    httpx.Client.__init__ = begin
    for client in made:
        client.close()


@pytest.fixture(autouse=True)
def their_settings(monkeypatch, tmp_path):
    """Clients look for keys and addresses in the environment; none of the caller's is meant."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "OLLAMA_", "LANGCHAIN_", "LANGSMITH_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def native(door):
    """ollama.Client"""
    return ollama.Client(door.url, headers={"Authorization": "Bearer " + door.token})


@pytest.fixture
def official(door):
    """openai.OpenAI"""
    with openai.OpenAI(base_url=door.url + "/v1", api_key=door.token, max_retries=0) as client:
        yield client


def chat_ollama(door, model, **more):
    module = pytest.importorskip("langchain_ollama")
    return module.ChatOllama(model=model, base_url=door.url, client_kwargs={
        "headers": {"Authorization": "Bearer " + door.token}}, **more)


def chat_openai(door, model, **more):
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(model=model, base_url=door.url + "/v1", api_key=door.token, max_retries=0,
                             **more)


def langchain(door, model, **more):
    return [chat_ollama(door, model, **more), chat_openai(door, model, **more)]


# -- ollama's own client --------------------------------------------------

def test_ollama_chats(native):
    said = native.chat(CHAT, HELLO)
    assert said.message.content == SAID and said.done and said.done_reason == "stop"
    assert (said.eval_count, said.prompt_eval_count) == (7, 5) and said.model == CHAT
    assert said.total_duration > 0 and said.eval_duration > 0
    pieces = list(native.chat(CHAT, HELLO, stream=True))
    assert "".join(piece.message.content for piece in pieces) == SAID and len(pieces) == 8
    assert [piece.done for piece in pieces] == [False] * 7 + [True]
    assert (pieces[-1].eval_count, pieces[-1].prompt_eval_count) == (7, 5)


def test_ollama_generates(native):
    said = native.generate(CHAT, "good morning")
    assert said.response == "You said: good morning" and said.eval_count == 5
    pieces = list(native.generate(CHAT, "good morning", stream=True))
    assert "".join(piece.response for piece in pieces) == said.response and pieces[-1].done
    short = native.generate(CHAT, "good morning", options={"num_predict": 2, "temperature": 0.1})
    assert (short.response, short.done_reason, short.eval_count) == ("You said", "length", 2)
    assert json.loads(native.generate(CHAT, "x", format="json").response) == {"said": "yes"}


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_calls_a_tool_and_hears_what_came_of_it(native, stream):
    turns = [{"role": "user", "content": ASKED}]
    found = native.chat(CHAT, turns, tools=[WEATHER], stream=stream)
    pieces = list(found) if stream else [found]
    calls = [call for piece in pieces for call in piece.message.tool_calls or ()]
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Paris"})]
    assert pieces[-1].done and pieces[-1].eval_count == 3
    turns += [{"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "tool_name": "get_weather", "content": "rain"}]
    assert native.chat(CHAT, turns, tools=[WEATHER]).message.content.endswith("Paris rain")


def test_ollama_calls_a_function_of_python(native):
    def get_weather(city: str) -> str:
        """The weather.

        Args:
            city: which
        """
        return city
    (call,) = native.chat(CHAT, [{"role": "user", "content": ASKED}], tools=[get_weather]
                          ).message.tool_calls
    assert get_weather(**call.function.arguments) == "Paris"


def test_ollama_shows_a_picture(native, tmp_path):
    path = tmp_path / "dot.png"
    path.write_bytes(PICTURE)
    for picture in (PICTURE, str(path), base64.b64encode(PICTURE).decode()):
        said = native.chat(EYES, [{"role": "user", "content": "look", "images": [picture]}])
        assert said.message.content.endswith(SEEN) and said.prompt_eval_count == 102
    assert native.generate(EYES, "look", images=[PICTURE]).response.endswith(SEEN)
    with pytest.raises(ollama.ResponseError, match="image input is not supported"):
        native.chat(CHAT, [{"role": "user", "content": "look", "images": [PICTURE]}])


def test_ollama_embeds(native):
    found = native.embed(VECTORS, ["one", "two"])
    assert len(found.embeddings) == 2 and len(found.embeddings[0]) == 64
    assert found.embeddings[0] != found.embeddings[1] and found.prompt_eval_count
    assert list(native.embed(VECTORS, "one").embeddings[0]) == list(found.embeddings[0])
    assert len(native.embeddings(VECTORS, "one").embedding) == 64


def test_ollama_lists_and_shows(native):
    rows = {row.model: row for row in native.list().models}
    assert set(rows) == {name + ":latest" for name in (CHAT, EYES, VECTORS)}
    assert rows[CHAT + ":latest"].size > 0 and rows[CHAT + ":latest"].details.format == "gguf"
    shown = native.show(CHAT)
    assert "tools" in shown.capabilities and shown.details.family == "llama"
    native.generate(CHAT, "hello")
    (row,) = [row for row in native.ps().models if row.model == CHAT + ":latest"]
    assert row.expires_at and row.size_vram is not None


def test_ollama_is_told_what_went_wrong(native, door):
    with pytest.raises(ollama.ResponseError) as caught:
        native.chat("nobody", HELLO)
    assert caught.value.status_code == 404 and "nobody" in caught.value.error
    with pytest.raises(ollama.ResponseError) as caught:
        list(native.chat("nobody", HELLO, stream=True))
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError):
        native.show("nobody")
    pieces = native.chat(CHAT, [{"role": "user", "content": "[[tokens=9 fail_after=3]]"}], stream=True)
    with pytest.raises(ollama.ResponseError, match="unexpected EOF"):
        for number, _ in enumerate(pieces):
            assert number < 3
    assert native.chat(CHAT, HELLO).message.content == SAID


@pytest.mark.skipif(NO_DOOR, reason="it asks nobody for a token")
def test_a_bad_key_is_a_bad_key_to_each_client(door):
    for key in ("0" * 64, ""):
        headers = {"Authorization": "Bearer " + key} if key else {}
        client = ollama.Client(door.url, headers=headers)
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(CHAT, HELLO)
        assert caught.value.status_code == 401 and "token" in caught.value.error
        with pytest.raises(ollama.ResponseError):
            client.list()
    with openai.OpenAI(base_url=door.url + "/v1", api_key="0" * 64, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="token"):
            client.chat.completions.create(model=CHAT, messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.skipif(NO_DOOR, reason="it takes everything")
def test_a_key_in_the_environment_is_found(door, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", door.token)
    monkeypatch.setenv("OLLAMA_HOST", door.url)
    monkeypatch.setenv("OPENAI_API_KEY", door.token)
    monkeypatch.setenv("OPENAI_BASE_URL", door.url + "/v1")
    client = ollama.Client()
    assert client.chat(CHAT, HELLO).message.content == SAID
    with openai.OpenAI() as client:
        assert client.chat.completions.create(model=CHAT, messages=HELLO
                                              ).choices[0].message.content == SAID


# -- OpenAI's client --------------------------------------------------------

def test_openai_chats(official):
    said = official.chat.completions.create(model=CHAT, messages=HELLO)
    assert said.choices[0].message.content == SAID and said.choices[0].finish_reason == "stop"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (5, 7, 12)
    assert said.object == "chat.completion" and said.model == CHAT
    pieces = list(official.chat.completions.create(model=CHAT, messages=HELLO, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == SAID
    assert pieces[-1].choices[0].finish_reason == "stop" and pieces[0].choices[0].delta.role == "assistant"
    assert all(piece.usage is None for piece in pieces) and len({piece.id for piece in pieces}) == 1
    assert all(piece.object == "chat.completion.chunk" and piece.choices for piece in pieces)


def test_openai_is_told_the_usage_where_it_asks(official):
    *pieces, last = official.chat.completions.create(model=CHAT, messages=HELLO, stream=True,
                                                     stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 7 and last.usage.prompt_tokens == 5
    assert all(piece.choices for piece in pieces)


def test_openai_limits_an_answer(official):
    for more in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        if NO_DOOR and "max_completion_tokens" in more:
            continue  # Ollama does not know it; the door does
        said = official.chat.completions.create(model=CHAT, messages=HELLO, temperature=0.5, seed=1,
                                                top_p=0.9, stop=["never"], **more)
        assert said.choices[0].message.content == "You said" and said.usage.completion_tokens == 2
        assert said.choices[0].finish_reason == "length"


def test_openai_completes(official):
    said = official.completions.create(model=CHAT, prompt="good morning", max_tokens=16)
    assert said.choices[0].text == "You said: good morning" and said.usage.completion_tokens == 5
    pieces = list(official.completions.create(model=CHAT, prompt="good morning", stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == said.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_openai_calls_a_tool_and_hears_what_came_of_it(official):
    turns = [{"role": "user", "content": ASKED}]
    said = official.chat.completions.create(model=CHAT, messages=turns, tools=[WEATHER])
    (call,) = said.choices[0].message.tool_calls
    assert said.choices[0].finish_reason == "tool_calls" and call.type == "function" and call.id
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    pieces = list(official.chat.completions.create(model=CHAT, messages=turns, tools=[WEATHER], stream=True,
                                                   tool_choice="auto"))
    calls = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["get_weather"] and calls[0].index == 0 and calls[0].id
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Paris"}
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "tool_calls"
    turns += [said.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    said = official.chat.completions.create(model=CHAT, messages=turns, tools=[WEATHER])
    assert said.choices[0].message.content.endswith("Paris rain")


def test_openai_shows_a_picture(official):
    address = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    turns = [{"role": "user", "content": [{"type": "text", "text": "look"},
                                          {"type": "image_url", "image_url": {"url": address}}]}]
    said = official.chat.completions.create(model=EYES, messages=turns)
    assert said.choices[0].message.content.endswith(SEEN) and said.usage.prompt_tokens == 102
    pieces = official.chat.completions.create(model=EYES, messages=turns, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces).endswith(SEEN)
    turns[0]["content"][1]["image_url"]["url"] = "https://example.com/cat.png"
    with pytest.raises(openai.BadRequestError):  # nobody fetches what a client names
        official.chat.completions.create(model=EYES, messages=turns)


def test_openai_responds(official):
    said = official.responses.create(model=CHAT, input="good morning to you")
    assert said.output_text == SAID and said.status == "completed"
    assert (said.usage.input_tokens, said.usage.output_tokens) == (5, 7)
    events = list(official.responses.create(model=CHAT, input="good morning to you", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAID
    assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens == 7
    with pytest.raises(openai.NotFoundError, match="nobody"):
        official.responses.create(model="nobody", input="hello")


def test_anthropics_messages_are_answered(door):
    body = {"model": CHAT, "max_tokens": 50, "messages": HELLO}
    text, status = curl(door, "/v1/messages", body, "-H", "anthropic-version: 2023-06-01")
    said = json.loads(text)
    assert status == 200 and said["content"][0]["text"] == SAID and said["stop_reason"] == "end_turn"
    assert said["usage"] == {"input_tokens": 5, "output_tokens": 7}
    text, status = curl(door, "/v1/messages", dict(body, stream=True), "-N", "-H", "x-api-key: "
                        + door.token, key="")  # as its own clients send the key
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and events[-1]["type"] == "message_stop"
    assert "".join(event["delta"].get("text", "") for event in events
                   if event["type"] == "content_block_delta") == SAID


def test_openai_embeds(official):
    found = official.embeddings.create(model=VECTORS, input=["one", "two"])  # base64, as it asks by default
    assert [len(row.embedding) for row in found.data] == [64, 64] and found.usage.prompt_tokens
    plain = official.embeddings.create(model=VECTORS, input="one", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-6)


def test_openai_lists_models(official):
    rows = official.models.list().data
    assert {row.id for row in rows} == {name + ":latest" for name in (CHAT, EYES, VECTORS)}
    assert official.models.retrieve(CHAT + ":latest").id == CHAT + ":latest"
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("nobody")


def test_openai_is_told_what_went_wrong(official):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        official.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        official.chat.completions.create(model="nobody", messages=HELLO, stream=True)
    with pytest.raises(openai.BadRequestError):
        official.chat.completions.create(model=CHAT, messages=[])
    assert official.chat.completions.create(model=CHAT, messages=HELLO).choices[0].message.content == SAID


@pytest.mark.skipif(NO_DOOR, reason="Ollama swallows it")
def test_openai_is_told_of_an_error_in_mid_stream(official):
    pieces = official.chat.completions.create(model=CHAT, stream=True, messages=[
        {"role": "user", "content": "[[tokens=9 fail_after=3]]"}])
    came = 0
    with pytest.raises(openai.APIError):
        for piece in pieces:
            came += bool(piece.choices and piece.choices[0].delta.content)
    assert came == 3


def test_openai_asks_many_things_at_once(door):
    async def ask():
        async with openai.AsyncOpenAI(base_url=door.url + "/v1", api_key=door.token,
                                      max_retries=0) as client:
            async def one(number):
                stream = await client.chat.completions.create(model=CHAT, stream=True, messages=[
                    {"role": "user", "content": "number %d" % number}])
                return "".join([piece.choices[0].delta.content or "" async for piece in stream])
            return await asyncio.gather(*map(one, range(24)))
    assert asyncio.run(ask()) == ["You said: number %d" % number for number in range(24)]


def test_ollama_asks_many_things_at_once(door):
    async def ask():
        client = ollama.AsyncClient(door.url, headers={"Authorization": "Bearer " + door.token})

        async def one(number):
            stream = await client.chat(CHAT, [{"role": "user", "content": "number %d" % number}],
                                       stream=True)
            return "".join([piece.message.content async for piece in stream])
        try:
            return await asyncio.gather(*map(one, range(24)))
        finally:
            await client._client.aclose()
    assert asyncio.run(ask()) == ["You said: number %d" % number for number in range(24)]


# -- LangChain ----------------------------------------------------------------

def test_langchain_chats(door):
    for model in langchain(door, CHAT):
        said = model.invoke("good morning to you")
        assert said.content == SAID, model
        assert (said.usage_metadata["input_tokens"], said.usage_metadata["output_tokens"]) == (5, 7), model
        assert "".join(piece.content for piece in model.stream("good morning to you")) == SAID, model
        said = model.invoke([("system", "be kind"), ("human", "hello"), ("ai", "hello"), ("human", "hey")])
        assert said.content == "You said: be kind hello hello hey", model


def test_langchain_calls_a_tool_and_hears_what_came_of_it(door):
    messages = pytest.importorskip("langchain_core.messages")
    for model in langchain(door, CHAT):
        bound = model.bind_tools([WEATHER])
        said = bound.invoke(ASKED)
        (call,) = said.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), model
        whole = None
        for piece in bound.stream(ASKED):
            whole = piece if whole is None else whole + piece
        assert [(each["name"], each["args"]) for each in whole.tool_calls] == [
            ("get_weather", {"city": "Paris"})], model
        end = bound.invoke([messages.HumanMessage(ASKED), said,
                            messages.ToolMessage("rain", tool_call_id=call["id"], name="get_weather")])
        assert end.content.endswith("Paris rain"), model


def test_langchain_shows_a_picture(door):
    messages = pytest.importorskip("langchain_core.messages")
    address = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    turn = messages.HumanMessage([{"type": "text", "text": "look"},
                                  {"type": "image_url", "image_url": {"url": address}}])
    for model in langchain(door, EYES):
        assert model.invoke([turn]).content.endswith(SEEN), model


def test_langchain_embeds(door):
    theirs = pytest.importorskip("langchain_ollama").OllamaEmbeddings(
        model=VECTORS, base_url=door.url, client_kwargs={
            "headers": {"Authorization": "Bearer " + door.token}})
    assert [len(row) for row in theirs.embed_documents(["one", "two"])] == [64, 64]
    other = pytest.importorskip("langchain_openai").OpenAIEmbeddings(
        model=VECTORS, base_url=door.url + "/v1", api_key=door.token, max_retries=0,
        check_embedding_ctx_length=False)  # else it sends numbers of tokens that another model counts
    assert other.embed_query("one") == pytest.approx(theirs.embed_query("one"), abs=1e-6)


def test_langchain_is_told_what_went_wrong(door):
    with pytest.raises(ollama.ResponseError, match="nobody"):
        chat_ollama(door, "nobody").invoke("hello")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat_openai(door, "nobody").invoke("hello")


# -- curl -----------------------------------------------------------------------

def curl(door, path, body=None, *flags, key=None):
    """(what it printed, status)."""
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    words = ["curl", "-sS", "-w", "\n%{http_code}", "--noproxy", "*", "--max-time", "60", *flags]
    if key != "":
        words += ["-H", "Authorization: Bearer " + (key or door.token)]
    if body is not None:
        words += ["--data-binary", "@-"]
    done = subprocess.run(words + [door.url + path], input=b"" if body is None else json.dumps(body).encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.decode().rpartition("\n")
    return text, int(status)


@pytest.mark.parametrize("http", ["--http1.1", "--http1.0"])
def test_curl_streams(door, http):
    text, status = curl(door, "/api/chat", {"model": CHAT, "messages": HELLO}, "-N", http)
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and "".join(line["message"]["content"] for line in lines) == SAID
    assert lines[-1]["done"] is True and lines[-1]["eval_count"] == 7
    text, status = curl(door, "/v1/chat/completions", {"model": CHAT, "messages": HELLO, "stream": True},
                        "-N", http)
    events = [line[6:] for line in text.splitlines() if line]
    assert status == 200 and events[-1] == "[DONE]" and all(json.loads(each) for each in events[:-1])
    text, status = curl(door, "/api/generate", {"model": CHAT, "prompt": "hi", "stream": False}, http)
    assert status == 200 and json.loads(text)["response"] == "You said: hi"


def test_curl_sends_three_megabytes_and_asks_whether_it_may(door):
    picture = base64.b64encode(bytes(3 << 20)).decode()
    body = {"model": EYES, "prompt": "look", "stream": False, "images": [picture]}
    for flags in (["-H", "Expect: 100-continue"], ["-H", "Expect:"]):
        text, status = curl(door, "/api/generate", body, *flags)
        assert status == 200 and json.loads(text)["response"].endswith("image of 3145728 bytes"), text[:300]


def test_who_asks_whether_it_may_send_is_told_before_it_does(door):
    body = json.dumps({"model": CHAT, "prompt": "hi", "stream": False}).encode()
    with socket.create_connection(("127.0.0.1", door.port), 20) as link:
        link.sendall(("POST /api/generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
                      "Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (
                          door.token, len(body))).encode())
        assert link.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(body)
        with link.makefile("rb") as stream:
            answer = stream.read()
    assert answer.startswith(b"HTTP/1.1 200 ") and b"You said: hi" in answer


def test_curl_looks_around(door):
    for path in ("/", "/health")[:1 if NO_DOOR else 2]:
        text, status = curl(door, path, None, key="")
        assert status == 200 and text
        assert curl(door, path, None, "-I", key="")[1] == 200
    assert json.loads(curl(door, "/api/version")[0])["version"] == "0.33.0"
    assert {row["name"] for row in json.loads(curl(door, "/api/tags")[0])["models"]} == {
        name + ":latest" for name in (CHAT, EYES, VECTORS)}
    assert curl(door, "/api/show", {"model": "nobody"})[1] == 404
    assert "not found" in curl(door, "/api/nothing")[0].lower() or curl(door, "/api/nothing")[1] == 404
    assert curl(door, "/api/chat")[1] == 405


# -- real engines -----------------------------------------------------------------

def real_engine(name):
    """(its program's folder, a model that it loads)."""
    program, model = {"llama-server": (engines.llama_server, engines.tiny_gguf),
                      "mlx": (engines.mlx_server, engines.tiny_mlx)}[name]
    return os.path.dirname(program()), model()


@pytest.fixture(scope="module", params=["llama-server", "mlx"])
def real(request, tmp_path_factory):
    """A door in front of a real engine with a tiny model."""
    folder, model = real_engine(request.param)
    with RunningDoor(tmp_path_factory.mktemp("real"), "", program_folder=folder, kind=request.param,
                     model=model) as running:
        (running.served,) = running.status()["models"]
        yield running


@pytest.mark.timeout(300)
def test_real_engines_answer_each_client(real):
    model, url, headers = real.served, real.url, {"Authorization": "Bearer " + real.token}
    with openai.OpenAI(base_url=url + "/v1", api_key=real.token, max_retries=0) as client:
        said = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
        assert 1 <= said.usage.completion_tokens <= 8 and said.usage.prompt_tokens > 0
        *pieces, last = client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True})
        assert last.usage.completion_tokens == said.usage.completion_tokens and last.choices == []
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces
                       if piece.choices) == said.choices[0].message.content
        assert not any(piece.usage for piece in client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=4, stream=True))
        done = client.completions.create(model=model, prompt="hello", max_tokens=4, temperature=0)
        assert 1 <= done.usage.completion_tokens <= 4
        assert list(client.completions.create(model=model, prompt="hello", max_tokens=4, stream=True))
        assert [row.id for row in client.models.list().data] == [model]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=HELLO)
    theirs = ollama.Client(url, headers=headers)
    native = theirs.chat(model, HELLO, options={"num_predict": 8, "temperature": 0})
    assert native.message.content == said.choices[0].message.content
    assert native.eval_count == said.usage.completion_tokens and native.done
    pieces = list(theirs.chat(model, HELLO, stream=True, options={"num_predict": 8, "temperature": 0}))
    assert "".join(piece.message.content for piece in pieces) == native.message.content
    assert pieces[-1].done and pieces[-1].eval_count == native.eval_count
    assert theirs.generate(model, "hello", options={"num_predict": 4}).eval_count >= 1
    assert [row.model for row in theirs.list().models]
    with pytest.raises(ollama.ResponseError):
        theirs.chat("nobody", HELLO)


@pytest.mark.timeout(300)
def test_real_engines_answer_langchain_and_curl(real):
    for chat in (chat_ollama(real, real.served, num_predict=6, temperature=0),
                 chat_openai(real, real.served, max_tokens=6, temperature=0)):
        said = chat.invoke("hello")
        assert said.content and 1 <= said.usage_metadata["output_tokens"] <= 6, chat
        assert "".join(piece.content for piece in chat.stream("hello")) == said.content, chat
    text, status = curl(real, "/v1/chat/completions", {"model": real.served, "messages": HELLO, "stream": True,
                                                       "max_tokens": 4}, "-N")
    assert status == 200 and text.rstrip().endswith("data: [DONE]")
    text, status = curl(real, "/api/chat", {"model": real.served, "messages": HELLO, "options":
                                            {"num_predict": 4}}, "-N")
    assert status == 200 and json.loads(text.splitlines()[-1])["done"] is True


@pytest.mark.timeout(300)
def test_a_client_that_leaves_ends_the_real_engines_work(real):
    with openai.OpenAI(base_url=real.url + "/v1", api_key=real.token, max_retries=0) as client:
        stream = client.chat.completions.create(model=real.served, messages=HELLO, max_tokens=400,
                                                stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: real.metrics().get(("b9agent_door_streams", ()), 0) == 0, "nothing streams", 30)
        assert client.chat.completions.create(model=real.served, messages=HELLO, max_tokens=2).usage
