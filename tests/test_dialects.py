"""Dialects: what clients ask, what engines are asked, and what comes back, in pieces cut anywhere.
The samples of streams and errors are invented, in the forms in which the engines answer."""
import base64
import http.client
import json
import os
import re
import struct

import pytest
from hypothesis import given, settings, strategies as st

import b9agent
import engines
from helpers import Program, environment, quiet_port, wait_until
from b9agent import ENGINE_BY_NAME as ENGINES, HttpError, engine_request, make_flow, read_ask, \
    whole_answer

FAST = settings(derandomize=True, database=None, deadline=None, max_examples=60)
PICTURE = "data:image/png;base64,iVBORw0KGgo="
USER = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": {
    "type": "object", "properties": {"url": {"type": "string"}}}}}


def ask(dialect, task, **body):
    return read_ask(dialect, task, json.dumps(dict({"model": "m"}, **body)).encode())


def request(asked, engine, tokens=100, context=8192, model="engine/m"):
    """(Wire, its body)."""
    wire = engine_request(asked, ENGINES[engine], model, tokens, context)
    return wire, json.loads(wire.body)


def refusal(call, *arguments, **named):
    with pytest.raises(HttpError) as caught:
        call(*arguments, **named)
    return caught.value


class Clock:
    """Nanoseconds; a millisecond passes at each look."""
    now = 0

    def __call__(self):
        self.now += 1000000
        return self.now


def flow_of(asked, engine, request_id="1"):
    wire, _ = request(asked, engine)
    return make_flow(asked, wire, request_id, Clock())


def run(asked, engine, pieces, problem=""):
    """(what the client gets, the flow) of an answer in these pieces."""
    flow = flow_of(asked, engine)
    out = b"".join([flow.feed(piece) for piece in pieces])
    return out + flow.end(problem), flow


def events(raw):
    """The data of server-sent events, decoded; [DONE] as it is.  Every event is well-formed."""
    assert raw.endswith(b"\n\n"), raw[-80:]
    found = []
    for event in raw.decode().split("\n\n")[:-1]:
        lines = [line for line in event.split("\n") if not line.startswith(":") and line]
        data = [line[6:] for line in lines if line.startswith("data: ")]
        assert len(data) == 1 and all(line.startswith(("data: ", "event: ")) for line in lines), event
        found.append(data[0] if data[0] == "[DONE]" else json.loads(data[0]))
    return found


def lines(raw):
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.decode().split("\n")[:-1]]


# ---------------------------------------------------------------------- samples

def sse(*values, separators=(",", ":"), end="\n\n"):
    return b"".join(b"data: " + (value if isinstance(value, str) else json.dumps(
        value, separators=separators, ensure_ascii=False)).encode() + end.encode() for value in values)


