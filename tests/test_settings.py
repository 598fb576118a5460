"""Settings: the table, where values come from, every kind of bad file, `config` and `init`."""
import json
import os
import pty
import re
import select
import stat
import subprocess

import pytest

import b9agent
from helpers import AGENT, PATIENCE_S, ROOT, agent_command, environment, run_agent, tree

TOKEN = "tok-3nTw0zZ_machine-secret-9876"
K3S = "k3s-bearer-secret.abcdef.5544"

# For every setting two values that are accepted, as text, and what they become.
VALUES = {
    "token": ((TOKEN, TOKEN), ("-dash_first-abcdef", "-dash_first-abcdef")),
    "token_file": (("/nowhere/a", "/nowhere/a"), ("/nowhere/b", "/nowhere/b")),
    "machine_id": (("0a1b2c3d", "0a1b2c3d"), ("12345678", "12345678")),
    "hostname": (("100.64.0.7", "100.64.0.7"), ("box.tail.ts.net", "box.tail.ts.net")),
    "provider_name": (("generic", "generic"), ("lambda labs", "lambda labs")),
    "pool_name": (("gpu", "gpu"), ("b\u00fcro", "b\u00fcro")),
    "gateway_host": (("gw.example", "gw.example"), ("[::1]", "::1")),
    "gateway_port": (("1", 1), ("65535", 65535)),
    "gateway_scheme": (("https", "https"), ("http", "http")),
    "gateway_ca_file": (("/nowhere/ca.pem", "/nowhere/ca.pem"), ("/x/y", "/x/y")),
    "gateway_proxy": (("none", "none"), ("http://u:pw-secret-123@proxy:3128",) * 2),
    "tunnel": (("me@gw.example", "me@gw.example"), ("b9@[::1]:2222", "b9@[::1]:2222")),
    "tunnel_local_port": (("0", 0), ("19940", 19940)),
    "tunnel_identity_file": (("/nowhere/key", "/nowhere/key"), ("/x/a b", "/x/a b")),
    "tunnel_reverse_k3s": (("true", True), ("off", False)),
    "tailnet_control": (("true", True), ("no", False)),
    "tailnet_socket": (("none", "none"), ("/x/tailscaled.sock", "/x/tailscaled.sock")),
    "k3s_token": ((K3S, K3S), ("other-k3s-secret-1", "other-k3s-secret-1")),
    "k3s_service_account": (("beta9-gateway", "beta9-gateway"), ("g", "g")),
    "k3s_token_hours": (("1", 1), ("168", 168)),
    "k3s_kubeconfig": (("/nowhere/k3s.yaml", "/nowhere/k3s.yaml"), ("/x/a b", "/x/a b")),
    "k3s_server": (("https://localhost:7443",) * 2, ("https://[::1]/", "https://[::1]/")),
    "k3s_ca_file": (("/nowhere/ca.crt", "/nowhere/ca.crt"), ("/x/y", "/x/y")),
    "keepalive_interval": (("1", 1.0), ("12.5s", 12.5)),
    "max_cpu": (("0.5", 500), ("3500m", 3500)),
    "max_memory": (("16Gi", 16 << 30), ("1.5Gi", 3 << 29)),
    "max_gpus": (("0", 0), ("8", 8)),
    "gpu_ids": (("0,1", (("", 0), ("", 1))), ("amd:3,0", (("", 0), ("amd", 3)))),
    "grid_intensity": (("0", 0.0), ("381.25", 381.25)),
    "renewable_pct": (("100", 100.0), ("33.3", 33.3)),
    "energy_certificate": (("GO 4711, wind", "GO 4711, wind"), ("x" * 200, "x" * 200)),
    "pue": (("1.0", 1.0), ("3", 3.0)),
    "cpu_watts": (("65", 65.0), ("10000", 10000.0)),
    "control_host": (("127.0.0.1", "127.0.0.1"), ("::1", "::1")),
    "control_port": (("0", 0), ("9998", 9998)),
    "inference_engine": (("llama-server", "llama-server"), ("mlx", "mlx")),
    "inference_model": (("llama3.2:1b", "llama3.2:1b"), ("/models/a b.gguf", "/models/a b.gguf")),
    "inference_autostart": (("true", True), ("yes", True)),
    "inference_host": (("100.64.0.7", "100.64.0.7"), ("::1", "::1")),
    "inference_port": (("0", 0), ("11435", 11435)),
    "inference_context": (("128", 128), ("131072", 131072)),
    "inference_parallel": (("2", 2), ("256", 256)),
    "inference_program": (("/opt/ollama", "/opt/ollama"), ("/opt/b c/vllm", "/opt/b c/vllm")),
    "inference_slots": (("1", 1), ("1024", 1024)),
    "inference_queue": (("0", 0), ("4096", 4096)),
    "inference_queue_wait": (("1", 1.0), ("2.5", 2.5)),
    "inference_silence_limit": (("600", 600.0), ("86400", 86400.0)),
    "inference_keep_warm": (("600", 600.0), ("auto", "auto")),
    "inference_keep_warm_models": (
        ("llama3.2:1b=600,b=auto", (("llama3.2:1b", 600.0), ("b", "auto"))),
        ("hf.co/A/b:Q4=1.5", (("hf.co/A/b:Q4", 1.5),))),
    "inference_idle_stop": (("1", 1.0), ("900", 900.0)),
    "inference_load_limit": (("1", 1.0), ("3600", 3600.0)),
    "inference_gateway_access": (("loopback", "loopback"), ("off", "off")),
    "inference_gpu_usd_per_hour": (("0", 0.0), ("2.99", 2.99)),
    "guards_parallel_cold_starts": (("1", 1), ("64", 64)),
    "guards_cold_start_seconds_per_day": (("0", 0.0), ("600.5", 600.5)),
    "guards_cold_starts_per_hour": (("0", 0), ("5", 5)),
    "guards_duplicates": (("payload", "payload"), ("off", "off")),
    "guards_max_retries": (("0", 0), ("7", 7)),
    "guards_retry_ttl": (("1", 1.0), ("86400", 86400.0)),
    "guards_task_depth": (("1", 1), ("12", 12)),
    "guards_task_tree": (("1", 1), ("500", 500)),
    "audit_keep_days": (("0", 0), ("3650", 3650)),
    "audit_full": (("refuse", "refuse"), ("go_on", "go_on")),
    "audit_prompts": (("true", True), ("no", False)),
    "tls": (("tailscale", "tailscale"), ("none", "none")),
    "tls_cert": (("/nowhere/cert.pem", "/nowhere/cert.pem"), ("/x/a b", "/x/a b")),
    "tls_key": (("/nowhere/key.pem", "/nowhere/key.pem"), ("/x/a b", "/x/a b")),
    "insecure": (("true", True), ("no", False)),
    "oidc_issuer": (("https://id.example/realm",) * 2, ("https://id.example/",) * 2),
    "oidc_audience": (("b9agent", "b9agent"), ("my app", "my app")),
    "oidc_jwks": (("/nowhere/jwks.json",) * 2, ("https://id.example:8443/keys?x=1",) * 2),
    "log_format": (("json", "json"), ("text", "text")),
    "debug": (("true", True), ("off", False)),
    "state_dir": (("/nowhere/s", "/nowhere/s"), ("/nowhere/t", "/nowhere/t")),
    "config": (None, None),  # has tests of its own
}
ROWS = [row for row in b9agent.SETTINGS if row.key != "config"]
FILED = [row for row in ROWS if row.path]
SECRETS = [row for row in ROWS if row.secret]


