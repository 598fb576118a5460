#!/usr/bin/env python3
"""Plays `ollama serve`: its routes, its model store on disk, its child processes and its manners.

    fake_ollama.py serve | --version          (and `runner`, which it starts itself, one per model)

Behaviour is copied from Ollama 0.33 as read and as run.  It honours OLLAMA_HOST, OLLAMA_MODELS,
OLLAMA_KEEP_ALIVE, OLLAMA_MAX_LOADED_MODELS, OLLAMA_MAX_QUEUE, OLLAMA_NUM_PARALLEL,
OLLAMA_CONTEXT_LENGTH, OLLAMA_NO_CLOUD and OLLAMA_NOPRUNE.  Its registry is built in (CATALOGUE).
What a test may set beside them:

    FAKE_OLLAMA_CATALOGUE     more names that can be pulled: "acme:1b other"
    FAKE_OLLAMA_LAYER_BYTES   size of a model's weights (200000)
    FAKE_OLLAMA_RATE          bytes per second of a pull (as fast as it goes)
    FAKE_OLLAMA_LOAD_S        how long a model loads (0)
    FAKE_OLLAMA_TOKENS        how many tokens an answer has (as many words as it says)
    FAKE_OLLAMA_TOKEN_S       time for each token (0)
    FAKE_OLLAMA_VERSION       0.33.0
    FAKE_OLLAMA_LEDGER        a file that gets a line of JSON for every generation: mark, path,
                              prompt and sent (tokens), and how it ended; and one for every load:
                              load (the model); both with when it began and the seconds it took
    FAKE_OLLAMA_FAULTS        "name" or "name=value", separated by commas:
        slow_start=S            the port is open, HTTP answers after S seconds
        crash_at_start[=N]      exit 1 before it listens (at its first N starts: counted in HOME)
        crash_while_serving=S   the process dies S seconds after it listens; runners are orphaned
        crash_on_generate       it dies after the first token of an answer; runners are orphaned
        ignore_sigterm          SIGTERM and SIGINT do nothing
        orphan_runner           it exits without its runners, which are in a session of their own
                                and ignore SIGTERM
        hang_http=S             no request is answered from S seconds after the start on
        pull_error[=N]          an error line inside the 200 at half of the weights (N pulls long)
        pull_cut[=N]            the connection is cut there (N pulls long)
        pull_stall              the same progress for ever from there on
        pull_digest             what came has another digest
        load_fail               the runner exits while it loads
        disconnect_during_load  the connection is cut while the model loads
        hang_generate           an answer never has a token
        stream_error            an error line inside the 200 after the first token
        runner_crash            the runner dies after the first token of an answer

And what a request may say within its prompt, "[[tokens=20 delay=0.01 mark=a7]]":

    tokens=N        how many the answer has        delay=S         time for each
    mark=TEXT       its name in the ledger         fail_after=N    an error after N tokens
    hang_after=N    nothing more after N tokens, until the client leaves
    cut_after=N     the connection is cut there    die_after=N     the process dies there

A model whose name has "llava" takes images; one that is given tools calls the first of them that the
last message names, and then tells what came of it.
"""
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time

ENV = os.environ


def faults():
    """{name: value} of FAKE_OLLAMA_FAULTS; the value of a bare name is None."""
    found = {}
    for word in filter(None, ENV.get("FAKE_OLLAMA_FAULTS", "").replace(" ", "").split(",")):
        name, _, value = word.partition("=")
        found[name] = float(value) if value else None
    return found


FAULTS = faults()
LEFT = {name: float("inf") if value is None else value for name, value in FAULTS.items()}
VERSION = ENV.get("FAKE_OLLAMA_VERSION", "0.33.0")
LAYER_BYTES = int(ENV.get("FAKE_OLLAMA_LAYER_BYTES", 200000))
RATE = float(ENV.get("FAKE_OLLAMA_RATE", 0))
LOAD_S = float(ENV.get("FAKE_OLLAMA_LOAD_S", 0))
TOKENS = int(ENV.get("FAKE_OLLAMA_TOKENS", 0))
TOKEN_S = float(ENV.get("FAKE_OLLAMA_TOKEN_S", 0))
RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"


def once(fault):
    """Whether the fault strikes now: always, or as many times as its value says."""
    if LEFT.get(fault, 0) < 1:
        return False
    LEFT[fault] -= 1
    return True


def die_now():
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------- log lines

OUTPUT = threading.Lock()


def write_line(stream, text):
    with OUTPUT:
        try:
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # whoever read it is gone


def quoted(value):
    text = str(value)
    return json.dumps(text) if not text or re.search(r'[\s"=]', text) else text


def log(source, message, level="INFO", **pairs):
    words = ["time=%s level=%s source=%s msg=%s" % (stamp(3), level, source, quoted(message))]
    words += ["%s=%s" % (name, quoted(value)) for name, value in pairs.items()]
    write_line(sys.stderr, " ".join(words))


def stamp(digits=9, at=None):
    at = time.time_ns() if at is None else at
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at // 10**9))
    return "%s.%sZ" % (day, ("%09d" % (at % 10**9))[:digits])


def go_duration(ns):
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= size:
            return "%.6g%s" % (ns / size, unit)
    return "%dns" % ns


# ---------------------------------------------------------------------- GGUF

GGUF_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
                11: "<q", 12: "<d"}
FILE_TYPES = {0: "F32", 1: "F16", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 32: "BF16"}


def gguf_string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_pair(key, value):
    if isinstance(value, str):
        return gguf_string(key) + struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, float):
        return gguf_string(key) + struct.pack("<If", 6, value)
    return gguf_string(key) + struct.pack("<II", 4, value)


