"""Worker pods: kubeconfigs, the Kubernetes client, the watch, and what the agent makes of it.  The
server is kube_api's stand-in, over TLS; the recordings of real ones are in ../shared."""
import collections
import copy
import io
import json
import os
import sqlite3
import time

import pytest

import b9agent
from b9agent import KubeClient, PodPace, PodWatch
from helpers import ask_control, run_agent, wait_until
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
    ca = tmp_path / "ca.pem"
    ca.write_text(text_of("k3s-server-ca.pem"))
    config = read(tmp_path, None, ca, k3s_token=TOKEN, k3s_server="https://localhost:7000")
    assert (config.source, config.endpoint.url) == ("k3s.token", "https://localhost:7000")
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(rancher())
    assert read(tmp_path, None, ca, k3s_token=TOKEN).source == str(tmp_path / ".kube" / "config")
    installed = tmp_path / "k3s.yaml"
    installed.write_text(kubeconfig(6443, certificate=True))
    assert read(tmp_path, installed).source == str(installed)
    assert read(tmp_path, installed, ca, k3s_token=TOKEN).source == str(installed)
    config = read(tmp_path, installed, k3s_token=TOKEN, k3s_ca_file=str(ca))
    assert (config.source, config.token, config.endpoint.url) == (
        "k3s.token", TOKEN, "https://127.0.0.1:6443")
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
    for text in ("current-context: prod\nusers: &all\nserver: https://127.0.0.1:6443\n",
                 "current-context: default\nserver: https://prod.example:6443\nusers: |\n",
                 "current-context: k3d\nserver: https://127.0.0.1:6443\nusers: |\n"):
        (tmp_path / ".kube" / "config").write_text(text)
        assert read(tmp_path) is None
    (tmp_path / ".kube" / "config").write_text(rancher(cluster=(
        "cluster: rancher-desktop,", "cluster: production,"), insecure=("insecure-skip-tls-verify", "x")))
    assert read(tmp_path) is None  # its current one is another's, for all the names


def test_a_token_without_an_authority_is_told_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(b9agent.UsageError, match="Set k3s.ca_file"):
        read(tmp_path, k3s_token=TOKEN)
    with pytest.raises(b9agent.UsageError, match="/nowhere/ca, by which"):
        read(tmp_path, k3s_token=TOKEN, k3s_ca_file="/nowhere/ca")


def test_a_k3s_that_this_user_may_not_ask_is_told_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "k3s.yaml").mkdir()  # for root, too, no file that can be read
    with pytest.raises(b9agent.UsageError, match="cannot read it.*k3s rbac"):
        read(tmp_path, tmp_path / "k3s.yaml")


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


def test_what_python_3_13_asks_of_certificates_and_k3s_did_not_write_is_no_matter(api, monkeypatch):
    """There every context of ssl's own asks for key identifiers; kubectl asks for none."""
    import ssl
    made = ssl.create_default_context

    def as_in_3_13(*arguments, **more):
        context = made(*arguments, **more)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context
    monkeypatch.setattr(ssl, "create_default_context", as_in_3_13)
    endpoint = b9agent.Endpoint("https", "127.0.0.1", api.port, os.path.join(TLS, "k3s-server-ca.pem"))
    with pytest.raises(b9agent.HttpFailure, match="[Ii]dentifier"):
        b9agent.http_request("GET", endpoint, "/version", {}, None, 10.0)
    assert client_of(api).request("GET", "/version")[0] == 200


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


@pytest.mark.parametrize("detail, kind", [
    ({"reason": "Expired"}, b9agent.KubeGone), ({"code": 410}, b9agent.KubeGone),
    ({"code": 401}, b9agent.KubeUnauthorized), ({"code": 500, "reason": "Gone"}, b9agent.KubeGone),
    ({"code": "x"}, b9agent.KubeUnwell), ({"code": 200}, b9agent.KubeUnwell), ({}, b9agent.KubeUnwell)])
def test_every_error_inside_a_stream_has_a_type(api, detail, kind):
    with pytest.raises(b9agent.KubeError) as caught:
        events(api, json.dumps({"type": "ERROR", "object": detail}).encode() + b"\n")
    assert type(caught.value) is kind


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


@pytest.mark.parametrize("size", [1, 16])
def test_a_line_in_small_bits_costs_what_a_line_costs(size):
    """Each byte was copied again with every bit that came: 40 s of a core for 2 MiB."""
    stream = b9agent.HttpStream.__new__(b9agent.HttpStream)
    stream.pieces = lambda: iter([b"x" * size] * 130000 + [b"y\nz\n\n", b"", b"end"])
    begun_s = time.process_time()
    lines = list(stream.lines(4 << 20))
    assert [len(line) for line in lines] == [130000 * size + 1, 1, 0, 3] and lines[1:] == [b"z", b"", b"end"]
    assert time.process_time() - begun_s < 1.0


def test_an_answer_is_no_longer_than_its_objects_may_be_large(api):
    api.objects["/api/v1/namespaces/default/pods/a"] = {"metadata": {}, "x": "x" * (9 << 20)}
    with pytest.raises(b9agent.KubeUnwell, match="more than 8388608 bytes"):
        client_of(api).request("GET", PODS + "/a")