def by_key(row):
    return row.key


@pytest.fixture
def file(tmp_path):
    """file(text, mode=0o600) writes a config file and returns its path."""
    def write(text, mode=0o600):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return str(path)
    return write


def nested(path, text):
    """`a.b: text` as the file says it, quoted."""
    *groups, leaf = path.split(".")
    lines = ["%s%s:" % ("  " * depth, name) for depth, name in enumerate(groups)]
    return "\n".join(lines + ["%s%s: %s" % ("  " * len(groups), leaf, json.dumps(text))]) + "\n"


def load(flags=None, environ=None, path=os.devnull):
    return b9agent.load_settings(dict(flags or {}, config=path), dict(environ or {}))


def refusal(*arguments, **named):
    with pytest.raises(b9agent.UsageError) as caught:
        load(*arguments, **named)
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- the table -----------------------------------------------------------

def test_every_setting_has_values_here():
    assert set(VALUES) == {row.key for row in b9agent.SETTINGS}


def test_flags_variables_and_places_in_the_file_are_each_used_once():
    for names in ([row.flag for row in b9agent.SETTINGS], [row.variable for row in b9agent.SETTINGS],
                  [row.key for row in b9agent.SETTINGS],
                  [name for row in FILED for name in {row.path, row.also} - {""}]):
        assert len(names) == len(set(names))


def test_every_default_is_a_value_that_is_accepted():
    loaded = b9agent.load_settings({"config": os.devnull}, {})
    for row in ROWS:
        assert loaded.origins[row.key] == "default"
        value = getattr(loaded.settings, row.key)
        assert (value is None) == (row.default == ""), row.key


def test_defaults_are_those_of_the_design():
    settings = load().settings
    assert (settings.pool_name, settings.provider_name, settings.gateway_host, settings.gateway_port,
            settings.gateway_scheme, settings.keepalive_interval, settings.control_port,
            settings.debug) == ("external", "generic", "localhost", 1994, "http", 60.0, 9999, False)


@pytest.mark.parametrize("row", ROWS, ids=by_key)
def test_flag_beats_environment_beats_file_beats_default(row, file):
    (one, one_value), (two, two_value) = VALUES[row.key]
    path = file(nested(row.path, one)) if row.path else os.devnull
    if row.path:
        loaded = load({}, {}, path)
        assert getattr(loaded.settings, row.key) == one_value
        assert loaded.origins[row.key] == "%s:%d" % (path, row.path.count(".") + 1)
    if row.key != "token_file":  # the file it names would have to exist: below
        loaded = load({}, {row.variable: two}, path)
        assert (getattr(loaded.settings, row.key), loaded.origins[row.key]) == (
            two_value, "environment " + row.variable)
        loaded = load({row.key: one}, {row.variable: two}, path)
        assert (getattr(loaded.settings, row.key), loaded.origins[row.key]) == (
            one_value, "flag " + row.flag)


# A token_file row with a file that is not there is refused, so that its precedence shows in its name.
@pytest.fixture(autouse=True)
def token_files(monkeypatch, request):
    if "row" in request.fixturenames and request.getfixturevalue("row").key == "token_file":
        real = b9agent.read_text
        monkeypatch.setattr(b9agent, "read_text", lambda path, *rest: (
            "a-token-of-a-file" if path.startswith("/nowhere/") else real(path, *rest)))


@pytest.mark.parametrize("row", [row for row in FILED if row.also], ids=by_key)
def test_the_flat_form_says_the_same_as_the_nested_one(row, file):
    text, value = VALUES[row.key][0]
    assert getattr(load(path=file(nested(row.also, text))).settings, row.key) == value
    assert "given twice" in refusal(path=file(nested(row.path, text) + nested(row.also, text)))


@pytest.mark.parametrize("row", FILED, ids=by_key)
def test_a_name_left_empty_or_null_in_the_file_is_not_set(row, file):
    *groups, leaf = row.path.split(".")
    for nothing in ("", " ~", " null"):
        text = "".join("%s%s:\n" % ("  " * depth, name) for depth, name in enumerate(groups))
        loaded = load(path=file("%s%s%s:%s\n" % (text, "  " * len(groups), leaf, nothing)))
        assert loaded.origins[row.key] == "default"


@pytest.mark.parametrize("row", ROWS, ids=by_key)
def test_an_empty_variable_is_not_set(row):
    assert load({}, {row.variable: ""}).origins[row.key] == "default"


def test_a_list_of_gpus_in_the_file(file):
    assert load(path=file("limits:\n  gpu_ids: [3, 0, '1']\n")).settings.gpu_ids == (
        ("", 0), ("", 1), ("", 3))
    assert load(path=file("limits:\n  gpu_ids:\n  - 2\n  - 0\n")).settings.gpu_ids == (("", 0), ("", 2))


# -- values that are refused, wherever they come from --------------------