def make_gguf(metadata, weights_bytes, seed):
    """A GGUF file with one tensor of 2-byte (F16) or 1-byte (as I8) elements."""
    import hashlib
    rows = max(1, weights_bytes // 128)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata))
    head += b"".join(gguf_pair(key, value) for key, value in metadata.items())
    head += gguf_string("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, rows, 1, 0)
    head += b"\0" * (-len(head) % 32)
    return head + hashlib.shake_256(seed.encode()).digest(rows * 128)


def llama_metadata(name, file_type, architecture="llama"):
    found = {"general.architecture": architecture, "general.type": "model", "general.name": name,
             "general.license": "apache-2.0", "general.file_type": file_type,
             "general.base_model.count": 1, "general.base_model.0.name": name + " base",
             "general.quantization_version": 2}
    found.update({architecture + "." + key: value for key, value in (
        ("block_count", 2), ("context_length", 2048), ("embedding_length", 64),
        ("feed_forward_length", 128), ("attention.head_count", 4), ("attention.head_count_kv", 2),
        ("attention.layer_norm_rms_epsilon", 1e-5), ("rope.dimension_count", 16))})
    if architecture == "bert":
        found["bert.pooling_type"] = 1
    return found


class Gguf:
    """Metadata (arrays as None) and tensors [(name, type number, shape)] of a GGUF file.

    Raises: ValueError.
    """

    def __init__(self, path):
        with open(path, "rb") as handle:
            self._file = handle
            if handle.read(4) != b"GGUF":
                raise ValueError("invalid file magic")
            try:
                self.version, tensors, pairs = self._take("<IQQ")
                self.metadata = dict(self._pair() for _ in range(pairs))
                self.tensors = [self._tensor() for _ in range(tensors)]
            except (struct.error, MemoryError, OverflowError):
                raise ValueError("unexpected EOF")
            self.data_at = handle.tell()

    def _take(self, form):
        return struct.unpack(form, self._file.read(struct.calcsize(form)))

    def _string(self):
        return self._file.read(self._take("<Q")[0]).decode("utf-8", "replace")

    def _value(self, kind):
        if kind == 8:
            return self._string()
        if kind != 9:
            if kind not in GGUF_FORMATS:
                raise ValueError("unknown type %d" % kind)
            return self._take(GGUF_FORMATS[kind])[0]
        inner, count = self._take("<IQ")
        for _ in range(count):
            self._value(inner)
        return None

    def _pair(self):
        key = self._string()
        return key, self._value(self._take("<I")[0])

    def _tensor(self):
        name = self._string()
        shape = self._take("<%dQ" % self._take("<I")[0])
        return name, self._take("<IQ")[0], list(shape)

    @property
    def architecture(self):
        return self.metadata.get("general.architecture", "unknown")

    @property
    def file_type(self):
        return FILE_TYPES.get(self.metadata.get("general.file_type"), "unknown")

    @property
    def parameters(self):
        total = 0
        for _, _, shape in self.tensors:
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    def of(self, key):
        return self.metadata.get("%s.%s" % (self.architecture, key))


def human_number(count):
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return ("%.1f" if count < 100 * size and size > 1000 else "%.0f") % (count / size) + unit
    return str(count)


def copied_gguf(path):
    """The bytes as Ollama keeps them: rewritten, so that their digest is another one."""
    with open(path, "rb") as handle:
        raw = handle.read()
    old = Gguf(path)
    version, tensors, pairs = struct.unpack("<IQQ", raw[4:24])
    extra = gguf_pair("general.quantization_version" if "general.quantization_version"
                      not in old.metadata else "general.rewritten", 2)
    data = old.data_at + (-old.data_at % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs + 1) + extra + raw[24:old.data_at]
    return head + b"\0" * (-len(head) % 32) + raw[data:]


# ---------------------------------------------------------------------- names and the store

class Refused(Exception):
    """An answer that is an error.  status, text."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status, self.text = status, text


class Gone(Exception):
    """The client has left."""


NAME_PART = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$")
CLOUD_OFF = "ollama cloud is disabled: remote model is unavailable"


class Name:
    """host/namespace/model:tag; compared without regard to case."""

    def __init__(self, host, namespace, model, tag):
        self.parts = (host, namespace, model, tag)

    @classmethod
    def parse(cls, text):
        """A Name, or None where it is not one."""
        text = re.sub(r"^https?://", "", text.strip())
        if text.lower().endswith(":local"):
            text = text[:-len(":local")]
        rest, slash, last = text.rpartition("/")
        model, _, tag = last.partition(":")
        pieces = rest.split("/") if slash else []
        pieces = ["registry.ollama.ai", "library"][:2 - len(pieces)] + pieces
        name = cls(*pieces[:2], model, tag or "latest") if len(pieces) == 2 else None
        valid = name and all(NAME_PART.match(part) for part in name.parts[1:])
        return name if valid and re.match(r"^[A-Za-z0-9_][\w.:-]*$", name.parts[0]) else None

    @property
    def path(self):
        return os.path.join(*self.parts)

    @property
    def full(self):
        return "%s/%s/%s:%s" % self.parts

    @property
    def short(self):
        host, namespace, model, tag = self.parts
        prefix = "" if (host, namespace) == ("registry.ollama.ai", "library") else namespace + "/"
        return ("" if host == "registry.ollama.ai" else host + "/") + prefix + model + ":" + tag

    def same(self, other):
        return self.full.lower() == other.full.lower()


def is_cloud(text):
    last = text.rpartition(":")[2].strip().lower() if ":" in text else ""
    return last == "cloud" or (last.endswith("-cloud") and "/" not in last)


def blob_path(digest):
    if not re.match(r"^sha256[:-][0-9a-fA-F]{64}$", digest):
        raise Refused(400, "invalid digest format")
    return os.path.join(STORE.blobs, digest.replace(":", "-"))


def sha256_of(path):
    import hashlib
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for piece in iter(lambda: handle.read(1 << 20), b""):
            digest.update(piece)
    return "sha256:" + digest.hexdigest()


MEDIA = "application/vnd.ollama.image."


class Model:
    """What the store knows of one manifest."""

    def __init__(self, name, path):
        self.name, self.manifest_path = name, path
        with open(path, "rb") as handle:
            self.raw = handle.read()
        self.modified_ns = os.stat(path).st_mtime_ns
        self.manifest = json.loads(self.raw)
        import hashlib
        self.digest = hashlib.sha256(self.raw).hexdigest()
        self.layers = self.manifest["layers"]
        with open(blob_path(self.manifest["config"]["digest"])) as handle:
            self.config = json.load(handle)

    @property
    def size(self):
        return self.manifest["config"]["size"] + sum(layer["size"] for layer in self.layers)

    def layer(self, kind):
        found = [layer for layer in self.layers if layer["mediaType"] == MEDIA + kind]
        return found[0] if found else None

    def text(self, kind):
        layer = self.layer(kind)
        if not layer:
            return ""
        with open(blob_path(layer["digest"])) as handle:
            return handle.read()

    @property
    def weights_path(self):
        layer = self.layer("model")
        return blob_path(layer["digest"]) if layer else ""

    def gguf(self):
        return Gguf(self.weights_path)

    def capabilities(self):
        try:
            gguf = self.gguf()
        except (OSError, ValueError):
            return []
        if gguf.of("pooling_type") is not None:
            return ["embedding"]
        template = self.text("template") or str(gguf.metadata.get("tokenizer.chat_template", ""))
        return ["completion"] + (["tools"] if "tools" in template.lower() else []) + (
            ["vision"] if self.layer("projector") else [])

    def details(self, more=False):
        found = {"parent_model": (self.layer("model") or {}).get("from", ""),
                 "format": self.config["model_format"], "family": self.config["model_family"],
                 "families": self.config["model_families"],
                 "parameter_size": self.config["model_type"],
                 "quantization_level": self.config["file_type"]}
        if more:
            try:
                gguf = self.gguf()
                found.update(context_length=gguf.of("context_length") or 0,
                             embedding_length=gguf.of("embedding_length") or 0)
            except (OSError, ValueError):
                pass
        return found

    def listed(self):
        return {"name": self.name.short, "model": self.name.short,
                "modified_at": stamp(at=self.modified_ns), "size": self.size,
                "digest": self.digest, "details": self.details(more=True),
                "capabilities": self.capabilities()}


class Store:
    """manifests/HOST/NAMESPACE/MODEL/TAG and blobs/sha256-…"""

    def __init__(self, folder):
        self.folder = folder
        self.blobs = os.path.join(folder, "blobs")
        self.manifests = os.path.join(folder, "manifests")

    def names(self):
        for top, _, files in os.walk(self.manifests):
            parts = os.path.relpath(top, self.manifests).split(os.sep)
            for tag in files if len(parts) == 3 else ():
                yield Name(*parts, tag)

    def models(self):
        """Newest first; what cannot be read is left out."""
        found = []
        for name in self.names():
            try:
                found.append(Model(name, os.path.join(self.manifests, name.path)))
            except (OSError, ValueError, KeyError, Refused):
                pass
        return sorted(found, key=lambda model: -model.modified_ns)

    def existing(self, name):
        """The name as the store spells it, or as it came."""
        return next((known for known in self.names() if known.same(name)), name)

    def find(self, name):
        """Raises: OSError where there is none."""
        name = self.existing(name)
        return Model(name, os.path.join(self.manifests, name.path))

    def write_manifest(self, name, raw):
        path = os.path.join(self.manifests, name.path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as handle:
            handle.write(raw)

    def add_blob(self, raw):
        import hashlib
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        path = blob_path(digest)
        if os.path.exists(path):
            return digest, False
        with open(path + "-new", "wb") as handle:
            handle.write(raw)
        os.rename(path + "-new", path)
        return digest, True

    def used(self):
        found = set()
        for model in self.models():
            found.update(layer["digest"] for layer in model.layers + [model.manifest["config"]])
        return found

    def prune(self, digests=None):
        """Remove blobs that no manifest has: these, or all, with partial ones older than an hour."""
        kept = {digest.replace(":", "-") for digest in self.used()}
        names = os.listdir(self.blobs) if digests is None else \
            [digest.replace(":", "-") for digest in digests]
        removed = 0
        for name in names:
            path = os.path.join(self.blobs, name)
            if name not in kept and os.path.exists(path) and not (
                    "-partial" in name and time.time() - os.stat(path).st_mtime < 3600):
                os.remove(path)
                removed += 1
        return len(names), removed


STORE = Store(ENV.get("OLLAMA_MODELS") or os.path.join(ENV.get("HOME", ""), ".ollama", "models"))


def image_config(gguf):
    return {"model_format": "gguf", "model_family": gguf.architecture,
            "model_families": [gguf.architecture], "model_type": human_number(gguf.parameters),
            "file_type": gguf.file_type, "architecture": "amd64", "os": "linux"}


def manifest_bytes(config_digest, config_size, layers):
    return json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                   "digest": config_digest, "size": config_size},
        "layers": layers}, separators=(",", ":")).encode()


# ---------------------------------------------------------------------- the registry and pulls

CATALOGUE = ["tiny", "tiny:other", "smollm2:135m", "llama3.2", "llama3.2:1b", "qwen2.5:0.5b",
             "nomic-embed-text", "llava"] + ENV.get("FAKE_OLLAMA_CATALOGUE", "").split()
LICENSE = "Apache License\nVersion 2.0, January 2004\n"
CHATML = ("{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
          "<|im_start|>assistant\n")
TEMPLATE = "{{- range .Messages }}<|{{ .Role }}|>{{ .Content }}{{ end }}{{ if .Tools }}{{ end }}"


def registry_image(name):
    """(manifest, {digest: bytes}) of a name in the catalogue.  Raises: Refused."""
    import hashlib
    if not any(known.parts[1:] == name.parts[1:] for known in map(Name.parse, CATALOGUE)):
        raise Refused(500, "pull model manifest: file does not exist")
    model = name.parts[2].lower()
    architecture = "bert" if "embed" in model else "llama"
    size = LAYER_BYTES + sum(name.short.encode()) % 97 * 128
    weights = make_gguf(llama_metadata(name.short, 7, architecture), size, name.short)
    blobs, layers = {}, []
    parts = [("model", weights), ("template", TEMPLATE.encode()), ("license", LICENSE.encode()),
             ("params", b'{"stop":["<|end|>"]}')]
    if "llava" in model:
        parts.append(("projector", make_gguf({"general.architecture": "clip"}, 1280, "projector")))
    for kind, raw in parts:
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        blobs[digest] = raw
        layers.append({"mediaType": MEDIA + kind, "digest": digest, "size": len(raw)})
    config = json.dumps({"model_format": "gguf", "model_family": architecture, "model_families":
                         [architecture], "model_type": human_number(size // 2), "file_type": "Q8_0",
                         "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers",
                         "diff_ids": [layer["digest"] for layer in layers]}}).encode()
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    blobs[digest] = config
    return manifest_bytes(digest, len(config), layers), blobs


class Download:
    """One blob on its way: shared by all pulls that want it, ended when the last of them leaves."""

    ALL = {}
    LOCK = threading.Lock()

    def __init__(self, digest, raw):
        self.digest, self.raw, self.total = digest, raw, len(raw)
        self.path = blob_path(digest)
        self.waiters, self.error = 0, ""
        self.done, self.cancelled = threading.Event(), threading.Event()
        self.completed = self._resume()
        self.stop_at = self.total if self.total < 1000 or not {
            "pull_error", "pull_stall"} & set(FAULTS) else self.total // 2

    def _resume(self):
        try:
            with open(self.path + "-partial-0") as handle:
                return json.load(handle)["Completed"]
        except (OSError, ValueError, KeyError):
            return 0

    @classmethod
    def join(cls, digest, raw):
        with cls.LOCK:
            self = cls.ALL.get(digest)
            if self is None:
                self = cls.ALL[digest] = cls(digest, raw)
                parts = 1
                log("download.go:181", "downloading %s in %d %d B part(s)" % (
                    digest[7:19], parts, self.total))
                threading.Thread(target=self._run, daemon=True).start()
            self.waiters += 1
            return self

    def leave(self):
        with self.LOCK:
            self.waiters -= 1
            if not self.waiters and not self.done.is_set():
                self.cancelled.set()
                self.ALL.pop(self.digest, None)

    def _run(self):
        piece = max(1, int(RATE * 0.02)) if RATE else 1 << 16
        mode = "r+b" if os.path.exists(self.path + "-partial") else "w+b"
        with open(self.path + "-partial", mode) as handle:
            handle.truncate(self.total)
            handle.seek(self.completed)
            while self.completed < self.total and not self.cancelled.is_set():
                if self.completed >= self.stop_at:
                    if "pull_stall" in FAULTS:
                        self.cancelled.wait()
                        break
                    if once("pull_error"):
                        self.error = "max retries exceeded: unexpected EOF"
                        break
                    self.stop_at = self.total
                end = min(self.completed + piece, self.total,
                          self.stop_at if self.completed < self.stop_at else self.total)
                raw = self.raw[self.completed:end]
                handle.write(raw if "pull_digest" not in FAULTS else raw[::-1])
                handle.flush()
                self.completed = end
                self._note()
                if RATE:
                    self.cancelled.wait(len(raw) / RATE)
        if self.completed == self.total:
            os.rename(self.path + "-partial", self.path)
            os.remove(self.path + "-partial-0")
        with self.LOCK:
            if self.ALL.get(self.digest) is self:
                del self.ALL[self.digest]
            self.done.set()

    def _note(self):
        with open(self.path + "-partial-0", "w") as handle:
            json.dump({"N": 0, "Offset": 0, "Size": self.total, "Completed": self.completed}, handle)


def layer_line(digest, total, completed):
    line = {"status": "pulling " + digest[7:19], "digest": digest, "total": total}
    return dict(line, completed=completed) if completed else line


def pull_blob(digest, raw, say, request):
    """Whether it was there already."""
    path = blob_path(digest)
    if os.path.exists(path):
        say(layer_line(digest, os.path.getsize(path), os.path.getsize(path)))
        return True
    download = Download.join(digest, raw)
    cut = len(raw) > 1000 and once("pull_cut")
    try:
        while not download.done.wait(0.06):
            if request.gone():
                raise Gone()
            say(layer_line(digest, download.total, download.completed))
            if cut and download.completed * 2 >= download.total:
                request.cut()
        if cut:
            request.cut()
        if download.error:
            raise Refused(500, download.error)
    finally:
        download.leave()
    return False


def pull(name, say, request):
    old = None
    try:
        old = STORE.find(name)
    except OSError:
        pass
    say({"status": "pulling manifest"})
    manifest, blobs = registry_image(name)
    there = {digest for digest, raw in blobs.items() if pull_blob(digest, raw, say, request)}
    say({"status": "verifying sha256 digest"})
    for digest in blobs:
        if digest not in there and sha256_of(blob_path(digest)) != digest:
            got = sha256_of(blob_path(digest))
            os.remove(blob_path(digest))
            raise Refused(500, "digest mismatch, file must be downloaded again: want %s, got %s"
                          % (digest, got))
    say({"status": "writing manifest"})
    STORE.write_manifest(name, manifest)
    unused = {layer["digest"] for layer in old.layers + [old.manifest["config"]]} - set(blobs) \
        if old else set()
    if unused and not ENV.get("OLLAMA_NOPRUNE"):
        say({"status": "removing unused layers"})
        STORE.prune(unused)
    say({"status": "success"})


# ---------------------------------------------------------------------- create

SUPPORTED = "F32, F16, Q4_K_S, Q4_K_M, Q8_0"


def converted(files, say):
    """GGUF bytes from safetensors that were uploaded.  Raises: Refused."""
    say({"status": "converting model"})
    if "config.json" not in files:
        raise Refused(500, "open config.json: no such file or directory")
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        raise Refused(500, "unknown tokenizer format")
    with open(blob_path(files["config.json"])) as handle:
        config = json.load(handle)
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture != "LlamaForCausalLM":
        raise Refused(500, "unsupported architecture %s" % json.dumps(architecture))
    size = sum(os.path.getsize(blob_path(digest)) for name, digest in files.items()
               if name.endswith(".safetensors"))
    lost = ("general.license", "general.base_model.count", "general.base_model.0.name")
    metadata = {key: value for key, value in llama_metadata("converted", 1).items()
                if key not in lost}
    for key, theirs in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size"),
                        ("context_length", "max_position_embeddings"),
                        ("attention.head_count", "num_attention_heads"),
                        ("attention.head_count_kv", "num_key_value_heads")):
        metadata["llama." + key] = config.get(theirs) or metadata["llama." + key]
    return make_gguf(metadata, size, "".join(sorted(files.values())))


def is_gguf(path):
    try:
        with open(path, "rb") as handle:
            return handle.read(4) == b"GGUF"
    except OSError:
        return False


def has_chat_template(files):
    try:
        with open(blob_path(files["tokenizer_config.json"])) as handle:
            return "chat_template" in json.load(handle)
    except (OSError, KeyError, ValueError):
        return False


def base_weights(fields, say, request):
    """(GGUF bytes or None where the layers stay, layers) that a create starts from."""
    if fields["from"]:
        name = Name.parse(fields["from"])
        if not name:
            raise Refused(400, "invalid model name")
        try:
            model = STORE.find(name)
        except OSError:
            pull(name, say, request)
            model = STORE.find(name)
        layers = [dict(layer) for layer in model.layers]
        layers[0]["from"] = name.short
        return None, layers
    if fields["files"] is None:
        raise Refused(400, "neither 'from' or 'files' was specified")
    files = fields["files"]
    if not files:
        raise Refused(400, "no files provided to convert")
    if any(name.endswith(".safetensors") for name in files):
        raw = converted(files, say)
        return raw, [new_layer("template", CHATML.encode(), "chatml")] \
            if has_chat_template(files) else []
    path = blob_path(next(iter(files.values())))
    if not next(iter(files)).endswith(".gguf") and not is_gguf(path):
        raise Refused(400, "unknown type")
    say({"status": "parsing GGUF"})
    if not os.path.exists(path):
        raise Refused(500, "open %s: no such file or directory" % path)
    try:
        Gguf(path)
    except ValueError:
        raise Refused(400, "supplied file was not in GGUF format")
    return copied_gguf(path), []


def quantized(raw, wanted, say):
    """Bytes of the wanted type; progress as llama-quantize makes it."""
    say_type = wanted.upper()
    numbers = {name: number for number, name in FILE_TYPES.items()}
    if say_type not in numbers:
        raise Refused(500, "unsupported quantization type %s - supported types are %s" % (
            say_type, SUPPORTED))
    digest, new = STORE.add_blob(raw)
    gguf = Gguf(blob_path(digest))
    if new:
        os.remove(blob_path(digest))
    if gguf.file_type not in ("F16", "BF16", "F32"):
        raise Refused(500, "quantization is only supported for F16, BF16 and F32 models")
    if gguf.file_type == say_type:
        return raw
    for step in range(1, 5):
        say({"status": "quantizing %s model to %s" % (gguf.file_type, say_type),
             "digest": "0000000000000000000", "total": len(raw), "completed": len(raw) * step // 4})
    metadata = {key: value for key, value in gguf.metadata.items() if value is not None}
    metadata = {key: int(value) if isinstance(value, bool) else value
                for key, value in metadata.items()}
    metadata["general.file_type"] = numbers[say_type]
    return make_gguf(metadata, len(raw) // 2, say_type)


def create(name, fields, say, request):
    raw, layers = base_weights(fields, say, request)
    if raw is None and fields["quantize"]:
        with open(blob_path(layers[0]["digest"]), "rb") as handle:
            raw, layers = handle.read(), layers[1:]
    if raw is not None:
        if fields["quantize"]:
            raw = quantized(raw, fields["quantize"], say)
        say({"status": "verifying conversion"})
        layers.insert(0, new_layer("model", raw))
    for kind, text in layer_texts(fields):
        layers = [layer for layer in layers if layer["mediaType"] != MEDIA + kind]
        layers.append(new_layer(kind, text.encode()))
    for layer in layers:
        if "detected" in layer:
            say({"status": "using autodetected template " + layer.pop("detected")})
        say({"status": "%s layer %s" % (layer.pop("said", "using existing"), layer["digest"])})
    config = json.dumps(image_config(Gguf(blob_path(layers[0]["digest"]))),
                        separators=(",", ":")).encode() + b"\n"
    digest, _ = STORE.add_blob(config)
    say({"status": "writing manifest"})
    STORE.write_manifest(STORE.existing(name), manifest_bytes(digest, len(config), layers))
    say({"status": "success"})


def layer_texts(fields):
    """[(kind, text)] of the layers beside the weights."""
    licenses = fields["license"] if isinstance(fields["license"], list) else [fields["license"]]
    found = [("template", fields["template"]), ("system", fields["system"])]
    found += [("license", text) for text in licenses]
    if fields["parameters"]:
        found.append(("params", json.dumps(fields["parameters"], separators=(",", ":")) + "\n"))
    return [(kind, text) for kind, text in found if text]


def new_layer(kind, raw, detected=None):
    """said, detected: for the progress; taken out again before it is written."""
    digest, new = STORE.add_blob(raw)
    layer = {"mediaType": MEDIA + kind, "digest": digest, "size": len(raw),
             "said": "creating new" if new else "using existing"}
    return dict(layer, detected=detected) if detected else layer


LEDGER = threading.Lock()


def book(began, **row):
    """A line in the ledger.  began: by the monotonic clock, which processes share."""
    if ENV.get("FAKE_OLLAMA_LEDGER"):
        line = json_line(dict(row, began=began, seconds=time.monotonic() - began))
        with LEDGER, open(ENV["FAKE_OLLAMA_LEDGER"], "ab", 0) as ledger:
            ledger.write(line)


# ---------------------------------------------------------------------- runners

def runner_main(arguments):
    """A child that holds one model: it loads, then answers lines of JSON on its port."""
    said = dict(zip(arguments[::2], arguments[1::2]))
    if "orphan_runner" in FAULTS:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener = socket.socket(fileno=int(said["--listen-fd"]))
    with open(said["--model"], "rb") as handle:
        magic = handle.read(4)
    time.sleep(LOAD_S)
    if magic != b"GGUF" or "load_fail" in FAULTS:
        write_line(sys.stderr, "llama_model_load: error loading model: invalid magic")
        sys.exit(1)
    write_line(sys.stderr, "srv  llama_server: listening on http://127.0.0.1:" + said["--port"])
    parent, last_seen = os.getppid(), time.monotonic()
    listener.settimeout(5)
    while os.getppid() == parent or time.monotonic() - last_seen < 600:
        try:
            connection, _ = listener.accept()
        except socket.timeout:
            continue
        last_seen = time.monotonic()
        threading.Thread(target=runner_answer, args=(connection,), daemon=True).start()


def runner_answer(connection):
    with connection, connection.makefile("rwb") as stream:
        try:
            task = json.loads(stream.readline() or b"{}")
            for number, token in enumerate(task.get("tokens", ())):
                if "hang_generate" in FAULTS:
                    threading.Event().wait()
                time.sleep(task.get("token_s", TOKEN_S))
                stream.write(json.dumps({"token": token}).encode() + b"\n")
                stream.flush()
                if number == 0 and "runner_crash" in FAULTS:
                    os._exit(139)
            stream.write(b'{"done": true}\n')
            stream.flush()
        except (OSError, ValueError):
            pass  # the server let go


class Runner:
    """One loaded model.  Scheduler.lock guards what changes in it."""

    def __init__(self, model, key, context, keep_alive):
        import subprocess
        self.model, self.key, self.context = model, key, context
        self.keep_alive, self.refs, self.expires_ns, self.turn = keep_alive, 0, 0, 0
        self.slots = threading.Semaphore(int(ENV.get("OLLAMA_NUM_PARALLEL") or 1))
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        command = [sys.executable, "-IS", os.path.abspath(__file__), "runner", "--model",
                   model.weights_path, "--port", str(self.port), "--host", "127.0.0.1", "-c",
                   str(context), "-np", "1", "--listen-fd", str(listener.fileno())]
        log("llama_server.go:433", "starting llama-server", cmd=" ".join(command))
        with listener:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()],
                start_new_session="orphan_runner" in FAULTS)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port))

    def answers(self, limit_s=0.02):
        """Whether it is loaded."""
        try:
            with self.connect() as connection:
                connection.sendall(b"{}\n")
                return bool(select.select([connection], [], [], limit_s)[0]) and \
                    bool(connection.recv(10))
        except OSError:
            return False

    @property
    def alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def tokens(self, tokens, gone, token_s=TOKEN_S):
        """Yield what it generates.  Raises: Refused where it dies, Gone."""
        try:
            with self.connect() as connection, connection.makefile("rb") as stream:
                connection.sendall(json.dumps({"tokens": tokens, "token_s": token_s}).encode() + b"\n")
                while True:
                    while not select.select([connection], [], [], 0.02)[0]:
                        if gone():
                            raise Gone()
                    line = stream.readline()
                    if not line:
                        raise Refused(500, RUNNER_DIED)
                    said = json.loads(line)
                    if said.get("done"):
                        return
                    yield said["token"]
                    while b"\n" in stream.peek(1):
                        said = json.loads(stream.readline())
                        if said.get("done"):
                            return
                        yield said["token"]
        except ConnectionError:
            raise Refused(500, RUNNER_DIED)


RELOADS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread",
           "draft_num_predict")


class Scheduler:
    """Which models are loaded: one load at a time, a place for each of a few."""

    def __init__(self):
        self.lock = threading.Condition()
        self.loading = threading.Lock()
        self.loaded = {}
        self.pending = 0
        self.most = int(ENV.get("OLLAMA_MAX_LOADED_MODELS") or 0) or 3
        self.queue = int(ENV.get("OLLAMA_MAX_QUEUE") or 512)

    def acquire(self, model, options, keep_alive, request):
        """A Runner that is loaded and counts us in.  Raises: Refused, Gone."""
        key = tuple(str(options.get(name)) for name in RELOADS)
        runner = self._ready(model, key, keep_alive)
        if runner:
            return runner
        with self.lock:
            if self.pending >= self.queue:
                raise Refused(503, "server busy, please try again.  maximum pending requests "
                              "exceeded")
            self.pending += 1
        try:
            while not self.loading.acquire(timeout=0.02):
                if request.gone():
                    raise Gone()
            try:
                return self._ready(model, key, keep_alive) or \
                    self._load(model, key, options, keep_alive, request)
            finally:
                self.loading.release()
        finally:
            with self.lock:
                self.pending -= 1

    def _ready(self, model, key, keep_alive):
        with self.lock:
            runner = self.loaded.get(model.digest)
            if not runner or runner.key != key or not runner.alive:
                return None
            runner.refs += 1
            runner.turn += 1
        good = runner.answers(2)  # as Ollama asks llama-server's /health
        with self.lock:
            if not good:
                runner.refs -= 1
                runner.kill()
                return None
            if keep_alive is not None:
                runner.keep_alive = keep_alive
            return runner

    def _load(self, model, key, options, keep_alive, request):
        self._make_room(model, request)
        gguf = model.gguf()
        context = options.get("num_ctx") or int(ENV.get("OLLAMA_CONTEXT_LENGTH") or 0) or 4096
        runner = Runner(model, key, min(context, gguf.of("context_length") or context),
                        DEFAULT_KEEP_ALIVE if keep_alive is None else keep_alive)
        began = time.monotonic()
        try:
            self._await(runner, began, request)
        finally:
            book(began, load=model.name.short)
        with self.lock:
            runner.refs = 1
            runner.expires_ns = expiry(runner.keep_alive)
            self.loaded[model.digest] = runner
            log("sched.go:728", "loaded runners", count=len(self.loaded))
        return runner

    def _await(self, runner, began, request):
        log("llama_server.go:1295", "waiting for llama-server to start responding")
        while not runner.answers():
            if not runner.alive:
                raise Refused(500, "llama-server process has terminated: exit status %d: error "
                              "loading model: invalid magic" % runner.process.returncode)
            if "disconnect_during_load" in FAULTS and time.monotonic() - began > LOAD_S / 2:
                runner.kill()
                request.cut()
            if request.gone():
                log("llama_server.go:1301", "client connection closed before llama-server finished "
                    "loading, aborting load", "WARN")
                runner.kill()
                raise Gone()
        log("llama_server.go:1362", "llama-server started in %.2f seconds"
            % (time.monotonic() - began))

    def _make_room(self, model, request):
        """Unload the model where it is loaded otherwise, and one more where all places are taken."""
        while True:
            with self.lock:
                for digest in [key for key, one in self.loaded.items() if not one.alive]:
                    self.loaded.pop(digest).kill()
                victim = self.loaded.get(model.digest)
                if not victim and len(self.loaded) < self.most:
                    return
                if not victim:
                    victim = min(self.loaded.values(), key=lambda one: (one.refs, one.expires_ns))
                if not victim.refs:
                    self._unload(victim)
                    continue
                self.lock.wait(0.02)
            if request.gone():
                raise Gone()

    def _unload(self, runner):
        if self.loaded.get(runner.model.digest) is runner:
            del self.loaded[runner.model.digest]
        runner.kill()
        self.lock.notify_all()

    def release(self, runner):
        with self.lock:
            runner.refs -= 1
            self.lock.notify_all()
            if not runner.refs:
                self._idle(runner)

    def _idle(self, runner):
        runner.expires_ns = expiry(runner.keep_alive)
        runner.turn += 1
        if runner.keep_alive == 0:
            self._unload(runner)
        elif 0 < runner.keep_alive < 3600:
            timer = threading.Timer(runner.keep_alive, self._expire, (runner, runner.turn))
            timer.daemon = True
            timer.start()

    def _expire(self, runner, turn):
        with self.lock:
            if not runner.refs and runner.turn == turn:
                self._unload(runner)

    def unload(self, model):
        with self.lock:
            runner = self.loaded.get(model.digest)
            if runner:
                runner.keep_alive = 0
                if not runner.refs:
                    self._unload(runner)

    def end(self):
        with self.lock:
            for runner in list(self.loaded.values()):
                runner.kill()


SCHEDULER = Scheduler()


def expiry(keep_alive):
    return time.time_ns() + int((keep_alive if keep_alive >= 0 else 292 * 365.25 * 86400) * 1e9)


def go_seconds(text):
    """Seconds of Go's "1h2m3.5s".  Raises: Refused."""
    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    match = re.match(r"^[-+]?((?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+$", text)
    if match:
        total = sum(float(number) * units[unit] for number, unit in re.findall(
            r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)", text))
        return -total if text.startswith("-") else total
    missing = re.match(r"^[-+]?\d+\.?\d*$", text)
    raise Refused(400, "time: %s duration %s" % (
        "missing unit in" if missing and text != "0" else "invalid", json.dumps(text)))


def keep_alive_of(value):
    """Seconds (below 0: for ever), None where it was not sent.  Raises: Refused."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return -1 if value < 0 else value
    if isinstance(value, str):
        seconds = go_seconds(value)
        return -1 if seconds < 0 else seconds
    raise Refused(400, "Unsupported type: '%s'" % go_kind(value))


def default_keep_alive():
    text = ENV.get("OLLAMA_KEEP_ALIVE", "").strip()
    try:
        return keep_alive_of(int(text) if re.match(r"^-?\d+$", text) else text)
    except Refused:
        return 300


DEFAULT_KEEP_ALIVE = default_keep_alive()


# ---------------------------------------------------------------------- bodies, as Go decodes them

STRING, BOOLEAN, OBJECT, STRINGS, ANY = "string", "bool", "map[string]interface {}", "[]string", ""
COMMON = {"model": STRING, "stream": BOOLEAN, "keep_alive": ANY, "options": OBJECT, "format": ANY,
          "think": ANY, "truncate": BOOLEAN, "shift": BOOLEAN, "logprobs": BOOLEAN,
          "top_logprobs": "int"}
STRUCTS = {
    "GenerateRequest": dict(COMMON, prompt=STRING, suffix=STRING, system=STRING, template=STRING,
                            context="[]int", raw=BOOLEAN, images="[]api.ImageData"),
    "ChatRequest": dict(COMMON, messages="[]api.Message", tools="api.Tools"),
    "EmbedRequest": dict(COMMON, input=ANY, dimensions="int"),
    "EmbeddingRequest": dict(COMMON, prompt=STRING),
    "PullRequest": {"model": STRING, "name": STRING, "stream": BOOLEAN, "insecure": BOOLEAN},
    "ShowRequest": {"model": STRING, "name": STRING, "verbose": BOOLEAN, "system": STRING,
                    "template": STRING, "options": OBJECT},
    "CopyRequest": {"source": STRING, "destination": STRING},
    "DeleteRequest": {"model": STRING, "name": STRING},
    "CreateRequest": {"model": STRING, "name": STRING, "stream": BOOLEAN, "from": STRING,
                      "files": "map[string]string", "adapters": "map[string]string",
                      "template": STRING, "system": STRING, "parameters": OBJECT, "messages":
                      "[]api.Message", "license": ANY, "quantize": STRING},
    "ChatCompletionRequest": {"model": STRING, "messages": "[]openai.Message", "stream": BOOLEAN,
                              "stream_options": "openai.StreamOptions", "max_tokens": "int",
                              "temperature": "float64", "top_p": "float64", "seed": "int",
                              "stop": ANY, "response_format": ANY, "tools": "[]api.Tool",
                              "reasoning_effort": STRING},
    "CompletionRequest": {"model": STRING, "prompt": STRING, "stream": BOOLEAN, "max_tokens": "int",
                          "stream_options": "openai.StreamOptions", "temperature": "float64",
                          "top_p": "float64", "seed": "int", "stop": ANY, "suffix": STRING},
    "ResponsesRequest": {"model": STRING, "input": ANY, "stream": BOOLEAN, "instructions": STRING,
                         "max_output_tokens": "int", "temperature": "float64", "top_p": "float64",
                         "tools": "[]responses.Tool"},
    "MessagesRequest": {"model": STRING, "messages": "[]anthropic.Message", "stream": BOOLEAN,
                        "max_tokens": "int", "system": ANY, "temperature": "float64",
                        "top_p": "float64", "top_k": "int", "stop_sequences": STRINGS,
                        "tools": "[]anthropic.Tool"},
    "OpenAIEmbedRequest": {"model": STRING, "input": ANY, "dimensions": "int",
                           "encoding_format": STRING},
}


def go_kind(value):
    return {str: "string", bool: "bool", int: "number", float: "number", list: "array",
            dict: "object"}.get(type(value), "null")


def fits(value, kind):
    if kind == ANY or value is None:
        return True
    wanted = {"string": str, "bool": bool, "int": int, "float64": (int, float)}.get(kind)
    if wanted:
        return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    return isinstance(value, list if kind.startswith("[]") or kind == "api.Tools" else dict)


def decode(raw, struct_name):
    """The fields of a Go struct: keys in any case, the last one wins, trailing bytes ignored.

    Raises: Refused.
    """
    text = raw.decode("utf-8", "replace").lstrip()
    if not text:
        raise Refused(400, "missing request body")
    try:
        pairs, _ = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
        value, _ = json.JSONDecoder().raw_decode(text)
    except ValueError as error:
        at = getattr(error, "pos", len(text))
        raise Refused(400, "unexpected EOF" if at >= len(text) - 1 else
                      "invalid character '%s' looking for beginning of value" % text[at])
    if not isinstance(value, dict):
        raise Refused(400, "json: cannot unmarshal %s into Go value of type api.%s" % (
            go_kind(value), struct_name))
    fields = dict.fromkeys(STRUCTS[struct_name])
    plain = {key: value[key] for key, _ in pairs}
    for key, _ in pairs:
        name = key.lower()
        if name in fields:
            kind = STRUCTS[struct_name][name]
            if not fits(plain[key], kind):
                raise Refused(400, "json: cannot unmarshal %s into Go struct field %s.%s of type %s"
                              % (go_kind(plain[key]), struct_name, name, kind))
            fields[name] = plain[key]
            if name == "keep_alive":
                keep_alive_of(plain[key])
    return fields


OPTION_TYPES = {**dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n",
                                 "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread",
                                 "draft_num_predict"), "integer"),
                **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature", "repeat_penalty",
                                 "presence_penalty", "frequency_penalty"), "float32"),
                "use_mmap": "boolean", "stop": "array"}


def checked_options(options):
    for name, value in (options or {}).items():
        kind = OPTION_TYPES.get(name)
        good = kind is None or value is None or (
            isinstance(value, {"integer": (int, float), "float32": (int, float), "boolean": bool,
                               "array": list}[kind])
            and (kind == "boolean" or not isinstance(value, bool)))
        if not good:
            raise Refused(500, 'option "%s" must be of type %s' % (name, kind))
    return {name: value for name, value in (options or {}).items() if value is not None}


# ---------------------------------------------------------------------- HTTP

class Request:
    """One request on a connection that may carry more."""

    def __init__(self, connection, stream):
        self.connection, self.stream = connection, stream
        self.method = self.path = ""
        self.headers, self.status, self.began = {}, 0, time.monotonic_ns()
        self.chunked, self.body_read, self.close = False, False, False

    def read_head(self):
        """False where the connection ended."""
        line = self.stream.readline(65536)
        if not line.strip():
            return False
        self.began = time.monotonic_ns()
        self.method, target, protocol = (line.decode("latin-1").split() + ["", ""])[:3]
        self.path = target.partition("?")[0]
        for line in iter(lambda: self.stream.readline(65536), b""):
            if line in (b"\r\n", b"\n"):
                break
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.close = protocol == "HTTP/1.0" or self.headers.get("connection", "").lower() == "close"
        return True

    def pieces(self):
        """The body.  Raises: ConnectionError where it ends too early."""
        self.body_read = True
        if self.headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while True:
                size = int(self.stream.readline(100).split(b";")[0] or b"0", 16)
                if size:
                    yield self._exactly(size)
                self.stream.readline(100)
                if not size:
                    return
        left = int(self.headers.get("content-length") or 0)
        while left:
            piece = self._exactly(min(left, 1 << 18))
            left -= len(piece)
            yield piece

    def _exactly(self, size):
        raw = self.stream.read(size)
        if len(raw) < size:
            raise ConnectionResetError("the body was cut off")
        return raw

    def fields(self, struct_name):
        return decode(b"".join(self.pieces()), struct_name)

    def gone(self):
        """Whether the client has closed its side."""
        try:
            return bool(select.select([self.connection], [], [], 0)[0]) and \
                not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def cut(self):
        """Close the connection as a crash would: without the end of the answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone()

    def reply(self, status, body=b"", kind="application/json; charset=utf-8", **headers):
        if not isinstance(body, bytes):
            body = json_line(body) if self.path.startswith("/v1/") else json_line(body)[:-1]
        self.status = status
        lines = self._head(status, kind if body else "")
        lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in headers.items()]
        lines.append("Content-Length: %d" % len(body))
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self.connection.sendall(head if self.method == "HEAD" else head + body)

    def _head(self, status, kind):
        phrase = {200: "OK", 201: "Created", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
                  405: "Method Not Allowed", 499: "status code 499", 501: "Not Implemented",
                  503: "Service Unavailable"}.get(status, "Internal Server Error")
        lines = ["HTTP/1.1 %d %s" % (status, phrase)]
        if kind:
            lines.append("Content-Type: " + kind)
        lines.append(time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()))
        return lines + (["Connection: close"] if self.close else [])

    def send(self, raw, kind):
        """A piece of an answer whose end nobody knows."""
        out = b""
        if not self.chunked:
            self.chunked, self.status = True, 200
            out = "\r\n".join(self._head(200, kind) + [
                "Transfer-Encoding: chunked"]).encode() + b"\r\n\r\n"
        self.connection.sendall(out + b"%x\r\n%s\r\n" % (len(raw), raw))

    def finish(self):
        if self.chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def log(self):
        spent = go_duration(time.monotonic_ns() - self.began)
        write_line(sys.stdout, "[GIN] %s | %3d | %12s | %15s | %-8s \"%s\"" % (
            time.strftime("%Y/%m/%d - %H:%M:%S"), self.status, spent, "127.0.0.1", self.method,
            self.path))


def json_line(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def progress(request, stream, work):
    """Run work(say); its lines go out as they come, or only the last one of them."""
    last = [{}]

    def say(line):
        last[0] = line
        if stream:
            request.send(json_line(line), "application/x-ndjson")
    try:
        work(say)
    except Refused as refused:
        if request.chunked:
            request.send(json_line({"error": refused.text}), "")
        else:
            request.reply(refused.status, {"error": refused.text}, "application/json")
        return
    if not stream:
        request.reply(200, last[0], "application/json")


# ---------------------------------------------------------------------- routes

def wanted_name(text, status=404, message=None):
    if is_cloud(text or ""):
        if ENV.get("OLLAMA_NO_CLOUD", "") not in ("", "0", "false"):
            raise Refused(403, CLOUD_OFF)
        raise Refused(502, "error proxying request to ollama.com: dial tcp: no such host")
    name = Name.parse(text or "")
    if not name:
        raise Refused(status, message or "model '%s' not found" % text)
    return name


def found_model(text, message):
    try:
        return STORE.find(wanted_name(text))
    except (OSError, ValueError, KeyError):
        raise Refused(404, message)


def home_page(request):
    request.reply(200, b"Ollama is running", "text/plain; charset=utf-8")


def version(request):
    request.reply(200, {"version": VERSION})


def cloud_status(request):
    off = ENV.get("OLLAMA_NO_CLOUD", "") not in ("", "0", "false")
    request.reply(200, {"cloud": {"disabled": off, "source": "env" if off else "none"}})


def tags(request):
    request.reply(200, {"models": [model.listed() for model in STORE.models()]})


def processes(request):
    with SCHEDULER.lock:
        runners = list(SCHEDULER.loaded.values())  # one that died is found at the next request
    runners.sort(key=lambda runner: -runner.expires_ns)
    request.reply(200, {"models": [
        {"name": runner.model.name.short, "model": runner.model.name.short,
         "size": runner.model.size + 1800000, "digest": runner.model.digest,
         "details": dict(runner.model.details(), parent_model=""),
         "expires_at": stamp(at=runner.expires_ns), "size_vram": 0,
         "context_length": runner.context} for runner in runners]})


def show(request):
    fields = request.fields("ShowRequest")
    text = fields["model"] or fields["name"]
    if not text:
        raise Refused(400, "model is required")
    name = wanted_name(text, 400, "invalid model name")
    model = found_model(text, "model '%s' not found" % name.short)
    gguf = model.gguf()
    info = {key: value for key, value in gguf.metadata.items()
            if key not in ("general.name", "tokenizer.chat_template")}
    info["general.parameter_count"] = gguf.parameters
    answer = {"modelfile": "# Modelfile generated by \"ollama show\"\n\nFROM %s\nTEMPLATE %s\n" % (
        model.weights_path, model.text("template") or "{{ .Prompt }}")}
    optional = {"license": model.text("license"), "system": model.text("system"), "parameters":
                "\n".join("%-30s %s" % (key, one) for key, value in json.loads(
                    model.text("params") or "{}").items()
                    for one in (value if isinstance(value, list) else [value]))}
    answer.update({key: value for key, value in optional.items() if value})
    template = model.text("template") or gguf.metadata.get("tokenizer.chat_template", "")
    answer.update(template=template, details=model.details(),
                  model_info=dict(sorted(info.items())), tensors=[
                      {"name": name, "type": FILE_TYPES.get(kind, str(kind)), "shape": shape}
                      for name, kind, shape in gguf.tensors],
                  capabilities=model.capabilities(), modified_at=stamp(at=model.modified_ns))
    request.reply(200, answer)


def pull_route(request):
    fields = request.fields("PullRequest")
    name = wanted_name(fields["model"] or fields["name"], 400, "invalid model name")
    name = STORE.existing(name)
    progress(request, fields["stream"] is not False, lambda say: pull(name, say, request))


def push_route(request):
    fields = request.fields("PullRequest")

    def work(say):
        say({"status": "retrieving manifest"})
        raise Refused(500, "you are not authorized to push to this namespace, create the model under "
                      "a namespace you own")
    progress(request, fields["stream"] is not False, work)


def create_route(request):
    fields = request.fields("CreateRequest")
    for path, digest in (fields["files"] or {}).items():
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, "file path must be relative")
        if not digest:
            raise Refused(400, "invalid digest format")
    name = Name.parse(fields["model"] or fields["name"] or "")
    if not name:
        raise Refused(400, "invalid model name")
    progress(request, fields["stream"] is not False, lambda say: create(name, fields, say, request))


def blob_route(request):
    digest = request.path.rpartition("/")[2]
    path = blob_path(digest)
    if request.method == "HEAD":
        if not os.path.exists(path):
            raise Refused(404, 'blob "%s" not found' % digest)
        return request.reply(200)
    if os.path.exists(path):
        request.close = True  # what is still to come is not read
        return request.reply(200)
    import hashlib
    hashed, temporary = hashlib.sha256(), path + "-%d" % threading.get_ident()
    try:
        with open(temporary, "wb") as handle:
            for piece in request.pieces():
                hashed.update(piece)
                handle.write(piece)
        got = "sha256:" + hashed.hexdigest()
        os.rename(temporary, blob_path(got))
    except ConnectionError:
        os.remove(temporary)
        raise
    if got != digest:
        raise Refused(400, 'digest mismatch, expected "%s", got "%s"' % (digest, got))
    return request.reply(201)


def copy_route(request):
    fields = request.fields("CopyRequest")
    names = {}
    for key in ("source", "destination"):
        names[key] = Name.parse(fields[key] or "")
        if not names[key]:
            raise Refused(400, '%s "%s" is invalid' % (key, fields[key] or ""))
    model = found_model(fields["source"], 'model "%s" not found' % fields["source"])
    STORE.write_manifest(STORE.existing(names["destination"]), model.raw)
    request.reply(200)


def delete_route(request):
    fields = request.fields("DeleteRequest")
    text = fields["model"] or fields["name"] or ""
    if not Name.parse(text):
        raise Refused(400, 'name "%s" is invalid' % text if text else "model is required")
    model = found_model(text, "model '%s' not found" % text)
    os.remove(model.manifest_path)
    STORE.prune([layer["digest"] for layer in model.layers + [model.manifest["config"]]])
    request.reply(200)


def said_in(prompt):
    """{name: text} of the "[[name=text …]]" in it."""
    found = re.search(r"\[\[(.*?)\]\]", prompt)
    return dict(word.partition("=")[::2] for word in found.group(1).split()) if found else {}


def answer_tokens(prompt, options, form, count=TOKENS):
    """(tokens, finish reason)."""
    if form:
        tokens = ['{"', "said", '":', ' "', "yes", '"}']
    elif count:
        tokens = [" token"] * count
    else:
        tokens = ["You", " said", ":"] + [" " + word for word in prompt.split()[-20:]]
    most = options.get("num_predict", -1)
    if 0 <= most < len(tokens):
        return tokens[:int(most)], "length"
    return tokens, "stop"


class Answer:
    """One generation: the runner, the tokens as they come, and the figures at the end."""

    def __init__(self, request, fields, prompt, text):
        self.began = time.monotonic_ns()
        self.request, self.prompt = request, prompt
        self.shown = fields["model"]
        self.model = found_model(text, "model '%s' not found" % text)
        self.keep_alive = keep_alive_of(fields.get("keep_alive"))
        self.options = fields.get("options") or {}
        self.form = fields.get("format")
        self.reason, self.eval_count, self.load_ns = "stop", 0, 0
        self.prompt_at = self.began
        self.told, self.images, self.call, self.noted = said_in(prompt), [], None, False

    def need(self, what):
        have = self.model.capabilities()
        if "completion" not in have:
            raise Refused(400, '"%s" does not support %s' % (self.shown, what))
        if self.images and "vision" not in have:
            raise Refused(500, "image input is not supported - hint: if this is unexpected, you may "
                          "need to provide the mmproj")

    def look_at(self, images):
        """Base64, as they come in a request.  Raises: Refused."""
        import base64
        for text in images or ():
            try:
                self.images.append(base64.b64decode(text, validate=True))
            except (ValueError, TypeError):
                raise Refused(400, "illegal base64 data at input byte 0")

    def use(self, tools, messages):
        """Whether one of the tools is called: the first that the last message names."""
        last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
        asked = message_text([last]) if last.get("role") == "user" else ""
        for tool in tools or ():
            known = tool.get("function") or {}
            if known.get("name") and known["name"] in asked:
                wanted = (known.get("parameters") or {}).get("properties") or {}
                words = asked.split()
                self.call = {"name": known["name"], "arguments": {
                    name: 7 if kind.get("type") in ("integer", "number") else words[-1]
                    for name, kind in wanted.items()}}
                return

    def note(self, end):
        """A line in the ledger, once."""
        if not self.noted:
            self.noted = True
            book(self.prompt_at / 1e9, mark=self.told.get("mark"), path=self.request.path,
                 prompt=self.prompt_count, sent=self.eval_count, end=end)

    def strike(self):
        """What the request said is to happen after so many tokens.  Raises: Refused, Gone."""
        here = str(self.eval_count)
        if self.told.get("fail_after") == here:
            self.note("error")
            raise Refused(500, RUNNER_DIED)
        if self.told.get("hang_after") == here:
            while not self.request.gone():
                time.sleep(0.01)
            self.note("gone")
            raise Gone()
        if self.told.get("cut_after") == here:
            self.note("cut")
            self.request.cut()
        if self.told.get("die_after") == here:
            self.note("died")
            die_now()

    def acquire(self):
        self.options = checked_options(self.options)
        runner = SCHEDULER.acquire(self.model, self.options, self.keep_alive, self.request)
        self.load_ns = time.monotonic_ns() - self.began
        return runner

    def load_only(self, body):
        """The answer to a request without a prompt: load, or unload with keep_alive 0."""
        if self.keep_alive == 0:
            SCHEDULER.unload(self.model)
        else:
            SCHEDULER.release(self.acquire())
        reason = "unload" if self.keep_alive == 0 else "load"
        self.request.reply(200, dict({"model": self.shown, "created_at": stamp()}, **body, done=True,
                                     done_reason=reason))

    def tokens(self):
        """Yield the text, piece by piece.  Raises: Refused, Gone."""
        runner = self.acquire()
        try:
            while not runner.slots.acquire(timeout=0.02):
                if self.request.gone():
                    raise Gone()
            self.prompt_at = time.monotonic_ns()
            try:
                if self.form not in (None, "", "json") and not isinstance(self.form, dict):
                    raise Refused(500, 'invalid format: %s; expected "json" or a valid JSON Schema '
                                  'object' % json.dumps(json.dumps(self.form)))
                tokens, self.reason = self.words()
                self.strike()
                for token in runner.tokens(tokens, self.request.gone,
                                           float(self.told.get("delay", TOKEN_S))):
                    self.eval_count += 1
                    if not self.call:
                        yield token
                    self.strike()
                    if "crash_on_generate" in FAULTS:
                        die_now()
                    if once("stream_error"):
                        raise Refused(500, RUNNER_DIED)
                if self.call:
                    yield self.call
                self.note(self.reason)
            finally:
                runner.slots.release()
                self.note("gone")
        finally:
            SCHEDULER.release(runner)

    def words(self):
        """(tokens, finish reason)."""
        if self.call:
            return ["<tool_call>", self.call["name"]] + list(self.call["arguments"]), "stop"
        seen = "".join(" image of %d bytes" % len(raw) for raw in self.images)
        return answer_tokens(self.prompt + seen, self.options, self.form,
                             int(self.told.get("tokens", TOKENS)))

    @property
    def prompt_count(self):
        return len(self.prompt.split()) + 1 + 100 * len(self.images)

    def figures(self):
        now = time.monotonic_ns()
        found = {"total_duration": now - self.began, "load_duration": self.load_ns,
                 "prompt_eval_count": self.prompt_count, "prompt_eval_duration": 1000000,
                 "eval_count": self.eval_count, "eval_duration": now - self.prompt_at}
        return {name: value for name, value in found.items() if value}

    def native(self, stream, body, final=None):
        """Send the answer as /api does.  body: the text -> the field that carries it."""
        whole = []
        line = {"model": self.shown}
        for token in self.tokens():
            whole.append(token)
            if stream:
                self.request.send(json_line(dict(line, created_at=stamp(), **body(token),
                                                 done=False)), "application/x-ndjson")
        text = self.call or "".join(whole)
        last = dict(line, created_at=stamp(), **body("" if stream else text), done=True,
                    done_reason=self.reason, **(final or {}), **self.figures())
        if stream:
            self.request.send(json_line(last), "application/x-ndjson")
        else:
            self.request.reply(200, last)


def generate_route(request):
    fields = request.fields("GenerateRequest")
    answer = Answer(request, fields, fields["prompt"] or "", fields["model"] or "")
    answer.look_at(fields["images"])
    answer.need("generate")
    if fields["think"]:
        raise Refused(400, '"%s" does not support thinking' % fields["model"])
    if fields["suffix"]:
        raise Refused(400, "%s does not support insert" % answer.model.name.full)
    if not fields["prompt"]:
        return answer.load_only({"response": ""})
    context = None if fields["raw"] else {"context": list(range(1, answer.prompt_count + 1))}
    return answer.native(fields["stream"] is not False, lambda text: {"response": text}, context)


def message_text(messages):
    words = []
    for message in messages or ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content
                               if isinstance(part, dict))
        words.append(content or "")
    return "\n".join(words)


