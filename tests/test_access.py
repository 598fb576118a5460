"""Who may ask: tenants.yaml and its commands, tokens, the tailnet, OpenID tokens made by openssl and
forged by hand, the gateway's address."""
import base64
import calendar
import hashlib
import hmac
import http.server
import json
import os
import re
import stat
import subprocess
import threading
import time

import pytest
import yaml
from hypothesis import given, settings as hypothesis_settings, strategies as st

import b9agent
from b9agent import (Access, AccessRefused, Oidc, Tenant, TenantBook, UsageError, WhoIs, load_tenants,
                     token_hash)
from helpers import Finished, Program, agent_command, environment, run_agent

QUICK = hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=150)
TOKEN, OTHER = "b9-" + "a" * 43, "b9-" + "b" * 43
HASH, OTHER_HASH = (hashlib.sha256(token.encode()).hexdigest() for token in (TOKEN, OTHER))
HOST = ("192.0.2.7", 40000)


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


class Lines(list):
    def __call__(self, level, event, **fields):
        self.append((level, event, fields))

    def error(self, event, error, level="error", **fields):
        self(level, event, what=error.what, do=error.hint, **fields)

    def events(self, *but):
        return [event for _, event, _ in self if event not in but]


def write(folder, text, mode=0o600):
    path = folder / "tenants.yaml"
    draft = folder / "draft"
    draft.write_text(text)
    draft.chmod(mode)
    draft.rename(path)
    return str(path)


def tenants_in(folder, text, priced=True):
    return load_tenants(write(folder, text), priced)


def one_entry(*lines):
    return "tenants:\n  - name: ada\n" + "".join("    %s\n" % line for line in lines)


# -- tenants.yaml --------------------------------------------------------

EVERY_FIELD = """\
# who may
tenants:
  - name: ada                     # of the lab
    token_sha256: %s
    models: [llama*, Library/Qwen2.5, "registry.ollama.ai/library/Phi*:4b"]
    admin: true
    priority: high
    tailnet: ["Ada@Example.com", "*@lab.example", "tag:ci"]
    oidc:
      - auth0|7
      - group:ML team
    requests_per_minute: 60
    concurrent_requests: 4
    tokens_per_day: 2000000000
    gpu_seconds_per_day: 1800.5
    usd_per_day: 0.25
    max_context_tokens: 8192
    max_output_tokens: 512
  - {name: bob, token_sha256: ["%s", "%s"], old_token_until: "2030-01-01T00:00:00Z"}
  - name: gateway
    models: phi4
""" % (HASH, OTHER_HASH.upper(), "c" * 64)


def test_every_field_is_read(tmp_path):
    ada, bob, gateway = tenants_in(tmp_path, EVERY_FIELD)
    assert ada == Tenant(
        "ada", (HASH,), ("llama*", "qwen2.5:latest", "phi*:4b"), True, "high",
        b9agent.Limits(60, 4, 2000000000, 1800.5, 0.25, 8192, 512),
        ("ada@example.com", "*@lab.example", "tag:ci"), ("auth0|7", "group:ML team"))
    assert bob == Tenant("bob", (OTHER_HASH, "c" * 64), old_token_until="2030-01-01T00:00:00Z")
    assert gateway == Tenant("gateway", models=("phi4:latest",))


def test_every_row_of_the_table_is_a_field_of_a_tenant_and_the_other_way_round():
    rows = [row.key for row in b9agent.TENANT_FIELDS]
    fields = set(Tenant._fields) - {"limits"} | set(b9agent.Limits._fields)
    assert sorted(rows) == sorted(fields)


TOKEN_LINE = "token_sha256: " + HASH


@pytest.mark.parametrize("text, expected", [
    ("", "tenants.yaml:1: no list of tenants, expected `tenants:`"),
    ("tenants: 5\n", "tenants.yaml:1: no list of tenants"),
    ("tenants: ''\n", "tenants.yaml:1: no list of tenants"),
    ("tenants: []\nmodels: x\n", "tenants.yaml:2: unknown name `models`, expected `tenants`"),
    ("tenants:\n  - ada\n", "tenants.yaml:2: this is no tenant"),
    ("tenants:\n  - token_sha256: %s\n" % HASH, "tenants.yaml:2: a tenant: it has no name"),
    (one_entry(), "tenants.yaml:2: tenant `ada`: nobody could be this tenant, expected one of token"),
    (one_entry(TOKEN_LINE, "model: x"),
     "tenants.yaml:4: tenant `ada`: unknown name `model`, expected `models`"),
    (one_entry(TOKEN_LINE, "x: y"), "lists"),
    (one_entry(TOKEN_LINE, "models: []"), "tenants.yaml:4: tenant `ada`: `models` cannot be used"),
    (one_entry(TOKEN_LINE, "models:"), "`models` `` cannot be used"),
    (one_entry(TOKEN_LINE, "models: a, b"), "expected a model's name, with `*`"),
    (one_entry(TOKEN_LINE, "models: [[a]]"), "expected a list, or one value"),
    (one_entry(TOKEN_LINE, "models: \"llama?\""), "`models` `llama?` cannot be used"),
    (one_entry(TOKEN_LINE, "admin: perhaps"), "`admin` `perhaps` cannot be used, expected true or"),
    (one_entry(TOKEN_LINE, "admin: [true]"), "expected one value"),
    (one_entry(TOKEN_LINE, "priority: urgent"), "expected high or normal or low"),
    (one_entry(TOKEN_LINE, "tokens_per_day: 1e6"), "expected a whole number, 1 to"),
    (one_entry(TOKEN_LINE, "tokens_per_day: 0"), "expected a whole number, 1 to"),
    (one_entry(TOKEN_LINE, "tokens_per_day: -5"), "tenants.yaml:4: "),
    (one_entry(TOKEN_LINE, "tokens_per_day: \"\u0661\u0662\""), "expected a whole number"),
    (one_entry(TOKEN_LINE, "requests_per_minute: 9999999"), "1 to 60000"),
    (one_entry("tailnet: [\"*\"]"), "`*` alone would let in"),
    (one_entry("tailnet: \"*@*\""), "expected ada@example.com"),
    (one_entry("tailnet: ada"), "expected ada@example.com"),
    (one_entry("oidc: \"*\""), "without `*`"),
    (one_entry("token_sha256: " + TOKEN), "expected 64 hexadecimal digits"),
    (one_entry("token_sha256: [%s, %s, %s]" % ("a" * 64, "b" * 64, "c" * 64)), "more than two"),
    (one_entry(TOKEN_LINE, "old_token_until: tomorrow"), "expected a time such as"),
    ("tenants:\n  - name: Default\n    %s\n" % TOKEN_LINE, "the name is this machine's own"),
    ("tenants:\n  - name: gateway\n    %s\n" % TOKEN_LINE, "known by its address alone"),
    ("tenants:\n  - name: gateway\n    admin: true\n", "known by its address alone"),
    ("tenants:\n  - name: Gateway\n", "expected another name"),
    ("tenants:\n  - {name: a, oidc: x}\n  - {name: a, oidc: y}\n", "name `a` is that of tenant `a`"),
    ("tenants:\n  - name: a b\n    %s\n" % TOKEN_LINE, "`name` `a b` cannot be used"),
    (one_entry(TOKEN_LINE) + "  - name: ADA\n    tailnet: a@b.c\n",
     "tenants.yaml:4: tenant `ADA`: name `ada` is that of tenant `ada` too"),
    (one_entry(TOKEN_LINE) + "  - name: bob\n    %s\n" % TOKEN_LINE,
     "tenants.yaml:4: tenant `bob`: token_sha256 is that of tenant `ada` too"),
    (one_entry("tailnet: a@b.c") + "  - name: bob\n    tailnet: A@b.c\n", "tailnet `a@b.c` is that of"),
    (one_entry(TOKEN_LINE, TOKEN_LINE), "tenants.yaml:4: `token_sha256` is given twice"),
    (one_entry(TOKEN_LINE, "models: *x"), "tenants.yaml:4: an alias"),
    ("tenants:\n" + "".join("  - name: n%d\n    tailnet: n%d@b.c\n" % (n, n) for n in range(1001)),
     "1000 at most"),
])
def test_what_cannot_be_used_is_refused_with_its_place_and_what_is_expected(tmp_path, text, expected):
    with pytest.raises(UsageError) as caught:
        tenants_in(tmp_path, text)
    assert expected in str(caught.value)
    assert TOKEN not in str(caught.value), "pasted by mistake, it stays where it is"