BAD_VALUES = [
    ("token", "two words"), ("token", "caf\u00e9"), ("token", "a\nb"), ("machine_id", "1234567"),
    ("machine_id", "12345678\n"), ("machine_id", "0x123456"), ("machine_id", "\u0661" * 8),
    ("hostname", "http://h"), ("hostname", "a b"), ("hostname", "gw\n"), ("hostname", "-x"),
    ("pool_name", " gpu"), ("pool_name", "g\x1b[2Ju"), ("pool_name", "gpu\n"), ("pool_name", "a\u202eb"),
    ("gateway_host", "gw:1994"), ("gateway_host", "gw/x"), ("gateway_host", "gw\r"),
    ("gateway_host", "gw example"), ("gateway_host", "gw\n"), ("gateway_host", "x" * 254),
    ("gateway_port", "0"), ("gateway_port", "65536"), ("gateway_port", "-1"), ("gateway_port", "1e3"),
    ("gateway_port", "80\n"), ("gateway_port", "\u0661"), ("gateway_port", "9" * 900),
    ("gateway_port", " 80"), ("gateway_scheme", "HTTPS"), ("gateway_scheme", "ftp"),
    ("tunnel", "gw.example"), ("tunnel", "-oProxyCommand=x@gw"), ("tunnel", "me@-oProxyCommand=x"),
    ("tunnel", "me@gw:0"), ("tunnel", "me@gw:65536"), ("tunnel", "me@gw:22:23"), ("tunnel", "me@"),
    ("tunnel", "me@gw\n"), ("tunnel", "me@g w"), ("tunnel", "a b@gw"), ("tunnel", "me@[::1"),
    ("k3s_service_account", "Beta9"), ("k3s_service_account", "-a"), ("k3s_service_account", "a/b"),
    ("k3s_service_account", "a" * 64), ("k3s_token_hours", "0"), ("k3s_token_hours", "169"),
    ("k3s_token_hours", "1.5"), ("k3s_server", "http://127.0.0.1:6443"), ("k3s_server", "https://127.0.0.1:0"),
    ("k3s_server", "https://a/b"), ("k3s_server", "https://u@a"), ("k3s_server", "https://"),
    ("tunnel_local_port", "65536"), ("tunnel_reverse_k3s", "perhaps"),
    ("tailnet_socket", "~nobody-of-that-name/s"), ("tailnet_control", "100.64.0.1"),
    ("gateway_proxy", "socks5://h:1"), ("gateway_proxy", "squid.lan"), ("gateway_proxy", "http://h:1\n"),
    ("keepalive_interval", "0"), ("keepalive_interval", "0.9"), ("keepalive_interval", "151"),
    ("keepalive_interval", "nan"), ("keepalive_interval", "inf"), ("keepalive_interval", "1e1"),
    ("keepalive_interval", "60\n"), ("keepalive_interval", "\u0666"), ("max_cpu", "0"),
    ("max_cpu", "-1"), ("max_cpu", "1.5m"), ("max_cpu", "4 cores"), ("max_cpu", "4\n"),
    ("max_memory", "16G"), ("max_memory", "16"), ("max_memory", "1Ki"), ("max_memory", "16Gi\n"),
    ("max_memory", "-1Gi"), ("max_gpus", "-1"), ("max_gpus", "two"), ("max_gpus", "1.0"),
    ("grid_intensity", "2000.1"), ("grid_intensity", "-1"), ("grid_intensity", "nan"),
    ("grid_intensity", "1e3"), ("grid_intensity", "9" * 5000), ("renewable_pct", "100.1"),
    ("renewable_pct", "50%"), ("pue", "0.9"), ("pue", "3.1"), ("pue", "inf"), ("cpu_watts", "0"),
    ("cpu_watts", "10001"), ("cpu_watts", "65W"), ("energy_certificate", "x" * 201),
    ("energy_certificate", "a\nb"), ("energy_certificate", " a"),
    ("gpu_ids", "0,,1"), ("gpu_ids", "a"), ("gpu_ids", "-1"), ("gpu_ids", ","), ("gpu_ids", "0-3"), ("gpu_ids", "matrox:0"), ("gpu_ids", "amd:"),
    ("inference_engine", "olama"), ("inference_context", "127"), ("inference_context", "8k"),
    ("inference_slots", "0"), ("inference_slots", "1025"), ("inference_queue", "-1"),
    ("inference_queue", "4097"), ("inference_queue_wait", "0"), ("inference_queue_wait", "60 s"),
    ("inference_silence_limit", "0.5"), ("inference_silence_limit", "86401"),
    ("inference_keep_warm", "0"), ("inference_keep_warm", "Auto"), ("inference_keep_warm", "nan"),
    ("inference_keep_warm_models", "a"), ("inference_keep_warm_models", "a=b=5"),
    ("inference_keep_warm_models", "a=1,"), ("inference_keep_warm_models", "a b=1"),
    ("inference_keep_warm_models", "=1"), ("inference_keep_warm_models", "a=0"),
    ("inference_idle_stop", "0"), ("inference_idle_stop", "10m"), ("inference_load_limit", "0"),
    ("inference_load_limit", "86401"), ("guards_parallel_cold_starts", "0"),
    ("guards_cold_start_seconds_per_day", "-1"), ("guards_cold_starts_per_hour", "1.5"),
    ("guards_duplicates", "on"), ("guards_max_retries", "101"), ("guards_retry_ttl", "0"),
    ("guards_task_depth", "0"), ("guards_task_tree", "0"), ("audit_keep_days", "-1"),
    ("audit_full", "stop"), ("audit_prompts", "perhaps"),
    ("inference_gateway_access", "on"), ("inference_gpu_usd_per_hour", "$3"), ("tls", "tailscal"),
    ("tls", "true"), ("tls_cert", "~nobody-of-that-name/c"), ("insecure", "please"),
    ("oidc_issuer", " a"), ("oidc_jwks", "http://id.example/keys"),
    ("oidc_jwks", "https://u:p@id.example/"), ("oidc_jwks", "~nobody-of-that-name/c"),
    ("inference_parallel", "0"), ("inference_parallel", "257"), ("inference_autostart", "maybe"),
    ("control_port", "65536"), ("control_port", "-0"), ("log_format", "xml"), ("debug", "maybe"),
    ("debug", "2"), ("state_dir", "a\0b"), ("state_dir", "a\nb"),
]


@pytest.mark.parametrize("key, text", BAD_VALUES)
def test_a_bad_value_is_named_with_its_flag_variable_or_line(key, text, file):
    row = b9agent.SETTING_BY_KEY[key]
    shown = "this value cannot be used" if row.secret else "cannot be used"
    said = refusal({key: text})
    assert said.startswith(row.flag + ": ") and shown in said and ", expected " in said
    assert b9agent.printable(said) == said
    said = refusal({}, {row.variable: text})
    assert said.startswith(row.variable + ": ") and shown in said
    if row.path:
        path = file(nested(row.path, text))
        said = refusal(path=path)
        line = row.path.count(".") + 1
        assert said.startswith("%s:%d: %s: " % (path, line, row.path)) and shown in said
    if row.secret:
        assert text.strip() not in said


def test_what_a_bad_value_is_expected_to_be_is_said_in_words_of_ours():
    assert refusal({"gateway_port": "9" * 5000}).endswith("expected a port, 1 to 65535")


def test_every_type_refuses_something():
    tried = {b9agent.SETTING_BY_KEY[key].parse for key, _ in BAD_VALUES}
    assert tried == {row.parse for row in ROWS}


def test_tls_is_said_in_one_form_of_two_wherever_the_parts_come_from(file):
    both = load(path=file("tls:\n  cert: /x/c.pem\n  key: /x/k.pem\n")).settings
    assert (both.tls, both.tls_cert, both.tls_key) == (None, "/x/c.pem", "/x/k.pem")
    assert load(path=file("tls: tailscale\n")).settings.tls == "tailscale"
    path = file("tls: tailscale\n")
    said = refusal({}, {"B9AGENT_TLS_KEY": "/x/k.pem"}, path)
    assert said.startswith("tls (%s:1) and tls.key (environment B9AGENT_TLS_KEY) are both set, "
                           "expected one form" % path)
    path = file("tls:\n  cert: /x/c.pem\n")
    assert refusal({"tls": "tailscale"}, {}, path).startswith(
        "tls (flag --tls) and tls.cert (%s:2) are both set" % path)
    assert "unknown name `tls.certt`, expected `tls.cert`" in refusal(path=file("tls:\n  certt: x\n"))


# -- the file: what is refused, and the words it is refused with ----------