def chat_route(request):
    fields = request.fields("ChatRequest")
    if not fields["model"]:
        raise Refused(400, "model is required")
    answer = Answer(request, fields, message_text(fields["messages"]), fields["model"])
    for message in fields["messages"] or ():
        answer.look_at(message.get("images") if isinstance(message, dict) else ())
    answer.need("chat")
    if fields["think"]:
        raise Refused(400, '"%s" does not support thinking' % fields["model"])
    if fields["tools"] and "tools" not in answer.model.capabilities():
        raise Refused(400, "%s does not support tools" % answer.model.name.full)
    answer.use(fields["tools"], fields["messages"])

    def body(text):
        if isinstance(text, dict):
            return {"message": {"role": "assistant", "content": "", "tool_calls": [
                {"id": "call_b9b9b9b9", "function": dict({"index": 0}, **text)}]}}
        return {"message": {"role": "assistant", "content": text}}
    if not fields["messages"]:
        return answer.load_only(body(""))
    return answer.native(fields["stream"] is not False, body)


def vector(text, size):
    import hashlib
    raw = hashlib.shake_256(text.encode()).digest(size)
    numbers = [byte - 127.5 for byte in raw]
    norm = sum(number * number for number in numbers) ** 0.5
    return [round(number / norm, 8) for number in numbers]