def test_contexts_may_be_forgotten_by_another_thread(monkeypatch):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass
    monkeypatch.setattr(b9agent, "_TLS_CONTEXTS", Forgetful())
    assert b9agent._tls_context(CLIENT_CA).get_ca_certs()


# -- what is read off a pod --------------------------------------------------

def shown(thing, wall="2026-11-21T10:01:05Z"):
    pod = b9agent.parse_pod(thing)
    return b9agent.pod_record(pod, b9agent.parse_kube_time(wall))


def test_the_pods_of_a_recorded_kubelet_list():
    """Read off the recording by eye; started is of the run that goes on, not of the pod."""
    pods = [b9agent.parse_pod(thing) for thing in json.loads(recording("podlist_kubelet_3-pods.json"))["items"]]
    assert [(pod.name, pod.status, pod.created, pod.started, pod.finished, pod.exit_code, pod.restarts,
             pod.containers, pod.reason, pod.worker_id, pod.function) for pod in pods] == [
        ("speaker-cpxhz", "RUNNING", "2020-03-30T02:22:43Z", "2020-08-28T08:45:50Z", None, None, 54, 1, None,
         None, None),
        ("nginx-ingress-default-backend-5b967cf596-pp4m9", "RUNNING", "2020-06-24T23:02:02Z",
         "2020-08-28T08:46:27Z", None, None, 18, 1, None, None, None),
        ("kuard-6b65d9d8b5-44bbs", "RUNNING", "2020-06-24T02:50:44Z", "2020-08-28T08:46:44Z", None, None, 18, 1,
         None, None, None)]


def test_the_pods_of_recorded_api_answers():
    (thing,) = json.loads(recording("podlist_labelselector.json"))["items"]
    assert shown(thing, "2022-04-05T10:12:37Z") == {
        "name": "kubernetes-01-prod-back-78d848c6b8-d9xsq", "worker_id": None, "status": "RUNNING",
        "function": None, "reason": None, "created": "2022-04-04T10:40:32Z",
        "started": "2022-04-05T10:11:37Z", "duration_seconds": 60.0, "exit_code": None, "restarts": 1,
        "containers": 1}
    assert json.loads(recording("podlist_empty.json"))["items"] == []


def test_a_recorded_pod_on_its_way_out():
    """Deleted at 15:58:40, killed (137) after the thirty seconds of grace at 15:59:10."""
    things = [json.loads(line)["object"] for line in
              recording("watch_pods_added-modified-deleted.ndjson").splitlines()]
    rows = [(pod["name"], pod["status"], pod["reason"], pod["exit_code"], pod["duration_seconds"],
             pod["containers"]) for pod in (shown(thing, "2023-03-10T15:58:56Z") for thing in things)]
    killed = ("network-tool", "FAILED", "Error", 137, 8534.0, 0)  # 13:36:56 to 15:59:10
    assert rows == [("network-tool1", "RUNNING", None, None, 8523.0, 1),
                    ("network-tool", "RUNNING", None, None, 8520.0, 1),
                    ("network-tool", "RUNNING", "Terminating", None, 8520.0, 1), killed, killed, killed]


def container(restarts=0, last=None, **state):
    return [{"name": "worker", "restartCount": restarts, "state": state, "lastState": last or {}}]


def ended(code, reason="Error", finished="2026-11-21T10:00:35Z"):
    return {"terminated": {"exitCode": code, "reason": reason, "startedAt": "2026-11-21T10:00:05Z",
                           "finishedAt": finished}}


RUNS = {"running": {"startedAt": "2026-11-21T10:00:05Z"}}


@pytest.mark.parametrize("thing, expected", [  # status, reason, exit code, duration, restarts, containers
    (worker_pod("a"), ("RUNNING", None, None, 60.0, 0, 1)),
    (worker_pod("a", phase="Pending", statuses=[]), ("PENDING", None, None, None, 0, 0)),
    (worker_pod("a", phase="Pending", statuses=container(waiting={"reason": "ContainerCreating"})),
     ("PENDING", "ContainerCreating", None, None, 0, 0)),
    (worker_pod("a", phase="Pending", statuses=container(waiting={"reason": "ImagePullBackOff"})),
     ("PENDING", "ImagePullBackOff", None, None, 0, 0)),
    (worker_pod("a", phase="Pending", statuses=container(waiting={"reason": "ErrImagePull"})),
     ("PENDING", "ErrImagePull", None, None, 0, 0)),
    (worker_pod("a", statuses=container(4, ended(137, "OOMKilled"), waiting={"reason": "CrashLoopBackOff"})),
     ("FAILED", "CrashLoopBackOff", 137, 30.0, 4, 0)),
    (worker_pod("a", statuses=container(2, ended(1), **RUNS)), ("RUNNING", None, None, 60.0, 2, 1)),
    (worker_pod("a", phase="Failed", statuses=container(**ended(137, "OOMKilled"))),
     ("FAILED", "OOMKilled", 137, 30.0, 0, 0)),
    (worker_pod("a", statuses=container(1, **ended(1))), ("FAILED", "Error", 1, 30.0, 1, 0)),
    (worker_pod("a", phase="Succeeded", statuses=container(**ended(0, "Completed"))),
     ("COMPLETED", None, 0, 30.0, 0, 0)),
    (worker_pod("a", phase="Succeeded", statuses=[]), ("COMPLETED", None, None, None, 0, 0)),
    (worker_pod("a", deletionTimestamp="2026-11-21T10:01:00Z"), ("RUNNING", "Terminating", None, 60.0, 0, 1)),
    (worker_pod("a", statuses=container(running={"startedAt": "2026-11-21T11:00:00Z"})),  # a clock apart
     ("RUNNING", None, None, 0.0, 0, 1)),
    (worker_pod("a", statuses=container(**ended(0, "Completed", None))), ("COMPLETED", None, 0, None, 0, 0)),
    (worker_pod("a", statuses=container(running={})), ("RUNNING", None, None, None, 0, 1)),
    (worker_pod("a", phase="Unknown", statuses=[]), ("PENDING", None, None, None, 0, 0)),
    (worker_pod("a", statuses=[]), ("RUNNING", None, None, None, 0, 0)),
])
def test_the_states_of_a_pod(thing, expected):
    pod = shown(thing)
    assert (pod["status"], pod["reason"], pod["exit_code"], pod["duration_seconds"], pod["restarts"],
            pod["containers"]) == expected