BAD_FILES = [
    # (the file, its line, what is said after "FILE:LINE: ")
    ("\tpool: gpu\n", 1, "a tab, expected spaces, or \\t between double quotes"),
    ("gateway:\n\thost: x\n", 2, "a tab, expected spaces, or \\t between double quotes"),
    ("pool: a\npool: b\n", 2, "`pool` is given twice, first in line 1, expected each name once"),
    ("machine:\n  id: 12345678\n\n  id: 1\n", 4,
     "`id` is given twice, first in line 2, expected each name once"),
    ("gateway: {host: a, host: b}\n", 1, "`host` is given twice, expected each name once"),
    ("pool: a\npool_name: b\n", 2, "`pool_name` is given twice, first in line 1, expected it once"),
    ("poool: a\n", 1, "unknown name `poool`, expected `pool`"),
    ("gateway:\n  hots: x\n", 2, "unknown name `gateway.hots`, expected `gateway.host`"),
    ("machine:\n  tokn: x\n", 2, "unknown name `machine.tokn`, expected `machine.token`"),
    ("keep_alive_interval: 5\n", 1,
     "unknown name `keep_alive_interval`, expected `keepalive_interval`"),
    ("zebra: 1\n", 1, "unknown name `zebra`, expected one of the names that `b9agent.py config` lists"),
    ("state_dir: /x\n", 1,
     "unknown name `state_dir`, expected one of the names that `b9agent.py config` lists"),
    ("gateway:\n  port: abc\n", 2,
     "gateway.port: `abc` cannot be used, expected a port, 1 to 65535"),
    ("machine:\n  id: 0\n", 2, "machine.id: `0` cannot be used, expected 8 hexadecimal digits, as "
                               "`machine create` prints them"),
    ("debug: maybe\n", 1, "debug: `maybe` cannot be used, expected true or false"),
    ("machine:\n  token: a b\n", 2, "machine.token: this value cannot be used, expected one word of "
                                    "printable ASCII characters"),
    ("pool: [a, b]\n", 1, "`pool` is a list, expected one value"),
    ("pool:\n- a\n", 1, "`pool` is a list, expected one value"),
    ("pool: {a: b}\n", 1, "`pool` is a group of names, expected one value"),
    ("gateway: here\n", 1, "`gateway` is a group, expected names below it, indented"),
    ("gateway:\n- a\n", 1, "`gateway` is a group, expected names below it, indented"),
    ("limits:\n  gpu_ids: [0, [1]]\n", 2, "`limits.gpu_ids` is a list, expected one value"),
    ("- a\n- b\n", 1, "this is not a mapping, expected lines of the form `name: value`"),
    ("pool\n", 1, "`pool` is no name with a value, expected `name: value`, with a blank after the colon"),
    ("pool:gpu\n", 1, "`pool` is no name with a value, expected `name: value`, with a blank after the colon"),
    ("pool: a: b\n", 1, "something after the end of the value, expected quotes around it all, a comment, or "
                         "the end of the line"),
    ("pool: 'a\n", 1, "a text that begins with ' has no end, expected a second ' on the same line"),
    ("pool: \"a\nb\"\n", 1, 'a text that begins with " has no end, expected a second " on the same '
                            "line"),
    ("pool: \"\\q\"\n", 1, 'the escape \\q, expected one of \\n \\t \\" \\\\ \\xNN \\uNNNN'),
    ("pool: 'a' b\n", 1, "something after the end of the value, expected quotes around it all, a comment, or "
                         "the end of the line"),
    ("limits:\n  gpu_ids: [0,\n    1]\n", 2,
     "a list or mapping that does not end on its line, expected `]`"),
    ("gateway: {host: a\n", 1, "a list or mapping that does not end on its line, expected `}`"),
    ("pool: a\n  b: c\n", 2, "this line is indented more than the one it follows, expected 0 spaces "
                             "before it, or a value on the line above"),
    ("gateway:\n  host: a\n port: 1\n", 3, "this line is indented more than the one it follows, "
                                           "expected 0 spaces before it, or a value on the line above"),
    ("  pool: a\nlog:\n", 2, "this line is indented less than the first, expected the same "
                             "indentation for all names of one level"),
    ("pool: &a x\n", 1, "an anchor (&) is not supported, expected a plain or quoted value"),
    ("pool: *a\n", 1, "an alias (*) is not supported, expected a plain or quoted value"),
    ("pool: !str x\n", 1, "a tag (!) is not supported, expected a plain or quoted value"),
    ("pool: |\n  x\n", 1, "a block of text (|) is not supported, expected a plain or quoted value"),
    ("pool: >\n  x\n", 1, "a folded block of text (>) is not supported, expected a plain or quoted "
                          "value"),
    ("pool: @x\n", 1, "the reserved character @ is not supported, expected a plain or quoted value"),
    ("pool: `x\n", 1, "the reserved character ` is not supported, expected a plain or quoted value"),
    ("pool: - a\n", 1, "a value that begins with `-`, expected a plain value, or quotes around it"),
    ("? pool\n: a\n", 1, "a complex key (?) is not supported, expected `name: value`"),
    ("<<: x\n", 1, "a merge (<<) is not supported, expected `name: value`"),
    ("%YAML 1.1\npool: a\n", 1, "a directive (%) is not supported, expected `name: value`"),
    ("pool: a\n---\npool: b\n", 2, "a document marker (---), expected one document"),
    ("pool: a\n...\n", 2, "a document marker (...), expected one document"),
    ("pool: a\0\n", 1, "the control character \\x00, expected printable text"),
    ("\npool: a\x1b[2J\n", 2, "the control character \\x1b, expected printable text"),
    (b"pool: a\ngateway:\n  host: caf\xe9\n", 3, "bytes that are not UTF-8, expected text"),
    ("a:\n b:\n  c:\n   d:\n    e:\n     f:\n      g:\n       h:\n        i:\n         j: x\n", 10,
     "too many levels, expected at most 8"),
]


@pytest.mark.parametrize("text, line, said", BAD_FILES, ids=lambda value: repr(value)[:40])
def test_a_bad_file_is_refused_by_line_and_by_name(text, line, said, file):
    path = file(text)
    assert refusal(path=path) == "%s:%d: %s" % (path, line, said)


def test_a_bad_file_is_an_exit_code_and_one_line_never_a_traceback(file, home):
    path = file("pool: a\npool: b\n")
    for command in ([], ["--once"], ["config"], ["init", "-y"], ["status"], ["--dry-run"]):
        done = run_agent(home, *command, "--config", path)
        assert (done.code, done.out) == (2, ""), (command, done)
        assert done.err == ("b9agent: error: %s:2: `pool` is given twice, first in line 1, expected "
                            "each name once\n" % path)


@pytest.mark.parametrize("text", ["pool: {a", "gateway: {host", "limits: {gpu_ids: [0", "pool: {a: {b",
                                  "pool: {'a'", "pool: {}x", "pool: [[[[[[[[[[[["])
def test_a_file_that_ends_early_is_refused_like_any_other(text, file):
    assert re.match(r".*/c\.yaml:1: .+, expected .+", refusal(path=file(text)))


def test_nothing_of_a_secret_stands_in_the_refusal_of_its_line(file):
    for text in ("machine:\n  token %s\n", "machine: {token: %s\n", "machine:\n  token: '%s\n",
                 "machine:\n  token: [%s]\n", "machine:\n  token: a: %s\n", "k3s: %s\n", "tokem: %s\n",
                 "machine:\n  token: &%s\n", "- %s\n"):
        said = refusal(path=file(text % "SECRETTOKEN0123456789abcdef"))
        assert "TOKEN0123456789" not in said, (text, said)