def test_money_needs_a_price(tmp_path):
    text = one_entry(TOKEN_LINE, "usd_per_day: 5")
    assert tenants_in(tmp_path, text)[0].limits.usd_per_day == 5.0
    with pytest.raises(UsageError, match="ada.*`usd_per_day` without a price, expected inference.gpu"):
        tenants_in(tmp_path, text, priced=False)


def test_a_file_that_others_may_read_is_refused(tmp_path):
    path = write(tmp_path, one_entry(TOKEN_LINE), 0o644)
    with pytest.raises(UsageError, match="others may read it.*chmod 600"):
        load_tenants(path, True)


@QUICK
@given(st.lists(st.sampled_from(
    ["tenants:", "  - name: a", "  - {name: b, oidc: x}", "    oidc: x", "    models: [a, b]",
     "    models:", "      - a*", "    - x", "admin: true", "    admin: on", "    token_sha256: " + HASH,
     "  -", "    tokens_per_day: 5", "  - name: gateway", "# x", "\t", "    usd_per_day: 1", "    {}",
     "    limits: {a: b}", "tenants: [[], {}]", "    name: [a]", "    oidc: {a: b}"]), max_size=12),
    st.text(max_size=10))
def test_any_file_is_tenants_or_a_message(lines, tail):
    try:
        tree = b9agent.parse_yaml("\n".join(lines) + tail)
    except b9agent.YamlError:
        return
    try:
        for tenant in b9agent.tenants_of(tree, "FILE", False):
            assert tenant.name and tenant.models
            b9agent.tables_of((tenant,))
    except UsageError as error:
        assert re.match("FILE:[0-9]+: ", error.what)


@pytest.mark.parametrize("patterns, yes, no", [
    (["*"], ["m:latest", "hf.co/org/m:q4"], []),
    (["llama3.2"], ["llama3.2", "Library/Llama3.2:latest", "registry.ollama.ai/library/llama3.2"],
     ["llama3.2:1b", "llama3.2-evil", "org/llama3.2"]),
    (["llama*"], ["llama3.2:1b", "LLAMA"], ["xllama", "org/llama3"]),
    (["*:8b"], ["m:8b", "org/m:8b"], ["m", "m:18b-x"]),
    (["q*n"], ["qwen", "qn:latest"], ["qwen:7b", "q"]),
    (["a*b*a"], ["aba", "a1b2b3a"], ["aa", "ab", "aab:x"]),
    (["org/m", "x"], ["Org/M:latest", "x"], ["m", "org/m:1b"]),
    (["library/l*"], ["llama"], ["org/llama"]),
])
def test_which_models_a_tenant_may_use(tmp_path, patterns, yes, no):
    lines = [TOKEN_LINE, "models:"] + ["  - \"%s\"" % pattern for pattern in patterns]
    ada, = tenants_in(tmp_path, one_entry(*lines))
    assert [name for name in yes if not ada.may_use(b9agent.model_key(name))] == []
    assert [name for name in no if ada.may_use(b9agent.model_key(name))] == []


@QUICK
@given(st.text("ab*", max_size=8), st.text("ab", max_size=8))
def test_a_pattern_means_what_a_regular_expression_says(pattern, text):
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text) is not None
    assert b9agent.glob_matches(pattern, text) is expected


# -- the book ------------------------------------------------------------

def book_of(folder, log=None, clock=None):
    return TenantBook(str(folder), log if log is not None else Lines(), True, clock or Clock())


def access_of(book, oidc=None, whois=lambda host, port: None, gateway=(), clock=None, log=None):
    return Access(book, oidc, whois, lambda: gateway, log if log is not None else Lines(),
                  clock or Clock())


def bearer(token):
    return {"host": "x", "authorization": "Bearer " + token}


def asked(access, headers, peer=HOST, on_tailnet=False):
    """As the door does it."""
    return (access.recognise(headers, peer, on_tailnet)
            or access.identify(headers, peer, on_tailnet))


def refused(access, headers, peer=HOST, on_tailnet=False):
    with pytest.raises(AccessRefused) as caught:
        asked(access, headers, peer, on_tailnet)
    return caught.value


def test_without_tenants_there_is_one_with_the_token_of_its_file(tmp_path):
    access = access_of(book_of(tmp_path), gateway=["10.0.0.1"])
    token = (tmp_path / "inference.token").read_text().strip()
    assert stat.S_IMODE(os.stat(tmp_path / "inference.token").st_mode) == 0o600
    caller = asked(access, bearer(token))
    assert caller.tenant.name == "default" and caller.tenant.admin and caller.tenant.may_use("x:1")
    assert caller.identity == "token"
    gateway = asked(access, {}, ("10.0.0.1", 5))
    assert gateway.tenant == Tenant("gateway") and not gateway.tenant.admin
    assert refused(access, {}).status == 401


def test_tenants_end_the_default_one_and_its_token(tmp_path):
    clock = Clock()
    access = access_of(book_of(tmp_path, clock=clock))
    token = (tmp_path / "inference.token").read_text().strip()
    asked(access, bearer(token))
    write(tmp_path, "tenants: []\n")
    clock.now += 1.0
    assert refused(access, bearer(token)).code == "bad_token"


def test_a_new_token_file_counts_without_a_restart(tmp_path):
    clock = Clock()
    access = access_of(book_of(tmp_path, clock=clock))
    (tmp_path / "inference.token").write_text("0123456789abcdef" * 4)
    clock.now += 1.0
    assert asked(access, bearer("0123456789abcdef" * 4)).tenant.name == "default"


def test_a_change_counts_within_a_second_and_is_read_off_the_doors_thread(tmp_path):
    write(tmp_path, one_entry(TOKEN_LINE))
    clock = Clock()
    access = access_of(book_of(tmp_path, clock=clock))
    assert access.recognise(bearer(TOKEN), HOST, False).tenant.name == "ada"
    write(tmp_path, one_entry("token_sha256: " + OTHER_HASH))
    clock.now += 0.5
    assert access.recognise(bearer(TOKEN), HOST, False), "looked at once a second"
    clock.now += 0.5
    assert access.recognise(bearer(TOKEN), HOST, False) is None, "identify() is to read it"
    assert access.recognise(bearer(OTHER), HOST, False) is None
    assert access.identify(bearer(OTHER), HOST, False).tenant.name == "ada"
    with pytest.raises(AccessRefused):
        access.recognise(bearer(TOKEN), HOST, False)


def test_a_token_that_was_made_just_now_counts_at_once(tmp_path):
    write(tmp_path, one_entry(TOKEN_LINE))
    access = access_of(book_of(tmp_path, clock=Clock()))
    with pytest.raises(AccessRefused):
        access.recognise(bearer(OTHER), HOST, False)
    write(tmp_path, one_entry("token_sha256: [%s, %s]" % (HASH, OTHER_HASH)))
    assert access.recognise(bearer(OTHER), HOST, False) is None, "identify() is to read it"
    assert access.identify(bearer(OTHER), HOST, False).tenant.name == "ada"


def test_a_file_that_breaks_leaves_the_last_good_one_in_force(tmp_path):
    write(tmp_path, one_entry(TOKEN_LINE))
    clock, log = Clock(), Lines()
    access = access_of(book_of(tmp_path, log, clock))
    for text in ("tenants:\n  - nme: ada\n", "", "tenants: ["):
        write(tmp_path, text)
        for _ in range(5):
            clock.now += 1.0
            assert asked(access, bearer(TOKEN)).tenant.name == "ada"
    assert log.events() == ["tenants"] + ["tenants_refused"] * 3, "each said once"
    assert "stay in force" in log[-1][2]["do"]
    os.chmod(write(tmp_path, one_entry(TOKEN_LINE)), 0o640)
    clock.now += 1.0
    asked(access, bearer(TOKEN))
    assert "chmod 600" in log[-1][2]["do"]
    os.chmod(tmp_path / "tenants.yaml", 0o600)  # nothing but its mode has changed
    clock.now += 1.0
    asked(access, bearer(TOKEN))
    assert log[-1][1] == "tenants"