def embedded(request, fields, texts):
    """(vectors, Answer); texts None: only load.  Raises: Refused."""
    name = wanted_name(fields["model"])
    try:
        STORE.find(name)
    except OSError:
        raise Refused(404, 'model "%s" not found, try pulling it first' % fields["model"])
    answer = Answer(request, dict(fields, format=None), " ".join(texts), fields["model"])
    runner = answer.acquire()
    try:
        if texts and "embedding" not in answer.model.capabilities():
            raise Refused(501, "This server does not support embeddings. Start it with "
                          "`--embeddings`")
        return [vector(text, fields.get("dimensions") or 64) for text in texts], answer
    finally:
        SCHEDULER.release(runner)


def input_texts(value):
    texts = [value] if isinstance(value, str) and value else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "invalid input type")
    return texts


def embed_route(request):
    fields = request.fields("EmbedRequest")
    texts = input_texts(fields["input"])
    vectors, answer = embedded(request, fields, texts)
    if not texts:
        return request.reply(200, {"model": fields["model"], "embeddings": []})
    return request.reply(200, {"model": fields["model"], "embeddings": vectors, "total_duration":
                               time.monotonic_ns() - answer.began, "load_duration": answer.load_ns,
                               "prompt_eval_count": answer.prompt_count})


def embeddings_route(request):
    fields = request.fields("EmbeddingRequest")
    texts = [fields["prompt"]] if fields["prompt"] else []
    try:
        vectors, _ = embedded(request, fields, texts)
    except Refused as refused:
        raise Refused(500 if refused.status == 501 else refused.status, refused.text)
    request.reply(200, {"embedding": vectors[0] if vectors else []})


