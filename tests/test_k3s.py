"""`b9agent.py k3s`: the rights and their manifest, tokens that are renewed, check, install.  The API is
kube_api's stand-in with RBAC over it: what a token may do is worked out from the Roles that were applied."""
import base64
import collections
import http.server
import io
import json
import os
import shutil
import stat
import subprocess
import threading
import time

import pytest
import yaml

import b9agent
from b9agent import GATEWAY_RIGHTS, KubeClient, Right
from helpers import PATIENCE_S, environment, files_with, quiet_port, run_agent, tree, wait_until
from hostile_gateway import TOKEN as GATEWAY_TOKEN
from kube_api import TOKEN, KubeApi, kubeconfig, status

ACCOUNTS = "/api/v1/namespaces/default/serviceaccounts"
JOBS, PODS = "/apis/batch/v1/namespaces/default/jobs", "/api/v1/namespaces/default/pods"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ROLES, BINDINGS = RBAC + "/namespaces/default/roles", RBAC + "/namespaces/default/rolebindings"
NODE = {"metadata": {"name": "box"}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
                                                "allocatable": {"cpu": "8"}}}
DISCOVERY = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{
        "name": "rbac.authorization.k8s.io", "versions": [
            {"groupVersion": "rbac.authorization.k8s.io/v1", "version": "v1"}],
        "preferredVersion": {"groupVersion": "rbac.authorization.k8s.io/v1", "version": "v1"}}]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
        {"name": "serviceaccounts", "singularName": "", "namespaced": True, "kind": "ServiceAccount",
         "verbs": ["create", "get"]}]},
    RBAC: {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "rbac.authorization.k8s.io/v1",
           "resources": [
               {"name": "roles", "singularName": "", "namespaced": True, "kind": "Role", "verbs": ["create"]},
               {"name": "rolebindings", "singularName": "", "namespaced": True, "kind": "RoleBinding",
                "verbs": ["create"]}]}}


def jwt(claims):
    part = lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
    return "%s.%s.c2lnbmF0dXJl" % (part({"alg": "ES256"}), part(claims))


class K3sApi(KubeApi):
    """KubeApi with accounts, their tokens and their rights.  life_s: no token lasts longer; extra:
    {account: rules that something else grants it}; TOKEN is cluster-admin's."""

    def __init__(self, **more):
        KubeApi.__init__(self, **more)
        self.life_s, self.extra, self.minted, self.spoil = 1e9, {}, [], False
        self._who = threading.local()
        self.objects["/api/v1/nodes/box"] = NODE

    def token_of(self, account, life_s=600):
        now = int(time.time())
        return self._mint(account, now, now + life_s)

    def _mint(self, account, begun_s, ends_s):
        token = jwt({"sub": "system:serviceaccount:default:" + account, "iat": begun_s, "exp": ends_s,
                     "jti": len(self.minted)})
        self.minted.append(token)
        return token

    def _known(self, handler):
        given = handler.headers.get("authorization", "")[len("Bearer "):]
        self._who.account = None
        if given in self.minted:
            claims = json.loads(base64.urlsafe_b64decode(given.split(".")[1] + "=="))
            self._who.account = claims["sub"].rpartition(":")[2]
            return (claims["exp"] > time.time()
                    and "%s/%s" % (ACCOUNTS, self._who.account) in self.objects)
        return given == self.token

    def rules(self, account):
        found = list(self.extra.get(account, ()))
        for path, binding in list(self.objects.items()):
            if path.startswith(BINDINGS) and any(row["name"] == account for row in binding["subjects"]):
                found += self.objects["%s/%s" % (ROLES, binding["roleRef"]["name"])]["rules"]
        return found

    def allows(self, account, group, resource, verb, name, namespace="default"):
        return account is None or any(
            {group, "*"} & set(rule["apiGroups"]) and {resource, "*"} & set(rule["resources"])
            and {verb, "*"} & set(rule["verbs"]) and name in rule.get("resourceNames", [name])
            and namespace == "default" for rule in self.rules(account))

    def _answer(self, kind, path, query, body):
        account, parts = self._who.account, path.strip("/").split("/")
        if path in DISCOVERY or path == "/version":
            return 200, DISCOVERY.get(path) or self.objects[path]
        if parts[-1].startswith("selfsubject"):
            return 201, self._review(account, json.loads(body))
        group = parts[1] if parts[0] == "apis" else ""
        parts = parts[3 if group else 2:]
        namespace, parts = (parts[1], parts[2:]) if parts[0] == "namespaces" else ("", parts)
        resource, name = "/".join(parts[:1] + parts[2:]), (parts + [""])[1]
        verb = {"POST": "create", "PUT": "update", "DELETE": "delete", "list": "list"}.get(kind, "get")
        if not self.allows(account, group, resource, verb, name, namespace):
            return 403, status(403, "Forbidden", "%s cannot %s %s" % (account, verb, resource))
        if resource == "serviceaccounts/token":
            return self._token(path, json.loads(body))
        if kind == "POST" and namespace not in ("", "default"):
            return 404, status(404, "NotFound", 'namespaces "%s" not found' % namespace)
        if kind in ("POST", "PUT") and self.spoil:
            return KubeApi._answer(self, kind, path, query, json.dumps(
                {**json.loads(body), "rules": []}).encode())
        return KubeApi._answer(self, kind, path, query, body)

    def _token(self, path, body):
        place, account = path[:-len("/token")], path.split("/")[-2]
        if place not in self.objects:
            return 404, status(404, "NotFound", 'serviceaccounts "%s" not found' % account)
        begun_s = int(time.time())
        ends_s = begun_s + int(min(self.life_s, body["spec"]["expirationSeconds"]))
        return 201, {"kind": "TokenRequest", "metadata": {"creationTimestamp": None}, "status": {
            "token": self._mint(account, begun_s, ends_s),
            "expirationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends_s))}}

    def _review(self, account, body):
        if body["kind"] == "SelfSubjectRulesReview":
            own = [{"verbs": ["create"], "apiGroups": ["authorization.k8s.io"],
                    "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]},
                   {"verbs": ["create"], "apiGroups": ["authentication.k8s.io"],
                    "resources": ["selfsubjectreviews"]}]
            return dict(body, status={"resourceRules": own + self.rules(account), "incomplete": False})
        asked = body["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        return dict(body, status={"allowed": self.allows(
            account, asked["group"], resource, asked["verb"], asked["name"], asked["namespace"])})


@pytest.fixture
def api():
    with K3sApi() as stand_in:
        yield stand_in


@pytest.fixture
def admin(api, tmp_path):
    """The path of the administrator's kubeconfig."""
    path = tmp_path / "admin.yaml"
    path.write_text(kubeconfig(api.port))
    path.chmod(0o600)
    return str(path)


def client(api, token=TOKEN):
    return KubeClient(b9agent.parse_kubeconfig(kubeconfig(api.port, token=token), "/t/config"))


def applied(api, gateway="beta9-gateway"):
    return [b9agent.apply_object(client(api), item) for item in b9agent.k3s_objects("default", gateway)]


def k3s(home, command, admin=None, *arguments, **more):
    """`b9agent.py k3s COMMAND`."""
    words = ("--k3s-kubeconfig", admin) if admin else ()
    return run_agent(home, "k3s", command, *words, *arguments, **more)


# -- the table and the manifest ----------------------------------------------

# Read off the gateway's source, by hand: pkg/scheduler, pool_external.go (createWorkerOnMachine) and
# pool_cleaner.go (Clean, deleteWorkerResources).
CALLS = {("batch", "jobs", "create"), ("batch", "jobs", "list"), ("batch", "jobs", "delete"),
         ("", "pods", "list")}


def granted(documents, account):
    """{(group, resource, verb, name)} that the manifest gives to an account."""
    roles = {doc["metadata"]["name"]: doc["rules"] for doc in documents if doc["kind"] == "Role"}
    found = set()
    for binding in (doc for doc in documents if doc["kind"] == "RoleBinding"):
        if {"kind": "ServiceAccount", "name": account, "namespace": "default"} in binding["subjects"]:
            found |= {(group, resource, verb, name) for rule in roles[binding["roleRef"]["name"]]
                      for group in rule["apiGroups"] for resource in rule["resources"]
                      for verb in rule["verbs"] for name in rule.get("resourceNames", [""])}
    return found


def test_the_manifest_grants_the_calls_of_the_gateway_and_nothing_else(home):
    done = k3s(home, "rbac")
    documents = list(yaml.safe_load_all(done.out))
    assert (done.code, done.err) == (0, "") and len(documents) == 6
    assert granted(documents, "beta9-gateway") == {(*call, "") for call in CALLS}
    assert granted(documents, "beta9-agent") == {
        ("", "pods", "list", ""), ("", "pods", "watch", ""),
        ("", "serviceaccounts/token", "create", "beta9-gateway"),
        ("", "serviceaccounts/token", "create", "beta9-agent")}
    assert {doc["kind"] for doc in documents} == {"ServiceAccount", "Role", "RoleBinding"}
    assert {doc["metadata"]["namespace"] for doc in documents} == {"default"}
    assert [doc["automountServiceAccountToken"] for doc in documents if doc["kind"] == "ServiceAccount"
            ] == [False, False]
    assert "*" not in done.out and done.out == k3s(home, "rbac").out
    assert os.listdir(str(home)) == []


def test_the_manifest_says_why_and_is_what_apply_would_make(home):
    text = k3s(home, "rbac").out
    assert list(yaml.safe_load_all(text)) == b9agent.k3s_objects("default", "beta9-gateway")
    rules = [line for line in text.splitlines() if line.startswith("  - ")]
    assert len(rules) == 7 and all("  # " in line for line in rules)


def test_other_names_are_used_throughout(home):
    text = k3s(home, "rbac", None, "--namespace", "workers", "--service-account", "gw-2").out
    documents = list(yaml.safe_load_all(text))
    assert "default" not in text and "beta9-gateway" not in text
    assert {doc["metadata"]["namespace"] for doc in documents} == {"workers"}
    rule = next(rule for doc in documents for rule in doc.get("rules", ()) if "resourceNames" in rule)
    assert rule["resourceNames"] == ["gw-2", "beta9-agent"]


@pytest.mark.parametrize("flag, name", [
    ("--namespace", "Default"), ("--namespace", "a b"), ("--namespace", "../kube-system"),
    ("--service-account", "x\n- y"), ("--service-account", "-x"), ("--service-account", "a" * 64),
    ("--service-account", "beta9-agent")])
def test_names_that_could_mean_something_else_are_refused(home, flag, name):
    done = k3s(home, "rbac", None, "%s=%s" % (flag, name))
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("kubectl") and not os.environ.get("B9TESTS_HEAVY"),
                    reason="no kubectl here")