def chunk(delta, reason=None, **more):
    return dict({"id": "chatcmpl-e", "object": "chat.completion.chunk", "created": 1, "model": "engine/m",
                 "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]},
                **more)


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
TRICK = '"content":"x" \n\ndata: [DONE] "usage":{"prompt_tokens":1} é \u2028"model":"engine/m"'
VLLM = sse(chunk({"role": "assistant", "content": ""}), chunk({"content": "Hi"}), chunk({"content": TRICK}),
           chunk({"content": "!"}, "stop"), dict(chunk({}), choices=[], usage=USAGE), "[DONE]")
SGLANG = sse(chunk({"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None},
                   usage=None), chunk({"role": None, "content": "Hi", "tool_calls": None}, usage=None),
             chunk({"content": TRICK, "reasoning_content": None}, usage=None),
             chunk({"content": "!"}, usage=None), chunk({"content": None}, "stop", usage=None),
             dict(chunk({}), choices=[], usage=USAGE), "[DONE]")
LLAMA = sse(chunk({"role": "assistant", "content": None}), chunk({"content": "Hi"}), chunk({"content": TRICK}),
            chunk({"content": "!"}), chunk({}, "stop", timings={"prompt_n": 9}),
            dict(chunk({}), choices=[], usage=USAGE), "[DONE]")
MLX = b": keepalive 1/9\n\n" + sse(
    *[chunk({"role": "assistant", "content": text, "reasoning": "", "tool_calls": []}, reason,
            model="default_model") for text, reason in (("Hi", None), (TRICK, None), ("!", None), ("", "stop"))],
    dict(chunk({}), model="default_model", choices=[], usage=USAGE), "[DONE]", separators=(", ", ": "))
CRLF = VLLM.replace(b"\n", b"\r\n")
OPENAI_STREAMS = {"vllm": VLLM, "sglang": SGLANG, "llama-server": LLAMA, "mlx": MLX}


def said(**more):
    return dict({"model": "engine/m", "created_at": "2026-01-02T03:04:05.6Z"}, **more)


def ndjson(*values):
    return b"".join(json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace(
        "\u2028", "\\u2028").encode() + b"\n" for value in values)  # as Go writes it


def message(content, **more):
    return {"message": dict({"role": "assistant", "content": content}, **more)}


FIGURES = {"total_duration": 812000000, "load_duration": 41000000, "prompt_eval_count": 9,
           "prompt_eval_duration": 60000000, "eval_count": 3, "eval_duration": 690000000}
OLLAMA = ndjson(said(**message("Hi"), done=False), said(**message(TRICK), done=False),
                said(**message("!"), done=False),
                said(**message(""), done=True, done_reason="stop", **FIGURES))
OLLAMA_TOOLS = ndjson(
    said(**message("", thinking="hm"), done=False),
    said(**message("", tool_calls=[{"function": {"name": "weather", "arguments": {
        "content": "forged", "done": True, "x": [{"done": False}]}}}]), done=False),
    said(**message(""), done=True, done_reason="stop", **FIGURES))
VLLM_TOOLS = sse(
    chunk({"role": "assistant", "content": ""}), chunk({"reasoning": "hm"}),
    chunk({"tool_calls": [{"index": 0, "id": "call_a", "type": "function", "function": {
        "name": "weather", "arguments": ""}}]}),
    *[chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
      for part in ('{"place"', ': "Par', 'is"}')],
    chunk({"tool_calls": [{"index": 1, "id": "call_b", "type": "function", "function": {
        "name": "now", "arguments": "{}"}}]}), chunk({}, "tool_calls"),
    dict(chunk({}), choices=[], usage=USAGE), "[DONE]")
GENERATE = ndjson(*[said(response=text, done=False) for text in ("Hi", TRICK, "!")], said(
    response="", done=True, done_reason="length", context=[1, 2, 3], **FIGURES))
COMPLETIONS = sse(*[dict(chunk({}), object="text_completion", choices=[
    {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}])
    for text, reason in (("Hi", None), (TRICK, None), ("!", "length"))],
    dict(chunk({}), choices=[], usage=USAGE), "[DONE]")


def named_events(*values):
    return b"".join(b"event: " + value["type"].encode() + b"\n" + sse(value) for value in values)


MESSAGES = named_events(
    {"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model":
     "engine/m", "content": [], "usage": {"input_tokens": 2, "output_tokens": 0}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    *[{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
      for text in ("Hi", TRICK, "!")],
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {
        "input_tokens": 9, "output_tokens": 3}}, {"type": "message_stop"})
RESPONSES = named_events(
    {"type": "response.created", "response": {"id": "resp_1", "model": "engine/m", "usage": None}},
    *[{"type": "response.output_text.delta", "item_id": "i", "delta": text} for text in ("Hi", TRICK, "!")],
    {"type": "response.output_text.done", "text": "Hi!"},
    {"type": "response.completed", "response": {"id": "resp_1", "model": "engine/m", "usage": {
        "input_tokens": 9, "output_tokens": 3, "total_tokens": 12}}})

CHAT = {"messages": USER}
OPENAI_CHAT = ask("openai", "chat", stream=True, **CHAT)
OLLAMA_CHAT = ask("ollama", "chat", **CHAT)
STREAMS = (
    *[("OpenAI from " + engine, OPENAI_CHAT, engine, raw) for engine, raw in OPENAI_STREAMS.items()],
    ("OpenAI with CRLF", OPENAI_CHAT, "vllm", CRLF),
    ("OpenAI's completions", ask("openai", "complete", prompt="x", stream=True), "vllm", COMPLETIONS),
    ("Ollama's chat", OLLAMA_CHAT, "ollama", OLLAMA),
    ("Ollama's generate", ask("ollama", "complete", prompt="x"), "ollama", GENERATE),
    ("messages", ask("anthropic", "messages", max_tokens=5, stream=True, **CHAT), "vllm", MESSAGES),
    ("responses", ask("openai", "responses", input="x", stream=True), "vllm", RESPONSES),
    ("OpenAI of Ollama", OPENAI_CHAT, "ollama", OLLAMA),
    ("completions of Ollama", ask("openai", "complete", prompt="x", stream=True), "ollama", GENERATE),
    *[("Ollama of " + engine, OLLAMA_CHAT, engine, raw) for engine, raw in OPENAI_STREAMS.items()],
    ("generate of vLLM", ask("ollama", "complete", prompt="x"), "vllm", VLLM),
    ("raw generate of vLLM", ask("ollama", "complete", prompt="x", raw=True), "vllm", COMPLETIONS))


def text_of(asked, raw):
    """What a client would show of a stream."""
    if asked.dialect == "ollama":
        return "".join(line.get("response", "") + line.get("message", {}).get("content", "")
                       for line in lines(raw))
    whole = ""
    for event in events(raw):
        delta = event.get("delta") if event != "[DONE]" else None
        whole += delta if isinstance(delta, str) else (delta or {}).get("text", "")
        for choice in event.get("choices", ()) if event != "[DONE]" else ():
            whole += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return whole


def frozen(raw):
    """A stream without the times in it."""
    values = lines(raw) if raw[:1] == b"{" else events(raw)
    for value in values:
        if isinstance(value, dict):
            for name in ("created", "created_at", "total_duration", "prompt_eval_duration", "eval_duration"):
                value.pop(name, None)
    return values


# ---------------------------------------------------------------------- streams

@pytest.mark.parametrize("asked,engine,raw", [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS])
def test_a_stream_comes_whole_wherever_it_is_cut(asked, engine, raw):
    whole, flow = run(asked, engine, [raw])
    assert text_of(asked, whole) == "Hi" + TRICK + "!"
    assert flow.complete and flow.usage.error == ""
    figures = (flow.usage.prompt_tokens, flow.usage.completion_tokens, flow.usage.pieces)
    assert figures == (9, 3, 3)
    assert b"engine/m\\" in whole and b'"model":"engine/m"' not in whole.replace(b" ", b"")
    assert b"default_model" not in whole
    ends = [at + 1 for at in range(len(raw)) if raw[at:at + 1] == b"\n"]
    cuts = [[raw[:at], raw[at:]] for at in range(1, len(raw))]
    cuts += [[raw[at:at + 1] for at in range(len(raw))],
             [raw[first:last] for first, last in zip([0] + ends, ends)]]
    if raw.count(b"\n\n"):
        cuts.append([part + b"\n\n" for part in raw.split(b"\n\n")[:-1]])  # as engines send it
    for pieces in cuts:
        out, flow = run(asked, engine, pieces)
        assert flow.complete and not flow.usage.error
        assert (flow.usage.prompt_tokens, flow.usage.completion_tokens, flow.usage.pieces) == figures
        if out != whole:  # but for the second in which it was made
            assert frozen(out) == frozen(whole)


@FAST
@given(st.sampled_from(STREAMS), st.lists(st.integers(1, 2000), max_size=30))
def test_a_stream_comes_whole_however_often_it_is_cut(row, places):
    _, asked, engine, raw = row
    places = sorted({place for place in places if place < len(raw)})
    pieces = [raw[first:last] for first, last in zip([0] + places, places + [len(raw)])]
    assert frozen(run(asked, engine, pieces)[0]) == frozen(run(asked, engine, [raw])[0])


@pytest.mark.parametrize("asked,engine,raw", [row[1:] for row in STREAMS], ids=[row[0] for row in STREAMS])
def test_a_stream_that_breaks_ends_in_an_error_of_the_clients_dialect(asked, engine, raw):
    for at in range(0, len(raw) - 14, 7):  # the last event is the engine's last word
        for problem in ("", "the engine closed the connection"):
            out, flow = run(asked, engine, [raw[:at]], problem)
            if flow.complete:
                continue  # all but the line end of its last word came
            expected = problem or "the engine ended its answer before it was done"
            assert expected in flow.usage.error or "no JSON" in flow.usage.error
            if asked.dialect == "ollama":
                assert lines(out)[-1]["error"] == flow.usage.error
                assert not any(line.get("done") for line in lines(out))
                continue
            last = events(out)[-1]
            assert "[DONE]" not in events(out)
            said_error = last if last.get("type") == "error" and "error" not in last else last["error"]
            assert said_error["message"] == flow.usage.error


def test_pieces_are_counted_where_no_figures_come():
    for raw in (VLLM, SGLANG, LLAMA, MLX):
        cut = raw[:raw.rindex(b"data: ", 0, raw.rindex(b"data: "))]
        _, flow = run(OPENAI_CHAT, "vllm", [part + b"\n\n" for part in cut.split(b"\n\n")[:-1]], "gone")
        assert flow.usage.pieces == 3 and flow.usage.completion_tokens is None
    out, flow = run(OPENAI_CHAT, "vllm", [VLLM_TOOLS[:VLLM_TOOLS.index(b'"tool_calls"}')]], "gone")
    assert flow.usage.pieces == 6  # thoughts, a name, three parts of arguments, another name


def test_usage_is_shown_to_those_who_asked_and_hidden_from_others():
    asked = ask("openai", "chat", stream=True, stream_options={"include_usage": True}, **CHAT)
    for engine, raw in dict(OPENAI_STREAMS, ollama=OLLAMA).items():
        shown, hidden = events(run(asked, engine, [raw])[0]), events(run(OPENAI_CHAT, engine, [raw])[0])
        assert shown[-2]["choices"] == [] and shown[-2]["usage"]["completion_tokens"] == 3
        assert len(shown) == len(hidden) + 1 and hidden[-1] == "[DONE]"
        assert not any(event.get("usage") for event in hidden[:-1])


def test_a_forged_end_within_arguments_ends_nothing():
    out, flow = run(OLLAMA_CHAT, "ollama", [OLLAMA_TOOLS])
    assert out == OLLAMA_TOOLS.replace(b"engine/m", b"m") and flow.usage.pieces == 2
    event = ndjson(said(**message("", tool_calls=[{"function": {"name": "f", "arguments": {"done": True}}}]),
                        done=False))
    out, flow = run(OLLAMA_CHAT, "ollama", [event] * 3)
    assert not flow.complete and flow.usage.pieces == 3


def test_calls_of_tools_from_ollama_to_openai():
    out, flow = run(OPENAI_CHAT, "ollama", [OLLAMA_TOOLS])
    found = events(out)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "reasoning": "hm"}
    call = found[1]["choices"][0]["delta"]["tool_calls"][0]
    assert call["index"] == 0 and call["id"] == "call_1_0" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["content"] == "forged"
    assert found[2]["choices"][0]["finish_reason"] == "tool_calls" and found[3] == "[DONE]"
    assert flow.usage.load_s == 0.041


def test_calls_of_tools_from_openai_to_ollama_are_joined():
    for pieces in ([VLLM_TOOLS], [VLLM_TOOLS[at:at + 1] for at in range(len(VLLM_TOOLS))]):
        found = lines(run(OLLAMA_CHAT, "vllm", pieces)[0])
        assert found[0]["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
        assert [(call["function"]["name"], call["function"]["arguments"])
                for call in found[1]["message"]["tool_calls"]] == [("weather", {"place": "Paris"}), ("now", {})]
        assert found[2]["done"] and found[2]["done_reason"] == "stop" and found[2]["eval_count"] == 3
        assert found[2]["total_duration"] >= found[2]["eval_duration"] > 0
    broken = VLLM_TOOLS.replace(b'is\\"}', b"is")
    out, flow = run(OLLAMA_CHAT, "vllm", [broken])
    assert "arguments" in lines(out)[-1]["error"] and not flow.complete


@pytest.mark.parametrize("line,text", [
    (b'{"error":"an error was encountered while running the model: unexpected EOF"}', "unexpected EOF"),
    (b'{"error":{"message":"boom","code":500}}', "boom"), (b'{"object":"error","message":"boom"}', "boom"),
    (b'{"error":"cannot open /home/alice/models/secret.gguf"}', "cannot open …/secret.gguf"),
    (b"no json", "no JSON"), (b"[1]", "no JSON"), (b'{"a":' * 2000, "no JSON")])
def test_an_error_in_the_middle_reaches_the_client(line, text):
    for asked, engine, raw in ((OLLAMA_CHAT, "ollama", OLLAMA), (OPENAI_CHAT, "ollama", OLLAMA),
                               (OPENAI_CHAT, "vllm", VLLM), (OLLAMA_CHAT, "vllm", VLLM)):
        first = raw[:raw.index(b"\n\n" if engine == "vllm" else b"\n") + 2 - (engine == "ollama")]
        error = (b"data: " + line + b"\n\n" if engine == "vllm" else line + b"\n")
        out, flow = run(asked, engine, [first, error, raw])
        assert text in flow.usage.error and not flow.complete and "/home" not in out.decode()
        if asked.dialect == "ollama":
            assert text in lines(out)[-1]["error"]
        else:
            assert text in events(out)[-1]["error"]["message"] and "[DONE]" not in events(out)


def test_errors_of_anthropic_and_of_responses():
    row = {row[0]: row for row in STREAMS}
    _, asked, _, raw = row["messages"]
    error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'
    out, flow = run(asked, "vllm", [raw[:raw.index(b"event: content_block_delta")], error])
    assert flow.usage.error == "busy" and out.count(b"event: error\n") == 2  # the engine's name, and ours
    assert events(out)[-1]["error"]["message"] == "busy"
    _, asked, _, raw = row["responses"]
    failed = named_events({"type": "response.failed", "response": {"error": {"message": "boom"}}})
    out, flow = run(asked, "vllm", [failed])
    assert flow.usage.error == "boom" and events(out)[0]["type"] == "response.failed"
    ended = named_events({"type": "response.incomplete", "response": {"usage": {"output_tokens": 2}}})
    assert run(asked, "vllm", [ended])[1].complete


def test_a_stream_of_messages_that_breaks_has_no_figure_of_what_was_made():
    row = {row[0]: row for row in STREAMS}["messages"]
    _, flow = run(row[1], "vllm", [row[3][:row[3].index(b"event: content_block_stop")]], "gone")
    assert (flow.usage.prompt_tokens, flow.usage.completion_tokens, flow.usage.pieces) == (2, None, 3)


def test_figures_beside_a_text_are_taken_and_nothing_after_the_end():
    both = chunk({"content": "?"}, usage=USAGE)
    out, flow = run(OPENAI_CHAT, "vllm", [sse(chunk({"content": "Hi"})), sse(both), sse("[DONE]"), sse(both)])
    assert (flow.usage.prompt_tokens, flow.usage.completion_tokens, flow.usage.pieces) == (9, 3, 2)
    assert len(events(out)) == 3
    for asked, raw in ((OLLAMA_CHAT, OLLAMA), (OPENAI_CHAT, OLLAMA)):
        out, flow = run(asked, "ollama", [raw, raw])
        assert out == run(asked, "ollama", [raw])[0] and flow.usage.pieces == 3
        cut, flow = run(asked, "ollama", [raw[:-1]])  # Ollama's answer in one piece has no line end
        assert flow.complete and frozen(cut) == frozen(out)
    flow = run(OLLAMA_CHAT, "ollama", [ndjson(said(**message(""), done=True, done_reason="stop"))])[1]
    assert (flow.usage.prompt_tokens, flow.usage.completion_tokens) == (0, 0)  # it leaves zeros out


def test_a_line_without_an_end_is_not_kept():
    for asked, engine in ((OPENAI_CHAT, "vllm"), (OLLAMA_CHAT, "ollama"), (OLLAMA_CHAT, "vllm")):
        flow = flow_of(asked, engine)
        out = b"".join([flow.feed(b"x" * 65536) for _ in range(200)])
        assert "without an end" in flow.usage.error and len(out) < 500
        assert flow.feed(b"data: {}\n\n") == b"" and flow.end("") == b""


@FAST
@given(st.sampled_from(STREAMS), st.lists(st.binary(max_size=60), max_size=5), st.integers(0, 2000))
def test_no_bytes_of_an_engine_raise(row, junk, at):
    _, asked, engine, raw = row
    out, flow = run(asked, engine, [raw[:at]] + junk + [raw[at:]])
    assert flow.complete or flow.usage.error
    assert out


ODD = st.sampled_from([None, True, 0, -1, 10 ** 30, 1.5, "", "x", [], [1], ["x"], {}, {"x": 1}, [[]], [{}],
                       [{"function": 3}], {"content": 3}, {"content": [1]}, {"message": {"x": 1}}])


def places_in(value, path=()):
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(
            value if isinstance(value, list) else ()):
        found += places_in(inner, path + (key,))
    return found


def changed(value, path, new):
    if not path:
        return new
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


PARSED = [(asked, engine, raw, [json.loads(line[line.index(b"{"):]) for line in raw.split(b"\n") if b"{" in line])
          for _, asked, engine, raw in STREAMS + (("", OPENAI_CHAT, "ollama", OLLAMA_TOOLS),
                                                  ("", OLLAMA_CHAT, "vllm", VLLM_TOOLS))]


@settings(FAST, max_examples=600)
@given(st.data())
def test_no_shape_of_an_engines_json_raises(data):
    asked, engine, raw, values = data.draw(st.sampled_from(PARSED))
    number = data.draw(st.integers(0, len(values) - 1))
    path = data.draw(st.sampled_from(places_in(values[number])))
    values = values[:number] + [changed(values[number], path, data.draw(ODD))] + values[number + 1:]
    write = ndjson if engine == "ollama" else sse
    out, flow = run(asked, engine, [write(value) for value in values] + [b"data: [DONE]\n\n"], "gone")
    assert flow.complete or flow.usage.error
    wire, _ = request(asked, engine)
    whole = json.loads(json.dumps(values[number]).replace('"delta"', '"message"'))
    for status in (200, 400, 500):
        answered = whole_answer(asked, wire, status, json.dumps(whole).encode(), "1")
        json.loads(answered[1])


# ---------------------------------------------------------------------- what is asked

# As the official SDKs, LangChain and curl send it.
TAKEN = (
    ("openai", "chat", dict(CHAT, temperature=0.5, top_p=1, n=1, stop=["a"], seed=1, user="u", metadata={"a": "b"},
                            store=False, parallel_tool_calls=True, service_tier="auto", logit_bias={"5": 1},
                            response_format={"type": "json_object"}, tools=[TOOL], tool_choice="auto",
                            reasoning_effort="low", max_completion_tokens=5, logprobs=True, top_logprobs=2,
                            stream_options={"include_usage": True}, stream=True, frequency_penalty=0,
                            presence_penalty=0.0, top_k=5, min_p=0.1, repetition_penalty=1.1,
                            chat_template_kwargs={"enable_thinking": False}, functions=None)),
    ("openai", "chat", {"messages": [
        {"role": "developer", "content": "Be brief"}, {"role": "user", "name": "u", "content": [
            {"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "image_url", "image_url": PICTURE}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
         "function_call": None, "tool_calls": [{"id": "c", "type": "function", "function": {
             "name": "weather", "arguments": '{"place": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "18"}]}),
    ("openai", "complete", {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 1, "suffix": "x"}),
    ("openai", "complete", {"prompt": [1, 2, 3]}), ("openai", "complete", {"prompt": [[1, 2], [3]]}),
    ("openai", "embed", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 3, "user": "u"}),
    ("openai", "embed", {"input": [[1, 2], [3]]}),
    ("openai", "responses", {"input": "x", "instructions": "y", "max_output_tokens": 5, "store": True,
                             "background": False, "previous_response_id": None}),
    ("openai", "responses", {"input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"},
                                     {"type": "input_image", "image_url": PICTURE, "detail": "auto"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "18"}], "tools": [
            {"type": "function", "name": "f", "parameters": {}}]}),
    ("anthropic", "messages", {"max_tokens": 9, "system": [{"type": "text", "text": "x", "cache_control": {
        "type": "ephemeral"}}], "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "iVBO"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
                {"type": "text", "text": "18"}]}]}], "tools": [{"name": "f", "input_schema": {}}]}),
    ("ollama", "chat", {"messages": [
        {"role": "user", "content": "x", "images": ["iVBORw0KGgo="]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "18", "tool_name": "f"}], "tools": [TOOL], "keep_alive": "5m",
        "format": {"type": "object"}, "think": True, "options": {
            "num_ctx": 4096, "num_predict": -1, "temperature": 0, "stop": ["a"], "num_gpu": 99, "seed": 1.0}}),
    ("ollama", "complete", {"prompt": "x", "system": "y", "raw": False, "images": ["iVBO"], "context": [1, 2]}),
    ("ollama", "embed", {"input": ["a"], "truncate": True}), ("ollama", "embed", {"prompt": "a"}),
)
ROUTES = {("openai", "ollama"): {"chat": "/api/chat", "complete": "/api/generate", "embed": "/api/embed",
                                 "responses": "/v1/responses"},
          ("openai", "vllm"): {"chat": "/v1/chat/completions", "complete": "/v1/completions",
                               "embed": "/v1/embeddings", "responses": "/v1/responses"},
          ("ollama", "ollama"): {"chat": "/api/chat", "complete": "/api/generate", "embed": "/api/embed"},
          ("ollama", "vllm"): {"chat": "/v1/chat/completions", "complete": "/v1/chat/completions",
                               "embed": "/v1/embeddings"}}


@pytest.mark.parametrize("dialect,task,body", TAKEN)
def test_what_clients_send_is_taken(dialect, task, body):
    for engine in ENGINES:
        asked = ask(dialect, task, **body)
        try:
            wire, sent = request(asked, engine)
        except HttpError as error:
            assert error.status in (400, 404), error.what  # said, where this engine cannot
            assert engine in ("ollama", "mlx") or "context" in error.what
            continue
        assert sent["model"] == ("default_model" if engine == "mlx" else "engine/m")
        assert not {"user", "metadata", "keep_alive", "num_ctx", "num_gpu", "max_completion_tokens"} & sent.keys()
        native = "ollama" if engine == "ollama" else "vllm"
        assert task == "messages" or wire.path == ROUTES[dialect, native][task]
        if task != "embed":
            limit = sent["options"]["num_predict"] if wire.dialect == "ollama" else sent.get(
                "max_tokens", sent.get("max_output_tokens"))
            assert 1 <= limit <= 100


@settings(FAST, max_examples=500)
@given(st.data())
def test_no_shape_of_a_clients_json_raises_anything_else(data):
    dialect, task, body = data.draw(st.sampled_from(TAKEN))
    for _ in range(data.draw(st.integers(1, 2))):
        body = changed(body, data.draw(st.sampled_from(places_in(body))), data.draw(ODD | st.sampled_from([
            {"type": "text"}, {"type": ["x"]}, [None], {"role": "user"}, {"type": "message"}, "0s", "\ud800"])))
        if not places_in(body):
            break
    try:
        asked = ask(dialect, task, **body)
        for engine in ENGINES:
            make_flow(asked, request(asked, engine)[0], "1")
    except HttpError as error:
        assert error.status in (400, 403, 404) and error.what


FORGED = "\u017ftream"  # folds to "stream", as Go reads it
REFUSED = (
    ("openai", "chat", dict(CHAT, MODEL="secret"), "MODEL"), ("openai", "chat", {**CHAT, FORGED: True}, FORGED),
    ("ollama", "chat", dict(CHAT, Options={}), "Options"), ("ollama", "chat", dict(CHAT, Keep_Alive=0), "Keep_Alive"),
    ("ollama", "chat", dict(CHAT, options={"NUM_CTX": 1}), "options.NUM_CTX"),
    ("ollama", "chat", dict(CHAT, _debug_render_only=True), "_debug_render_only"),
    ("ollama", "chat", dict(CHAT, options={"temperature": "hot"}), "options.temperature"),
    ("ollama", "chat", dict(CHAT, options={"num_predict": 0}), "num_predict"),
    ("ollama", "chat", dict(CHAT, options={"num_predict": -3}), "num_predict"),
    ("ollama", "chat", {"messages": [{"role": "user", "Content": "x"}]}, "messages[0].Content"),
    ("openai", "chat", {"messages": []}, "messages"), ("openai", "chat", {}, "messages"),
    ("openai", "chat", {"messages": "x"}, "messages"), ("openai", "chat", {"messages": ["x"]}, "messages[0]"),
    ("openai", "chat", {"messages": [{"content": "x"}]}, "role"),
    ("openai", "chat", dict(CHAT, model=""), "model"), ("openai", "chat", dict(CHAT, model="  "), "model"),
    ("openai", "chat", dict(CHAT, model=["m"]), "model"), ("openai", "chat", dict(CHAT, model="m" * 600), "model"),
    ("openai", "chat", dict(CHAT, stream="yes"), "stream"), ("openai", "chat", dict(CHAT, stream=1), "stream"),
    ("openai", "chat", dict(CHAT, n=0), "n"), ("openai", "chat", dict(CHAT, max_tokens=0), "max_tokens"),
    ("openai", "chat", dict(CHAT, max_tokens=1.5), "max_tokens"),
    ("openai", "chat", dict(CHAT, max_completion_tokens=-1, max_tokens=5), "max_completion_tokens"),
    ("openai", "chat", dict(CHAT, n=17, max_tokens=1), "n"), ("openai", "chat", dict(CHAT, adapters="/etc"), "adapters"),
    ("openai", "complete", {"prompt": ["a", "b", "c"], "n": 8, "max_tokens": 1}, "n"),
    ("openai", "complete", {"prompt": [1, "a"]}, "prompt"), ("openai", "complete", {"prompt": [[True]]}, "prompt"),
    ("openai", "complete", {"prompt": "x", "best_of": 5}, "best_of"), ("openai", "complete", {"prompt": ""}, "prompt"),
    ("openai", "embed", {"input": {"a": 1}}, "input"), ("openai", "embed", {"input": []}, "input"),
    ("openai", "chat", dict(CHAT, chat_template_kwargs={"chat_template": "{{ x }}"}), "chat_template_kwargs"),
    ("openai", "responses", {"input": "x", "previous_response_id": "resp_of_another"}, "previous_response_id"),
    ("openai", "responses", {"input": "x", "tools": [{"type": "mcp", "server_url": "http://a"}]}, "tools"),
    ("openai", "responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ("anthropic", "messages", dict(CHAT), "max_tokens"),
    ("anthropic", "messages", dict(CHAT, max_tokens=5, mcp_servers=[{"url": "http://a"}]), "mcp_servers"),
    ("anthropic", "messages", dict(CHAT, max_tokens=5, tools=[{"type": "bash_20250124", "name": "bash"}]), "tools"),
    *[("openai", "chat", dict(CHAT, **{name: {}}), name) for name in (
        "draft_model", "lora_path", "mm_processor_kwargs", "media_io_kwargs", "chat_template", "prompt_embeds",
        "kv_transfer_params", "logits_processors", "num_draft_tokens", "priority", "id_slot", "anything")])


@pytest.mark.parametrize("dialect,task,body,name", REFUSED)
def test_what_is_refused_is_named(dialect, task, body, name):
    error = refusal(ask, dialect, task, **body)
    assert error.status == 400 and name in error.what and error.code


def test_a_field_spelled_otherwise_is_told_how_it_is_spelled():
    assert refusal(ask, "openai", "chat", Max_Tokens=5, **CHAT).hint == "It is spelled `max_tokens`"
    assert b9agent.printable("\x1b") in refusal(ask, "openai", "chat", **dict(CHAT, **{"\x1b[2J": 1})).what


@pytest.mark.parametrize("raw", [
    b"", b"null", b"[]", b"{}", b'{"model":"m","messages":[]} x', b'{"model":"m"}{"model":"n"}',
    b'{"model":"m","model":"n","messages":[{"role":"user","content":"x"}]}',
    b'{"model":"m","messages":[{"role":"user","role":"system","content":"x"}]}',
    b'{"model":"m","temperature":NaN,"messages":[{"role":"user","content":"x"}]}', b"\xff\xfe", b"\xef\xbb\xbf{}",
    b'{"model":"m","messages":' + b"[" * 100000, b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', b"{'model':'m'}", b'{"a":' * 50000,
    b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":1' + b"0" * 5000 + b"}",
    b'{"model":"m","messages":[{"role":"user","content":"x"}],"response_format":' + b'{"a":' * 40 + b"1" + b"}" * 41])
def test_a_body_that_is_no_strict_json_is_a_400(raw):
    for dialect, task in (("openai", "chat"), ("ollama", "chat"), ("anthropic", "messages")):
        assert refusal(read_ask, dialect, task, raw).status == 400


def parts(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
    {"type": "image_url", "image_url": "https://example.com/x.png"}, {"type": "image_url", "image_url": "file:///etc/passwd"},
    {"type": "image_url", "image_url": {"url": "DATA:image/png;base64,x"}}, {"type": "image_url", "image_url": {"url": ["x"]}},
    {"type": "image_url", "image_url": {"url": "data:,x"}}, {"type": "image_url"}, {"type": "image_url", "image_url": None},
    {"image_url": "http://a/x.png"}, {"type": "text", "text": "x", "image_url": "http://a/x.png"},
    {"type": "video_url", "video_url": {"url": "http://a"}}, {"type": "audio_url", "audio_url": {"url": "http://a"}},
    {"type": "image_embeds", "image_embeds": "gASV"}, {"type": "file", "file": {"file_id": "x"}}, "text", 5, None, [],
    {"type": "input_image", "file_id": "x"}, {"type": "image", "source": {"type": "url", "url": "http://a"}},
    {"type": ["text"]}, {"type": {"a": 1}}, {"role": "user", "content": "x"}, {"type": "message", "content": "x"},
    {"type": "document", "source": {"type": "url", "url": "http://a"}},
    {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}])
def test_nothing_that_an_engine_would_fetch_gets_through(part):
    for dialect, task, more in (("openai", "chat", {}), ("anthropic", "messages", {"max_tokens": 5})):
        assert refusal(ask, dialect, task, **parts(part), **more).status == 400
    if part != {"role": "user", "content": "x"}:
        assert refusal(ask, "openai", "responses", input=[{"role": "user", "content": [part]}]).status == 400


def test_a_picture_of_megabytes_is_read_and_its_twin_in_a_string_is_not_mistaken():
    url = "data:image/png;base64," + "A" * (4 << 20)
    assert ask("openai", "chat", **parts({"type": "image_url", "image_url": url})).prompt_tokens < 3000
    tricky = "[[[[" * 20 + '\\"' + "{" * 40 + "\\"
    assert ask("openai", "chat", messages=[{"role": "user", "content": tricky}] * 40).prompt_tokens > 512


def test_an_address_in_a_schema_or_in_words_is_none_of_ours():
    body = {"messages": [{"role": "user", "content": "see http://example.com"}], "tools": [TOOL]}
    assert request(ask("openai", "chat", **body), "vllm")[1]["tools"] == [TOOL]


def test_only_what_was_checked_is_sent():
    _, sent = request(ask("openai", "chat", **TAKEN[0][2]), "vllm", 5)
    assert sorted(sent) == sorted(TAKEN[0][2].keys() - {
        "user", "metadata", "store", "service_tier", "functions", "max_completion_tokens"} | {"model", "max_tokens"})
    assert sent["max_tokens"] == 5 and sent["stream_options"] == {"include_usage": True}
    _, sent = request(ask(*TAKEN[10][:2], **TAKEN[10][2]), "ollama", 5)
    assert sent["options"] == {"temperature": 0, "stop": ["a"], "seed": 1.0, "num_predict": 5}
    assert sent["stream"] is True and "keep_alive" not in sent
    _, sent = request(ask("openai", "responses", input="x", store=True), "vllm", 5)
    assert sent["store"] is False and sent["max_output_tokens"] == 5
    assert "temperature" not in request(ask("openai", "chat", **CHAT), "ollama")[1]["options"]


def test_limits_are_read_and_multiplied():
    assert ask("openai", "chat", max_tokens=7, **CHAT).output_tokens == 7
    assert ask("openai", "chat", max_tokens=7, max_completion_tokens=5, n=3, **CHAT).output_tokens == 15
    assert ask("openai", "complete", prompt=["a", "b"], n=2, max_tokens=5).output_tokens == 20
    assert ask("openai", "chat", **CHAT).output_tokens is None and ask("openai", "embed", input="x").output_tokens == 0
    assert ask("ollama", "chat", options={"num_predict": 9, "num_ctx": 4096}, **CHAT)[6:8] == (9, 4096)
    assert ask("ollama", "chat", options={"num_predict": -2}, **CHAT).output_tokens is None
    assert request(ask("openai", "chat", n=3, max_tokens=5, **CHAT), "vllm", 15)[1]["max_tokens"] == 5
    assert refusal(request, ask("openai", "chat", n=3, **CHAT), "vllm", 2).status == 400
    error = refusal(request, ask("ollama", "chat", options={"num_ctx": 9000}, **CHAT), "ollama")
    assert error.code == "context_too_large" and "8192" in error.what


def test_the_bound_of_a_prompt_counts_whatever_a_template_writes():
    base = ask("openai", "chat", **CHAT).prompt_tokens
    assert base == 512 + 16 + len("Hello")
    assert ask("openai", "chat", messages=USER * 3).prompt_tokens == 512 + 3 * (16 + 5)
    assert ask("openai", "chat", messages=[{"role": "user", "content": "é" * 10}]).prompt_tokens == 512 + 16 + 20
    tools = ask("openai", "chat", tools=[TOOL], **CHAT).prompt_tokens - base
    assert tools >= len(json.dumps(TOOL, separators=(",", ":"))) - 20
    numbers = ask("openai", "chat", tools=[dict(TOOL, x=[10 ** 30] * 100)], **CHAT).prompt_tokens
    assert numbers - base >= 3000
    picture = ask("openai", "chat", **parts({"type": "image_url", "image_url": PICTURE + "A" * 99999})).prompt_tokens
    assert 512 + 2048 <= picture < 512 + 2048 + 100
    assert ask("ollama", "complete", prompt="x", images=["A" * 99999] * 2).prompt_tokens == 512 + 16 + 1 + 4096
    assert ask("ollama", "complete", prompt="x", context=[1] * 50, system="abc").prompt_tokens >= 512 + 50 + 3 + 1
    assert ask("openai", "complete", prompt=[[1, 2], [3]]).prompt_tokens == 512 + 2 * 16 + 3
    assert ask("openai", "embed", input=["abc", "d"]).prompt_tokens == 512 + 2 * 16 + 4
    assert ask("openai", "responses", input="abc", instructions="de").prompt_tokens >= 512 + 5
    call = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x" * 500}}]}]}
    assert ask("openai", "chat", **call).prompt_tokens >= 512 + 516


def test_what_only_loads_or_unloads_says_so_and_keep_alive_is_left_out_of_the_rest():
    for keep in (0, "0", "0s", 0.0, "0m"):
        asked = ask("ollama", "complete", prompt="", keep_alive=keep)
        assert asked.keep_alive == 0 and request(asked, "ollama")[1]["keep_alive"] == 0
        assert refusal(request, ask("ollama", "chat", messages=[], keep_alive=keep), "vllm").status == 501
        asked = ask("ollama", "chat", keep_alive=keep, **CHAT)
        assert asked.keep_alive is None and asked.body.keys() == {"messages"}
    for keep, kept in ((-1, -1), ("-1m", -1), (300, None), ("5m", None), (None, None), ("x", None)):
        asked = ask("ollama", "chat", keep_alive=keep)
        assert asked.keep_alive == kept and request(asked, "ollama")[1].get("keep_alive") == kept
    assert request(ask("ollama", "chat"), "ollama")[1]["messages"] == []
    wire, answer = request(ask("ollama", "chat", keep_alive=-1), "vllm")
    assert wire.path == "" and answer["done_reason"] == "load" and answer["model"] == "m"


def test_conversations_are_turned_from_openai_to_ollama():
    wire, sent = request(ask(*TAKEN[1][:2], **TAKEN[1][2]), "ollama")
    system, user, assistant, tool = sent["messages"]
    assert system == {"role": "system", "content": "Be brief"}
    assert user == {"role": "user", "content": "what is it?", "images": ["iVBORw0KGgo="] * 2}
    assert assistant["tool_calls"] == [{"id": "c", "function": {"name": "weather", "arguments": {"place": "Paris"}}}]
    assert tool == {"role": "tool", "content": "18", "tool_call_id": "c", "tool_name": "weather"}
    schema = {"type": "object", "properties": {}}
    asked = ask("openai", "chat", stop="x", top_k=5, repetition_penalty=1.5, response_format={
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, reasoning_effort="none", **CHAT)
    _, sent = request(asked, "ollama")
    assert sent["format"] == schema and sent["think"] is False
    assert sent["options"] == {"num_predict": 100, "stop": ["x"], "top_k": 5, "repeat_penalty": 1.5}
    assert "tools" not in request(ask("openai", "chat", tools=[TOOL], tool_choice="none", **CHAT), "ollama")[1]
    for body in ({"n": 2}, {"response_format": {"type": "xml"}}, {"messages": [{
            "role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}):
        assert refusal(request, ask("openai", "chat", **dict(CHAT, **body)), "ollama").status == 400


def test_conversations_are_turned_from_ollama_to_openai():
    wire, sent = request(ask(*TAKEN[10][:2], **TAKEN[10][2]), "vllm")
    user, assistant, tool = sent["messages"]
    assert user["content"] == [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    call = assistant["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"a": 1} and tool["tool_call_id"] == call["id"]
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert sent["chat_template_kwargs"] == {"enable_thinking": True} and sent["temperature"] == 0
    assert sent["stream_options"] == {"include_usage": True}
    wire, sent = request(ask("ollama", "complete", prompt="x", system="y", images=["/9j/"]), "vllm")
    assert sent["messages"][0] == {"role": "system", "content": "y"}
    assert sent["messages"][1]["content"][1]["image_url"]["url"] == "data:image/jpeg;base64,/9j/"
    wire, sent = request(ask("ollama", "complete", prompt="x", raw=True), "vllm")
    assert (wire.path, wire.task, sent["prompt"]) == ("/v1/completions", "complete", "x")
    for name, value in (("suffix", "x"), ("template", "x"), ("context", [1])):
        assert refusal(request, ask("ollama", "complete", prompt="x", **{name: value}), "vllm").status == 400


TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=9)})


@FAST
@given(st.lists(TURN, min_size=1, max_size=4), st.lists(st.tuples(st.sampled_from("fgh"), st.dictionaries(
    st.text(max_size=3), st.integers(-9, 9) | st.text(max_size=3), max_size=2)), max_size=4))
def test_a_conversation_comes_back_the_same_from_both_turns(turns, calls):
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in calls]}
    results = [{"role": "tool", "content": str(number), "tool_name": name} for number, (name, _) in enumerate(calls)]
    messages = turns + [call] * bool(calls) + results
    _, sent = request(ask("ollama", "chat", messages=messages), "vllm")
    _, back = request(ask("openai", "chat", messages=sent["messages"]), "ollama")
    for message in back["messages"]:
        message.pop("tool_call_id", None)
        for made in message.get("tool_calls", ()):
            made.pop("id")
    assert back["messages"] == messages


# ---------------------------------------------------------------------- whole answers

def whole(asked, engine, value, status=200):
    wire, _ = request(asked, engine)
    status, body, usage = whole_answer(asked, wire, status, value if isinstance(value, bytes) else json.dumps(
        value).encode(), "1", 5000)
    return status, json.loads(body), usage


def test_whole_answers_in_every_pair_of_dialects():
    openai = dict(chunk({}), object="chat.completion", usage=USAGE, choices=[{"index": 0, "finish_reason": "length",
                  "message": {"role": "assistant", "content": "Hi", "reasoning": "hm"}, "logprobs": None}])
    ollama = said(**message("Hi", thinking="hm"), done=True, done_reason="length", **FIGURES)
    chat, native = ask("openai", "chat", **CHAT), ask("ollama", "chat", stream=False, **CHAT)
    for asked, engine, value in ((chat, "vllm", openai), (chat, "ollama", ollama)):
        status, body, usage = whole(asked, engine, value)
        assert status == 200 and body["model"] == "m" and body["usage"] == USAGE
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "reasoning": "hm"}
        assert body["choices"][0]["finish_reason"] == "length" and usage.completion_tokens == 3
    for asked, engine, value in ((native, "vllm", openai), (native, "ollama", ollama)):
        status, body, usage = whole(asked, engine, value)
        assert status == 200 and body["model"] == "m" and body["message"]["thinking"] == "hm"
        assert (body["done"], body["done_reason"], body["eval_count"], body["message"]["content"]) == (
            True, "length", 3, "Hi")
        assert usage.prompt_tokens == 9 and body["total_duration"] > 0
    status, body, usage = whole(ask("openai", "complete", prompt="x"), "ollama", said(
        response="Hi", done=True, done_reason="stop", **FIGURES))
    assert body["choices"] == [{"text": "Hi", "index": 0, "finish_reason": "stop", "logprobs": None}]
    assert body["object"] == "text_completion" and body["id"] == "cmpl-1"
    status, body, usage = whole(ask("anthropic", "messages", max_tokens=5, **CHAT), "vllm", {
        "type": "message", "model": "engine/m", "content": [], "usage": {"input_tokens": 9, "output_tokens": 3}})
    assert body["model"] == "m" and usage.completion_tokens == 3


def test_calls_and_probabilities_in_whole_answers():
    logprobs = [{"token": "Hi", "logprob": -0.1, "top_logprobs": []}]
    value = said(**message("", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]), done=True,
                 done_reason="stop", logprobs=logprobs, **FIGURES)
    _, body, _ = whole(ask("openai", "chat", logprobs=True, **CHAT), "ollama", value)
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["logprobs"] == {"content": logprobs}
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    value = dict(chunk({}), usage=USAGE, choices=[{"finish_reason": "tool_calls", "logprobs": {"content": logprobs},
                 "message": choice["message"]}])
    _, body, _ = whole(ask("ollama", "chat", stream=False, **CHAT), "vllm", value)
    assert body["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert body["logprobs"] == logprobs and body["done_reason"] == "stop"


ERRORS = (
    (404, b'{"error":"model \'x\' not found"}', 404, "model 'x' not found"),
    (400, b'{"error":{"message":"too long","type":"BadRequestError","code":400}}', 400, "too long"),
    (400, b'{"object":"error","message":"too long","code":400}', 400, "too long"),
    (422, b'{"detail":[{"loc":["body","x"],"msg":"Field required"}]}', 422, "['body', 'x']: Field required"),
    (404, b'{"detail":"Not Found"}', 404, "Not Found"), (404, b"Not Found", 404, "Not Found"),
    (401, b'{"error":"Unauthorized"}', 502, "the engine failed: Unauthorized"),
    (403, b"", 502, "the engine failed: the engine answered 403 without a word"),
    (500, b"<html><body>oops", 502, "the engine failed: a page of HTML"),
    (500, b'{"error":"cannot open /home/alice/.ollama/models/blobs/sha256-1"}', 502,
     "the engine failed: cannot open …/sha256-1"),
    (503, b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}', 503, "Loading model"),
    (503, b'{"error":"server busy"}', 503, "server busy"), (501, b'{"error":"no embeddings"}', 501, "no embeddings"),
    (302, b"moved", 502, "the engine failed: moved"), (200, b"no json", 502, "the engine failed: its answer is no "
                                                       "JSON object"),
    (200, b'{"error":"boom"}', 502, "the engine failed: boom"), (500, b"\xff\x1b[2J\n", 502, None))


@pytest.mark.parametrize("status,body,expected,words", ERRORS)
def test_errors_of_engines_in_the_dialects_of_clients(status, body, expected, words):
    for dialect, task, more in (("openai", "chat", {}), ("ollama", "chat", {}),
                                ("anthropic", "messages", {"max_tokens": 5})):
        for engine in ("ollama", "vllm"):
            got, answer, usage = whole(ask(dialect, task, **CHAT, **more), engine, body, status)
            text = answer["error"] if dialect == "ollama" else answer["error"]["message"]
            assert got == expected and text == (words or text) and usage.error
            assert b9agent.printable(text) == text and len(text) < 500
            assert answer.get("type") == ("error" if dialect == "anthropic" else None)


def test_an_answer_of_calls_that_make_no_sense_is_a_502():
    value = dict(chunk({}), choices=[{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "["}}]}}])
    for value in (value, {"choices": []}, {}):
        assert whole(ask("ollama", "chat", **CHAT), "vllm", value)[0] == 502


VECTORS = [[0.5, -1.25, 1e-05], [1, 2, 3]]


def test_embeddings_in_every_pair_of_dialects():
    native = json.dumps({"model": "m", "embeddings": VECTORS, "prompt_eval_count": 9}, separators=(",", ":")).encode()
    openai = json.dumps({"object": "list", "data": [{"object": "embedding", "index": number, "embedding": vector}
                        for number, vector in enumerate(VECTORS)], "model": "m", "usage": {
                            "prompt_tokens": 9, "total_tokens": 9}}).encode()
    texts = ["a", "b"]
    asked = ask("openai", "embed", input=texts)
    status, body, usage = whole(asked, "ollama", native)
    assert [item["embedding"] for item in body["data"]] == VECTORS and body["usage"]["prompt_tokens"] == 9
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 0) and body["model"] == "m"
    _, body, _ = whole(ask("openai", "embed", input=texts, encoding_format="base64"), "ollama", native)
    assert list(struct.unpack("<3f", base64.b64decode(body["data"][1]["embedding"]))) == [1, 2, 3]
    _, body, usage = whole(ask("ollama", "embed", input=texts), "vllm", openai)
    assert body == {"model": "m", "embeddings": VECTORS, "prompt_eval_count": 9}
    assert whole(ask("ollama", "embed", prompt="a"), "vllm", openai)[1] == {"embedding": VECTORS[0]}
    assert whole(ask("ollama", "embed", prompt="a"), "ollama", native)[1] == {"embedding": VECTORS[0]}
    for asked, engine, raw in ((asked, "vllm", openai), (ask("ollama", "embed", input=texts), "ollama", native)):
        wire, _ = request(asked, engine)
        status, body, usage = whole_answer(asked, wire, 200, raw, "1")
        assert body is raw and usage.prompt_tokens == 9
    assert refusal(request, ask("openai", "embed", input=[[1]]), "ollama").status == 400
    assert refusal(request, ask("openai", "embed", input="x"), "mlx").status == 404