def test_why_a_pod_waits_or_was_ended_is_told():
    evicted = worker_pod("a", phase="Failed", statuses=[])
    evicted["status"].update(reason="Evicted", message="The node was low on resource: memory.")
    assert (shown(evicted)["status"], shown(evicted)["reason"]) == ("FAILED", "Evicted")
    unplaced = worker_pod("a", phase="Pending", statuses=[])
    unplaced["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]
    assert (shown(unplaced)["status"], shown(unplaced)["reason"]) == ("PENDING", "Unschedulable")
    for state, status, reason in (
            ({"waiting": {"reason": "CrashLoopBackOff"}}, "FAILED", "Init:CrashLoopBackOff"),
            ({"waiting": {"reason": "ImagePullBackOff"}}, "PENDING", "Init:ImagePullBackOff"),
            ({"terminated": {"exitCode": 3}}, "PENDING", "Init:ExitCode:3"),
            ({"terminated": {"exitCode": 0}}, "PENDING", "PodInitializing")):
        thing = worker_pod("a", phase="Pending", statuses=container(waiting={"reason": "PodInitializing"}))
        thing["status"]["initContainerStatuses"] = [{"name": "init", "state": state}]
        assert (shown(thing)["status"], shown(thing)["reason"]) == (status, reason)


def test_the_worker_counts_and_not_what_stands_beside_it():
    thing = worker_pod("a", statuses=[
        {"name": "a-sidecar", "state": RUNS, "restartCount": 9}] + container(**ended(2)))
    pod = shown(thing)
    assert (pod["status"], pod["exit_code"], pod["restarts"], pod["containers"]) == ("FAILED", 2, 0, 1)


def test_the_function_is_what_a_label_says_and_else_unknown():
    thing = worker_pod("worker-gpu-ab12-train-x7k")
    assert (shown(thing)["function"], shown(thing)["worker_id"]) == (None, "w1")
    thing["metadata"]["labels"]["beta9.io/stub-id"] = "stub-77"
    assert shown(thing)["function"] == "stub-77"


def test_what_a_terminal_must_not_see_is_escaped_and_cut():
    thing = worker_pod("a\x1b[2J" + "x" * 999, worker="w\n1")
    assert shown(thing)["name"].startswith("a\\x1b[2Jx") and len(shown(thing)["name"]) == 253
    assert shown(thing)["worker_id"] == "w\\n1"


# -- the watch -----------------------------------------------------------------

QUICK = PodPace(first_s=0.05, most_s=0.2, look_s=0.1, idle_s=5.0, watch_s=60, soon_s=0.0)


class Watched:
    """A PodWatch of the machine 0badcafe."""

    def __init__(self, folder, text, pace=QUICK):
        self.path, self.stream = folder / "k3s.kubeconfig", io.StringIO()
        if text is not None:
            self.path.write_text(text)
        self.log = b9agent.Log(stream=self.stream, minimum="info")
        self.watch = PodWatch(settings(folder), "0badcafe", self.log, pace, lambda given: (
            b9agent.read_kubeconfig(given, "/nowhere/k3s.yaml", "/nowhere/ca")))

    def names(self):
        return {pod["name"]: pod["status"] for pod in self.watch.status()["pods"]}

    def wait(self, what, **expected):
        """Until the status has these values; `names` are the pods'."""
        def look():
            status = self.watch.status()
            status["names"] = {pod["name"] for pod in status["pods"]}
            return all(value(status[name]) if callable(value) else status[name] == value
                       for name, value in expected.items())
        wait_until(look, "%s: %s in %s" % (what, expected, self.watch.status()))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    started = []

    def start(text, **pace):
        one = Watched(tmp_path, text, QUICK._replace(**pace))
        started.append(one)
        one.watch.start()
        return one
    yield start
    for one in started:
        one.watch.stop()
        assert not one.watch._thread.is_alive()
        assert "defect" not in one.stream.getvalue(), one.stream.getvalue()


def test_pods_come_change_and_go(api, watched):
    api.put_pod(worker_pod("a", phase="Pending", statuses=[]))
    one = watched(kubeconfig(api.port))
    one.wait("listed", state="watching", names={"a"}, server=api.url)
    assert one.names() == {"a": "PENDING"}
    api.put_pod(worker_pod("a"))
    api.put_pod(worker_pod("b", created="2026-11-21T11:00:00Z"))
    one.wait("changed", names={"a", "b"}, pods=lambda pods: pods[1]["status"] == "RUNNING")
    assert [pod["name"] for pod in one.watch.status()["pods"]] == ["b", "a"]  # the newest first
    assert one.watch.counts() == {"RUNNING": 2}
    api.remove_pod("a")
    one.wait("gone", names={"b"})
    assert (api.count("list"), api.count("watch")) == (1, 1)
    query = api.asked[-1].query
    assert query["labelSelector"] == "run.beam.cloud/role=worker" and query["allowWatchBookmarks"] == "true"
    assert query["resourceVersion"] == "101" and query["timeoutSeconds"] == "60"


def test_only_this_machines_workers_are_shown(api, watched):
    """By the labels that the gateway's pods carry; an older gateway sets none for the machine."""
    for name, machine in (("ours", "0badcafe"), ("theirs", "deadbeef"), ("old", None)):
        pod = worker_pod(name, machine)
        if machine is None:
            del pod["metadata"]["labels"]["run.beam.cloud/machine-id"]
        api.put_pod(pod)
    other = worker_pod("coredns")
    other["metadata"]["labels"] = {"app": "coredns", "app.kubernetes.io/managed-by": "beta9"}
    api.put_pod(other)
    one = watched(kubeconfig(api.port))
    one.wait("listed", state="watching", names={"ours", "old"})
    api.put_pod(worker_pod("theirs2", "deadbeef"))
    api.put_pod(worker_pod("ours2"))
    one.wait("watched", names={"ours", "old", "ours2"})


def test_what_is_no_worker_is_not_shown_whatever_the_api_sends(api, watched):
    """A recorded stream of somebody's pods, without the labels that were asked for."""
    api.fault("watch", raw=recording("watch_pods_added-modified-deleted.ndjson").encode())
    one = watched(kubeconfig(api.port))
    api.wait_for(lambda: api.count("watch") == 2, "the stream's end")
    assert one.watch.status()["pods"] == [] and api.asked[-1].query["resourceVersion"] == "760032"


def test_long_lists_come_in_pages(api, watched):
    api.page = 40
    for number in range(100):
        api.put_pod(worker_pod("p%03d" % number))
    one = watched(kubeconfig(api.port))
    one.wait("all", state="watching", pods=lambda pods: len(pods) == 100)
    assert [asked.query.get("continue") for asked in api.asked if asked.kind == "list"] == [None, "40", "80"]
    api.put_pod(worker_pod("p100"))
    wait_until(lambda: one.watch.counts() == {"RUNNING": 101}, "counted, though a hundred are told")
    assert len(one.watch.status()["pods"]) == 100


@pytest.mark.parametrize("mark", ["\ud800", "a b", 7, {"a": 1}, ["\ud800"], "x" * 9999])
def test_a_next_page_that_nobody_names_so_is_no_defect(tmp_path, mark):
    answers = [{"items": [], "metadata": {"continue": mark, "resourceVersion": "7"}},
               {"items": [], "metadata": {"resourceVersion": "7"}}]
    client = collections.namedtuple("Client", "request")(lambda *_: (200, answers.pop(0)))
    watch = PodWatch(settings(tmp_path), "0badcafe", b9agent.Log(stream=io.StringIO()))
    assert watch._list(client) == "7"


def test_no_more_pods_are_kept_than_a_thousand(api, watched):
    for number in range(1010):
        api.objects["%s/p%d" % (PODS, number)] = dict(worker_pod("p%d" % number))
    one = watched(kubeconfig(api.port))
    one.wait("some", state="watching")
    assert one.watch.counts() == {"RUNNING": 1000}


def test_a_bookmark_moves_the_version(api, watched):
    api.put_pod(worker_pod("a"))
    one = watched(kubeconfig(api.port))
    one.wait("watching", state="watching")
    api.bookmark()
    api.fault("watch", 500)  # of the next one
    wait_until(lambda: api.version == 151, "the bookmark")
    api.put_pod(worker_pod("b"))
    one.wait("told", names={"a", "b"})


@pytest.mark.parametrize("raw", ["bookmark", "watch_bookmark.ndjson", "watch_bookmark_initial-events-end.ndjson",
                                 "watch_bookmark_job.ndjson"])
def test_a_watch_that_ends_goes_on_where_it_was(api, watched, raw):
    """Also after recorded bookmarks; without listing again."""
    line = (recording(raw) if raw != "bookmark" else json.dumps(
        {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "3845"}}})).encode().strip()
    api.fault("watch", raw=line + b"\n")
    one = watched(kubeconfig(api.port))
    api.wait_for(lambda: api.count("watch") == 2, "a second watch")
    version = json.loads(line)["object"]["metadata"]["resourceVersion"]
    assert [asked.query["resourceVersion"] for asked in api.asked if asked.kind == "watch"] == ["100", version]
    assert api.count("list") == 1 and one.watch.state == "watching"


