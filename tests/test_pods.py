"""Worker pods: kubeconfigs, the Kubernetes client, the watch, and what the agent makes of it.  The
server is kube_api's stand-in, over TLS; the recordings of real ones are in ../shared."""
import collections
import json
import os

import pytest

import b9agent
from b9agent import KubeClient
from kube_api import CLIENT_CA, PODS, TLS, TOKEN, KubeApi, data_of, kubeconfig, text_of, worker_pod

FIXTURES = os.environ.get("B9AGENT_FIXTURES") or os.path.join(
    os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "shared", "fixtures")


def recording(name):
    path = os.path.join(FIXTURES, "kubernetes", name)
    if not os.path.exists(path):
        pytest.skip("the recording %s is not here" % name)
    with open(path, encoding="utf-8") as handle:
        return handle.read()


Settings = collections.namedtuple("Settings", "k3s_kubeconfig k3s_token k3s_server k3s_ca_file state_dir")


def settings(tmp_path, **more):
    return Settings(**dict(dict(k3s_kubeconfig=None, k3s_token=None, k3s_ca_file=None,
                                k3s_server="https://127.0.0.1:6443", state_dir=str(tmp_path)), **more))


def client_of(api, **more):
    return KubeClient(b9agent.parse_kubeconfig(kubeconfig(api.port, **more), "/t/config"))


def refused(text, words):
    with pytest.raises(b9agent.UsageError) as caught:
        b9agent.parse_kubeconfig(text, "/t/config")
    assert words in str(caught.value) and caught.value.hint
    return str(caught.value)


# -- kubeconfigs -----------------------------------------------------------

def test_k3s_s_own_kubeconfig_is_read():
    config = b9agent.parse_kubeconfig(kubeconfig(6443, certificate=True), "/t/k3s.yaml")
    assert config.endpoint.url == "https://127.0.0.1:6443"
    assert (config.token, config.source) == ("", "/t/k3s.yaml")
    assert config.endpoint.tls.context().get_ca_certs()[0]["subject"][0][0][1].startswith("k3s-server-ca")
    assert "PRIVATE" not in repr(config)


def test_the_recorded_one_is_read_up_to_where_it_was_cut():
    assert refused(recording("k3s_redacted.yaml"), "client-certificate-data is no text")


def test_the_recorded_old_one_is_refused_for_its_password():
    refused(recording("k3s_old_password.yaml"), "k3s takes no password any more since 1.19")


RANCHER = """\
apiVersion: v1
clusters:
  - name: production
    cluster:
      server: https://203.0.113.7:6443
      insecure-skip-tls-verify: true
  -   name: rancher-desktop   # the second one
      cluster:
        server: https://127.0.0.1:6443
        certificate-authority-data: {ca}
        extensions:
          - name: x
            extension: {{a: [b, c]}}
contexts:
  - name: rancher-desktop
    context: {{cluster: rancher-desktop, user: rancher-desktop, namespace: elsewhere}}
current-context: "rancher-desktop"
preferences: {{}}
users:
  - name: production
    user:
      exec:
        apiVersion: client.authentication.k8s.io/v1
        args:
        - --region
        - eu-west-1
        command: aws
        env:
        - name: AWS_PROFILE
          value: x
        interactiveMode: IfAvailable
        provideClusterInfo: false
  - name: rancher-desktop
    user:
      client-certificate-data: {cert}
      client-key-data: {key}
kind: Config
"""


def rancher(**change):
    text = RANCHER.format(ca=data_of("k3s-server-ca.pem"), cert=data_of("k3s-client.pem"),
                          key=data_of("k3s-client.key"))
    for old, new in change.items():
        text = text.replace(*new) if isinstance(new, tuple) else text
    return text


def test_other_clusters_in_the_same_file_are_no_matter():
    config = b9agent.parse_kubeconfig(rancher(), "/t/config")
    assert config.endpoint.url == "https://127.0.0.1:6443"


def test_json_is_a_kubeconfig_too():
    import yaml
    text = json.dumps(yaml.safe_load(kubeconfig(7443, token="t-0k3n-of-json")), indent=1)
    config = b9agent.parse_kubeconfig(text, "/t/config")
    assert (config.endpoint.port, config.token) == (7443, "t-0k3n-of-json")
    refused(text[:-9], "no JSON")