def test_limits_and_refusals_are_said_in_each_dialect():
    numbers = {"limit": "tokens_per_day", "left": 0}
    openai = json.loads(b9agent.error_answer("openai", 429, "tokens_per_day", "no tokens left", numbers))["error"]
    assert openai == {"message": "no tokens left", "type": "rate_limit_error", "param": None, "code": "tokens_per_day",
                      "details": numbers}
    assert json.loads(b9agent.error_answer("ollama", 402, "usd", "no money left", numbers)) == {
        "error": "no money left", "code": "usd", "details": numbers}
    assert json.loads(b9agent.error_answer("anthropic", 401, "x", "who?", {}))["error"]["type"] == \
        "authentication_error"


# ---------------------------------------------------------------------- the official clients

class Door:
    """The door without sockets: what an SDK sends is turned, an engine's sample is its answer, or
    that of the engine at a port."""

    def __init__(self, engine, raw, model="engine/m"):
        self.engine, self.raw, self.model, self.usage = engine, raw, model, None

    def answer(self, wire):
        if isinstance(self.raw, bytes):
            return 200, self.raw
        connection = http.client.HTTPConnection("127.0.0.1", self.raw, timeout=30)
        try:
            connection.request("POST", wire.path, wire.body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def __call__(self, request):
        httpx = pytest.importorskip("httpx")
        if request.method == "GET":
            return httpx.Response(200, json=b9agent.model_answer(request.url.path, ["m"], 8192, 0.0))
        dialect, task = {"/v1/chat/completions": ("openai", "chat"), "/v1/embeddings": ("openai", "embed"),
                         "/v1/completions": ("openai", "complete"), "/v1/responses": ("openai", "responses"),
                         "/api/chat": ("ollama", "chat"), "/api/generate": ("ollama", "complete"),
                         "/api/embed": ("ollama", "embed")}[request.url.path]
        try:
            asked = read_ask(dialect, task, request.content)
            wire = engine_request(asked, ENGINES[self.engine], self.model, 100, 8192)
        except HttpError as error:
            return httpx.Response(error.status, content=b9agent.error_answer(
                dialect, error.status, error.code, error.what))
        status, raw = self.answer(wire)
        if not asked.stream or task == "embed" or status != 200:
            status, body, self.usage = whole_answer(asked, wire, status, raw, "1")
            return httpx.Response(status, content=body, headers={"Content-Type": "application/json"})
        flow = make_flow(asked, wire, "1")
        out = b"".join([flow.feed(raw[at:at + 7]) for at in range(0, len(raw), 7)]) + flow.end("")
        self.usage = flow.usage
        return httpx.Response(200, content=out, headers={"Content-Type": flow.content_type})


def openai_client(engine, raw, *model):
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    door = Door(engine, raw, *model)
    return openai.OpenAI(api_key="k", base_url="http://door/v1", max_retries=0, http_client=httpx.Client(
        transport=httpx.MockTransport(door))), door


def ollama_client(engine, raw, *model):
    ollama, httpx = pytest.importorskip("ollama"), pytest.importorskip("httpx")
    door = Door(engine, raw, *model)
    return ollama.Client(host="http://door", transport=httpx.MockTransport(door)), door


@pytest.mark.parametrize("engine,raw", [("vllm", VLLM), ("mlx", MLX), ("ollama", OLLAMA)], ids=("vllm", "mlx", "ollama"))
def test_the_openai_client_streams(engine, raw):
    client, _ = openai_client(engine, raw)
    found = list(client.chat.completions.create(model="m", messages=USER, stream=True,
                                                stream_options={"include_usage": True}))
    assert "".join(item.choices[0].delta.content or "" for item in found if item.choices) == "Hi" + TRICK + "!"
    assert found[-1].usage.completion_tokens == 3 and {item.model for item in found} == {"m"}
    with client.chat.completions.stream(model="m", messages=USER) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


@pytest.mark.parametrize("engine,raw", [("vllm", VLLM_TOOLS), ("ollama", OLLAMA_TOOLS)], ids=("vllm", "ollama"))
def test_the_openai_client_calls_tools(engine, raw):
    client, _ = openai_client(engine, raw)
    with client.chat.completions.stream(model="m", messages=USER, tools=[TOOL]) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "weather"
    json.loads(choice.message.tool_calls[0].function.arguments)


def test_the_openai_client_learns_of_errors():
    openai = pytest.importorskip("openai")
    error = ndjson(said(**message("Hi"), done=False), {"error": "the runner died"})
    with pytest.raises(openai.APIError, match="the runner died"):
        list(openai_client("ollama", error)[0].chat.completions.create(model="m", messages=USER, stream=True))
    with pytest.raises(openai.APIError, match="before it was done"):
        list(openai_client("vllm", VLLM[:300])[0].chat.completions.create(model="m", messages=USER, stream=True))
    with pytest.raises(openai.BadRequestError, match="best_of"):
        openai_client("vllm", b"")[0].completions.create(model="m", prompt="x", best_of=3)
    responses = openai_client("vllm", RESPONSES[:-200])[0].responses.create(model="m", input="x", stream=True)
    assert [item.type for item in responses][-1] == "error"


def test_the_openai_client_embeds_and_lists():
    native = json.dumps({"model": "m", "embeddings": VECTORS, "prompt_eval_count": 9}).encode()
    client, door = openai_client("ollama", native)
    found = client.embeddings.create(model="m", input=["a", "b"])  # it asks for base64
    assert found.data[1].embedding == [1, 2, 3] and found.usage.prompt_tokens == 9
    assert [model.id for model in client.models.list()] == ["m"] and client.models.retrieve("m").id == "m"


@pytest.mark.parametrize("engine,raw", [("vllm", VLLM), ("llama-server", LLAMA), ("ollama", OLLAMA)],
                         ids=("vllm", "llama", "ollama"))
def test_the_ollama_client_streams(engine, raw):
    client, door = ollama_client(engine, raw)
    found = list(client.chat(model="m", messages=USER, stream=True, options={"temperature": 0}, keep_alive="5m"))
    assert "".join(item.message.content for item in found) == "Hi" + TRICK + "!"
    assert found[-1].done and found[-1].eval_count == 3 and {item.model for item in found} == {"m"}
    assert [model.model for model in client.list().models] == ["m"] and client.ps().models[0].context_length == 8192


def test_the_ollama_client_calls_tools_and_learns_of_errors():
    ollama = pytest.importorskip("ollama")
    found = list(ollama_client("vllm", VLLM_TOOLS)[0].chat(model="m", messages=USER, stream=True, tools=[TOOL]))
    assert found[1].message.tool_calls[0].function.arguments == {"place": "Paris"}
    with pytest.raises(ollama.ResponseError, match="boom"):
        list(ollama_client("vllm", sse({"error": {"message": "boom"}}))[0].generate(
            model="m", prompt="x", stream=True))
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        ollama_client("vllm", b"")[0].generate(model="m", prompt="x", options={"num_ctx": 10 ** 6})
    shown = b9agent.model_answer("/api/show", ["m"], 8192, 0.0)
    assert ollama.ShowResponse(**shown).capabilities == ["completion", "tools"]
    assert b9agent.model_answer("/api/version", [], 0, 0.0)["version"]


# ---------------------------------------------------------------------- engines that run

def healthy(port, path="/health"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def speaks(engine, port, model):
    """Both clients, streaming and not, with the engine at a port."""
    client, door = openai_client(engine, port, model)
    more = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    whole_one = client.chat.completions.create(**more)
    assert whole_one.usage.completion_tokens == door.usage.completion_tokens > 0 and whole_one.model == "m"
    pieces = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **more))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert pieces[-1].usage.completion_tokens == door.usage.completion_tokens > 0
    assert 0 < door.usage.pieces <= door.usage.completion_tokens + 1
    assert client.completions.create(model="m", prompt="hi", max_tokens=4).choices[0].text
    client, door = ollama_client(engine, port, model)
    options = {"num_predict": 8, "temperature": 0}
    found = list(client.chat(model="m", messages=more["messages"], stream=True, options=options))
    assert found[-1].done and found[-1].eval_count == door.usage.completion_tokens > 0
    text = "".join(item.message.content for item in found)
    assert text and client.chat(model="m", messages=more["messages"], options=options).message.content == text
    assert client.generate(model="m", prompt="hi", options=options).response