@pytest.mark.parametrize("row", FILED, ids=by_key)
def test_a_typo_in_any_setting_is_answered_with_the_setting(row, file):
    for name in {row.path, row.also} - {""}:
        leaf = name.rpartition(".")[2]
        at = len(leaf) // 2
        for typo in {leaf + "x", leaf[:at] + leaf[at] + leaf[at:], leaf[:at] + "_" + leaf[at:]}:
            full = name[:len(name) - len(leaf)] + typo
            path = file(nested(full, "x"))
            said = refusal(path=path)
            assert said == "%s:%d: unknown name `%s`, expected `%s`" % (
                path, full.count(".") + 1, full, name)


@pytest.mark.parametrize("row", list(b9agent.SETTINGS), ids=by_key)
def test_a_typo_in_any_flag_is_answered_with_the_flag(row):
    at = len(row.flag) // 2
    for typo in {row.flag + "x", row.flag[:at] + row.flag[at + 1:], row.flag.replace("-", "_")[2:]}:
        typo = "--" + typo.lstrip("-_")
        if typo == row.flag:
            continue
        with pytest.raises(b9agent.UsageError) as caught:
            b9agent.parse_arguments([typo, "x"], ())
        assert "unknown flag %s, expected `%s`" % (typo, row.flag) in str(caught.value)


def test_a_file_too_large_to_be_one_is_refused_and_not_half_read(file):
    path = file("pool: gpu\n" + "# padding\n" * 30000 + "pool: other\n")
    assert re.search(r"large|given twice", refusal(path=path))


def test_no_file_is_no_error_but_a_named_one_must_exist(home):
    assert b9agent.load_settings({"state_dir": str(home)}, {}).settings.pool_name == "external"
    for flags, environ in (({"config": str(home / "no")}, {}), ({}, {"B9AGENT_CONFIG": str(home / "no")})):
        with pytest.raises(b9agent.UsageError) as caught:
            b9agent.load_settings(flags, environ)
        assert "there is no config file %s" % (home / "no") in str(caught.value)
        assert "b9agent.py init" in str(caught.value)


def test_a_folder_for_a_file_is_refused(tmp_path):
    assert "cannot read %s" % tmp_path in refusal(path=str(tmp_path))


def test_the_file_is_looked_for_in_the_state_folder(home):
    state = home / "s"
    state.mkdir()
    (state / "config.yaml").write_text("pool: found\n")
    loaded = b9agent.load_settings({}, {"B9AGENT_HOME": str(state)})
    assert loaded.settings.pool_name == "found"
    assert loaded.settings.config == str(state / "config.yaml")


# -- who may read secrets ------------------------------------------------

@pytest.mark.parametrize("row", [row for row in SECRETS], ids=by_key)
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_a_file_with_a_secret_that_others_may_touch_is_refused_with_the_chmod_that_mends_it(
        row, mode, file):
    path = file(nested(row.path, VALUES[row.key][1][0]), mode)
    assert refusal(path=path) == ("%s holds secrets and others may read it (mode %04o). Mend it with: "
                                  "chmod 600 %s" % (path, mode, path))
    os.chmod(path, 0o600)
    load(path=path)


def test_a_file_without_a_secret_may_be_read_by_anybody(file):
    assert load(path=file("pool: gpu\n", 0o644)).settings.pool_name == "gpu"


def test_the_token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    loaded = load({"token_file": str(path)})
    assert (loaded.settings.token, loaded.origins["token"]) == (TOKEN, "file %s" % path)
    path.chmod(0o644)
    assert "chmod 600 %s" % path in refusal({"token_file": str(path)})
    path.chmod(0o600)
    path.write_text("two words\n")
    assert "%s: this is not a token, expected one word" % path in refusal({"token_file": str(path)})
    path.write_text("")
    assert "this is not a token" in refusal({"token_file": str(path)})
    path.unlink()
    said = refusal({"token_file": str(path)})
    assert "cannot read the token file %s" % path in said and "flag --token-file" in said


def test_a_token_beats_a_token_file_that_stands_no_higher(tmp_path, file):
    path = tmp_path / "token"
    path.write_text("from-the-token-file")
    path.chmod(0o600)
    config = file("machine:\n  token: from-the-config-file\n  token_file: %s\n" % path)
    both = {"BETA9_TOKEN": "from-the-environment"}
    assert load({}, {}, config).settings.token == "from-the-config-file"
    assert load({"token_file": str(path)}, both, config).settings.token == "from-the-token-file"
    assert load({}, dict(both, B9AGENT_TOKEN_FILE=str(path)), config).settings.token == \
        "from-the-environment"
    assert load({}, {"B9AGENT_TOKEN_FILE": str(path)}, config).settings.token == "from-the-token-file"
    assert load({"token_file": str(path), "token": "a-flag-token"}, both, config).settings.token == \
        "a-flag-token"


def test_a_secret_on_the_command_line_earns_a_warning():
    for row in SECRETS:
        loaded = load({row.key: VALUES[row.key][1][0]})
        assert [warning for warning in loaded.warnings if row.flag in warning and "`ps`" in warning
                and row.variable in warning]
    assert load({}, {"BETA9_TOKEN": TOKEN}).warnings == ()


@pytest.mark.parametrize("name, meant", [
    ("B9AGENT_INFERENCE_QEUE", "B9AGENT_INFERENCE_QUEUE"), ("BETA9_TOKN", "BETA9_TOKEN"),
    ("BETA9_INFERENCE_PORT", "B9AGENT_INFERENCE_PORT"), ("B9AGENT_KEEPALIVE_INTERVAL", "BETA9_KEEPALIVE_INTERVAL")])
def test_a_variable_that_is_misspelt_is_told_of(name, meant):
    assert load({}, {name: "1"}).warnings == (f"the variable {name} is not read: {meant} is",)


@pytest.mark.parametrize("name", ["B9AGENT_TOKEN", "B9AGENT_MACHINE_ID", "BETA9_INFERENCE_HOST", "B9AGENT_XYZZY",
                                  "B9AGENT", "BETA9_CLUSTER", "OLLAMA_HOST", "B9AGENT_DRY_RUN", "B9AGENT_GATEWAY",
                                  "B9AGENT_POOL", "B9AGENT_YES", "B9AGENT_PYTHON", "B9AGENT_QUIET", "B9AGENT_RUN_AS",
                                  "B9AGENT_FROM", "B9AGENT_BASE_URL", "B9AGENT_NO_START", "B9AGENT_NO_SERVICE"])
def test_variables_of_others_are_left_alone(name):
    assert load({}, {name: "1"}).warnings == ()


# -- the command line ----------------------------------------------------

def parsed(*argv):
    return b9agent.parse_arguments(argv, (b9agent.Option("--once", "", ""),
                                          b9agent.Option("--wait", "SECONDS", "")))