def test_kubectl_takes_the_manifest(home, api, admin):
    manifest = k3s(home, "rbac").out
    done = subprocess.run(
        ["kubectl", "--kubeconfig", admin, "create", "--dry-run=client", "--validate=false", "-o", "name",
         "-f", "-"], input=manifest.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(home), timeout=PATIENCE_S)
    assert done.stdout.decode().split() == [
        prefix + account for account in ("beta9-gateway", "beta9-agent")
        for prefix in ("serviceaccount/", "role.rbac.authorization.k8s.io/",
                       "rolebinding.rbac.authorization.k8s.io/")], done.stderr
    assert done.returncode == 0
    assert not [asked for asked in api.asked if asked.method != "GET"]


# -- applied -------------------------------------------------------------------

def test_what_is_applied_is_created_once_and_mended_after(api):
    assert applied(api) == ["created"] * 6
    assert applied(api) == ["unchanged"] * 6
    role = dict(api.objects[ROLES + "/beta9-gateway"], rules=[
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}])
    role["metadata"]["annotations"] = {"a": "kept"}
    api.put(ROLES + "/beta9-gateway", role)
    assert applied(api) == ["unchanged", "changed"] + ["unchanged"] * 4
    assert api.objects[ROLES + "/beta9-gateway"]["metadata"]["annotations"] == {"a": "kept"}
    binding = dict(api.objects[BINDINGS + "/beta9-gateway"])
    binding["roleRef"] = dict(binding["roleRef"], kind="ClusterRole", name="cluster-admin")
    api.put(BINDINGS + "/beta9-gateway", binding)
    assert applied(api) == ["unchanged", "unchanged", "replaced"] + ["unchanged"] * 3
    assert api.objects[BINDINGS + "/beta9-gateway"]["roleRef"]["name"] == "beta9-gateway"


def test_an_apply_that_did_not_take_is_no_success(api):
    api.spoil = True
    item = b9agent.k3s_objects("default", "beta9-gateway")[1]
    with pytest.raises(b9agent.KubeError, match="is not what was written"):
        b9agent.apply_object(client(api), item)