def test_the_stand_ins_are_understood(home, tmp_path):
    folder = engines.stand_in(tmp_path / "bin", "ollama", "vllm")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x")
    port, other = quiet_port(), quiet_port()
    with Program([os.path.join(folder, "ollama"), "serve"], environment(
            home, OLLAMA_HOST="127.0.0.1:%d" % port, OLLAMA_MODELS=str(tmp_path / "store"))), \
        Program([os.path.join(folder, "vllm"), "serve", str(model), "--port", str(other), "--host", "127.0.0.1",
                 "--served-model-name", "tiny"], environment(home)):
        wait_until(lambda: healthy(port, "/api/version"), "it answers")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/api/pull", json.dumps({"model": "llama3.2:1b", "stream": False}))
        assert connection.getresponse().status == 200
        connection.close()
        speaks("ollama", port, "llama3.2:1b")
        wait_until(lambda: healthy(other), "it answers")
        speaks("vllm", other, "tiny")


def test_the_real_llama_server_is_understood(home):
    port = quiet_port()
    with Program([engines.llama_server(), "-m", engines.tiny_gguf(), "--host", "127.0.0.1", "--port",
                  str(port), "-c", "512", "-np", "1"], engines.engine_environment(home)):
        wait_until(lambda: healthy(port), "it answers")
        speaks("llama-server", port, "tiny")
        anthropic = ask("anthropic", "messages", max_tokens=8, stream=True, **CHAT)
        wire = engine_request(anthropic, ENGINES["llama-server"], "tiny", 8, 512)
        status, raw = Door("llama-server", port).answer(wire)
        flow = make_flow(anthropic, wire, "1")
        out = flow.feed(raw) + flow.end("")
        assert flow.complete and flow.usage.completion_tokens == 8, (status, raw, out)