def test_values_after_a_blank_or_an_equals_sign():
    assert parsed("--pool-name", "gpu").flags == parsed("--pool-name=gpu").flags == {"pool_name": "gpu"}
    assert parsed("--once", "--wait", "3", "run").options == {"once": "", "wait": "3"}
    assert parsed("--pool-name=a=b").flags == {"pool_name": "a=b"}
    assert parsed("machine", "create").words == ("machine", "create")


@pytest.mark.parametrize("token", ["-x", "-abc_DEF-", "--", "--abc", "-", "-1", "--=", "-h", "-=x"])
def test_a_value_may_begin_with_a_dash(token):
    assert parsed("--token", token).flags == {"token": token}
    assert parsed("--token=" + token).flags == {"token": token}


@pytest.mark.parametrize("argv, said", [
    (["--token"], "--token needs a value (TOKEN)"),
    (["--token", "--debug"], "--token needs a value (TOKEN)"),
    (["--token", "--pool-name=x"], "--token needs a value (TOKEN)"),
    (["--token="], "--token has an empty value, expected TOKEN"),
    (["--token", ""], "--token has an empty value, expected TOKEN"),
    (["--once=1"], "--once takes no value"),
    (["--nonsense"], "unknown flag --nonsense, expected"),
    (["--gateway", "gw"], "unknown flag --gateway, expected `--gateway-host`"),
    (["--pool", "gpu"], "unknown flag --pool, expected `--pool-name`"),
])
def test_a_bad_command_line_says_what_is_missing(argv, said):
    with pytest.raises(b9agent.UsageError) as caught:
        parsed(*argv)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("had, typed", [("-y", "--yes"), ("--yes", "-y"), ("-y", "-y")])
def test_yes_has_two_names_everywhere(had, typed):
    option = b9agent.Option(had, "", "ask nothing")
    assert b9agent.parse_arguments([typed], [option]).options == {option.name: ""}


def test_a_switch_is_true_alone_and_takes_a_word():
    assert load(parsed("--debug").flags).settings.debug is True
    assert load(parsed("--debug=false").flags, {"BETA9_DEBUG": "1"}).settings.debug is False
    assert "true or false" in refusal(parsed("--debug=perhaps").flags)


def test_a_dash_token_reaches_the_agent_whole(home):
    for arguments in (["--token", "-Abc_123-zyxwvut"], ["--token=-Abc_123-zyxwvut"]):
        done = run_agent(home, "config", "--json", *arguments)
        assert done.code == 0, done
        assert json.loads(done.out)["token"] == {"value": "\u2026wvut", "origin": "flag --token"}


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["run", "--help"], ["init", "--help"],
                                  ["config", "--help"], ["machine", "create", "--help"]])
def test_help_lists_flags_with_variables_and_defaults(argv, home):
    done = run_agent(home, *argv)
    assert (done.code, done.err) == (0, "")
    if argv[0] in ("--help", "-h", "help", "run", "init"):
        for row in b9agent.SETTINGS:
            assert row.flag in done.out and "(%s)" % row.variable in done.out
            assert not row.default or "[%s]" % row.default in done.out


def test_help_lists_every_command(home):
    done = run_agent(home, "--help")
    for command in b9agent.COMMANDS:
        assert re.search(r"^  %s +%s" % (command.words, re.escape(command.help)), done.out, re.M)


def test_help_fits_the_terminal_and_no_line_is_wider(home):
    for columns, widest in (("80", 80), ("300", 100), ("20", 80)):
        for words in ([], ["top"], ["k3s"], ["k3s", "token"], ["doctor"]):
            done = run_agent(home, *words, "--help", COLUMNS=columns)
            assert done.code == 0 and max(map(len, done.out.splitlines())) <= widest, done


def test_help_of_a_group_is_of_its_commands(home):
    group = run_agent(home, "help", "k3s").out
    assert group == run_agent(home, "k3s", "chek", "-h").out
    assert group.startswith("usage: b9agent.py k3s COMMAND") and "--token" not in group
    assert [line.split()[1] for line in group.splitlines() if line.startswith("  k3s ")] == [
        "check", "rbac", "token", "install"]
    both = run_agent(home, "models", "--help").out
    assert both.startswith("usage: b9agent.py models [FLAG") and "  models fit  " in both and "--json" in both


@pytest.mark.parametrize("argv, said", [
    (["k3s", "token", "--hours", "0"], "--hours: `0` cannot be used, expected hours, 1 to 168"),
    (["k3s", "token", "--write", "~nobody-9/x"], "--write: `~nobody-9/x` cannot be used, expected a path"),
    (["k3s", "check", "--namespace", "A"], "--namespace: `A` cannot be used, expected lower-case letters"),
    (["k3s", "install", "--dry-run", "--sha256", "xyz"], "--sha256: `xyz` cannot be used, expected 64 hex"),
    (["k3s", "install", "--dry-run", "--release", "v1;x"], "--release: `v1;x` cannot be used, expected a ver"),
    (["top", "--control-token-file", "/x"], "--control-token-file is of no use without --host"),
    (["top", "--host", "h", "--control-token-file", "/"], "cannot read /. "),
])
def test_what_only_one_command_takes_is_named_where_it_is_wrong(argv, said, home):
    done = run_agent(home, *argv)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("b9agent: error: " + said), done


def test_a_control_token_that_is_none_is_named_by_where_it_stands(home):
    done = run_agent(home, "top", "--host", "h", B9AGENT_CONTROL_TOKEN="zz")
    assert done.code == 2 and "B9AGENT_CONTROL_TOKEN is no control token" in done.err, done
    for text in ("zz", ""):
        (home / "there").write_text(text)
        (home / "there").chmod(0o600)
        done = run_agent(home, "top", "--host", "h", "--control-token-file", "~/there")
        assert done.code == 2 and "%s is no control token" % (home / "there") in done.err, done


@pytest.mark.parametrize("argv, said", [
    (["rnu"], "`run`"), (["stauts"], "`status`"), (["machine", "craete"], "machine create"),
    (["--poolname", "x"], "`--pool-name`"), (["config", "--jsno"], "`--json`"),
    (["run", "extra"], "unknown command"), (["machine"], "machine create"), (["k3s", "chek"], "k3s check"),
    (["dashboard"], "`b9agent.py --help` lists"), (["top", "--no-tui"], "`b9agent.py COMMAND --help` lists"),
])
def test_a_bad_command_is_exit_2_with_a_suggestion(argv, said, home):
    done = run_agent(home, *argv)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("b9agent: error: unknown ") and said in done.err, done
    assert done.err.count("\n") == 1


# -- config --------------------------------------------------------------