def test_files_that_it_names_are_read_and_stand_beside_it(tmp_path):
    for name in ("k3s-server-ca.pem", "k3s-client.pem", "k3s-client.key"):
        (tmp_path / name).write_text(text_of(name))
    (tmp_path / "token").write_text("token-of-a-file-1\n")
    text = kubeconfig(6443).replace("certificate-authority-data: " + data_of("k3s-server-ca.pem"),
                                    "certificate-authority: k3s-server-ca.pem")
    text = text.replace("token: " + TOKEN, "tokenFile: %s/token\n    client-certificate: k3s-client.pem\n"
                        "    client-key: k3s-client.key" % tmp_path)
    config = b9agent.parse_kubeconfig(text, str(tmp_path / "config"))
    assert config.token == "token-of-a-file-1" and config.endpoint.tls.context()
    (tmp_path / "token").unlink()
    with pytest.raises(b9agent.UsageError, match="tokenFile: .*token cannot be read"):
        b9agent.parse_kubeconfig(text, str(tmp_path / "config"))


@pytest.mark.parametrize("old, new, words", [
    ("token: " + TOKEN, "exec: {command: aws}", "users[default].exec is not supported"),
    ("token: " + TOKEN, "auth-provider: {name: gcp}", "users[default].auth-provider"),
    ("token: " + TOKEN, "password: p\n    username: admin", "since 1.19"),
    ("server:", "insecure-skip-tls-verify: true\n    server:", "not verified could be anybody"),
    ("server:", "proxy-url: http://x\n    server:", "proxy-url"),
    ("server: https", "server: http", "https://HOST"),
    ("127.0.0.1:6443", "127.0.0.1:6443/k8s/clusters/c-1", "without a path"),
    ("server:", "other:", "server cannot be used"),
    ("current-context: default", "current-context: other", "contexts has none named `other`"),
    ("user: default", "user: other", "users has none named `other`"),
    ("clusters:", "clubs:", "clusters has none named `default`"),
    ("token: " + TOKEN, "token: [a]", "token is no text"),
    ("token: " + TOKEN, "token: a b", "no word"),
    ("token: " + TOKEN, "client-key-data: " + data_of("k3s-client.key"), "lacks its key"),
    ("certificate-authority-data: ", "certificate-authority-data: !", "/t/config:4: "),
    ("certificate-authority-data: ", "certificate-authority-data: _", "no PEM"),
    ("certificate-authority-data: LS0", "certificate-authority-data: DATA", "no PEM"),
    ("certificate-authority-data: ", "certificate-authority: /nowhere/ca # ", "cannot be read"),
    ("kind: Config", "kind: |", "/t/config:13: a block of text (|) is not supported"),
])
def test_what_is_not_read_is_named_with_its_place(old, new, words):
    text = kubeconfig(6443)
    assert old in text
    said = refused(text.replace(old, new), words)
    assert "/t/config" in said and TOKEN not in said


@pytest.mark.parametrize("text", ["", "a: b", "[]", "{}", "- a", "null", "\0", "clusters:\n- a\n", "{" * 5000,
                                  '{"clusters": 1, "contexts": [1], "current-context": {}}'])
def test_no_kubeconfig_at_all(text):
    refused(text, "/t/config")


# -- which one -------------------------------------------------------------

def read(tmp_path, installed=None, ca=None, **more):
    return b9agent.read_kubeconfig(settings(tmp_path, **more), str(installed or tmp_path / "none"),
                                   str(ca or tmp_path / "none"))


def test_without_any_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path) is None