def test_the_servers_own_time_limit_is_no_failure(api, watched):
    one = watched(kubeconfig(api.port), watch_s=1)
    api.wait_for(lambda: api.count("watch") >= 3, "more watches")
    assert api.count("list") == 1 and one.watch.state == "watching"
    assert "warning" not in one.stream.getvalue()


@pytest.mark.parametrize("then", ["cut", "hang"])
def test_a_line_that_is_cut_is_told_again_by_the_next_watch(api, watched, then):
    """Nothing of the half, nothing lost, and the version is that of the last whole line."""
    whole = worker_pod("whole", resourceVersion="100")
    half = json.dumps({"type": "ADDED", "object": worker_pod("half")}).encode()[:-40]
    api.fault("watch", raw=json.dumps({"type": "ADDED", "object": whole}).encode() + b"\n" + half, then=then)
    one = watched(kubeconfig(api.port), idle_s=0.5)
    one.wait("the whole one", names={"whole"})
    api.put_pod(worker_pod("half"))
    one.wait("both", names={"whole", "half"})
    assert [asked.query["resourceVersion"] for asked in api.asked if asked.kind == "watch"][:2] == ["100"] * 2
    assert api.count("list") == 1


@pytest.mark.parametrize("gone_as", ["status", "Gone", "Expired"])
def test_a_version_that_is_gone_is_listed_again_at_once(api, watched, gone_as):
    api.gone_as = gone_as
    api.put_pod(worker_pod("a"))
    api.put_pod(worker_pod("b"))
    one = watched(kubeconfig(api.port), first_s=600.0, most_s=600.0)  # a wait would be noticed
    one.wait("watching", state="watching")
    with api._changed:
        api.objects.pop(PODS + "/a")  # while nobody could tell of it
    api.forget()
    api.cut()
    api.wait_for(lambda: api.count("watch") == 3, "a watch that is refused, and one that is not")
    one.wait("listed", state="watching", names={"b"})
    assert api.count("list") == 2