# OpenAI's routes: another form of error, and what goes wrong within a stream is swallowed.

def openai_model(model):
    return {"id": model.name.short, "object": "model", "created": model.modified_ns // 10**9,
            "owned_by": model.name.parts[1]}


def v1_models(request):
    listed = [openai_model(model) for model in STORE.models()]
    request.reply(200, {"object": "list", "data": listed or None}, "application/json")


def v1_model(request):
    from urllib.parse import unquote
    text = unquote(request.path[len("/v1/models/"):])
    model = found_model(text, "model '%s' not found" % wanted_name(text).short)
    request.reply(200, dict(openai_model(model), id=text), "application/json")


def v1_options(fields):
    found = {"temperature": 1.0, "top_p": 1.0}
    for ours, theirs in (("num_predict", "max_tokens"), ("seed", "seed"), ("top_p", "top_p"),
                         ("temperature", "temperature")):
        if fields.get(theirs) is not None:
            found[ours] = fields[theirs]
    return found


def v1_send(request, answer, fields, head, choice):
    """choice(text, reason, first) -> the one choice of a chunk."""
    usage = {}
    if not fields["stream"]:
        text = (list(answer.tokens()) and answer.call) if answer.call else "".join(answer.tokens())
        usage = {"prompt_tokens": answer.prompt_count, "completion_tokens": answer.eval_count,
                 "total_tokens": answer.prompt_count + answer.eval_count}
        return request.reply(200, dict(head, choices=[choice(text, answer.reason, None)],
                                       usage=usage), "application/json")

    def send(value):
        request.send(b"data: " + json_line(value) + b"\n", "text/event-stream")
    first = True
    try:
        for token in answer.tokens():
            send(dict(head, choices=[choice(token, None, first)]))
            first = False
    except Refused:
        if first:
            raise
        send(dict(head, model="", choices=[choice("", None, False)]))
        return None
    send(dict(head, choices=[choice("", answer.reason, False)]))
    if (fields["stream_options"] or {}).get("include_usage"):
        usage = {"prompt_tokens": answer.prompt_count, "completion_tokens": answer.eval_count,
                 "total_tokens": answer.prompt_count + answer.eval_count}
        send(dict(head, choices=[], usage=usage))
    request.send(b"data: [DONE]\n\n", "")
    return None