def test_apply_leaves_a_kubeconfig_that_needs_no_administrator(home, api, admin, state):
    done = k3s(home, "rbac", admin, "--apply")
    assert done.code == 0 and done.out.count(": created\n") == 6, done
    path = state / "k3s.kubeconfig"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "init --k3s-service-account" in done.out
    config = json.loads(path.read_text())
    token = config["users"][0]["user"]["token"]
    claims = b9agent.token_claims(token)
    assert claims["sub"].endswith(":beta9-agent") and claims["exp"] - claims["iat"] == 30 * 86400
    assert not any(secret in done.out + done.err for secret in api.minted + [TOKEN])
    again = k3s(home, "rbac", admin, "--apply")
    assert again.code == 0 and again.out.count(": unchanged\n") == 6
    made = k3s(home, "token")  # with what was written, and nothing of the administrator's
    assert made.code == 0 and made.out.strip() == api.minted[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is sudo")
def test_under_sudo_the_agent_s_state_folder_is_the_user_s(monkeypatch):
    loaded = b9agent.load_settings({"config": os.devnull}, {})
    given = b9agent.load_settings({"config": os.devnull, "state_dir": "/x"}, {})
    monkeypatch.setenv("SUDO_USER", "nobody")
    place = b9agent.find_place({})
    assert b9agent.for_the_agent(loaded).settings.state_dir == (
        place.state if os.path.isdir(place.state) else os.path.expanduser("~nobody/.b9agent"))
    assert b9agent.for_the_agent(given).settings.state_dir == "/x"
    monkeypatch.setenv("SUDO_USER", "root")
    assert b9agent.for_the_agent(loaded) is loaded


@pytest.fixture
def users_folder():
    """A folder of `nobody`, who can go there."""
    import pwd
    import tempfile
    user = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # pytest's own let no other user in
        os.chown(folder, user.pw_uid, user.pw_gid)
        yield folder, user


@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks into others' folders")
@pytest.mark.parametrize("caller", ["nobody", "root"])
def test_root_takes_from_the_service_s_configuration_what_its_token_is_of_and_no_path(
        users_folder, monkeypatch, caller):
    folder, user = users_folder
    config = os.path.join(folder, "config.yaml")
    with open(config, "w") as handle:
        handle.write("k3s:\n  service_account: gw-2\n  token_hours: 9\n  kubeconfig: /evil\n")
    os.chown(config, user.pw_uid, user.pw_gid)
    monkeypatch.setattr(b9agent, "SYSTEM_STATE", folder)
    monkeypatch.setenv("SUDO_USER", caller)
    loaded = b9agent.for_the_agent(b9agent.load_settings({"config": os.devnull}, {})).settings
    assert (loaded.state_dir, loaded.k3s_service_account, loaded.k3s_token_hours, loaded.k3s_kubeconfig) == (
        folder, "gw-2", 9, None)
    flag = b9agent.load_settings({"config": os.devnull, "k3s_service_account": "mine"}, {})
    assert b9agent.for_the_agent(flag).settings.k3s_service_account == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads for others")
def test_root_reads_for_another_user_no_file_that_his_kubeconfig_names(home, api, users_folder, tmp_path):
    folder, user = users_folder
    (tmp_path / "secret").write_text("only-for-the-eyes-of-root\n")
    for name, text in (("k3s.kubeconfig", kubeconfig(api.port).replace(
            "token: " + TOKEN, "tokenFile: %s/secret" % tmp_path)), ("whole", kubeconfig(api.port))):
        with open(os.path.join(folder, name), "w") as handle:
            handle.write(text)
        os.chown(handle.name, user.pw_uid, user.pw_gid)
    for command in ("check", "token"):
        done = k3s(home, command, None, "--state-dir", folder)
        assert done.code == 2 and "is another user's: root reads no tokenFile" in done.out + done.err
    assert api.asked == []
    assert b9agent.kubeconfig_at(os.path.join(folder, "whole")).token == TOKEN
    os.chown(os.path.join(folder, "k3s.kubeconfig"), 0, 0)
    assert b9agent.kubeconfig_at(os.path.join(folder, "k3s.kubeconfig")).token == "only-for-the-eyes-of-root"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for others")
def test_a_user_s_link_leads_root_nowhere(home, api, admin, users_folder):
    folder, user = users_folder
    os.mkdir(os.path.join(folder, "root-s"), 0o755)
    link = os.path.join(folder, "state")
    os.symlink(os.path.join(folder, "root-s"), link)
    os.lchown(link, user.pw_uid, user.pw_gid)
    done = k3s(home, "rbac", admin, "--apply", "--state-dir", link)
    assert done.code == 2 and os.listdir(os.path.join(folder, "root-s")) == [], done
    os.lchown(link, 0, 0)
    assert b9agent.folder_owner(link).uid == 0
    os.chown(os.path.join(folder, "root-s"), user.pw_uid, user.pw_gid)
    assert b9agent.folder_owner(link).uid == user.pw_uid


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for others")
def test_the_kubeconfig_belongs_to_whose_state_folder_it_is(home, api, admin, users_folder):
    folder, user = users_folder
    done = k3s(home, "rbac", admin, "--apply", "--state-dir", os.path.join(folder, "state"))
    assert done.code == 0, done
    made = os.stat(os.path.join(folder, "state", "k3s.kubeconfig"))
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (user.pw_uid, 0o600)
    assert os.stat(os.path.join(folder, "state")).st_uid == user.pw_uid


@pytest.mark.parametrize("arguments, words, code", [
    (("--namespace", "nowhere"), "kubectl create namespace nowhere", 4),
    (("--service-account", "beta9-agent"), "the agent's own account", 2)])
def test_what_cannot_be_applied_says_what_to_do(home, api, admin, arguments, words, code):
    done = k3s(home, "rbac", admin, "--apply", *arguments)
    assert done.code == code and words in done.err and not (home / ".b9agent" / "k3s.kubeconfig").exists()


def test_without_k3s_or_rights_the_next_step_is_said(home, api, tmp_path):
    if not os.path.exists(b9agent.K3S_KUBECONFIG):
        assert "sudo b9agent.py k3s install" in k3s(home, "rbac", None, "--apply").err
        none = k3s(home, "check", None)
        assert none.code == 2 and none.out.count("there is no k3s here") == 1 and "warn " not in none.out
    applied(api)
    path = tmp_path / "agent.yaml"
    path.write_text(kubeconfig(api.port, token=api.token_of("beta9-agent")))
    done = k3s(home, "rbac", str(path), "--apply")
    assert done.code == 4 and "sudo b9agent.py k3s rbac --apply" in done.err


# -- what a token can do -------------------------------------------------------

def asked(kube, method, path, body=None):
    try:
        return kube.request(method, path, body)[0]
    except b9agent.KubeForbidden:
        return 403


def test_the_gateway_s_token_can_make_the_gateway_s_calls_and_no_other(api):
    applied(api)
    kube = client(api, b9agent.mint_token(client(api), "default", "beta9-gateway", 600)[0])
    job = {"kind": "Job", "metadata": {"name": "worker-gpu-1"}}
    assert asked(kube, "POST", JOBS, job) == 201
    assert asked(kube, "GET", JOBS + "?labelSelector=run.beam.cloud/role=worker") == 200
    assert asked(kube, "GET", PODS + "?labelSelector=job-name=worker-gpu-1") == 200
    assert asked(kube, "DELETE", JOBS + "/worker-gpu-1") == 200
    others = [("GET", JOBS + "/worker-gpu-1"), ("PUT", JOBS + "/worker-gpu-1"), ("POST", PODS),
              ("DELETE", PODS + "/p"), ("POST", PODS + "/p/exec"), ("GET", PODS + "/p"),
              ("GET", "/api/v1/namespaces/default/secrets"), ("GET", "/api/v1/nodes"),
              ("GET", JOBS.replace("default", "kube-system")), ("GET", "/api/v1/pods"),
              ("POST", ACCOUNTS + "/beta9-gateway/token"), ("GET", ROLES)]
    assert [call for call in others if asked(kube, *call, {}) != 403] == []


def test_the_agent_s_token_makes_tokens_of_two_accounts_alone(api):
    applied(api)
    api.put(ACCOUNTS + "/default", {"metadata": {"name": "default"}})
    kube = client(api, api.token_of("beta9-agent"))
    for account in ("beta9-gateway", "beta9-agent"):
        assert b9agent.mint_token(kube, "default", account, 600)[0] == api.minted[-1]
    with pytest.raises(b9agent.KubeForbidden):
        b9agent.mint_token(kube, "default", "default", 600)


@pytest.mark.parametrize("rules, found", [
    ([], []),
    ([{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "create"]}], []),
    ([{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list"]}], ["get jobs of batch"]),
    ([{"apiGroups": ["", "batch"], "resources": ["jobs"], "verbs": ["list"]}], ["list jobs"]),
    ([{"apiGroups": [""], "resources": ["secrets", "pods"], "verbs": ["list"]}], ["list secrets"]),
    ([{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}], ["everything (cluster-admin)"]),
    ([{"apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews"],
       "verbs": ["create"]}], []),
    ([{"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"],
       "verbs": ["create"]}], ["create subjectaccessreviews of authorization.k8s.io"]),
    ("none", []), ([None, 7, {"apiGroups": 7, "resources": {"a": 1}, "verbs": None}], []),
])
def test_rights_beyond_the_table_are_found(rules, found):
    assert b9agent.excess_rights({"status": {"resourceRules": rules}}, GATEWAY_RIGHTS) == found


def test_a_right_is_asked_for_each_of_its_names(api):
    applied(api)
    kube = client(api, api.token_of("beta9-agent"))
    right = Right("", "serviceaccounts/token", "create", "", ("beta9-gateway", "beta9-agent"))
    assert b9agent.may(kube, "default", right)
    assert not b9agent.may(kube, "default", right._replace(names=("beta9-gateway", "default")))
    assert not b9agent.may(kube, "kube-system", right)


# -- `k3s token` -----------------------------------------------------------------

def test_a_token_goes_to_stdout_and_nowhere_else(home, api, admin):
    applied(api)
    done = k3s(home, "token", admin, "--hours", "2")
    claims = b9agent.token_claims(done.out.strip())
    assert done.code == 0 and done.out == api.minted[-1] + "\n"
    assert claims["exp"] - claims["iat"] == 7200 and "it ends 20" in done.err
    assert api.minted[-1] not in done.err and files_with(home, api.minted[-1]) == []


def test_a_token_is_written_for_its_owner_alone(home, api, admin, tmp_path):
    applied(api)
    path = tmp_path / "k3s.token"
    done = k3s(home, "token", admin, "--write", str(path))
    assert done.code == 0 and path.read_text() == api.minted[-1] + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert api.minted[-1] not in done.out + done.err and str(path) in done.out


def test_a_life_that_the_server_shortens_is_told(home, api, admin):
    applied(api)
    api.life_s = 3600
    done = k3s(home, "token", admin, "--hours", "48")
    assert done.code == 0 and "k3s gave 1.0 of 48 hours" in done.err


@pytest.mark.parametrize("arguments, code, words", [
    (("--hours", "0"), 2, "1 to 168"), (("--hours", "-1"), 2, "1 to 168"), (("--hours", "x"), 2, "hours"),
    (("--hours", "169"), 2, "1 to 168"), (("--write", "/nowhere/at/all"), 2, "/nowhere/at/all"),
    (("--service-account", "absent"), 4, "sudo b9agent.py k3s rbac --apply")])
def test_a_token_that_cannot_be_made_is_an_error(home, api, admin, arguments, code, words):
    applied(api)
    done = k3s(home, "token", admin, *arguments)
    assert done.code == code and words in done.err and done.out == ""


@pytest.mark.parametrize("answer", [
    {}, {"status": None}, {"status": {}}, {"status": {"token": "short", "expirationTimestamp": "x"}},
    {"status": {"token": "a" * 99}}, {"status": {"token": 7, "expirationTimestamp": "2030-01-01T00:00:00Z"}},
    {"status": {"token": "two words " * 9, "expirationTimestamp": "2030-01-01T00:00:00Z"}},
    {"status": {"token": "a" * 99, "expirationTimestamp": "2030-13-01T00:00:00Z"}}])
def test_an_answer_without_a_token_is_an_error(answer):
    kube = collections.namedtuple("Kube", "request")(lambda *_: (201, answer))
    with pytest.raises(b9agent.KubeError):
        b9agent.mint_token(kube, "default", "beta9-gateway", 600)


@pytest.mark.parametrize("token", ["", "a", "a.b", "a.%%%.c", "a.bnVsbA.c", "a.é.c", "." * 9, "a." + "x" * 9999])
def test_what_is_no_token_of_an_account_claims_nothing(token):
    assert b9agent.token_claims(token) == {}


# -- renewed in time, by a clock of the test's own ---------------------------------

UNREACHABLE = b9agent.KubeUnreachable("k3s is not reached", "start it")


class Keeper:
    """A TokenKeeper whose answers are scripted: seconds of life, or an error."""

    def __init__(self, *answers):
        self.now_s, self.taken, self.stream = 5000.0, [], io.StringIO()
        self.answers = list(answers)
        self.keeper = b9agent.TokenKeeper(self._mint, self.taken.append, b9agent.Log(stream=self.stream),
                                          lambda: self.now_s, lambda low, high: high)

    def _mint(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return "token-%d" % len(self.taken), time.time() + answer

    def step(self):
        wait_s = self.keeper.step()
        self.now_s += wait_s
        return wait_s


def test_a_token_is_renewed_at_two_thirds_of_its_life():
    life = Keeper(86400, 3600)
    assert life.step() == pytest.approx(86400 * 0.7, abs=2)
    assert life.step() == pytest.approx(3600 * 0.7, abs=2)
    assert life.taken == ["token-0", "token-1"]
    low = b9agent.TokenKeeper(lambda: ("t" * 20, time.time() + 900), lambda token: None,
                              b9agent.Log(stream=io.StringIO()), uniform=lambda low, high: low)
    assert 900 * 0.6 < low.step() < 900 * 2 / 3


def test_a_renewal_that_fails_is_tried_again_with_backoff_and_told_before_the_end():
    life = Keeper(3600, *[UNREACHABLE] * 25, 3600)
    life.step()
    waits = [life.step() for _ in range(25)]
    assert waits[:6] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0] and set(waits[5:]) == {60.0}
    lines = life.stream.getvalue().splitlines()
    first = next(line for line in lines if "not renewed" in line)
    assert "WARN" in first.upper() and "it ends in 10" in first and "start it" in first
    assert "it has ended" in life.keeper.told[1]
    levels = [line.split()[1] for line in lines if "not renewed" in line]
    assert levels == ["warning"] * 4 + ["error"] * 3  # 1st, 2nd, 4th, 8th; ten minutes left, 16th, ended
    assert "it ends in" in lines[-2] and "it has ended" in lines[-1]
    assert life.taken == ["token-0"]
    life.step()
    assert life.taken == ["token-0", "token-1"] and life.keeper.told[1] == ""


def test_without_a_first_token_the_gateway_is_said_to_have_none():
    life = Keeper(UNREACHABLE, 3600)
    life.step()
    assert life.keeper.told == (None, "the k3s token is not renewed: k3s is not reached; "
                                      "and the gateway has none")
    life.step()
    assert life.keeper.told[1] == "" and life.taken == ["token-0"]


@pytest.mark.parametrize("jump_s", [7200.0, -7200.0])
def test_a_clock_that_was_set_renews_at_once(jump_s):
    """To the keeper: the steady clock is another distance from the wall's."""
    ahead_s, taken = [0.0], []
    keeper = b9agent.TokenKeeper(lambda: ("t" * 20, time.time() + 86400), taken.append, b9agent.Log(
        stream=io.StringIO()), lambda: b9agent.now_s() + ahead_s[0])
    keeper.start()
    try:
        keeper._wake.set()  # only looks again
        ahead_s[0] = -jump_s
        keeper._wake.set()
        wait_until(lambda: len(taken) == 2, "a new token")
        keeper._wake.set()
    finally:
        keeper.stop()
    assert len(taken) == 2


@pytest.mark.parametrize("begun_s", [10 ** 4000, -10 ** 4000, True, 1e308, "1", None],
                         ids=["huge", "minus", "true", "float", "text", "null"])
def test_whatever_an_api_answers_the_agent_starts(begun_s):
    token, taken = jwt({"iat": begun_s, "exp": begun_s}), []
    keeper = b9agent.TokenKeeper(lambda: (token, time.time() + 900), taken.append,
                                 b9agent.Log(stream=io.StringIO()))
    keeper.start()
    keeper.stop()
    assert taken == [token] and 500 < keeper._due_s - b9agent.now_s() < 700


def test_a_defect_of_the_first_token_does_not_end_the_agent():
    stream = io.StringIO()
    keeper = b9agent.TokenKeeper(lambda: 1 / 0, lambda token: None, b9agent.Log(stream=stream))
    keeper.start()
    keeper.stop()
    assert "ZeroDivisionError" in stream.getvalue() and keeper._due_s > b9agent.now_s() + 50


def test_the_agent_renews_its_own_token_in_time_too(api, tmp_path):
    applied(api)
    path, now = str(tmp_path / "k3s.kubeconfig"), int(time.time())
    config = b9agent.parse_kubeconfig(kubeconfig(api.port), path)

    def after(begun_s, ends_s, where=path):
        token = api._mint("beta9-agent", begun_s, ends_s)
        text = b9agent.render_kubeconfig(config, token)
        (tmp_path / "k3s.kubeconfig").write_text(text)
        b9agent.renew_own_token(b9agent.parse_kubeconfig(text, where), path)
        return b9agent.parse_kubeconfig((tmp_path / "k3s.kubeconfig").read_text(), path).token != token
    assert not after(now - 60, now + 60)
    assert after(now - 70, now + 30)
    assert not after(now - 70, now + 30, where="/etc/rancher/k3s/k3s.yaml")  # not ours to write
    os.unlink(path)
    assert after(now - 70, now + 30) and stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_kubeconfig_that_was_made_is_read_as_it_was_meant(tmp_path):
    text = kubeconfig(6443).replace("server: https://127.0.0.1:6443",
                                    "server: https://127.0.0.1:6443\n    tls-server-name: kubernetes")
    config = b9agent.parse_kubeconfig(text, "/x")
    made = b9agent.parse_kubeconfig(b9agent.render_kubeconfig(config, "t" * 20), "/y")
    assert made.endpoint[:6] == config.endpoint[:6] and made.token == "t" * 20
    assert made.endpoint.tls.ca_pem == config.endpoint.tls.ca_pem


# -- in a running agent --------------------------------------------------------------

def own_kubeconfig(state, api, token):
    state.mkdir(mode=0o700)
    (state / "k3s.kubeconfig").write_text(kubeconfig(api.port, token=token))
    (state / "k3s.kubeconfig").chmod(0o600)


def to(gateway):
    return ("--gateway-port", gateway.port, "--gateway-host", "127.0.0.1", "--machine-id", "0badcafe",
            "--control-port", "0", "--k3s-service-account", "beta9-gateway")


def test_a_running_agent_registers_its_new_token_before_the_old_one_ends(home, state, agent, hostile, api):
    applied(api)
    api.life_s = 6
    own_kubeconfig(state, api, api.token_of("beta9-agent", 3600))
    given = len(api.minted)
    running = agent("run", *to(hostile), BETA9_TOKEN=GATEWAY_TOKEN)
    ends = {}

    def registered(requests):
        for request in requests:
            if request.name == "register" and request.body["token"] not in ends:
                left_s = b9agent.token_claims(request.body["token"])["exp"] - time.time()
                ends[request.body["token"]] = left_s
        return len(ends) >= 3
    hostile.wait_for(registered, "three tokens are registered")
    assert list(ends)[:3] == api.minted[given:given + 3] and min(ends.values()) > 2.0
    hostile.wait_for(lambda requests: requests[-1].name == "keepalive", "a keepalive follows")
    names = [request.name for request in hostile.requests]
    assert names[:6] == ["register", "keepalive"] * 3  # one registration a token, a keepalive with each
    told = json.loads(run_agent(home, "status", "--json").out)
    assert told["k3s"]["service_account"] == "beta9-gateway" and told["k3s"]["message"] == ""
    assert told["k3s"]["token_expires"].startswith("20") and told["state"] == "ready"
    assert "token ends 20" in run_agent(home, "status").out and told["failures"] == 0
    api.stop()
    running.wait_line("k3s token is not renewed")
    running.wait_line("and it has ended")
    message = json.loads(run_agent(home, "status", "--json").out)["k3s"]["message"]
    assert "the k3s token is not renewed" in message and "is not reached" in message
    assert running.stop() == 0
    shown = running.text() + json.dumps(told)
    assert not any(secret in shown for secret in api.minted)
    assert {os.path.basename(path) for secret in api.minted for path in files_with(home, secret)} <= {
        "k3s.kubeconfig"}


def test_an_agent_without_k3s_keeps_the_machine_and_brings_the_token_later(home, state, agent, hostile, api):
    applied(api)
    own_kubeconfig(state, api, api.token_of("beta9-agent", 3600))
    api.stop()
    agent("run", *to(hostile), BETA9_TOKEN=GATEWAY_TOKEN)
    hostile.wait_for(lambda requests: [request.name for request in requests][:2] == ["register", "keepalive"],
                     "it is kept alive")
    assert hostile.requests[0].body["token"] == ""
    with api:
        hostile.wait_for(lambda requests: requests[-1].name == "keepalive" and len(requests) > 2, "again")
        assert [request.body["token"] for request in hostile.requests if request.name == "register"] == [
            "", api.minted[-1]]


def test_once_fails_without_the_token_that_it_was_to_bring(home, state, hostile, api):
    own_kubeconfig(state, api, TOKEN)
    once = lambda: run_agent(home, "--once", *to(hostile), BETA9_TOKEN=GATEWAY_TOKEN)
    done = once()
    assert done.code == 4 and "there is no service account beta9-gateway" in done.err
    assert hostile.requests == []
    applied(api)
    assert once().code == 0 and hostile.requests[0].body["token"] == api.minted[-1]


def test_the_agent_s_kubeconfig_renews_itself_and_costs_no_token_where_it_cannot(home, state, hostile, api):
    applied(api)
    now = int(time.time())
    own = api._mint("beta9-agent", now - 70, now + 30)
    own_kubeconfig(state, api, own)
    once = lambda: run_agent(home, "--once", *to(hostile), BETA9_TOKEN=GATEWAY_TOKEN)
    assert once().code == 0
    kept = json.loads((state / "k3s.kubeconfig").read_text())["users"][0]["user"]["token"]
    claims = b9agent.token_claims(kept)
    assert kept != own and claims["sub"].endswith("beta9-agent") and claims["exp"] > now + 29 * 86400
    role = api.objects[ROLES + "/beta9-agent"]
    role["rules"][-1]["resourceNames"].remove("beta9-agent")
    old = api._mint("beta9-agent", now - 70, now + 30)
    (state / "k3s.kubeconfig").write_text(kubeconfig(api.port, token=old))
    done = once()
    assert done.code == 0 and "k3s_kubeconfig" in done.err and "rbac --apply" in done.err
    assert hostile.named("register")[-1].body["token"] == api.minted[-1]
    assert not any(token in done.err for token in api.minted)


def test_a_kubeconfig_of_an_agent_that_only_watches_does_not_end_either(home, state, agent, hostile, api):
    applied(api)
    now = int(time.time())
    own = api._mint("beta9-agent", now - 70, now + 30)
    own_kubeconfig(state, api, own)
    running = agent("run", *to(hostile)[:-2], BETA9_TOKEN=GATEWAY_TOKEN)
    wait_until(lambda: own not in (state / "k3s.kubeconfig").read_text(), "its token is renewed")
    token = json.loads((state / "k3s.kubeconfig").read_text())["users"][0]["user"]["token"]
    assert b9agent.token_claims(token)["exp"] > now + 29 * 86400
    wait_until(lambda: json.loads(run_agent(home, "status", "--json").out)["pods"]["state"] == "watching",
               "the watch")
    assert running.stop() == 0 and {request.body["token"] for request in hostile.named("register")} == {""}


def test_a_fixed_token_and_an_account_exclude_each_other(home):
    done = run_agent(home, "--once", "--k3s-service-account", "beta9-gateway", BETA9_TOKEN="t" * 20,
                     BETA9_K3S_TOKEN="k" * 20)
    assert done.code == 2 and "k3s.token and k3s.service_account are both set" in done.err


# -- check -------------------------------------------------------------------------

def checked(home, admin, *arguments, **more):
    """(exit code, {name: findings})."""
    done = k3s(home, "check", admin, "--json", *arguments, **more)
    found = {}
    for row in json.loads(done.out)["checks"]:
        found.setdefault(row["name"], []).append((row["level"], row["seen"], row["mend"]))
    return done.code, found


def test_all_that_is_needed_is_found(home, api, admin):
    applied(api)
    code, found = checked(home, admin, "--hostname", "127.0.0.1")
    assert code == 0 and "v1.33.1+k3s1" in found["api"][0][1] and "verified" in found["api"][0][1]
    assert found["rights"] == [("ok", "the gateway may create jobs, list jobs, delete jobs, list pods in "
                                      "default", "")]
    assert [row[0] for row in found["own"]] == ["ok"] and found["nodes"][0][1] == "ready: box"
    assert "system:serviceaccount:default:beta9-gateway" in found["token"][0][1]
    lines = k3s(home, "check", admin).out.splitlines()
    assert lines[0].startswith("ok    api ") and "nothing keeps the gateway from starting workers" in lines[-1]
    assert [asked.path for asked in api.asked if asked.method not in ("GET", "POST")] == []
    assert not any(secret in "\n".join(lines) for secret in api.minted)


def test_a_right_that_is_lacking_is_a_failure_and_one_too_many_a_warning(home, api, admin):
    applied(api)
    role = dict(api.objects[ROLES + "/beta9-gateway"])
    role["rules"] = role["rules"][1:] + [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
    api.put(ROLES + "/beta9-gateway", role)
    code, found = checked(home, admin)
    assert code == 2 and [row[0] for row in found["rights"]] == ["fail", "warn"]
    assert "the gateway may not create jobs in default" in found["rights"][0][1]
    assert found["rights"][0][2] == "sudo b9agent.py k3s rbac --apply"
    assert found["rights"][1][1] == "it may also: get secrets"


def test_cluster_admin_is_a_warning(home, api, admin):
    applied(api)
    api.extra["beta9-gateway"] = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    code, found = checked(home, admin)
    assert code == 0 and found["rights"][1][:2] == ("warn", "it may also: everything (cluster-admin)")


def test_the_predecessors_account_is_named_with_what_it_has_too_much(home, api, admin):
    applied(api)
    api.put(ACCOUNTS + "/beta9", {"metadata": {"name": "beta9"}})
    api.extra["beta9"] = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    code, found = checked(home, admin, BETA9_K3S_TOKEN=api.token_of("beta9", 30 * 86400))
    assert code == 0 and "system:serviceaccount:default:beta9: accepted" in found["token"][0][1]
    assert found["rights"][1][0] == "warn" and "| grep beta9 " in found["rights"][1][2]


def test_a_token_alone_is_checked_without_the_rights_of_an_account(home, api, tmp_path):
    """As with k3s.token and k3s.ca_file, and no kubeconfig."""
    from kube_api import SERVER_CA
    applied(api)
    code, found = checked(home, None, "--k3s-ca-file", SERVER_CA, "--k3s-server", api.url,
                          BETA9_K3S_TOKEN=api.token_of("beta9-gateway", 30 * 86400))
    assert [row[0] for row in found["rights"]] == ["ok"] and code == 0
    assert [row[:2] for row in found["own"]] == [
        ("warn", "the agent may not watch pods in default: as they change")]


@pytest.mark.parametrize("life_s, level, words", [
    (3600, "warn", "and it ends 20"), (30 * 86400, "ok", "and it ends 20"), (None, "warn", "never ends")])
def test_a_fixed_token_is_told_by_its_end(home, api, admin, life_s, level, words):
    applied(api)
    token = api.token_of("beta9-gateway", life_s or 600) if life_s else TOKEN
    _, found = checked(home, admin, BETA9_K3S_TOKEN=token)
    assert found["token"][0][0] == level and words in found["token"][0][1]
    assert token not in json.dumps(found)


def test_a_fixed_token_that_has_ended_is_a_failure(home, api, admin):
    applied(api)
    code, found = checked(home, admin, BETA9_K3S_TOKEN=api.token_of("beta9-gateway", -5))
    assert code == 2 and [row[0] for row in found["token"]] == ["fail"]


def test_an_api_that_is_away_is_unreachable_and_said_by_each_row(home, api, admin):
    api.stop()
    code, found = checked(home, admin)
    assert code == 5 and found["api"][0][0] == "fail" and "is not reached" in found["api"][0][1]


def test_the_agent_s_kubeconfig_is_enough_for_check(home, api, admin):
    assert k3s(home, "rbac", admin, "--apply").code == 0
    code, found = checked(home, None)
    levels = {name: [row[0] for row in rows] for name, rows in found.items()}
    assert code == 0 and levels["rights"] == levels["own"] == ["ok"]
    if os.path.exists(b9agent.K3S_KUBECONFIG):
        return
    assert found["nodes"] == [("ok", "not looked at: the agent may not see them, and need not; with sudo they "
                                     "are", "")]


@pytest.mark.parametrize("hostname, words", [
    ("127.0.0.1", "127.0.0.1:6443"), ("no-such-host.invalid", "the gateway adds its tailnet's name")])
def test_the_address_that_is_registered_is_tried(home, api, admin, hostname, words):
    applied(api)
    _, found = checked(home, admin, "--hostname", hostname)
    assert words in found["address"][0][1]


@pytest.mark.parametrize("claims", [{"exp": 10 ** 30}, {"exp": -10 ** 30}, {"exp": "soon"}, {"exp": None},
                                    {"sub": "\x1b[2J"}, {"sub": 7}, {"exp": 1.5}])
def test_a_token_may_claim_anything(claims):
    found = b9agent.judge_token(jwt(claims), False, time.time())
    assert found.level in ("ok", "warn") and "\x1b" not in found.seen


@pytest.mark.parametrize("nodes, gpus, levels", [
    ([NODE], 0, ["ok"]), ([], 0, ["fail"]), ([NODE], 1, ["ok", "warn"]),
    ([{"metadata": {"name": "b"}, "status": {}}], 0, ["fail"]),
    ([{"metadata": {"name": "b"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}], 0,
     ["fail"]),
    ([dict(NODE, status=dict(NODE["status"], allocatable={"nvidia.com/gpu": "2"}))], 2, ["ok", "ok"]),
    ([dict(NODE, status=dict(NODE["status"], allocatable={"nvidia.com/gpu": "many"}))], 1, ["ok", "warn"]),
])
def test_nodes_and_their_gpus_are_judged(nodes, gpus, levels):
    assert [finding.level for finding in b9agent.judge_nodes(nodes, gpus)] == levels


# -- install ------------------------------------------------------------------------

INSTALLER = """#!/bin/sh
env | grep -E '^(INSTALL_)?K3S_' | sort > "{folder}/environment"
echo "[INFO]  Installing k3s"
[ ! -e "{folder}/fail" ] || {{ echo "[ERROR]  Download failed" >&2; exit 1; }}
mkdir -p "{folder}/etc" && cat "{folder}/kubeconfig" > "{folder}/etc/k3s.yaml"
"""


def elf(text="k3s version v1.33.1+k3s1 (abc)\ngo version go1.24\n", machine=62):
    """A program for Linux on x86-64 that prints a text."""
    body = text.encode()
    code = (b"\xb8\x01\0\0\0\xbf\x01\0\0\0\x48\x8d\x35" + (16).to_bytes(4, "little") + b"\xba"
            + len(body).to_bytes(4, "little") + b"\x0f\x05\xb8\x3c\0\0\0\x31\xff\x0f\x05")
    word = lambda *values: b"".join(value.to_bytes(8, "little") for value in values)
    head = (b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\0" + machine.to_bytes(2, "little") + b"\x01\0\0\0"
            + word(0x400078, 64, 0) + b"\0\0\0\0" + b"\x40\0\x38\0\x01\0\x40\0\0\0\0\0")
    whole = 120 + len(code) + len(body)
    return head + b"\x01\0\0\0\x05\0\0\0" + word(0, 0x400000, 0x400000, whole, whole, 0x1000) + code + body


class Box:
    """A folder in place of /, with what a user carries to it."""

    def __init__(self, folder, api):
        self.folder, self.api, self.said, self.asked, self.answer = folder, api, [], [], True
        (folder / "kubeconfig").write_text(kubeconfig(api.port))
        self.installer = folder / "install.sh"
        self.installer.write_text(INSTALLER.format(folder=folder))
        self.root = folder / "root"
        self.root.mkdir()
        self.places = b9agent.K3sPlaces(
            str(self.root / "bin/k3s"), str(self.root / "images"), str(self.root / "config.yaml"),
            str(folder / "etc/k3s.yaml"), (str(folder / "k3s.service"),), port=quiet_port())

    def install(self, names=("", "100.64.0.7"), **options):
        steps = b9agent.Steps(self.said.append, {name.replace("_", "-"): str(value)
                                                 for name, value in options.items()})
        b9agent.K3sInstall(steps, {name.replace("_", "-"): str(value) for name, value in options.items()},
                           names, self.places).run(self._confirm, lambda text: None)
        return "\n".join(self.said)

    def _confirm(self, question):
        self.asked.append(question)
        return self.answer

    def environment(self):
        return (self.folder / "environment").read_text().split()

    def refused(self, kind=b9agent.UsageError, **options):
        before = tree(self.root)
        with pytest.raises(kind) as caught:
            self.install(**options)
        assert tree(self.root) == before and not (self.folder / "environment").exists()
        return str(caught.value)


@pytest.fixture
def box(tmp_path, api):
    return Box(tmp_path, api)


def test_the_installer_runs_once_it_is_shown_and_wanted(box, monkeypatch):
    monkeypatch.setenv("K3S_URL", "https://elsewhere:6443")
    monkeypatch.setenv("INSTALL_K3S_EXEC", "agent")
    said = box.install(installer=box.installer)
    digest = subprocess.run(["sha256sum", str(box.installer)], stdout=subprocess.PIPE).stdout.decode()[:64]
    assert "its SHA-256 is " + digest in said and len(box.asked) == 1
    assert box.environment() == ["INSTALL_K3S_EXEC=server"]
    assert "[INFO]  Installing k3s" in said and "k3s v1.33.1+k3s1 is ready" in said
    assert said.endswith("next: sudo b9agent.py k3s rbac --apply")
    config = yaml.safe_load((box.root / "config.yaml").read_text())
    assert config == {"write-kubeconfig-mode": "0600", "tls-san": ["100.64.0.7"], "disable": [
        "traefik", "servicelb", "metrics-server", "local-storage"]}
    assert stat.S_IMODE(os.stat(box.places.config).st_mode) == 0o600


def test_a_dry_run_tells_every_step_and_makes_none(box):
    before = tree(box.folder)
    said = box.install(dry_run="", installer=box.installer)
    assert tree(box.folder) == before and box.asked == [] and box.api.asked == []
    steps = [line.split()[1] for line in said.splitlines() if line.startswith("would ")]
    assert steps == ["read", "write", "run", "wait"] and said.endswith("nothing was changed")
    assert "INSTALL_K3S_EXEC=server" in said


def test_a_no_changes_nothing(box):
    box.answer = False
    assert "nothing was changed" in box.refused(installer=box.installer)


def test_an_installer_that_is_cut_off_at_our_limit_is_not_run(box):
    box.installer.write_bytes(box.installer.read_bytes() + b"#" * (1 << 20))
    assert "is no shell script" in box.refused(installer=box.installer, y="")
    assert "cannot be read" in box.refused(installer=box.folder / "absent", y="")


def test_another_installer_than_the_pinned_one_is_not_run(box):
    assert "not the one that was asked for" in box.refused(installer=box.installer, sha256="0" * 64, y="")
    digest = b9agent.sha256_hex(box.installer.read_bytes())
    assert "is ready" in box.install(installer=box.installer, sha256=digest.upper(), y="")
    assert box.asked == []


def test_a_k3s_that_is_there_is_left_as_it_is(box):
    (box.folder / "k3s.service").write_text("theirs")
    (box.folder / "etc").mkdir()
    shutil.copy(str(box.folder / "kubeconfig"), box.places.kubeconfig)
    before = tree(box.folder)
    said = box.install(installer=box.installer, y="")
    assert "it is left as it is" in said and "the installer" not in said and "v1.33.1+k3s1 is ready" in said and tree(box.folder) == before


def test_a_configuration_that_is_there_is_kept(box):
    (box.root / "config.yaml").write_text("disable: []\n")
    assert "is there already and stays" in box.install(installer=box.installer, y="")
    assert (box.root / "config.yaml").read_text() == "disable: []\n"


def test_an_installer_that_fails_is_no_success(box):
    (box.folder / "fail").write_text("")
    with pytest.raises(b9agent.UnhealthyError, match="Download failed.*k3s-uninstall.sh"):
        box.install(installer=box.installer, y="")
    assert "is ready" not in "\n".join(box.said)
    (box.folder / "fail").unlink()
    box.said.clear()  # again: what the first run wrote is nobody else's
    said = box.install(installer=box.installer, y="")
    assert "stays as it is" not in said and "is ready" in said


def test_an_installation_that_was_cut_off_is_told_from_a_k3s_that_is_down(box, monkeypatch):
    (box.folder / "k3s.service").write_text("")
    monkeypatch.setattr(b9agent, "Wake", lambda: type("Now", (), {"wait": lambda *_: None}))
    clock = iter(range(0, 9999, 3))
    monkeypatch.setattr(b9agent, "now_s", lambda: next(clock))
    with pytest.raises(b9agent.UnhealthyError, match="there is no .*cut off. sudo k3s-uninstall.sh"):
        box.install()
    (box.folder / "etc").mkdir()
    (box.folder / "etc" / "k3s.yaml").write_text(kubeconfig(quiet_port()))
    with pytest.raises(b9agent.UnhealthyError, match="is not reached") as caught:
        box.install()
    assert "uninstall" not in str(caught.value)


def test_ready_is_believed_when_a_node_is_ready(box, monkeypatch):
    box.api.put("/api/v1/nodes/box", {"metadata": {"name": "box"}, "status": {"conditions": []}})
    steps = []

    def later(text):
        steps.append(text)
        if "not Ready" in text:
            box.api.put("/api/v1/nodes/box", NODE)
    b9agent.K3sInstall(b9agent.Steps(box.said.append, {}), {"installer": str(box.installer), "y": ""}, (),
                       box.places).run(lambda question: True, later)
    assert any("its node is not Ready yet" in step for step in steps) and "is ready" in box.said[-1]
    monkeypatch.setattr(b9agent, "K3S_READY_LIMIT_S", 0.2)
    box.api.objects.pop("/api/v1/nodes/box")
    (box.folder / "k3s.service").write_text("")
    with pytest.raises(b9agent.UnhealthyError, match="k3s is not ready: it has no node yet"):
        box.install()


needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the stand-in is for x86-64")


@pytest.fixture
def usb(box):
    folder = box.folder / "usb"
    folder.mkdir()
    (folder / "k3s").write_bytes(elf())
    (folder / "k3s-airgap-images-amd64.tar.zst").write_bytes(b"images" * 1000)
    (folder / "sha256sum-amd64.txt").write_text("not an image")
    return folder


@needs_x86
def test_without_a_network_three_files_are_enough(box, usb):
    (usb / "k3s").chmod(0o600)  # a USB stick has no modes
    said = box.install(installer=box.installer, binary=usb / "k3s", images=usb, y="")
    assert "it is k3s version v1.33.1+k3s1 (abc)" in said and "is ready" in said
    assert box.environment() == ["INSTALL_K3S_EXEC=server", "INSTALL_K3S_SKIP_DOWNLOAD=true"]
    assert (box.root / "bin/k3s").read_bytes() == elf()
    assert stat.S_IMODE((box.root / "bin/k3s").stat().st_mode) == 0o755
    assert os.listdir(str(box.root / "images")) == ["k3s-airgap-images-amd64.tar.zst"]
    assert os.listdir(str(box.root / "bin")) == ["k3s"]


@needs_x86
@pytest.mark.parametrize("content, words", [
    (b"#!/bin/sh\n", "is no Linux program"), (b"", "is no Linux program"),
    (elf(machine=183), "another processor than this machine's")])
def test_a_program_of_another_kind_is_refused_before_anything(box, usb, content, words):
    (usb / "k3s").write_bytes(content)
    assert words in box.refused(installer=box.installer, binary=usb / "k3s", images=usb, y="")


@needs_x86
def test_a_program_that_is_no_k3s_is_not_put_in_place(box, usb):
    (usb / "k3s").write_bytes(elf("hello\n"))
    with pytest.raises(b9agent.UsageError, match="is no k3s"):
        box.install(installer=box.installer, binary=usb / "k3s", images=usb, y="")
    assert os.listdir(str(box.root / "bin")) == [] and not (box.folder / "environment").exists()


@needs_x86
def test_what_is_missing_on_the_stick_is_said(box, usb):
    options = dict(installer=box.installer, binary=usb / "k3s", y="")
    assert "three things are needed" in box.refused(binary=usb / "k3s", images=usb)
    assert "three things are needed" in box.refused(installer=box.installer, images=usb)
    assert "cannot be read" in box.refused(**dict(options, binary=usb / "nothing"))
    (usb / "k3s-airgap-images-amd64.tar.zst").write_bytes(b"")
    assert "is empty" in box.refused(images=usb, **options)
    (usb / "k3s-airgap-images-amd64.tar.zst").rename(usb / "k3s-airgap-images-arm64.tar.zst")
    (usb / "k3s-airgap-images-arm64.tar.zst").write_bytes(b"x")
    assert "not for amd64" in box.refused(images=usb, **options)
    (usb / "k3s-airgap-images-arm64.tar.zst").unlink()
    (usb / "link.tar").symlink_to("/nowhere")
    (usb / "folder.tar").mkdir()
    assert "has no images" in box.refused(images=usb, **options)


def test_a_port_that_is_taken_is_said_before_anything(box):
    import socket
    with socket.socket() as other:
        other.bind(("127.0.0.1", box.places.port))
        other.listen()
        assert "is held by" in box.refused(b9agent.LockedError, installer=box.installer, y="")


@pytest.mark.parametrize("code, body, words", [
    (200, b"<html>log in</html>", "is no shell script"), (404, b"#!/bin/sh\n", "is no shell script"),
    (302, b"", "is no shell script"), (200, b"#!/bin/sh\n" + b"#" * (1 << 20), "cannot be read")])
def test_a_portal_is_no_installer(box, code, body, words):
    with serving(code, body) as port:
        box.places = box.places._replace(source=b9agent.Endpoint("http", "127.0.0.1", port))
        assert words in box.refused(y="")


def test_the_installer_is_fetched_where_no_file_is_named(box):
    with serving(200, box.installer.read_bytes()) as port:
        box.places = box.places._replace(source=b9agent.Endpoint("http", "127.0.0.1", port))
        said = box.install(y="", release="v1.33.1+k3s1")
    assert "fetch http://127.0.0.1:%d" % port in said and "is ready" in said
    assert box.environment() == ["INSTALL_K3S_EXEC=server", "INSTALL_K3S_VERSION=v1.33.1+k3s1"]


class serving:
    """An HTTP server with one answer, as a context manager that gives its port."""

    def __init__(self, code, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self._server.server_address[1]

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_the_command_shows_its_steps_to_anybody_and_runs_for_root_alone(home):
    if any(map(os.path.exists, b9agent.K3sPlaces().traces)):
        pytest.skip("there is a k3s on this machine")
    done = k3s(home, "install", None, "--dry-run")
    assert done.code == 0 and "would fetch https://get.k3s.io" in done.out, done
    assert "/etc/rancher/k3s/config.yaml" in done.out and done.out.endswith("nothing was changed\n")
    if os.geteuid() != 0:
        assert k3s(home, "install", None, "-y").code == 7