def test_a_file_that_is_broken_at_the_start_lets_nobody_in(tmp_path):
    (tmp_path / "inference.token").write_text("0" * 64)
    os.chmod(tmp_path / "inference.token", 0o600)
    write(tmp_path, one_entry("tokn: x"))
    clock, log = Clock(), Lines()
    access = access_of(book_of(tmp_path, log, clock), gateway=["10.0.0.1"],
                       whois=lambda host, port: WhoIs("ada@example.com", (), "n"))
    for headers, peer in (({}, ("10.0.0.1", 1)), (bearer("0" * 64), HOST), (bearer(TOKEN), HOST)):
        assert refused(access, headers, peer, True).status == 401
    assert log.events("bad_tokens") == ["tenants_refused"]
    assert "nobody is let in" in log[0][2]["do"]
    write(tmp_path, one_entry(TOKEN_LINE))
    clock.now += 1.0
    assert asked(access, bearer(TOKEN)).tenant.name == "ada"
    assert asked(access, {}, ("10.0.0.1", 1)).identity == "gateway"


def test_the_gateway_has_the_models_and_limits_of_its_entry(tmp_path):
    write(tmp_path, "tenants:\n  - name: gateway\n    models: llama*\n    tokens_per_day: 7\n")
    access = access_of(book_of(tmp_path), gateway=["10.0.0.1"])
    tenant = asked(access, {}, ("::ffff:10.0.0.1", 1, 0, 0)).tenant
    assert (tenant.name, tenant.admin, tenant.limits.tokens_per_day) == ("gateway", False, 7)
    assert tenant.may_use("llama3:8b") and not tenant.may_use("phi4:latest")


# -- tokens --------------------------------------------------------------

@pytest.fixture
def lab(tmp_path):
    """Two tenants; ada is known by tailnet and OIDC as well."""
    write(tmp_path, "tenants:\n  - name: ada\n    %s\n    tailnet: [ada@example.com, \"tag:ci\"]\n"
          "    oidc: [ada-7, boss@example.com, \"group:ml\"]\n"
          "  - name: bob\n    token_sha256: %s\n    tailnet: \"*@lab.example\"\n"
          % (TOKEN_LINE, OTHER_HASH))
    return book_of(tmp_path)


@pytest.mark.parametrize("headers", [
    {"authorization": "Bearer " + TOKEN}, {"authorization": "bearer  %s " % TOKEN},
    {"x-api-key": TOKEN}, {"x-api-key": TOKEN, "authorization": "Bearer " + TOKEN}])
def test_a_token_comes_in_one_of_two_headers(lab, headers):
    caller = access_of(lab).recognise(headers, HOST, False)
    assert (caller.tenant.name, caller.identity) == ("ada", "token")