def test_versions_that_are_always_gone_are_asked_for_ever_more_slowly(api, watched):
    for _ in range(50):
        api.fault("watch", 410, "Expired", "too old resource version: 1 (2)")
    one = watched(kubeconfig(api.port), first_s=0.2, most_s=60.0, soon_s=30.0)
    one.wait("it says so", state="failed", message=lambda text: "has forgotten that version" in text)
    api.wait_for(lambda: api.count("list") >= 4, "more tries")
    begun = time.monotonic()
    api.wait_for(lambda: api.count("list") >= 5, "another try")
    assert time.monotonic() - begun > 0.2 and api.count("list") < 8


@pytest.mark.parametrize("code, reason, words", [
    (500, "InternalError", "unwell: it answered 500"), (503, "ServiceUnavailable", "apiserver not ready"),
    (403, "Forbidden", "b9agent.py k3s rbac"), (429, "TooManyRequests", "429")])
def test_refusals_are_told_and_tried_again(api, watched, code, reason, words):
    for _ in range(3):
        api.fault("list", code, reason, "apiserver not ready")
    one = watched(kubeconfig(api.port))
    one.wait("told", state="failed", message=lambda text: words in text)
    one.wait("well again", state="watching", message="")
    assert one.stream.getvalue().count("warning") == 1  # not for each try


def test_an_api_that_restarts_keeps_the_pods_on_show(api, watched):
    api.put_pod(worker_pod("a"))
    one = watched(kubeconfig(api.port))
    one.wait("watching", state="watching", names={"a"})
    api.stop()
    one.wait("away", state="failed", names={"a"}, message=lambda text: "connection refused" in text)
    assert one.watch.counts() == {"RUNNING": 1}
    api.fault("list", 503, "ServiceUnavailable", "apiserver not ready")
    with api._changed:
        api.objects.pop(PODS + "/a")
    api.put_pod(worker_pod("b"))
    api.start()
    one.wait("back", state="watching", names={"b"}, message="")


def test_a_renewed_token_is_read_again(api, watched):
    one = watched(kubeconfig(api.port))
    one.wait("watching", state="watching")
    api.token = "a-renewed-token-4411"
    api.cut()
    one.wait("refused", state="failed", message=lambda text: "does not accept who we are" in text)
    one.path.write_text(kubeconfig(api.port, token="a-renewed-token-4411"))
    one.wait("taken", state="watching", message="")
    assert "a-renewed" not in one.stream.getvalue() and TOKEN not in one.stream.getvalue()


def test_pods_that_nobody_could_ask_for_any_more_do_not_run_for_ever(api, watched):
    api.put_pod(worker_pod("a"))
    one = watched(kubeconfig(api.port), keep_s=0.5)
    one.wait("all", names={"a"})
    api.stop()
    wait_until(lambda: one.watch.counts() is None, "unknown")
    assert one.watch.status()["pods"] == []
    with api:
        one.wait("again", state="watching", names={"a"})
        assert one.watch.counts() == {"RUNNING": 1}