def test_the_real_mlx_server_is_understood(home):
    port = quiet_port()
    with Program([engines.mlx_server(), "--model", engines.tiny_mlx(), "--host", "127.0.0.1",
                  "--port", str(port)], engines.engine_environment(home)):
        wait_until(lambda: healthy(port), "it answers")
        speaks("mlx", port, "tiny")


def test_a_body_of_millions_of_values_is_refused_before_any_is_made():
    """Thirty megabytes of them are a gigabyte of memory, and half a minute."""
    most = b9agent.JSON_VALUES_MAX
    for value in (b"1", b"[]", b"{}", b'""', b'"a"'):
        raw = b'{"model":"m","prompt":[%s1]}' % ((value + b",") * most)
        with pytest.raises(b9agent.HttpError) as caught:
            b9agent.read_ask("openai", "complete", raw)
        assert caught.value.status == 400 and "values" in caught.value.what
    with pytest.raises(b9agent.HttpError) as caught:
        b9agent.read_ask("openai", "complete", b'{"model":"m","prompt":"x%s"}' % (
            b'","' * 5 * most))
    assert "values" in caught.value.what
    said = ',[{\\"' * most  # within one text they are no values
    raw = ('{"model":"m","prompt":"%s"}' % said).encode()
    assert b9agent.read_ask("openai", "complete", raw).body["prompt"] == said.replace("\\", "")