@pytest.mark.parametrize("headers", [
    {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer "},
    {"authorization": TOKEN}, {"authorization": "Basic " + TOKEN}, {"x-api-key": ""},
    {"authorization": "Bearer " + TOKEN, "x-api-key": OTHER},
    {"authorization": "Bearer " + OTHER, "x-api-key": ""}, {"x-api-key": TOKEN + "\udcff"},
    {"authorization": "Bearer %s,%s" % (TOKEN, TOKEN)}, bearer(TOKEN[:-1]), bearer(TOKEN + "x"),
    bearer(TOKEN.upper()), bearer(HASH), bearer("sk-" + "0" * 40), bearer("a.b.c"),
    bearer("\xe9" * 50)])
def test_bad_credentials_are_refused_and_never_looked_past(lab, headers):
    """The address is the gateway's, and the tailnet would say ada."""
    access = access_of(lab, gateway=[HOST[0]],
                       whois=lambda host, port: pytest.fail("nobody asked for this"))
    problem = refused(access, headers, on_tailnet=True)
    assert problem.status == 401 and problem.hint
    assert TOKEN not in problem.what + problem.hint


def test_who_brings_nothing_is_told_what_is_wanted(lab):
    problem = refused(access_of(lab), {})
    assert (problem.status, problem.code) == (401, "no_token")
    assert problem.challenge.startswith("Bearer ")


def test_of_two_tokens_the_old_one_counts_until_its_time(tmp_path):
    for until, counts in (("", True), ("2999-01-01T00:00:00Z", True), ("2020-01-01T00:00:00Z", False)):
        write(tmp_path, one_entry("token_sha256: [%s, %s]" % (HASH, OTHER_HASH), *(
            ["old_token_until: \"%s\"" % until] if until else [])))
        access = access_of(book_of(tmp_path))
        assert asked(access, bearer(TOKEN)).tenant.name == "ada"
        if counts:
            assert asked(access, bearer(OTHER)).tenant.name == "ada"
        else:
            assert refused(access, bearer(OTHER)).status == 401


def test_guesses_of_an_address_are_slowed_down_and_a_right_token_is_not(lab):
    clock, log = Clock(), Lines()
    access = access_of(lab, clock=clock, log=log)
    for number in range(10):
        assert refused(access, bearer("guess%d" % number)).status == 401
        clock.now += 1.0
    for _ in range(50):
        problem = refused(access, bearer("guess"))
        assert (problem.status, problem.code, problem.retry_after_s) == (429, "too_many_failures", 51)
    assert refused(access, {"authorization": "Basic x"}).status == 429
    assert asked(access, bearer(TOKEN)).tenant.name == "ada"
    assert refused(access, bearer("guess"), ("192.0.2.8", 1)).status == 401, "another address"
    assert refused(access, {}).status == 401, "no token is no guess"
    assert log.events() == ["bad_tokens"]
    clock.now += 51.0
    assert refused(access, bearer("guess")).status == 401


def test_an_ipv6_customer_is_one_address_and_a_mapped_one_is_its_ipv4(lab):
    access = access_of(lab)
    for number in range(10):
        refused(access, bearer("guess"), ("2001:db8:1:2::%x" % number, 1, 0, 0))
        refused(access, bearer("guess"), ("::ffff:198.51.100.%d" % number, 1, 0, 0))
    assert refused(access, bearer("guess"), ("2001:db8:1:2:ffff::1", 1, 0, 0)).status == 429
    assert refused(access, bearer("guess"), ("2001:db8:1:3::1", 1, 0, 0)).status == 401
    assert refused(access, bearer("guess"), ("::ffff:198.51.100.77", 1, 0, 0)).status == 401
    for _ in range(9):
        refused(access, bearer("guess"), ("198.51.100.1", 1))
    assert refused(access, bearer("guess"), ("::ffff:198.51.100.1", 1, 0, 0)).status == 429


def test_what_is_remembered_of_addresses_is_bounded(lab):
    access = access_of(lab, whois=lambda host, port: None)
    for number in range(b9agent.ACCESS_KEPT + 500):
        host = "10.%d.%d.1" % divmod(number, 256)
        refused(access, bearer("guess"), (host, 1))
        refused(access, {}, (host, 1), True)
    assert len(access._failures._items) == len(access._known._items) == b9agent.ACCESS_KEPT


# -- the tailnet ---------------------------------------------------------

class Tailscale:
    def __init__(self, **known):
        self.known, self.asked = known, []

    def __call__(self, host, port):
        self.asked.append((host, port))
        return self.known.get(host.replace(".", "_"))


def test_who_tailscale_names_is_a_tenant_and_is_asked_for_once_a_minute(lab):
    clock, tailscale = Clock(), Tailscale(_100_64_0_1=WhoIs("Ada@Example.com", (), "laptop"))
    tailscale.known = {"100_64_0_1": tailscale.known["_100_64_0_1"]}
    access, peer = access_of(lab, whois=tailscale, clock=clock), ("100.64.0.1", 9)
    assert access.recognise({}, peer, True) is None
    caller = access.identify({}, peer, True)
    assert (caller.tenant.name, caller.identity) == ("ada", "tailnet:ada@example.com")
    clock.now += 59.0
    assert access.recognise({}, ("100.64.0.1", 10), True) == caller
    clock.now += 2.0
    assert access.recognise({}, peer, True) is None
    assert tailscale.asked == [peer]


@pytest.mark.parametrize("who, name", [
    (WhoIs("ada@example.com", ("tag:ci",), "n"), "ada"), (WhoIs("x@lab.example", (), "n"), "bob"),
    (WhoIs("X@LAB.example", (), "n"), "bob"), (WhoIs("x@lab.example", ("tag:other",), "n"), None),
    (WhoIs("ada@example.com", ("tag:other",), "n"), None), (WhoIs("eve@example.com", (), "n"), None),
    (WhoIs("tag:ci", (), "n"), None), (WhoIs("x@lab.example.evil.com", (), "n"), None),
    (WhoIs("", (), "n"), None), (WhoIs("*@lab.example", (), "n"), "bob"),
    (WhoIs("eve@x\x1b[2J", (), "n"), None)])
def test_of_a_node_with_tags_only_they_count_never_who_tagged_it(lab, who, name):
    access = access_of(lab, whois=lambda host, port: who)
    if name:
        assert asked(access, {}, ("100.64.0.1", 9), True).tenant.name == name
    else:
        problem = refused(access, {}, ("100.64.0.1", 9), True)
        assert (problem.status, problem.code) == (403, "no_tenant")
        assert "\x1b" not in problem.what


def test_whom_tailscale_does_not_know_is_asked_for_again_after_five_seconds(lab):
    clock, tailscale = Clock(), Tailscale()
    access, peer = access_of(lab, whois=tailscale, clock=clock), ("100.64.0.1", 9)
    for _ in range(3):
        assert refused(access, {}, peer, True).status == 401
    assert len(tailscale.asked) == 1
    clock.now += 5.0
    refused(access, {}, peer, True)
    assert len(tailscale.asked) == 2


def test_tailscale_is_not_asked_off_the_tailnet_nor_where_no_tenant_is_of_it(lab, tmp_path):
    tailscale = Tailscale()
    refused(access_of(lab, whois=tailscale), {}, ("100.64.0.1", 9), False)
    write(tmp_path, one_entry(TOKEN_LINE))
    refused(access_of(book_of(tmp_path), whois=tailscale), {}, ("100.64.0.1", 9), True)
    assert tailscale.asked == []


# -- OpenID --------------------------------------------------------------

WALL = 1900000000.0
ISSUER, AUDIENCE = "https://id.example/", "b9agent"


def b64(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Key:
    """An RSA key of openssl's."""

    def __init__(self, folder, name, bits=2048, e=65537):
        self.name, self.path, self.e = name, str(folder / name), e
        self.openssl("genpkey", "-quiet", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:%d" % bits,
                     "-pkeyopt", "rsa_keygen_pubexp:%d" % e, "-out", self.path)
        shown = self.openssl("rsa", "-in", self.path, "-noout", "-modulus")
        self.n = int(shown.decode().strip().partition("=")[2], 16)
        self.size = (self.n.bit_length() + 7) // 8

    @staticmethod
    def openssl(*arguments, stdin=b""):
        done = subprocess.run(["openssl", *arguments], input=stdin, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def public_pem(self):
        return self.openssl("rsa", "-in", self.path, "-pubout")

    def sign(self, signed, digest="sha256"):
        return self.openssl("dgst", "-" + digest, "-sign", self.path, stdin=signed)

    def raw(self, block):
        """A signature that opens to this block."""
        return self.openssl("pkeyutl", "-decrypt", "-inkey", self.path, "-pkeyopt",
                            "rsa_padding_mode:none", stdin=block.rjust(self.size, b"\0"))

    def jwk(self, **more):
        return dict({"kty": "RSA", "kid": self.name, "use": "sig", "alg": "RS256",
                     "n": b64(self.n.to_bytes(self.size, "big")),
                     "e": b64(self.e.to_bytes((self.e.bit_length() + 7) // 8, "big"))}, **more)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: Key(folder, name, bits, e) for name, bits, e in (
        ("one", 2048, 65537), ("two", 3072, 65537), ("cube", 2048, 3), ("weak", 1024, 65537))}


@pytest.fixture
def jwks(tmp_path, keys):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [key.jwk() for key in keys.values()]}))
    return path


def claims(**changed):
    found = dict({"iss": ISSUER, "aud": AUDIENCE, "sub": "ada-7", "exp": WALL + 600, "iat": WALL,
                  "nbf": WALL}, **changed)
    return {name: value for name, value in found.items() if value is not None}


def unsigned(body=None, **header):
    header = {name: value for name, value in dict({"alg": "RS256", "typ": "JWT", "kid": "one"},
                                                  **header).items() if value is not None}
    return "%s.%s" % (b64(json.dumps(header).encode()),
                      b64(json.dumps(claims() if body is None else body).encode()))


def signed(key, body=None, **header):
    text = unsigned(body, **dict({"kid": key.name}, **header))
    return "%s.%s" % (text, b64(key.sign(text.encode())))


def oidc_of(jwks, clock=None, wall=None, log=None):
    return Oidc(ISSUER, AUDIENCE, str(jwks), log if log is not None else Lines(), clock or Clock(),
                wall or Clock(WALL))


@pytest.fixture
def sso(lab, jwks):
    return access_of(lab, oidc_of(jwks))


def test_a_token_that_openssl_signed_is_taken_and_then_known_without_waiting(sso, keys):
    for key in (keys["one"], keys["two"], keys["cube"]):
        token = signed(key)
        assert sso.recognise(bearer(token), HOST, False) is None
        caller = sso.identify(bearer(token), HOST, False)
        assert (caller.tenant.name, caller.identity) == ("ada", "oidc:ada-7")
        assert sso.recognise(bearer(token), HOST, False) == caller


@pytest.mark.parametrize("changed", [
    {"aud": [AUDIENCE, "other"]}, {"exp": WALL + 0.5}, {"nbf": WALL + 59, "iat": WALL + 59},
    {"nbf": None, "iat": None},
    {"sub": "x", "email": "boss@example.com", "email_verified": True}, {"sub": "x", "groups": ["ml"]},
    {"sub": "x", "groups": [7, None, {}, "ml"]}])
def test_what_a_good_token_may_say(sso, keys, changed):
    assert asked(sso, bearer(signed(keys["one"], claims(**changed)))).tenant.name == "ada"


@pytest.mark.parametrize("changed, why", [
    ({"iss": "https://id.example"}, "issuer"), ({"iss": None}, "issuer"), ({"aud": "other"}, "audience"),
    ({"aud": None}, "audience"), ({"aud": []}, "audience"), ({"aud": {AUDIENCE: 1}}, "audience"),
    ({"aud": AUDIENCE + "2"}, "audience"), ({"exp": None}, "times"), ({"exp": WALL}, "expired"),
    ({"exp": WALL - 30}, "expired"), ({"exp": str(WALL + 600)}, "times"), ({"exp": True}, "times"),
    ({"exp": -1}, "times"), ({"exp": 10**30}, "times"), ({"nbf": WALL + 61}, "not valid yet"),
    ({"iat": WALL + 61}, "not valid yet"), ({"nbf": "x"}, "times"), ({"sub": None}, "nobody"),
    ({"sub": ""}, "nobody"), ({"sub": 7}, "nobody"), ({"sub": "group:ml"}, "nobody"),
    ({"sub": "x" * 256}, "nobody")])
def test_what_a_token_may_not_say_well_signed_though_it_is(sso, keys, changed, why):
    problem = refused(sso, bearer(signed(keys["one"], claims(**changed))))
    assert problem.status == 401 and why in problem.what


@pytest.mark.parametrize("changed", [
    {"sub": "x"}, {"sub": "x", "email": "boss@example.com"},
    {"sub": "x", "email": "boss@example.com", "email_verified": "true"},
    {"sub": "x", "email": "boss@example.com", "email_verified": 1}, {"sub": "x", "groups": "ml"},
    {"sub": "x", "groups": ["group:ml"]}, {"sub": "ml"}, {"sub": "x", "group": "ml"},
    {"sub": "x", "email": "group:ml", "email_verified": True}])
def test_who_is_signed_for_and_no_tenant_is_403(sso, keys, changed):
    problem = refused(sso, bearer(signed(keys["one"], claims(**changed))))
    assert (problem.status, problem.code) == (403, "no_tenant")


def hs256(secret, **header):
    text = unsigned(**dict({"alg": "HS256"}, **header))
    return "%s.%s" % (text, b64(hmac.new(secret, text.encode(), hashlib.sha256).digest()))


def resigned(key, head, body):
    text = "%s.%s" % (b64(head), b64(body))
    return "%s.%s" % (text, b64(key.sign(text.encode())))


def plus_n(keys):
    """A second signature of the same size, where s + n is none the longer for it."""
    for key in keys:
        for number in range(20):
            text = unsigned(claims(jti=number), kid=key.name)
            other = int.from_bytes(key.sign(text.encode()), "big") + key.n
            if other.bit_length() <= 8 * key.size and key.name != "weak":
                return "%s.%s" % (text, b64(other.to_bytes(key.size, "big")))
    raise AssertionError("no such signature was found")


def left_over(token):
    """The same bytes to a lax decoder: a bit that stands for nothing is set."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    changed = token[:-1] + alphabet[alphabet.index(token[-1]) + 1]
    assert base64.urlsafe_b64decode(changed.split(".")[2] + "==") == base64.urlsafe_b64decode(
        token.split(".")[2] + "==")
    return changed


HEAD, BODY = b'{"alg":"RS256","kid":"one"}', json.dumps(claims()).encode()
FORGED = {
    "alg none": lambda keys: unsigned(alg="none") + ".",
    "alg none with a signature": lambda keys: signed(keys["one"], alg="none"),
    "alg in small letters": lambda keys: signed(keys["one"], alg="rs256"),
    "alg missing": lambda keys: signed(keys["one"], alg=None),
    "alg a list": lambda keys: signed(keys["one"], alg=["RS256"]),
    "HS256 with the public key": lambda keys: hs256(keys["one"].public_pem()),
    "HS256 with the public key, called RS256": lambda keys: hs256(keys["one"].public_pem(),
                                                                  alg="RS256"),
    "HS256 with the modulus": lambda keys: hs256(keys["one"].n.to_bytes(256, "big"), alg="RS256"),
    "RS512": lambda keys: signed(keys["one"], alg="RS512"),
    "signed with SHA-512": lambda keys: "%s.%s" % (unsigned(), b64(keys["one"].sign(
        unsigned().encode(), "sha512"))),
    "no signature": lambda keys: unsigned() + ".",
    "another key": lambda keys: signed(keys["two"], kid="one"),
    "kid of another": lambda keys: signed(keys["one"], kid="two"),
    "no kid": lambda keys: signed(keys["one"], kid=None),
    "kid unknown": lambda keys: signed(keys["one"], kid="../../dev/null"),
    "kid a list": lambda keys: signed(keys["one"], kid=["one"]),
    "a weak key": lambda keys: signed(keys["weak"]),
    "crit": lambda keys: signed(keys["one"], crit=["exp"]),
    "crit with b64": lambda keys: signed(keys["one"], crit=["b64"], b64=False),
    "key in its own head": lambda keys: signed(keys["two"], kid="none", jwk=keys["two"].jwk(),
                                               jku="http://127.0.0.1/"),
    "signature too short": lambda keys: signed(keys["one"])[:-4],
    "signature with a byte more": lambda keys: "%s.%s" % (unsigned(), b64(
        b"\0" + keys["one"].sign(unsigned().encode()))),
    "signature of zeros": lambda keys: unsigned() + "." + b64(b"\0" * 256),
    "signature 1, for e=3": lambda keys: unsigned(kid="cube") + "." + b64(b"\0" * 255 + b"\1"),
    "signature plus n": lambda keys: plus_n(keys.values()),
    "padding": lambda keys: signed(keys["one"]) + "==",
    "a line break": lambda keys: signed(keys["one"]).replace(".", ".\n", 1),
    "standard alphabet": lambda keys: signed(keys["one"])[:-1] + "+",
    "bits left over": lambda keys: left_over(signed(keys["one"])),
    "five parts": lambda keys: signed(keys["one"]) + ".x.y",
    "two parts": lambda keys: unsigned(),
    "empty": lambda keys: "..",
    "a name twice in the head": lambda keys: resigned(
        keys["one"], b'{"alg":"none","alg":"RS256","kid":"one"}', BODY),
    "a name twice in the body": lambda keys: resigned(
        keys["one"], HEAD, BODY[:-1] + b',"sub":"ada-7"}'),
    "bytes after the body": lambda keys: resigned(keys["one"], HEAD, BODY + b"{}"),
    "a body that is a list": lambda keys: resigned(keys["one"], HEAD, b"[" + BODY + b"]"),
    "a head that is a list": lambda keys: resigned(keys["one"], b"[" + HEAD + b"]", BODY),
    "NaN": lambda keys: resigned(keys["one"], HEAD, BODY.replace(b'"exp": 1900000600.0',
                                                                 b'"exp": NaN')),
    "infinite": lambda keys: resigned(keys["one"], HEAD, BODY.replace(b"1900000600.0", b"1e999")),
    "nested for ever": lambda keys: resigned(keys["one"], HEAD, b"[" * 5000 + b"]" * 5000),
    "not UTF-8": lambda keys: resigned(keys["one"], HEAD, BODY[:-1] + b',"x":"\xff"}'),
    "too long": lambda keys: signed(keys["one"], claims(x="x" * 20000)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_token_is_refused(sso, keys, name):
    token = FORGED[name](keys)
    problem = refused(sso, bearer(token))
    assert problem.status == 401
    assert problem.code in ("bad_token", "bad_credentials")
    assert token not in problem.what + problem.hint


SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


@pytest.mark.parametrize("name, block", [
    ("short padding, rubbish at the end",
     lambda size, end: b"\0\1" + b"\xff" * 8 + end + b"\x55" * (size - 10 - len(end))),
    ("zeros at the end", lambda size, end: b"\0\1" + b"\xff" * 100 + end + b"\0" * (size - 102 - len(end))),
    ("block type 2", lambda size, end: b"\0\2" + b"\xff" * (size - 2 - len(end)) + end),
    ("padding with a hole", lambda size, end: b"\0\1\xff\xfe" + b"\xff" * (size - 4 - len(end)) + end),
    ("no NULL in the algorithm", lambda size, end: b"\0\1" + b"\xff" * (size - 2 - len(end) + 2)
     + b"\0" + bytes.fromhex("302f300b0609608648016503040201") + end[-34:]),
    ("rubbish in the algorithm", lambda size, end: b"\0\1" + b"\xff" * (size - 2 - len(end) - 8) + b"\0"
     + bytes.fromhex("3039301506096086480165030402010508") + b"\x55" * 8 + end[-34:]),
    ("no DigestInfo at all", lambda size, end: b"\0\1" + b"\xff" * (size - 35) + b"\0" + end[-32:]),
])
def test_a_block_that_is_not_exactly_as_it_must_be_is_refused(sso, keys, name, block):
    """Signed by the true key: what parses the block instead of comparing it takes some of these,
    and with e=3 such signatures can be made without the key."""
    for key in (keys["one"], keys["cube"]):
        text = unsigned(kid=key.name)
        end = b"\0" + SHA256_INFO + hashlib.sha256(text.encode()).digest()
        good = b"\0\1" + b"\xff" * (key.size - 2 - len(end)) + end
        assert asked(sso, bearer("%s.%s" % (text, b64(key.raw(good)))), ("10.0.0.9", 1))
        text = unsigned(claims(jti=name), kid=key.name)
        end = b"\0" + SHA256_INFO + hashlib.sha256(text.encode()).digest()
        made = block(key.size, end)
        assert len(made) == key.size
        assert "signature" in refused(sso, bearer("%s.%s" % (text, b64(key.raw(made))))).what


def test_a_cube_root_forges_nothing(sso, keys):
    """Bleichenbacher's: with e=3 a number whose cube begins as the block does."""
    key, text = keys["cube"], unsigned(kid="cube")
    end = b"\0" + SHA256_INFO + hashlib.sha256(text.encode()).digest()
    start = b"\0\1" + b"\xff" * 8 + end
    high = int.from_bytes(start + b"\xff" * (key.size - len(start)), "big")
    root, bit = 0, 1 << 700
    while bit:
        if (root | bit) ** 3 <= high:
            root |= bit
        bit >>= 1
    cube = (root ** 3).to_bytes(key.size, "big")
    assert cube.startswith(start), "it would be taken by who reads it from the left"
    assert "signature" in refused(sso, bearer("%s.%s" % (text, b64(root.to_bytes(key.size, "big"))))
                                  ).what


def test_a_verified_token_ends_with_its_time(lab, jwks, keys):
    wall = Clock(WALL)
    access = access_of(lab, oidc_of(jwks, wall=wall))
    token = signed(keys["one"], claims(exp=WALL + 30))
    asked(access, bearer(token))
    wall.now += 29.0
    assert access.recognise(bearer(token), HOST, False)
    wall.now += 1.0
    assert "expired" in refused(access, bearer(token)).what


def test_keys_in_a_file_are_read_again_when_it_changes(lab, jwks, keys):
    clock, log = Clock(), Lines()
    access = access_of(lab, oidc_of(jwks, clock, log=log))
    token, other = signed(keys["one"]), signed(keys["two"])
    asked(access, bearer(token))
    jwks.write_text(json.dumps({"keys": [keys["two"].jwk()]}))
    clock.now += 61.0
    assert asked(access, bearer(other)).tenant.name == "ada"
    assert refused(access, bearer(token)).status == 401, "its key is gone, though it was verified"
    jwks.write_text("rubbish")
    clock.now += 61.0
    assert asked(access, bearer(other)).tenant.name == "ada", "the old keys go on"
    assert log.events() == ["oidc_keys"]


def test_a_key_that_nobody_can_rely_on_is_left_out(keys):
    one = keys["one"]
    for bad in (one.jwk(kty="EC"), one.jwk(use="enc"), one.jwk(alg="RS512"), one.jwk(kid=None),
                one.jwk(n="!"), one.jwk(n=one.jwk()["n"] + "="), one.jwk(e=b64(b"\1")),
                one.jwk(e=b64(b"\4")), one.jwk(e=b64(b"\2\0\0\0\1")), one.jwk(n=None),
                one.jwk(n=b64((one.n - 1).to_bytes(256, "big"))), keys["weak"].jwk(), "x", None):
        with pytest.raises(ValueError):
            b9agent.keys_of(json.dumps({"keys": [bad]}).encode())
        assert set(b9agent.keys_of(json.dumps({"keys": [bad, keys["two"].jwk()]}).encode())) == {"two"}
    for text in ("", "[]", "{}", '{"keys": {}}', '{"keys": [], "keys": []}', "\xff"):
        with pytest.raises(ValueError):
            b9agent.keys_of(text.encode("latin-1"))
    with pytest.raises(ValueError):
        b9agent.keys_of(json.dumps({"keys": [one.jwk(), keys["two"].jwk(kid="one")]}).encode())
    assert b9agent.keys_of(json.dumps({"keys": [one.jwk(use=None, alg=None, x5t="x")]}).replace(
        '"use": null, "alg": null, ', "").encode()) == {"one": (one.n, 65537)}


class KeyServer:
    """A JWKS on loopback: answer is (status, body); it counts who asks."""

    def __init__(self, answer):
        self.answer, self.asked = answer, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += 1
                outer.path = self.path
                status, body = outer.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d/keys?x=1" % self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_keys_of_a_url_are_fetched_rarely_and_old_ones_go_on_without_it(lab, keys):
    clock, log = Clock(), Lines()
    document = json.dumps({"keys": [keys["one"].jwk()]}).encode()
    with KeyServer((500, b"")) as server:
        access = access_of(lab, oidc_of(server.url, clock, log=log), clock=clock)
        token, other = signed(keys["one"]), signed(keys["two"])
        for _ in range(3):
            assert "not known" in refused(access, bearer(token)).what
        assert server.asked == 1, "once a minute, whatever comes"
        server.answer = (200, document)
        clock.now += 60.0
        asked(access, bearer(token))
        assert (server.asked, server.path) == (2, "/keys?x=1")
        for _ in range(5):
            refused(access, bearer(other))
        assert server.asked == 2
        server.answer = (200, json.dumps({"keys": [keys["one"].jwk(), keys["two"].jwk()]}).encode())
        clock.now += 60.0
        assert asked(access, bearer(other)), "a new key is found within a minute"
        assert server.asked == 3
        clock.now += 3599.0
        assert access.recognise(bearer(token), HOST, False) is None or server.asked == 3
        server.answer = (302, b"")
        clock.now += 2.0
        assert access.recognise(bearer(token), HOST, False) is None, "its key may be gone by now"
        assert asked(access, bearer(token)), "the old keys go on"
        assert server.asked == 4
        assert access.recognise(bearer(token), HOST, False)
        server.answer = (200, json.dumps({"keys": [keys["cube"].jwk()]}).encode())
        clock.now += 3600.0
        last = signed(keys["cube"])
        assert asked(access, bearer(last))
        server.answer = (200, document)
        clock.now += 60.0
        assert asked(access, bearer(token))
        assert access.recognise(bearer(last), HOST, False) is None, "its key is not there any more"
    assert log.events("bad_tokens") == ["oidc_keys"] * 2


def test_keys_are_fetched_once_for_all_who_wait(lab, keys):
    gate = threading.Event()
    document = json.dumps({"keys": [keys["one"].jwk()]}).encode()

    class Slow(KeyServer):
        @property
        def answer(self):
            gate.wait(20)
            return 200, document

        @answer.setter
        def answer(self, _):
            pass
    token, found = signed(keys["one"]), []
    with Slow(None) as server:
        access = access_of(lab, oidc_of(server.url))
        threads = [threading.Thread(target=lambda: found.append(access.identify(
            bearer(token), HOST, False).tenant.name)) for _ in range(5)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
        assert server.asked == 1 and found == ["ada"] * 5


@pytest.mark.parametrize("place", ["http://id.example/keys", "ftp://127.0.0.1/", "https://", "http://x",
                                   "https://user@id.example/", "http://127.0.0.1.evil.example/"])
def test_keys_come_from_nowhere_else(place):
    with pytest.raises(UsageError, match="jwks"):
        oidc_of(place)


def test_a_tenants_own_token_is_looked_for_first(lab, keys):
    class Forbidden:
        def known(self, digest):
            pytest.fail("no JWT")
    assert asked(access_of(lab, Forbidden()), bearer(TOKEN)).tenant.name == "ada"
    assert refused(access_of(lab, Forbidden()), bearer("nothing")).status == 401


# -- the commands --------------------------------------------------------

@pytest.fixture
def tenant(state, capsys):
    """tenant(*arguments) does what `b9agent.py tenant …` does, in this process."""
    def run(*arguments):
        capsys.readouterr()
        code = b9agent.exit_code_of(["tenant", *arguments, "--state-dir", str(state)])
        return Finished(int(code), *capsys.readouterr())
    return run


def shown_token(done):
    assert done.code == 0, done
    assert re.fullmatch("b9-[A-Za-z0-9_-]{43}\n", done.out), "the token alone, for a shell to keep"
    return done.out.strip()


def test_a_tenants_life(home, tenant, state):
    token = shown_token(tenant("add", "ada", "--models", "llama*, qwen2.5", "--tokens-per-day", "1000",
                  "--tailnet=ada@example.com,tag:ci", "--admin", "--priority", "high"))
    path = state / "tenants.yaml"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert yaml.safe_load(path.read_text()) == {"tenants": [{
        "name": "ada", "token_sha256": [token_hash(token)], "models": ["llama*", "qwen2.5"],
        "admin": True, "priority": "high", "tailnet": ["ada@example.com", "tag:ci"],
        "tokens_per_day": 1000}]}
    ada, = load_tenants(str(path), False)
    assert ada.models == ("llama*", "qwen2.5:latest") and ada.limits.tokens_per_day == 1000
    second = tenant("rotate", "ada", "--overlap", "2").out.strip()
    ada, = load_tenants(str(path), False)
    assert ada.token_sha256 == (token_hash(second), token_hash(token))
    until_s = calendar.timegm(time.strptime(ada.old_token_until, "%Y-%m-%dT%H:%M:%SZ"))
    assert abs(until_s - time.time() - 7200) < 60
    done = run_agent(home, "tenant", "rotate", "ada", "--overlap", "1.5")
    assert "the one before that ends now" in done.err
    third = done.out.strip()
    ada, = load_tenants(str(path), False)
    assert ada.token_sha256 == (token_hash(third), token_hash(second))
    last = tenant("rotate", "ada").out.strip()
    ada, = load_tenants(str(path), False)
    assert (ada.token_sha256, ada.old_token_until) == ((token_hash(last),), "")
    assert tenant("remove", "ada").code == 0
    assert load_tenants(str(path), False) == (), "and the default tenant does not come back"
    assert yaml.safe_load(path.read_text()) == {"tenants": []}
    kept = b"".join(entry.read_bytes() for entry in state.rglob("*") if entry.is_file())
    for secret in (token, second, third, last):
        assert secret.encode() not in kept
    assert sorted(entry.name for entry in state.iterdir()) == ["tenants.yaml"]


def test_what_is_said_stands_on_the_error_stream_without_the_token(home, tenant):
    done = run_agent(home, "tenant", "add", "ada")
    token = done.out.strip()
    assert token not in done.err and "ada is added" in done.err and "shown this once" in done.err
    assert "inference.token does not count any more" in done.err
    assert "inference.token" not in tenant("add", "bob").err
    done = tenant("remove", "ada")
    assert done.out == "" and "is removed" in done.err


def test_who_needs_no_token_gets_none(tenant, state):
    done = tenant("add", "gateway", "--models", "llama*")
    assert (done.code, done.out) == (0, "")
    done = tenant("add", "ada", "--no-token", "--oidc", "group:ML team,auth0|7")
    assert (done.code, done.out) == (0, "")
    gateway, ada = load_tenants(str(state / "tenants.yaml"), False)
    assert ada.oidc == ("group:ML team", "auth0|7") and ada.token_sha256 == ()
    assert "known by its address" in tenant("rotate", "gateway").err
    assert token_hash(tenant("rotate", "ada").out.strip()) == load_tenants(
        str(state / "tenants.yaml"), False)[1].token_sha256[0]


@pytest.mark.parametrize("arguments, expected", [
    (["add"], "needs a NAME"), (["add", "a b"], "expected at most 63 letters"),
    (["add", "default"], "expected another name"), (["add", "bob"], "is that of tenant `bob` too"),
    (["add", "x", "--models", "a b"], "--models: `a b` cannot be used"),
    (["add", "x", "--models", "a,,b"], "--models: `` cannot be used"),
    (["add", "x", "--tokens-per-day", "many"], "--tokens-per-day: `many` cannot be used, expected a"),
    (["add", "x", "--tailnet", "*"], "alone would let in"), (["add", "x", "--admin=yes"], "no value"),
    (["add", "x", "--no-token"], "nobody could be this tenant"),
    (["add", "x", "--usd-per-day", "5"], "without a price"), (["add", "gateway", "--admin"], "address"),
    (["add", "x", "--token-sha256", "y"], "unknown flag"), (["rotate", "eve"], "Those there: bob"),
    (["remove", "eve"], "there is no tenant `eve`"), (["rotate", "bob", "--overlap", "x"], "hours"),
    (["remove", "Bob"], "there is no tenant `Bob`"), (["list", "bob"], "takes no word, and `bob` is more"),
    (["lst"], "tenant list")])
def test_a_command_that_cannot_be_done_says_why_and_changes_nothing(tenant, state, arguments, expected):
    state.mkdir(mode=0o700)
    write(state, "tenants:\n  - name: bob\n    token_sha256: %s\n" % HASH)
    before = (state / "tenants.yaml").read_bytes()
    done = tenant(*arguments)
    assert done.code == 2 and done.out == "" and expected in done.err
    assert (state / "tenants.yaml").read_bytes() == before
    assert sorted(entry.name for entry in state.iterdir()) == ["tenants.yaml"]


def test_the_list_shows_what_was_used_today_and_no_hashes(tenant, state):
    shown_token(tenant("add", "ada", "--tokens-per-day", "1000"))
    day = int(time.time() // 86400)
    used = {"requests": 3, "prompt_tokens": 40, "completion_tokens": 2, "gpu_seconds": 1.25, "usd": 0.5}
    (state / "usage.json").write_text(json.dumps({"day": day, "tenants": {"ada": used}}))
    shown = tenant("list").out
    assert re.search(r"ada +\* +no +normal +3 +42 +1\.2 +0\.50 +tokens_per_day=1000", shown)
    record = json.loads(tenant("list", "--json").out)["tenants"]
    assert record[0]["today"] == used and record[0]["tokens"] == 1
    assert not re.search("[0-9a-f]{64}", shown + json.dumps(record))
    (state / "usage.json").write_text(json.dumps({"day": day - 1, "tenants": {"ada": used}}))
    assert json.loads(tenant("list", "--json").out)["tenants"][0]["today"]["requests"] == 0


def test_the_list_of_a_machine_without_tenants_is_the_default_one(tenant, state):
    done = tenant("list")
    assert done.code == 0 and re.search(r"default +\* +yes", done.out)
    assert not state.exists()


def test_commands_at_once_lose_nothing(home, state):
    programs = [Program(agent_command("tenant", "add", "t%d" % number), environment(home))
                for number in range(6)]
    assert [program.wait() for program in programs] == [0] * 6
    assert sorted(one.name for one in load_tenants(str(state / "tenants.yaml"), False)) == [
        "t%d" % number for number in range(6)]


BY_HAND = """\
# Who may use the models here.  Ask Zoe before you change this.

tenants:      # newest last

  # the lab
  - name: ada   # of the lab
    token_sha256: %s  # since May
    models:
      - llama*      # small
      - qwen*

  # ci, without a token
  -
    name: ci
    tailnet: ["tag:ci"]   # all runners

  - token_sha256:
    - "%s"
    - "%s"
    old_token_until: "2999-01-01T00:00:00Z"   # then out
    name: old
# the end
""" % (HASH, OTHER_HASH, "c" * 64)


def by_hand(folder, text=BY_HAND):
    return b9agent.TenantText(write(folder, text), False)


def test_an_entry_is_added_after_the_last_and_all_else_stays(tmp_path):
    text = by_hand(tmp_path)
    text.add({"name": "new", "models": ["a*"], "token_sha256": ["d0" * 32]})
    text.save("new", ["d0" * 32])
    assert (tmp_path / "tenants.yaml").read_text() == BY_HAND.replace("# the end", (
        '  - name: new\n    models: ["a*"]\n    token_sha256: ["%s"]\n# the end' % ("d0" * 32)))


def test_an_entry_is_removed_and_all_else_stays(tmp_path):
    for name, gone in (("ada", BY_HAND[BY_HAND.index("  - name: ada"):BY_HAND.index("\n  # ci") ]),
                       ("ci", BY_HAND[BY_HAND.index("  -\n"):BY_HAND.index("\n  - token")]),
                       ("old", BY_HAND[BY_HAND.index("  - token"):BY_HAND.index("# the end")])):
        text = by_hand(tmp_path)
        text.remove(name)
        text.save(name, None)
        assert (tmp_path / "tenants.yaml").read_text() == BY_HAND.replace(gone, "")


def test_a_token_is_changed_where_it_stands_and_all_else_stays(tmp_path):
    new = {"token_sha256": ["e0" * 32]}
    for name, before, after in (
            ("ada", "token_sha256: " + HASH, 'token_sha256: ["%s"]' % ("e0" * 32)),
            ("ci", "# all runners\n", '# all runners\n    token_sha256: ["%s"]\n' % ("e0" * 32)),
            ("old", BY_HAND[BY_HAND.index("token_sha256:\n"):BY_HAND.index("    name: old")],
             'token_sha256: ["%s"]\n    # then out\n' % ("e0" * 32))):
        text = by_hand(tmp_path)
        text.set_token(name, new)
        text.save(name, new["token_sha256"])
        assert (tmp_path / "tenants.yaml").read_text() == BY_HAND.replace(before, after)


def test_a_new_token_takes_no_comment_away(tmp_path):
    text = by_hand(tmp_path, """tenants:
  - name: ada
    token_sha256:   # two laptops
      - %s   # the old one
      # ordered in May
      - %s   # the new one
    old_token_until: 2026-01-31T12:00:00Z   # agreed with ada
    models: "*"   # all
""" % (HASH, OTHER_HASH))
    text.set_token("ada", {"token_sha256": ["e0" * 32]})
    text.save("ada", ["e0" * 32])
    assert (tmp_path / "tenants.yaml").read_text() == """tenants:
  - name: ada
    token_sha256: ["%s"]   # two laptops
    # the old one
    # ordered in May
    # the new one
    # agreed with ada
    models: "*"   # all
""" % ("e0" * 32)


def test_a_comment_among_a_tenants_keys_comes_and_goes_with_it(tmp_path):
    ada = "  - name: ada\n    token_sha256: %s\n    # requests_per_minute: 5\n" % HASH
    text = by_hand(tmp_path, "tenants:\n" + ada + "# the end\n")
    text.add({"name": "bob", "token_sha256": ["d0" * 32]})
    text.save("bob", ["d0" * 32])
    bob = '  - name: bob\n    token_sha256: ["%s"]\n' % ("d0" * 32)
    assert (tmp_path / "tenants.yaml").read_text() == "tenants:\n" + ada + bob + "# the end\n"
    text = b9agent.TenantText(str(tmp_path / "tenants.yaml"), False)
    text.remove("ada")
    text.save("ada", None)
    assert (tmp_path / "tenants.yaml").read_text() == "tenants:\n" + bob + "# the end\n"


def test_a_file_is_not_made_larger_than_is_read_again(tmp_path):
    whole = one_entry(TOKEN_LINE) + "\n"
    whole += ("#" * 99 + "\n") * ((b9agent.CONFIG_MAX_BYTES - len(whole) - 20) // 100)
    text = by_hand(tmp_path, whole)
    text.add({"name": "new", "token_sha256": ["d0" * 32]})
    with pytest.raises(b9agent.UsageError) as caught:
        text.save("new", ["d0" * 32])
    assert "would have more than" in caught.value.what and "Nothing was changed" in caught.value.hint
    assert (tmp_path / "tenants.yaml").read_text() == whole


def test_a_token_that_nobody_saw_is_told_of(home, tenant):
    tenant("add", "ada")
    with open("/dev/full", "w") as full:
        done = subprocess.run(agent_command("tenant", "rotate", "ada"), env=environment(home), stdout=full,
                              stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 2 and "nobody has seen it: b9agent.py tenant rotate" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_token_is_changed_with_the_time_of_the_old_one(tmp_path):
    new = {"token_sha256": ["e0" * 32, HASH], "old_token_until": "2999-01-01T00:00:00Z"}
    for name in ("ada", "ci", "old"):
        text = by_hand(tmp_path, BY_HAND.replace(HASH, "f" * 64))
        text.set_token(name, new)
        text.save(name, new["token_sha256"])
        found = [one for one in load_tenants(str(tmp_path / "tenants.yaml"), False) if one.name == name]
        assert found[0].old_token_until == new["old_token_until"]


@pytest.mark.parametrize("text", [
    "tenants: []", "tenants: [ ]   # nobody\n", "tenants:\n", "tenants:   # nobody yet", "# x\n\ntenants:\n# y",
    "---\ntenants: []\n", "\"tenants\": []\n", "tenants: []\r\n", "\ufefftenants: []\n"])
def test_the_first_entry_goes_into_any_empty_list(tmp_path, text):
    found = by_hand(tmp_path, text)
    found.add({"name": "new", "token_sha256": ["d0" * 32]})
    found.save("new", ["d0" * 32])
    again = b9agent.TenantText(str(tmp_path / "tenants.yaml"), False)
    assert [one.name for one in again.tenants] == ["new"]
    for comment in re.findall("#.*", text):
        assert comment in (tmp_path / "tenants.yaml").read_text()
    again.remove("new")
    again.save("new", None)
    assert load_tenants(str(tmp_path / "tenants.yaml"), False) == ()


@pytest.mark.parametrize("text", [
    "tenants: [{name: ada, oidc: x}]\n", "tenants:\n  - {name: ada, oidc: x}\n"])
@pytest.mark.parametrize("arguments", [["add", "bob"], ["rotate", "ada"], ["remove", "ada"]])
def test_a_form_that_cannot_be_changed_by_lines_is_left_to_its_writer(tenant, state, text, arguments):
    state.mkdir(mode=0o700)
    path = write(state, text)
    done = tenant(*arguments)
    assert done.code == 2 and "change it by hand" in done.err and done.out == ""
    with open(path, encoding="utf-8") as handle:
        assert handle.read() == text


def test_a_file_that_is_broken_is_not_touched(tenant, state):
    state.mkdir(mode=0o700)
    for text, mode, expected in ((one_entry("x: y"), 0o600, "tenants.yaml:3"),
                                 (one_entry(TOKEN_LINE), 0o644, "chmod 600"),
                                 ("tenants: [\n", 0o600, "tenants.yaml:1"),
                                 ("\xff\n", 0o600, "expected")):
        write(state, text, mode)
        for arguments in (["add", "bob"], ["list"]):
            done = tenant(*arguments)
            assert done.code == 2 and expected in done.err, done
        assert (state / "tenants.yaml").read_text() == text


# -- what a newcomer tripped over ------------------------------------------

def test_a_request_that_never_fits_is_not_told_to_come_again(tmp_path):
    ledger = b9agent.Ledger(None, lambda *_args, **_pairs: None, None)
    tenant = b9agent.Tenant("t", limits=b9agent.Limits(tokens_per_day=100))
    with pytest.raises(b9agent.LimitReached) as never:
        ledger.reserve(tenant, 90, 11, 1)
    assert "Come again" not in never.value.hint and "send less" in never.value.hint
    grant = ledger.reserve(tenant, 50, 10, 1)
    with pytest.raises(b9agent.LimitReached) as later:
        ledger.reserve(tenant, 50, 10, 1)
    assert "Come again" in later.value.hint
    ledger.settle(grant, 1, 1)


@pytest.mark.parametrize("words, said", [
    (["add", "ada", "bob"], "takes one NAME, and `bob` is more"),
    (["add", "ada", "--admin", "yes"], "takes one NAME, and `yes` is more"),
    (["add", "ada", "--token", "of-my-own"], "--token is the machine's own")])
def test_a_slip_on_the_command_line_adds_nobody(state, words, said, capsys):
    assert b9agent.main(["tenant", *words, "--state-dir", str(state)]) == 2
    assert said in capsys.readouterr().err
    assert not (state / "tenants.yaml").exists()


def test_without_a_tenant_left_it_is_said_that_nobody_is_let_in(state, capsys):
    def tenant(*words):
        assert b9agent.main(["tenant", *words, "--state-dir", str(state)]) == 0
        return capsys.readouterr().err
    tenant("add", "ada"), tenant("add", "bob")
    assert "nobody else is touched" in tenant("remove", "ada")
    assert "nobody is let in now" in tenant("remove", "bob")
    assert "nobody is let in now" in tenant("list")