def test_config_shows_every_value_with_its_origin_and_masks_secrets(home, file):
    path = file("machine:\n  token: %s\npool: gpu\nkeepalive_interval: 30\nlimits:\n"
                "  gpu_ids: [0, 1]\n  memory: 16Gi\n  cpu: 4\n" % TOKEN)
    arguments = ("config", "--config", path, "--max-gpus", "2")
    done = run_agent(home, *arguments, BETA9_K3S_TOKEN=K3S, BETA9_GATEWAY_HOST="gw.example")
    assert (done.code, done.err) == (0, ""), done
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in done.out.splitlines()[1:]}
    assert rows["machine.token"] == ["\u20269876", path + ":2"]
    assert rows["k3s.token"] == ["\u20265544", "environment BETA9_K3S_TOKEN"]
    assert rows["gateway.host"] == ["gw.example", "environment BETA9_GATEWAY_HOST"]
    assert rows["pool"] == ["gpu", path + ":3"]
    assert rows["keepalive_interval"] == ["30", path + ":4"]
    assert rows["limits.gpus"] == ["2", "flag --max-gpus"]
    assert rows["limits.gpu_ids"] == ["0,1", path + ":6"]
    assert rows["gateway.port"] == ["1994", "default"]
    assert rows["limits.memory"][0] == "16384Mi" and rows["limits.cpu"][0] == "4000m"
    assert set(rows) == {row.path or row.flag for row in b9agent.SETTINGS}
    done = run_agent(home, *arguments, "--json", BETA9_K3S_TOKEN=K3S)
    shown = json.loads(done.out)
    assert shown["token"] == {"value": "\u20269876", "origin": path + ":2"}
    assert set(shown) == {row.key for row in b9agent.SETTINGS}
    assert TOKEN not in done.out + done.err and K3S not in done.out + done.err


def test_config_shows_values_that_can_be_given_back(home):
    for row in ROWS:
        for text, value in VALUES[row.key]:
            assert row.parse(b9agent.setting_text(row, value)) == value, row.key


def between(name):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as handle:
        found = re.findall(r"<!-- %s -->\n(.*?)<!-- /%s -->" % (name, name), handle.read(), re.S)
    assert len(found) == 1, "README.md has no part between <!-- %s --> and <!-- /%s -->" % (name, name)
    return found[0].strip("\n")


@pytest.mark.parametrize("name", [name for name, _ in b9agent.README_TABLES])
def test_the_readme_has_the_tables_of_the_file(name, home):
    done = run_agent(home, "config", "--" + name)
    assert (done.code, done.err) == (0, "")
    assert between(name) == done.out.strip("\n")


def test_the_table_of_exit_codes_has_every_exit_code(home):
    listed = re.findall(r"^\| (\d+) \| .{10}", run_agent(home, "config", "--exit-codes").out, re.M)
    assert sorted(map(int, listed)) == sorted(set(map(int, listed))) == sorted(
        int(code) for code in b9agent.Exit)


# -- init ----------------------------------------------------------------

NO_GATEWAY = ("--gateway", "127.0.0.1:1")


def mode(path):
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


def written(path):
    found = {key: given.text for key, given in b9agent.read_config(str(path)).items()}
    if found.get("inference_port") == environment("")["B9AGENT_INFERENCE_PORT"]:
        del found["inference_port"]  # of the tests' environment, and kept as every variable is
    return found


def test_init_with_its_short_forms_asks_nothing(home, state, hostile):
    done = run_agent(home, "init", "--gateway", "127.0.0.1:%d" % hostile.port, "--token", TOKEN,
                     "--pool", "gpu")
    assert done.code == 0, done
    path = state / "config.yaml"
    found = written(path)
    machine = found.pop("machine_id")
    assert re.fullmatch("[0-9a-f]{8}", machine)
    assert found == {"token": TOKEN, "pool_name": "gpu", "gateway_host": "127.0.0.1",
                     "gateway_port": str(hostile.port)}
    assert (mode(path), mode(state)) == (0o600, 0o700)
    assert "gateway %s is up" % hostile.url in done.out and str(path) in done.out
    assert TOKEN not in done.out + done.err and machine in done.out
    assert set(tree(home)) == {".b9agent", ".b9agent/config.yaml"}
    assert [request.name for request in hostile.requests] == ["health"]
    assert not any(request.values("authorization") for request in hostile.requests)


def test_init_keeps_the_machine_id_and_what_else_the_file_says(home, state):
    state.mkdir(mode=0o700)
    path = state / "config.yaml"
    path.write_text("machine:\n  id: 0badcafe\n  token: %s\nkeepalive_interval: 30\n"
                    "limits: {gpu_ids: [0, 2]}\n" % TOKEN)
    path.chmod(0o600)
    done = run_agent(home, "init", *NO_GATEWAY, "--pool", "new", "-y")
    assert done.code == 0, done
    assert written(path) == {"machine_id": "0badcafe", "token": TOKEN, "keepalive_interval": "30",
                             "gpu_ids": "0,2", "gateway_host": "127.0.0.1", "gateway_port": "1",
                             "pool_name": "new"}
    again = path.read_bytes()
    assert run_agent(home, "init", "-y").code == 0
    assert path.read_bytes() == again


def test_init_takes_the_id_that_the_agent_has_made_before(home, state):
    state.mkdir(mode=0o700)
    (state / "machine_id").write_text("feedbeef\n")
    assert run_agent(home, "init", *NO_GATEWAY, "-y").code == 0
    assert written(state / "config.yaml")["machine_id"] == "feedbeef"


def test_init_keeps_a_copy_of_a_file_with_comments(home, state):
    state.mkdir(mode=0o700)
    path = state / "config.yaml"
    old = "# the basement box\nmachine:\n  token: %s # from ops\n" % TOKEN
    path.write_text(old)
    path.chmod(0o600)
    done = run_agent(home, "init", *NO_GATEWAY, "-y")
    assert done.code == 0 and str(path) + ".old" in done.out
    assert (state / "config.yaml.old").read_text() == old
    assert mode(state / "config.yaml.old") == 0o600


def test_init_takes_variables_and_long_flags_too(home, state):
    done = run_agent(home, "init", "-y", "--gateway-host", "127.0.0.1", "--gateway-port=1",
                     "--max-memory", "1.5Gi", "--gpu-ids", "1,0", "--debug", BETA9_TOKEN=TOKEN,
                     BETA9_POOL_NAME="env-pool")
    assert done.code == 0, done
    found = written(state / "config.yaml")
    found.pop("machine_id")
    assert found == {"token": TOKEN, "pool_name": "env-pool", "gateway_host": "127.0.0.1",
                     "gateway_port": "1", "max_memory": "1536Mi", "gpu_ids": "0,1", "debug": "true"}


@pytest.mark.parametrize("row", [row for row in FILED if row.key != "token_file"], ids=by_key)
def test_what_init_writes_the_agent_reads(row, home, state):
    for text, value in VALUES[row.key]:
        done = run_agent(home, "init", "-y", row.flag + "=" + text, *(
            NO_GATEWAY if row.key not in ("gateway_host", "gateway_port") else ()),
            BETA9_GATEWAY_HOST="127.0.0.1", BETA9_GATEWAY_PORT="1")
        assert done.code == 0, done
        loaded = b9agent.load_settings({"state_dir": str(state)}, {})
        assert getattr(loaded.settings, row.key) == value