def test_the_order_in_which_they_are_looked_for(tmp_path, monkeypatch):
    """From the last to the first: each new one is taken instead of those after it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(rancher())
    assert read(tmp_path).source == str(tmp_path / ".kube" / "config")
    installed = tmp_path / "k3s.yaml"
    installed.write_text(kubeconfig(6443, certificate=True))
    assert read(tmp_path, installed).source == str(installed)
    assert read(tmp_path, installed, k3s_token=TOKEN).source == str(installed)
    ca = tmp_path / "ca.pem"
    ca.write_text(text_of("k3s-server-ca.pem"))
    config = read(tmp_path, installed, ca, k3s_token=TOKEN, k3s_server="https://localhost:7000")
    assert (config.source, config.token, config.endpoint.url) == (
        "k3s.token", TOKEN, "https://localhost:7000")
    config = read(tmp_path, installed, k3s_token=TOKEN, k3s_ca_file=str(ca))
    assert (config.source, config.endpoint.url) == ("k3s.token", "https://127.0.0.1:6443")
    (tmp_path / "k3s.kubeconfig").write_text(kubeconfig(6443))
    assert read(tmp_path, installed, ca, k3s_token=TOKEN).source == str(tmp_path / "k3s.kubeconfig")
    chosen = tmp_path / "chosen"
    with pytest.raises(b9agent.UsageError, match="chosen cannot be read"):
        read(tmp_path, installed, k3s_kubeconfig=str(chosen))
    chosen.write_text(kubeconfig(6443, host="k3s.example"))
    assert read(tmp_path, installed, ca, k3s_kubeconfig=str(chosen)).endpoint.host == "k3s.example"


@pytest.mark.parametrize("context, server, taken", [
    ("rancher-desktop", "https://127.0.0.1:6443", True), ("default", "https://127.0.0.1:6443", True),
    ("k3d-lab", "https://0.0.0.0:41234", True), ("k3s", "https://localhost:6443", True),
    ("default", "https://[::1]:6443", True),
    ("default", "https://203.0.113.7:6443", False), ("default", "https://127.0.0.1.evil.example:6443", False),
    ("k3s", "https://prod.example:6443", False), ("prod", "https://127.0.0.1:6443", False),
    ("kind-lab", "https://127.0.0.1:41234", False), ("arn:aws:eks:eu:1:cluster/x", "https://127.0.0.1", False)])
def test_the_users_own_is_taken_only_where_it_is_of_k3s_on_this_machine(tmp_path, monkeypatch, context,
                                                                        server, taken):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kube").mkdir()
    text = kubeconfig(6443).replace("https://127.0.0.1:6443", server)
    text = text.replace("name: default\ncurrent-context: default",
                        "name: %s\ncurrent-context: %s" % (context, context))
    (tmp_path / ".kube" / "config").write_text(text)
    assert (read(tmp_path) is not None) == taken


def test_a_strangers_config_is_not_even_parsed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text("current-context: prod\nusers: &all\n")
    assert read(tmp_path) is None


def test_a_token_without_an_authority_is_told_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(b9agent.UsageError, match="Set k3s.ca_file"):
        read(tmp_path, k3s_token=TOKEN)


# -- the client ------------------------------------------------------------

@pytest.fixture
def api():
    with KubeApi() as api:
        yield api


def test_a_request_brings_token_and_body_and_returns_status_and_object(api):
    client = client_of(api)
    path = "/api/v1/namespaces/default/serviceaccounts"
    made = {"metadata": {"name": "b9"}}
    assert client.request("POST", path, made)[0] == 201
    assert client.request("POST", path, made)[0] == 409  # the caller knows what that means
    assert client.request("GET", path + "/b9")[1]["metadata"]["name"] == "b9"
    assert client.request("GET", path + "/none")[0] == 404
    code, answer = client.request("PATCH", path + "/b9", {"x": 1}, "application/merge-patch+json")
    assert (code, answer["x"]) == (200, 1)
    assert client.request("DELETE", path + "/b9")[0] == 200
    assert api.asked[0].headers["Authorization"] == "Bearer " + TOKEN
    assert [asked.headers.get("Content-Type") for asked in api.asked][3:5] == [
        None, "application/merge-patch+json"]


def test_a_client_certificate_is_shown_and_no_key_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with KubeApi(token=None, client_ca=CLIENT_CA) as api:
        assert client_of(api, certificate=True).request("GET", "/version")[1]["gitVersion"]
        with pytest.raises(b9agent.KubeUnauthorized):
            client_of(api).request("GET", "/version")
    assert os.listdir(str(tmp_path)) == []


def test_without_memory_files_a_key_lies_in_a_private_file_for_an_instant(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with b9agent._private_path("secret") as path:
        assert os.path.dirname(path) == str(tmp_path) and b9agent.read_text(path) == "secret"
        assert os.stat(path).st_mode & 0o777 == 0o600
    with KubeApi(token=None, client_ca=CLIENT_CA) as api:
        assert client_of(api, certificate=True).request("GET", "/version")[0] == 200
    assert os.listdir(str(tmp_path)) == []


def test_another_authority_or_name_is_refused_before_anything_is_said(api):
    for client in (client_of(api, ca="ca.pem"), client_of(api, ca="k3s-client-ca.pem")):
        with pytest.raises(b9agent.KubeUnreachable, match="certificate not accepted"):
            client.request("GET", "/version")
    with KubeApi(certificate="other") as named:
        with pytest.raises(b9agent.KubeUnreachable, match="certificate not accepted.*127.0.0.1"):
            client_of(named, ca="ca.pem").request("GET", "/version")
        assert named.asked == []
    assert api.asked == []
    text = kubeconfig(api.port).replace("server:", "tls-server-name: kubernetes\n    server:")
    config = b9agent.parse_kubeconfig(text, "/t/config")
    assert KubeClient(config).request("GET", "/version")[0] == 200


def test_certificates_that_are_none_are_a_typed_error(api):
    text = kubeconfig(api.port).replace(data_of("k3s-server-ca.pem"), "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1J")
    with pytest.raises(b9agent.KubeUnreachable, match="certificates for it cannot be used"):
        KubeClient(b9agent.parse_kubeconfig(text, "/t/config")).request("GET", "/version")


@pytest.mark.parametrize("code, reason, kind", [
    (403, "Forbidden", b9agent.KubeForbidden), (410, "Expired", b9agent.KubeGone),
    (500, "InternalError", b9agent.KubeUnwell), (503, "ServiceUnavailable", b9agent.KubeUnwell),
    (429, "TooManyRequests", b9agent.KubeUnwell), (302, "", b9agent.KubeUnwell)])
def test_answers_that_are_errors_are_typed(api, code, reason, kind):
    for name in ("list", "watch"):
        api.fault(name, code, reason, "because \x1b[2J " + "x" * 900, [("Retry-After", "7")])
    with pytest.raises(kind) as caught:
        client_of(api).request("GET", PODS)
    with pytest.raises(kind):
        next(client_of(api).watch(PODS + "?watch=true", 5.0))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 700
    if code == 429:
        assert caught.value.retry_after_s == 7.0


def test_the_recorded_refusals_tell_what_is_lacking(api):
    for name in ("status_403_forbidden.json", "status_403_forbidden_pretty.json"):
        error = client_of(api)._error(403, json.loads(recording(name)))
        assert 'cannot list resource "pods" in API group "" in the namespace' in str(error)
        assert "b9agent.py k3s rbac" in str(error)


def test_a_wrong_token_a_stopped_server_and_a_stranger(api):
    with pytest.raises(b9agent.KubeUnauthorized) as caught:
        client_of(api, token="another-token-000").request("GET", PODS)
    assert "another-token-000" not in str(caught.value)
    api.fault("list", 200)
    api.faults[-1].body = b"<html>hello</html>"
    with pytest.raises(b9agent.KubeUnwell, match="does not answer as Kubernetes does"):
        client_of(api).request("GET", PODS)
    api.stop()
    with pytest.raises(b9agent.KubeUnreachable, match="connection refused"):
        client_of(api).request("GET", PODS)
    api.start()


# -- a watch ---------------------------------------------------------------

def events(api, raw, then="end"):
    api.fault("watch", raw=raw, then=then)
    return list(client_of(api).watch(PODS + "?watch=true", 0.5))


def test_recorded_events_are_told_as_they_came(api):
    raw = recording("watch_pods_added-modified-deleted.ndjson").encode()
    found = events(api, raw)
    assert [(event["type"], event["object"]["metadata"]["name"]) for event in found] == [
        ("ADDED", "network-tool1"), ("ADDED", "network-tool"), ("MODIFIED", "network-tool"),
        ("MODIFIED", "network-tool"), ("MODIFIED", "network-tool"), ("DELETED", "network-tool")]


@pytest.mark.parametrize("name", ["watch_error_410_expired.ndjson", "watch_error_410_gone.ndjson"])
def test_a_recorded_error_inside_a_stream_is_raised(api, name):
    with pytest.raises(b9agent.KubeGone, match="too old resource version"):
        events(api, recording(name).encode())


@pytest.mark.parametrize("then", ["end", "cut", "hang"])
def test_a_watch_that_is_cut_ends_and_tells_of_no_half_line(api, then):
    line = json.dumps({"type": "ADDED", "object": worker_pod("a")}).encode()
    for raw in (line + b"\n" + line[:-9], line + b"\n"):
        assert [event["type"] for event in events(api, raw, then)] == ["ADDED"]


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"type":1,"object":1}', b"\xff", b"[" * 9000, b"9" * 9000, b""])
def test_a_watch_of_something_else_ends(api, line):
    assert events(api, line + b"\n" + line) == []


def test_a_line_without_end_is_a_typed_error(api):
    with pytest.raises(b9agent.KubeUnwell, match="a line of more than"):
        events(api, b"x" * (3 << 20))