def v1_head(kind, prefix, model):
    import random
    return {"id": "%s-%d" % (prefix, random.randrange(999)), "object": kind,
            "created": int(time.time()), "model": model, "system_fingerprint": "fp_ollama"}


def v1_images(content):
    """The base64 of the data: URLs.  Raises: Refused."""
    found = []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") == "image_url":
            address = part.get("image_url")
            address = address.get("url", "") if isinstance(address, dict) else address or ""
            match = re.match(r"^data:image/(?:jpeg|jpg|png|webp);base64,(.*)$", address, re.DOTALL)
            if not match:
                raise Refused(400, "invalid image input")
            found.append(match.group(1))
    return found


def v1_chat(request):
    fields = request.fields("ChatCompletionRequest")
    if not fields["messages"]:
        raise Refused(400, "[] is too short - 'messages'")
    fields["options"] = v1_options(fields)
    answer = Answer(request, fields, message_text(fields["messages"]), fields["model"] or "")
    for message in fields["messages"]:
        answer.look_at(v1_images(message.get("content") if isinstance(message, dict) else ""))
    answer.need("chat")
    answer.use(fields["tools"], fields["messages"])
    kind = "chat.completion.chunk" if fields["stream"] else "chat.completion"

    def choice(text, reason, first):
        reason = "tool_calls" if reason and answer.call else reason
        if isinstance(text, dict):
            said = {"role": "assistant", "content": "", "tool_calls": [
                {"id": "call_b9b9b9b9", "index": 0, "type": "function", "function": {
                    "name": text["name"], "arguments": json.dumps(text["arguments"])}}]}
            return {"index": 0, "message" if first is None else "delta": said,
                    "finish_reason": reason}
        if first is None:
            return {"index": 0, "message": {"role": "assistant", "content": text},
                    "finish_reason": reason}
        delta = dict({"role": "assistant"} if first else {}, **({"content": text} if text else {}))
        return {"index": 0, "delta": delta, "finish_reason": reason}
    v1_send(request, answer, fields, v1_head(kind, "chatcmpl", fields["model"]), choice)