def test_a_kubeconfig_is_read_again_though_all_is_well(api, watched):
    """What renews its token does so then; nothing is seen of it."""
    one = watched(kubeconfig(api.port), read_s=0.2, watch_s=1)
    one.wait("watching", state="watching")
    api.wait_for(lambda: api.count("list") >= 3, "listed anew")
    assert one.stream.getvalue().count("pods") == 1 and one.watch.state == "watching"


def test_without_k3s_nothing_is_said_and_one_that_comes_is_noticed(api, watched):
    one = watched(None)
    one.wait("off", state="off")
    assert one.watch.status() == {"state": "off", "server": None, "message": "", "pods": []}
    assert one.watch.counts() == {} and one.stream.getvalue() == ""
    api.put_pod(worker_pod("a"))
    one.path.write_text("current-context: default\nclusters: &x\n")
    one.wait("a bad one", state="failed", server=None, message=lambda text: ":2: " in text)
    assert one.watch.counts() is None
    one.path.write_text(kubeconfig(api.port))
    one.wait("a good one", state="watching", names={"a"}, server=api.url)
    one.path.unlink()
    api.stop()
    one.wait("uninstalled", state="off", pods=[], server=None, message="")
    one.path.write_text("a: |\n")
    one.wait("another bad one", state="failed", pods=[])
    assert one.watch.counts() is None  # not those of before
    api.start()


def test_a_wrong_authority_is_told(api, watched):
    one = watched(kubeconfig(api.port, ca="k3s-client-ca.pem"))
    one.wait("told", state="failed", message=lambda text: "certificate not accepted" in text)
    assert api.asked == []


def test_a_server_that_ends_every_watch_is_not_hammered(api, watched):
    for _ in range(500):
        api.fault("watch", raw=b"")
    one = watched(kubeconfig(api.port), soon_s=30.0, first_s=0.2, most_s=60.0)
    one.wait("told", state="failed", message=lambda text: "ends every watch at once" in text)
    api.wait_for(lambda: api.count("list") >= 3, "more tries")
    assert api.count("watch") < 8


def test_no_secret_of_a_pod_is_kept(api, watched):
    """Worker pods carry their worker's token in their environment."""
    api.put_pod(worker_pod("a"))
    one = watched(kubeconfig(api.port))
    one.wait("watching", state="watching", names={"a"})
    kept = repr(one.watch.status()) + repr(one.watch._pods) + one.stream.getvalue()
    assert "worker-token-secret-91" not in kept and TOKEN not in kept


# -- the agent -------------------------------------------------------------------

class Member:
    """An agent of the embedded gateway, with a kubeconfig or without."""

    def __init__(self, agent, home, state, embedded, *arguments, gateway=None, **extra):
        self.home, self.state, self.db = home, state, embedded.db
        self.machine_id, token = embedded.create()
        self.program = agent("run", "--gateway-host", "127.0.0.1", "--gateway-port", gateway or embedded.port,
                             "--machine-id", self.machine_id, "--pool-name", "gpu", "--keepalive-interval", "1",
                             "--control-port", "0", *arguments, BETA9_TOKEN=token, **extra)
        wait_until(lambda: (state / "control.addr").exists(), "the control API")

    def get(self, path):
        return ask_control(self.state, path)

    def status(self):
        return json.loads(self.get("/status"))

    def wait(self, condition, what):
        wait_until(lambda: condition(self.status()), "%s: %s" % (what, self.status()))

    def received(self):
        """What the gateway has of the last keepalive."""
        with sqlite3.connect(self.db) as base:
            (metrics,) = base.execute("SELECT metrics FROM machines WHERE machine_id = ?",
                                      (self.machine_id,)).fetchone()
        return json.loads(metrics or "{}")


@pytest.fixture
def member(agent, home, state, embedded):
    state.mkdir(mode=0o700, exist_ok=True)
    return lambda *arguments, **extra: Member(agent, home, state, embedded, *arguments, **extra)


def test_an_agent_shows_its_pods_and_tells_the_gateway_how_many_run(api, member, state, home):
    (state / "k3s.kubeconfig").write_text(kubeconfig(api.port))
    one = member()
    one.wait(lambda status: status["pods"]["state"] == "watching", "watching")
    for name, changes in (("a", {}), ("b", {}), ("theirs", {"machine": "deadbeef"}), ("done", {
            "phase": "Succeeded", "statuses": container(**ended(0, "Completed"))})):
        api.put_pod(worker_pod(name, **dict({"machine": one.machine_id}, **changes)))
    one.wait(lambda status: status["total_jobs"] == 3, "three pods")
    status = one.status()
    assert status["running_jobs"] == 2 and status["pods"]["server"] == api.url
    assert {pod["name"]: (pod["status"], pod["exit_code"], pod["duration_seconds"])
            for pod in status["pods"]["pods"] if pod["name"] == "done"} == {"done": ("COMPLETED", 0, 30.0)}
    wait_until(lambda: one.received().get("worker_count") == 2, "the gateway has it")
    assert one.received()["container_count"] == 2
    metrics = one.get("/metrics")
    assert 'b9agent_worker_pods{status="RUNNING"} 2\n' in metrics
    assert 'b9agent_worker_pods{status="COMPLETED"} 1\n' in metrics
    assert 'b9agent_pods_watch_state{state="watching"} 1\n' in metrics
    done = run_agent(home, "status")
    assert "watching; %s; 1 completed, 2 running" % api.url in done.out
    assert "done completed, exit code 0, 30 s" in done.out
    api.stop()
    one.wait(lambda status: status["pods"]["state"] == "failed", "the API is away")
    assert one.status()["total_jobs"] == 3 and one.status()["state"] == "ready"
    api.start()
    one.wait(lambda status: status["pods"]["state"] == "watching", "it is back")
    assert one.program.stop() == 0
    text = one.program.text()
    assert TOKEN not in text and "defect" not in text and "worker-token-secret" not in text