@pytest.mark.parametrize("arguments, said", [
    (["--gateway", "http://x"], "--gateway"), (["--gateway", "x:99999"], "a port, 1 to 65535"),
    (["--gateway", "x:"], "HOST:PORT"), (["--port", "no"], "--gateway-port"),
    (["--pool", " x"], "--pool-name"), (["--machine-id", "xyz"], "--machine-id"),
])
def test_init_refuses_a_bad_value_and_writes_nothing(arguments, said, home):
    done = run_agent(home, "init", "-y", *arguments)
    assert done.code == 2 and said in done.err, done
    assert "defect" not in done.err
    assert tree(home) == {}


def test_init_without_a_terminal_and_without_answers_says_what_to_give(home):
    done = run_agent(home, "init", stdin="\n\n\n\n\n")
    assert done.code == 2 and "not a terminal" in done.err and "-y" in done.err
    assert tree(home) == {}


def test_init_says_what_it_found_at_the_gateway(home):
    done = run_agent(home, "init", "-y", *NO_GATEWAY)
    assert done.code == 0
    assert "http://127.0.0.1:1" in done.out and "connection refused" in done.out
    assert "--tunnel USER@HOST" in done.out


def test_init_leaves_the_folder_of_a_config_file_elsewhere_as_it_is(home, tmp_path):
    folder = tmp_path / "etc"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "b9agent.yaml").write_text("pool: gpu\n")
    done = run_agent(home, "init", "-y", *NO_GATEWAY, "--config", folder / "b9agent.yaml")
    assert done.code == 0, done
    assert mode(folder / "b9agent.yaml") == 0o600
    assert mode(folder) == 0o755, "init closed a folder that is not its own"


def test_init_can_make_the_file_that_it_is_told_to_write(home, tmp_path):
    done = run_agent(home, "init", "-y", *NO_GATEWAY, "--config", tmp_path / "new.yaml")
    assert done.code == 0, done
    assert mode(tmp_path / "new.yaml") == 0o600


def fake_tailscale(folder, address="100.99.88.77", code=0):
    folder.mkdir(exist_ok=True)
    program = folder / "tailscale"
    program.write_text('''#!/bin/sh\necho '{"BackendState": "Running", "TailscaleIPs": ["%s"]}'\n'''
                       "exit %d\n" % (address, code))
    program.chmod(0o755)
    return "%s:%s" % (folder, os.environ["PATH"])


@pytest.mark.parametrize("address", ["100.99.88.77", "", "192.168.1.2"])
def test_init_leaves_the_tailnet_address_to_the_agent_which_follows_it(address, home, state, tmp_path):
    path = fake_tailscale(tmp_path / "bin", address)
    done = run_agent(home, "init", "-y", *NO_GATEWAY, PATH=path)
    assert done.code == 0 and ("hostname 100.99.88.77, of the tailnet" in done.out) == (
        address == "100.99.88.77")
    assert "hostname" not in written(state / "config.yaml")
    assert run_agent(home, "init", "-y", *NO_GATEWAY, "--hostname", "mine", PATH=path).code == 0
    assert written(state / "config.yaml")["hostname"] == "mine"


class Terminal:
    """A pseudo-terminal with the agent on it, or with a command of the test's own."""

    def __init__(self, home, *arguments, command=None, env=None, cwd=None, **extra):
        self._master, slave = pty.openpty()
        self._child = subprocess.Popen(command or agent_command(*arguments), cwd=cwd,
                                       env=env or environment(home, **extra),
                                       stdin=slave, stdout=slave, stderr=slave,
                                       preexec_fn=self._own_terminal)
        os.close(slave)
        self.seen = ""

    @staticmethod
    def _own_terminal():
        import fcntl
        import termios
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # getpass asks on /dev/tty

    def read_until(self, text):
        at = len(self.seen)
        while text not in self.seen[at:]:
            assert select.select([self._master], [], [], PATIENCE_S)[0], "no %r in %r" % (text, self.seen)
            try:
                piece = os.read(self._master, 4096)
            except OSError:  # EIO: the other side is closed
                piece = b""
            assert piece, "it ended without %r: %r" % (text, self.seen)
            self.seen += piece.decode()

    def type(self, text):
        os.write(self._master, text.encode())

    def answer(self, question, text):
        self.read_until(question)
        self.type(text + "\n")

    def end(self):
        while select.select([self._master], [], [], PATIENCE_S)[0]:
            try:
                piece = os.read(self._master, 4096)
            except OSError:
                break
            if not piece:
                break
            self.seen += piece.decode()
        return self._child.wait(timeout=PATIENCE_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._child.kill()
        self._child.wait()
        os.close(self._master)


def test_init_on_a_terminal_asks_and_never_shows_the_token(home, state):
    with Terminal(home, "init") as terminal:
        terminal.answer("Gateway", "127.0.0.1:1")
        terminal.answer("Pool", "gpu")
        terminal.answer("Machine id", "ABCDEF01")
        terminal.answer("Token", TOKEN)
        terminal.answer("Hostname", "")
        assert terminal.end() == 0, terminal.seen
        assert TOKEN not in terminal.seen
    assert written(state / "config.yaml") == {
        "gateway_host": "127.0.0.1", "gateway_port": "1", "pool_name": "gpu", "token": TOKEN,
        "machine_id": "ABCDEF01"}


def test_init_asks_for_nothing_that_a_flag_gave(home, state):
    flags = ("--gateway", "127.0.0.1:1", "--pool", "gpu", "--machine-id", "abcdef01")
    with Terminal(home, "init", *flags) as terminal:
        terminal.answer("Token", TOKEN)
        terminal.answer("[machine-abcdef01]", "mine")
        assert terminal.end() == 0, terminal.seen
        assert terminal.seen.startswith("Token [none]: ") and "Machine id" not in terminal.seen
    assert written(state / "config.yaml") == {
        "gateway_host": "127.0.0.1", "gateway_port": "1", "pool_name": "gpu", "token": TOKEN,
        "machine_id": "abcdef01", "hostname": "mine"}


def test_init_on_a_terminal_takes_what_stands_in_brackets_for_enter(home, state, tmp_path):
    state.mkdir(mode=0o700)
    path = state / "config.yaml"
    path.write_text("gateway: {host: 127.0.0.1, port: 1}\npool: old\nmachine: {id: 0badcafe, token: %s}\n"
                    % TOKEN)
    path.chmod(0o600)
    with Terminal(home, "init", PATH=fake_tailscale(tmp_path / "bin")) as terminal:
        for question in ("[127.0.0.1:1]", "[old]", "[0badcafe]", "[\u20269876]", "[100.99.88.77]"):
            terminal.answer(question, "")
        assert terminal.end() == 0, terminal.seen
    assert written(path) == {"gateway_host": "127.0.0.1", "gateway_port": "1", "pool_name": "old",
                             "machine_id": "0badcafe", "token": TOKEN}


def test_init_that_is_interrupted_writes_nothing(home):
    with Terminal(home, "init") as terminal:
        terminal.answer("Gateway", "127.0.0.1:1")
        terminal.answer("Pool", "\x03")
        assert "Traceback" not in terminal.seen
        terminal.end()
        assert "Traceback" not in terminal.seen
    assert tree(home) == {}


def test_the_agent_itself_is_one_file_here():
    assert os.path.samefile(b9agent.__file__, AGENT)