def v1_completions(request):
    fields = request.fields("CompletionRequest")
    fields["options"] = v1_options(fields)
    answer = Answer(request, fields, fields["prompt"] or "", fields["model"] or "")
    answer.need("generate")
    v1_send(request, answer, fields, v1_head("text_completion", "cmpl", fields["model"]),
            lambda text, reason, _: {"text": text, "index": 0, "finish_reason": reason})


def v1_embeddings(request):
    fields = request.fields("OpenAIEmbedRequest")
    texts = input_texts(fields["input"])
    if not texts:
        raise Refused(400, "invalid input")
    vectors, answer = embedded(request, fields, texts)
    if fields["encoding_format"] == "base64":
        import base64
        vectors = [base64.b64encode(struct.pack("<%df" % len(one), *one)).decode()
                   for one in vectors]
    request.reply(200, {"object": "list", "data": [
        {"object": "embedding", "embedding": one, "index": index}
        for index, one in enumerate(vectors)], "model": fields["model"], "usage": {
            "prompt_tokens": answer.prompt_count, "total_tokens": answer.prompt_count}},
        "application/json")


def sent_events(request, answer, events):
    """A stream of named events: events(text) for each token, events(None) for the end, and
    events("") before the first.  What goes wrong in between is swallowed, as with the others."""
    def send(found):
        for body in found:
            request.send(b"event: " + body["type"].encode() + b"\ndata: " + json_line(body) + b"\n",
                         "text/event-stream")
    begun = False
    try:
        for token in answer.tokens():
            if not begun:
                begun = send(events("")) is None
            send(events(token))
    except Refused:
        if not begun:
            raise
        return
    send(events(None))


def v1_responses(request):
    fields = request.fields("ResponsesRequest")
    given = fields["input"] if isinstance(fields["input"], list) else [{"content": fields["input"]}]
    fields["options"] = {"num_predict": fields["max_output_tokens"]} if fields["max_output_tokens"] else {}
    text = "\n".join(filter(None, [fields["instructions"], message_text(given)]))
    answer = Answer(request, fields, text, fields["model"] or "")
    answer.need("chat")
    said = []

    def item(text, status="completed"):
        return {"id": "msg_1", "type": "message", "status": status, "role": "assistant", "content": [
            {"type": "output_text", "text": text, "annotations": [], "logprobs": []}]}

    def whole(status="completed"):
        done = status == "completed"
        return {"id": "resp_1", "object": "response", "created_at": int(time.time()), "status": status,
                "model": fields["model"], "output": [item("".join(said))] if done else [],
                "error": None, "incomplete_details": None, "instructions": fields["instructions"],
                "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0, "top_p": 1.0,
                "tool_choice": "auto", "tools": [], "usage": {
                    "input_tokens": answer.prompt_count, "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens": answer.eval_count, "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": answer.prompt_count + answer.eval_count} if done else None}
    if not fields["stream"]:
        said.extend(answer.tokens())
        return request.reply(200, whole(), "application/json")
    count = iter(range(10 ** 6))

    def events(token):
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        if token:
            said.append(token)
            found = [dict(place, type="response.output_text.delta", delta=token, logprobs=[])]
        elif token == "":
            found = [{"type": "response.created", "response": whole("in_progress")},
                     {"type": "response.output_item.added", "output_index": 0,
                      "item": dict(item("", "in_progress"), content=[])},
                     dict(place, type="response.content_part.added", part=item("")["content"][0])]
        else:
            text = "".join(said)
            found = [dict(place, type="response.output_text.done", text=text, logprobs=[]),
                     dict(place, type="response.content_part.done", part=item(text)["content"][0]),
                     {"type": "response.output_item.done", "output_index": 0, "item": item(text)},
                     {"type": "response.completed", "response": whole()}]
        return [dict(body, sequence_number=next(count)) for body in found]
    return sent_events(request, answer, events)