def test_an_agent_with_a_token_and_an_authority(api, member, tmp_path):
    ca = tmp_path / "ca.crt"
    ca.write_text(text_of("k3s-server-ca.pem"))
    one = member("--k3s-server", api.url, "--k3s-ca-file", ca, BETA9_K3S_TOKEN=TOKEN)
    one.wait(lambda status: status["pods"]["state"] == "watching", "watching")
    api.put_pod(worker_pod("a", one.machine_id, deletionTimestamp="2026-11-21T10:00:00Z"))
    one.wait(lambda status: status["running_jobs"] == 1, "a pod")


def test_an_agent_without_k3s_is_quiet(member, home):
    one = member()
    one.wait(lambda status: status["state"] == "ready" and status["keepalives"] >= 2, "ready")
    assert one.status()["pods"] == {"state": "off", "server": None, "message": "", "pods": []}
    assert (one.received()["worker_count"], one.received()["container_count"]) == (0, 0)
    assert 'b9agent_pods_watch_state{state="off"} 1\n' in one.get("/metrics")
    assert "pods" not in one.program.text() and "worker pod" not in run_agent(home, "status").out
    assert "_ssl" not in (b9agent.read_text("/proc/%d/maps" % one.program.pid) or "")


def test_the_first_keepalive_does_not_wait_for_a_k3s_that_hangs(member, state):
    """A port that takes connections and says nothing."""
    import socket
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(5)
        (state / "k3s.kubeconfig").write_text(kubeconfig(deaf.getsockname()[1]))
        one = member()
        one.wait(lambda status: status["state"] == "ready", "ready")
        one.wait(lambda status: status["pods"]["state"] == "connecting", "it tries")
        one.wait(lambda status: "worker_count" not in status["metrics"], "not known is not none")
        begun = time.monotonic()
        assert one.program.stop() == 0 and time.monotonic() - begun < 10


def test_nothing_is_asked_of_k3s_before_the_gateway_was(api, member, state):
    """A gateway that takes its time."""
    import socket
    (state / "k3s.kubeconfig").write_text(kubeconfig(api.port))
    with socket.socket() as slow:
        slow.bind(("127.0.0.1", 0))
        slow.listen(5)
        one = member(gateway=slow.getsockname()[1])
        link, _ = slow.accept()
        for _ in range(30):
            assert one.status()["pods"]["state"] == "off" and api.asked == []
        link.close()
        one.wait(lambda status: status["pods"]["state"] == "watching", "k3s is asked, gateway or not")


def test_doctor_asks_the_api_where_it_may(api, home, state):
    def k3s(**extra):
        done = run_agent(home, "doctor", "--json", "--control-port", "0", "--gateway-port", "1", BETA9_TOKEN="t-0",
                         **extra)
        return [(row["level"], row["seen"], row["mend"]) for row in json.loads(done.out)["checks"]
                if row["name"] == "k3s"]
    assert len(k3s()) == 1
    state.mkdir(mode=0o700)
    (state / "k3s.kubeconfig").write_text(kubeconfig(api.port))
    level, seen, _ = k3s()[0]
    assert level == "ok" and "worker pods can be watched" in seen and str(state) in seen
    api.fault("list", 403, "Forbidden", "pods is forbidden: User x")
    level, seen, mend = k3s()[0]
    assert level == "warn" and "pods is forbidden" in seen and "b9agent.py k3s rbac" in mend
    (state / "k3s.kubeconfig").write_text("a: |")
    level, seen, mend = k3s()[0]
    assert level == "warn" and "k3s.kubeconfig:1" in seen and mend


# -- anything at all -----------------------------------------------------------

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
bounded = hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None,
                              suppress_health_check=list(hypothesis.HealthCheck))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2 ** 70, 2 ** 70), st.floats(), st.text(max_size=9),
              st.sampled_from(["2026-11-21T10:00:05Z", "2026-99-99T99:99:99Z", "0000-00-00T00:00:00Z", "worker",
                               "\ud800", "x" * 9999, "CrashLoopBackOff", "Running"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["name", "state", "reason", "running", "terminated", "waiting", "exitCode", "startedAt"]),
        inner, max_size=4)), max_leaves=8)