def test_a_line_without_an_end_is_an_error_once():
    ask = b9agent.read_ask("openai", "chat", json.dumps({
        "model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode())
    flow = b9agent.make_flow(ask, b9agent.Wire("/v1/chat/completions", b"", "openai", "chat"), "1")
    piece = b"x" * (b9agent.STREAM_LINE_MAX_BYTES + 1)
    assert b"error" in flow.feed(piece)
    assert flow.feed(piece) == b"" and flow.end("") == b""


def test_a_model_is_loaded_by_its_name_alone():
    """As Ollama's manual says it: {"model": "m"}, without a prompt."""
    for task in ("chat", "complete", "embed"):
        asked = read_ask("ollama", task, b'{"model":"m"}')
        path = engine_request(asked, ENGINES["ollama"], "m:latest", 9, 4096).path
        assert path == {"chat": "/api/chat", "complete": "/api/generate"}.get(task, "/api/embed")
        assert engine_request(asked, ENGINES["vllm"], "m", 9, 4096).path == ""


def _ollama_line(**more):
    return json.dumps(dict({"model": "m", "created_at": "t", "message": dict({
        "role": "assistant", "content": "Hi"}, **more.pop("said", {})), "done": False}, **more),
        separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize("dialect, engine, event, end", [
    ("openai", "ollama", _ollama_line(said={"tool_calls": [
        {"function": {"name": "f", "arguments": {"a": 1}}}]}), b""),
    ("openai", "ollama", _ollama_line(said={"thinking": "so"}), b""),
    ("openai", "ollama", _ollama_line(logprobs=[{"token": "Hi", "logprob": -0.1}]), b""),
    ("openai", "ollama", _ollama_line(done=True, done_reason="length"), b""),
    ("ollama", "vllm", b'data: {"id":"x","model":"m","choices":[{"index":0,"delta":{"content":"Hi"},'
     b'"logprobs":null,"finish_reason":"length"}]}\n\n', b"data: [DONE]\n\n"),
    ("ollama", "llama-server", b'data: {"choices":[{"finish_reason":"length","index":0,"delta":'
     b'{"content":"Hi"}}],"id":"x","model":"m"}\n\n', b"data: [DONE]\n\n")])
def test_what_is_said_beside_a_text_is_not_lost_where_the_stream_before_said_it_too(
        dialect, engine, event, end):
    asked = read_ask(dialect, "chat", json.dumps({"model": "m", "stream": True, "messages": [
        {"role": "user", "content": "x"}]}).encode())
    shape, told = b9agent.Shape(), []
    for _ in range(2):
        flow = flow_of(asked, engine)
        flow.expect(shape)
        out = flow.feed(event)
        shape = flow.shape
        told.append(re.sub(rb'"(created|created_at|[a-z_]+_duration)": ?[^,}]*', b"", out + flow.feed(end)))
    assert told[0] == told[1]
    assert flow.usage.pieces == 1