def v1_messages(request):
    fields = request.fields("MessagesRequest")
    if not fields["max_tokens"]:
        raise Refused(400, "max_tokens is required")
    fields["options"] = {"num_predict": fields["max_tokens"]}
    answer = Answer(request, fields, message_text(fields["messages"]), fields["model"] or "")
    answer.need("chat")

    def message(text, reason):
        content = [{"type": "text", "text": text}] if text else []
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": fields["model"],
                "content": content, "stop_reason": reason, "stop_sequence": None, "usage": {
                    "input_tokens": answer.prompt_count, "output_tokens": answer.eval_count}}
    reasons = {"stop": "end_turn", "length": "max_tokens"}
    if not fields["stream"]:
        text = "".join(answer.tokens())
        return request.reply(200, message(text, reasons[answer.reason]), "application/json")

    def events(token):
        if token:
            return [{"type": "content_block_delta", "index": 0, "delta": {
                "type": "text_delta", "text": token}}]
        if token == "":
            # What it says of the prompt here is an estimate, a quarter of its length.
            begun = message("", None)
            begun["usage"] = {"input_tokens": len(answer.prompt) // 4, "output_tokens": 0}
            return [{"type": "message_start", "message": begun},
                    {"type": "content_block_start", "index": 0, "content_block": {
                        "type": "text", "text": ""}}]
        return [{"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": reasons[answer.reason],
                                                    "stop_sequence": None},
                 "usage": message("", None)["usage"]}, {"type": "message_stop"}]
    return sent_events(request, answer, events)


def not_here(request):
    list(request.pieces())
    raise Refused(503, "account unavailable")


ROUTES = (
    ("HEAD GET", r"/", home_page), ("HEAD GET", r"/api/version", version),
    ("GET", r"/api/status", cloud_status), ("HEAD GET", r"/api/tags", tags),
    ("GET", r"/api/ps", processes), ("POST", r"/api/show", show), ("POST", r"/api/pull", pull_route),
    ("POST", r"/api/push", push_route), ("POST", r"/api/create", create_route),
    ("POST", r"/api/copy", copy_route), ("DELETE", r"/api/delete", delete_route),
    ("HEAD POST", r"/api/blobs/[^/]+", blob_route), ("POST", r"/api/generate", generate_route),
    ("POST", r"/api/chat", chat_route), ("POST", r"/api/embed", embed_route),
    ("POST", r"/api/embeddings", embeddings_route), ("POST", r"/api/me", not_here),
    ("POST", r"/v1/chat/completions", v1_chat), ("POST", r"/v1/completions", v1_completions),
    ("POST", r"/v1/embeddings", v1_embeddings), ("GET", r"/v1/models", v1_models),
    ("POST", r"/v1/responses", v1_responses), ("POST", r"/v1/messages", v1_messages),
    ("GET", r"/v1/models/.+", v1_model),
)


def host_allowed(text):
    host = re.sub(r":\d+$", "", text).strip("[]").lower()
    if host in ("", "localhost", socket.gethostname().lower()) or \
            host.endswith((".localhost", ".local", ".internal")):
        return True
    import ipaddress
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


def origin_allowed(text):
    return not text or re.match(
        r"^(https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:\d+)?|(app|file|tauri|vscode-\w+)://.*)$",
        text) is not None


def route(request):
    if not origin_allowed(request.headers.get("origin")) or (
            LOOPBACK and not host_allowed(request.headers.get("host", ""))):
        return request.reply(403)
    known = [(methods.split(), handler) for methods, pattern, handler in ROUTES
             if re.match(pattern + "$", request.path)]
    for methods, handler in known:
        if request.method in methods:
            return handler(request)
    if known:
        return request.reply(405, b"405 method not allowed", "text/plain",
                             Allow=", ".join(known[0][0]))
    return request.reply(404, b"404 page not found", "text/plain")


def refuse(request, refused):
    if request.chunked:  # it has begun: a last line says it, the status cannot
        request.send(json_line({"error": refused.text}), "")
    elif request.path.startswith("/v1/"):
        kind = {400: "invalid_request_error", 404: "not_found_error"}.get(refused.status, "api_error")
        request.reply(refused.status, {"error": {"message": refused.text, "type": kind,
                                                 "param": None, "code": None}}, "application/json")
    else:
        request.reply(refused.status, {"error": refused.text})


def serve_one(request):
    """False where the connection is to be closed."""
    hang_s = FAULTS.get("hang_http")
    if hang_s is not None and time.monotonic() - STARTED > hang_s:
        threading.Event().wait()
    try:
        try:
            route(request)
        except Refused as refused:
            refuse(request, refused)
        if not request.body_read:
            for _ in request.pieces() if not request.close else ():
                pass
        request.finish()
    except Gone:
        request.status = request.status or 499
        return False
    except OSError:
        return False
    finally:
        request.log()
    return not request.close


def serve_connection(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as stream:
        try:
            while True:
                request = Request(connection, stream)
                if not request.read_head() or not serve_one(request):
                    return
        except OSError:
            pass  # the client left


# ---------------------------------------------------------------------- the program

def listen_address():
    """(host, port) of OLLAMA_HOST."""
    text = ENV.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, _, rest = text.rpartition("://")
    rest = rest.partition("/")[0]
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    match = re.match(r"^(\[[^\]]*\]|[^:]*)(?::(\d+))?$", rest)
    if not match:
        return rest.strip("[]"), default
    port = int(match.group(2)) if match.group(2) else default
    return match.group(1).strip("[]") or "127.0.0.1", port if port < 65536 else default


LOOPBACK = listen_address()[0] in ("localhost", "::1") or listen_address()[0].startswith("127.")
STARTED = time.monotonic()


def fail(text):
    write_line(sys.stderr, "Error: " + text)
    sys.exit(1)


def make_key():
    folder = os.path.join(ENV["HOME"], ".ollama")
    path = os.path.join(folder, "id_ed25519")
    if os.path.exists(path):
        return
    os.makedirs(folder, exist_ok=True)
    write_line(sys.stderr, "Couldn't find '%s'. Generating new private key." % path)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
        handle.write("not a key: this is a stand-in\n")
    write_line(sys.stderr, "Your new public key is: \n\nssh-ed25519 AAAAnone\n")


def crashes_now():
    if "crash_at_start" not in FAULTS:
        return False
    if FAULTS["crash_at_start"] is None:
        return True
    path = os.path.join(ENV["HOME"], ".fake-ollama-starts")
    with open(path, "ab") as handle:
        handle.write(b".")
    return os.path.getsize(path) <= FAULTS["crash_at_start"]


def bind():
    host, port = listen_address()
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0].lower()
        return fail("listen tcp %s:%d: bind: %s" % (host, port, reason))


def announce(listener):
    host, port = listener.getsockname()[:2]
    shown = {name: value for name, value in sorted(ENV.items()) if name.startswith("OLLAMA_")}
    log("routes.go:1951", "server config", env="map[%s]" % " ".join(
        "%s:%s" % pair for pair in shown.items()))
    log("routes.go:1953", "Ollama cloud disabled: %s" % (
        "true" if ENV.get("OLLAMA_NO_CLOUD") else "false"))
    if not ENV.get("OLLAMA_NOPRUNE"):
        total, removed = STORE.prune()
        log("images.go:919", "total blobs: %d" % total)
        log("images.go:926", "total unused blobs removed: %d" % removed)
    log("routes.go:2008", "Listening on %s:%d (version %s)" % (host, port, VERSION))
    log("runner.go:60", "discovering available GPUs...")
    log("types.go:50", "inference compute", id="cpu", library="cpu", total="23.5 GiB",
        available="23.1 GiB")
    log("routes.go:2058", "vram-based default context", total_vram="0 B", default_num_ctx=4096)


def accept(listener):
    time.sleep(FAULTS.get("slow_start") or 0)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve_connection, args=(connection,), daemon=True).start()


def serve():
    if not ENV.get("HOME"):
        fail("$HOME is not defined")
    make_key()
    if crashes_now():
        fail("could not initialise: this stand-in was told to crash at start")
    for folder in (STORE.blobs, STORE.manifests):
        os.makedirs(folder, exist_ok=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, (lambda *_: None) if "ignore_sigterm" in FAULTS
                      else lambda *_: stop.set())
    listener = bind()
    announce(listener)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    crash_s = FAULTS.get("crash_while_serving", -1)
    if not stop.wait(None if crash_s == -1 else crash_s or 1):
        write_line(sys.stderr, "fatal error: unexpected signal during runtime execution")
        die_now()
    listener.close()
    if "orphan_runner" not in FAULTS:
        SCHEDULER.end()
    os._exit(0)  # connections are closed at once, nothing is drained


def main(words):
    if words[:1] == ["runner"]:
        runner_main(words[1:])
    elif words[:1] in (["-v"], ["--version"]):
        try:
            socket.create_connection(listen_address(), 1).close()
            print("ollama version is " + VERSION)
        except OSError:
            print("Warning: could not connect to a running Ollama instance\n"
                  "Warning: client version is " + VERSION)
    elif words[:1] in (["serve"], ["start"]):
        serve()
    else:
        fail("unknown command %s for \"ollama\"" % json.dumps(" ".join(words)))


if __name__ == "__main__":
    main(sys.argv[1:])