def places(thing, path=()):
    """Every path into an object."""
    yield path
    for key, value in (thing.items() if isinstance(thing, dict) else
                       enumerate(thing) if isinstance(thing, list) else ()):
        yield from places(value, path + (key,))


FULL_POD = worker_pod("a", statuses=container(3, ended(1), waiting={"reason": "CrashLoopBackOff"}))
FULL_POD["status"].update(
    reason="Evicted", initContainerStatuses=[{"name": "i", "state": {"terminated": {"exitCode": 1}}}],
    conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}])


def check_record(pod):
    record = b9agent.pod_record(pod, 1795255265.0)
    assert set(record) == {"name", "worker_id", "status", "function", "reason", "created", "started",
                           "duration_seconds", "exit_code", "restarts", "containers"}
    assert record["status"] in ("PENDING", "RUNNING", "COMPLETED", "FAILED")
    assert record["duration_seconds"] is None or record["duration_seconds"] >= 0
    json.dumps(record).encode()
    return record


@bounded
@hypothesis.given(st.sampled_from(sorted(places(FULL_POD), key=str)), anything)
def test_a_mutated_pod_is_read_or_left_out(path, value):
    thing = copy.deepcopy(FULL_POD)
    if path:
        place = thing
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    else:
        thing = value
    pod = b9agent.parse_pod(thing)
    assert pod is None or check_record(pod)
    watch = PodWatch(settings("/nowhere"), "0badcafe", b9agent.Log(stream=io.StringIO()))
    try:
        for kind in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", value):
            watch._heed({"type": kind, "object": thing if isinstance(thing, dict) else {}})
        watch.status()
    finally:
        watch._wake.close()


class OneStream:
    """A connection's answer, without a connection."""
    status, headers = 200, {}

    def __init__(self, raw, failure):
        self.raw, self.failure = raw, failure

    def lines(self, max_bytes):
        *whole, rest = self.raw.split(b"\n")
        yield from whole
        if self.failure:
            raise b9agent.HttpFailure(self.failure, "it broke")
        if rest:
            yield rest

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


LINES = [json.dumps({"type": kind, "object": worker_pod(name)}).encode() for kind, name in (
    ("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"))] + [json.dumps(
        {"type": "ERROR", "object": {"kind": "Status", "code": code, "reason": "Gone"}}).encode()
        for code in (410, "x", None, 401, 403, 500, 200)]


@bounded
@hypothesis.given(st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=20)), max_size=4),
                  st.integers(0, 4000), st.binary(max_size=3),
                  st.sampled_from([None, "closed", "timeout", "network", "tls", "garbage", "too_large"]))
def test_mutated_watch_bytes_are_events_or_a_typed_error(lines, at, dirt, failure):
    raw = b"\n".join(lines)
    raw = raw[:at] + dirt + raw[at + len(dirt):]
    client = KubeClient(b9agent.parse_kubeconfig(kubeconfig(1), "/t"))
    client._open = lambda *_: OneStream(raw, failure)
    try:
        for event in client.watch("/", 1.0):
            assert isinstance(event["object"], dict)
            pod = b9agent.parse_pod(event["object"])
            assert pod is None or check_record(pod)
    except b9agent.KubeError as error:
        assert len(str(error)) < 900


TREE = {"clusters": [{"name": "c", "cluster": {
    "server": "https://127.0.0.1:6443", "certificate-authority-data": "LS0tLS1CRUdJTiA=",
    "certificate-authority": "/nowhere", "insecure-skip-tls-verify": False}}],
    "users": [{"name": "u", "user": {"token": "t-1", "tokenFile": "", "exec": None, "client-key-data": "",
                                     "client-certificate": ""}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}


@bounded
@hypothesis.given(st.sampled_from(sorted(places(TREE), key=str)), st.one_of(anything, st.sampled_from(
    ["\0", "/\0", "\ud800", "\u00e9", "a\nb", "https://\u00e9", "https://a:99999999999", "/dev/null", "/"])))
def test_a_mutated_tree_is_read_or_refused(path, value):
    thing = copy.deepcopy(TREE)
    place = thing
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    try:
        config = b9agent.parse_kubeconfig(json.dumps(thing), "/t/config")
    except b9agent.UsageError as error:
        assert "/t/config" in str(error) and len(str(error)) < 700
        return
    with pytest.raises(b9agent.HttpFailure):
        config.endpoint.tls.context()  # it is no certificate: a typed error


@bounded
@hypothesis.given(st.integers(0, 900), st.sampled_from(
    ["", " ", "\n", ":", "- ", "{", "}", "[", '"', "x", "\t", "&a", "null", "\ud7ff", "#"]), st.integers(0, 30))
def test_a_mutated_kubeconfig_is_read_or_refused(at, dirt, cut):
    text = kubeconfig(6443).replace(data_of("k3s-server-ca.pem"), "LS0tLS1CRUdJTiA=")
    text = text[:at] + dirt + text[at + cut:]
    try:
        config = b9agent.parse_kubeconfig(text, "/t/config")
        assert config.endpoint.scheme == "https"
    except b9agent.UsageError as error:
        assert "/t/config" in str(error)
