"""What a program does to its machine, as strace saw it: files, folders, sockets, programs, signals, and
what was sent; and, told by the interpreter's own audit hook, its threads' names."""
import collections
import os
import re
import time

# One thing that was done.  kind: read, look, write, make (a folder), rename, remove, mode, bind, listen,
# name (which port a bind to any free one got), connect, run, thread, signal, power (what changes rights or the system); by: the program, with `agent`
# for ours; what: a path, ADDRESS:PORT, a program or a name; mode: of a file or folder that was made;
# more: where a rename leads, (argv, environment) of a run.
Act = collections.namedtuple("Act", "at_s life by kind what mode more", defaults=(None, None))
# Bytes that left the process: to a path, a peer (ADDRESS:PORT) or "" where it is a pipe.
Sent = collections.namedtuple("Sent", "at_s life by to data")

POWERS = ("ptrace", "mount", "umount2", "chroot", "pivot_root", "unshare", "setns", "setuid", "setgid",
          "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset", "bpf", "init_module",
          "finit_module", "reboot", "swapon", "settimeofday", "clock_settime", "sethostname", "keyctl",
          "perf_event_open", "personality", "setpriority", "ioprio_set", "sched_setscheduler",
          "sched_setaffinity", "mknod", "mknodat", "process_vm_readv", "process_vm_writev", "setxattr",
          "socketpair")
LOOKS = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink",
         "readlinkat", "statfs")
CALLS = ("open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,"
         "symlink,symlinkat,chmod,fchmod,fchmodat,chown,lchown,fchown,fchownat,truncate,umask,execve,execveat,"
         "fork,vfork,clone,clone3,socket,bind,listen,getsockname,connect,accept4,sendto,sendmsg,write,writev,pwrite64,"
         "kill,tgkill,tkill,pidfd_send_signal,memfd_create," + ",".join(POWERS + LOOKS))

# Each thread that Python starts is looked for as a file, which strace sees.
HOOK = '''import os, threading
def told(start):
    def tell_and_start(function, *given, **more):
        os.access("/b9-thread/%s" % getattr(function, "__self__", threading.current_thread()).name, os.F_OK)
        return start(function, *given, **more)
    return tell_and_start
for name in ("_start_new_thread", "_start_joinable_thread"):
    if hasattr(threading, name):
        setattr(threading, name, told(getattr(threading, name)))
'''


def write_hook(folder):
    """For PYTHONPATH.  Returns: the folder."""
    os.makedirs(folder)
    with open(os.path.join(folder, "sitecustomize.py"), "w") as handle:
        handle.write(HOOK)
    return folder


def command(strace, output, argv):
    """argv under strace, which is no parent of it: pid and exit status are the program's own."""
    return [strace, "-D", "-ff", "--seccomp-bpf", "-qqq", "-ttt", "-y", "-v", "-s", "100000", "-o", output, "-e",
            "trace=" + ",".join("?" + name for name in CALLS.split(",")), "-e", "signal=none", *argv]


def wait_ended(within_s=20.0):
    """Until every strace of this process namespace has written its last line."""
    until = time.monotonic() + within_s
    while "strace" in map(_program_of, filter(str.isdigit, os.listdir("/proc"))):
        assert time.monotonic() < until, "a program under strace did not end"
        time.sleep(0.02)


def _program_of(pid):
    """"" of one that ended."""
    try:
        with open("/proc/%s/cmdline" % pid) as handle:
            return os.path.basename(handle.read().partition("\0")[0])
    except OSError:
        return ""


_LINE = re.compile(r"^([0-9.]+) (\w+)\((.*)\) += (-?[0-9]+|0x[0-9a-f]+|\?)(<[^>]*>)?(?: (E\w+))?")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FD_PATH = re.compile(r"^(?:AT_FDCWD|[0-9]+)<([^>]*)>")
_INODE = re.compile(r"<(socket:\[[0-9]+\])>")


def text(quoted):
    """The text between strace's quotes, as Latin-1."""
    return quoted.encode("latin-1", "replace").decode("unicode_escape") if "\\" in quoted else quoted


def strings(arguments):
    return [text(found) for found in _STRING.findall(arguments)]


def address_of(arguments):
    """ADDRESS:PORT, or the path of a unix socket; None for what is none of both."""
    port = re.search(r"sin6?_port=htons\(([0-9]+)\)", arguments)
    if port:
        host = re.search(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', arguments)
        return "%s:%s" % (host.group(1) or "[%s]" % host.group(2), port.group(1))
    path = re.search(r'sun_path=(@?)"((?:[^"\\]|\\.)*)"', arguments)
    return "unix:" + path.group(1) + text(path.group(2)) if path else None


class Trace:
    """All acts of one life.  output: what strace was given; is_agent(argv): whether that is ours."""

    def __init__(self, output, life, is_agent, umask=0o022):
        self.life, self._is_agent, self._output = life, is_agent, output
        self.acts, self.sent, self._peers, self._kinds, self._bound = [], [], {}, {}, {}
        folder, name = os.path.split(output)
        self._files = {other.rpartition(".")[2]: os.path.join(folder, other) for other in os.listdir(folder)
                       if other.startswith(name + ".")}
        self._children = set()
        first = min(filter(self._began, self._files), key=self._began)
        self._walk(first, "agent", umask)
        assert not set(self._files) - self._children - {first}, "threads of no parent"

    def _began(self, pid):
        with open(self._files[pid], encoding="latin-1") as handle:
            return float(handle.readline().split(" ")[0] or 0)

    def _walk(self, pid, by, umask):
        """One thread, and then those it began."""
        with open(self._files[pid], encoding="latin-1") as handle:
            for line in handle:
                match = _LINE.match(line)
                if not match:
                    continue
                at_s, call, arguments, result, where, error = match.groups()
                if call in ("fork", "vfork", "clone", "clone3"):
                    if result in self._files:
                        self._children.add(result)
                        self._walk(result, by, umask)
                elif call == "umask":
                    umask = int(arguments, 8)
                elif call in ("execve", "execveat"):
                    by = self._run(float(at_s), by, arguments, error)
                else:
                    self._see(float(at_s), by, call, arguments, (where or "")[1:-1], error, umask)

    def _run(self, at_s, by, arguments, error):
        path, rest = re.match(r'"((?:[^"\\]|\\.)*)", \[(.*)\]$', arguments).groups()
        argv, _, environment = rest.partition("], [")
        argv, name = strings(argv), os.path.basename(text(path))
        ours = self._is_agent(argv)
        self.acts.append(Act(at_s, self.life, by, "run", "agent" if ours else name, error,
                             (argv, strings(environment))))
        return by if error else "agent" if ours else name

    def _see(self, at_s, by, call, arguments, where, error, umask):
        def add(kind, what, mode=None, more=None):
            self.acts.append(Act(at_s, self.life, by, kind, what, mode, more))
        if call in ("open", "openat", "openat2", "creat"):
            flags = re.search(r"O_[A-Z_|]+", arguments)
            flags = "O_WRONLY|O_CREAT" if call == "creat" else flags.group(0) if flags else ""
            path = where if where and not error else self._path(arguments)
            if re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", flags):
                mode = re.search(r", (0[0-7]*)\)?$", arguments) if "O_CREAT" in flags else None
                add("write", path, int(mode.group(1), 8) & ~umask if mode else None, error)
            else:
                add("read", path, None, error)
        elif call in LOOKS:
            path = self._path(arguments)
            if path.startswith("/b9-thread/"):
                add("thread", path[len("/b9-thread/"):])
            elif strings(arguments) != [""]:
                add("look", path)
        elif call in ("mkdir", "mkdirat"):
            if not error:
                add("make", self._path(arguments), int(re.search(r"(0[0-7]*)$", arguments).group(1), 8) & ~umask)
        elif call.startswith(("rename", "link", "symlink")):
            if not error:
                from_, to = strings(arguments)[:2]
                add("rename", from_, None, to)
        elif call.startswith(("unlink", "rmdir")):
            if not error:
                add("remove", self._path(arguments))
        elif call.startswith(("chmod", "fchmod")):
            path = self._path(arguments) if _STRING.search(arguments) else _FD_PATH.match(arguments).group(1)
            add("mode", path, int(re.search(r", (0[0-7]*)(?:, 0)?$", arguments).group(1), 8))
        elif call.startswith(("kill", "tgkill", "tkill", "pidfd_send")):
            add("signal", re.search(r"(?:SIG\w+|, 0)", arguments).group(0).strip(", "))
        elif call in POWERS or call.startswith(("chown", "lchown", "fchown", "truncate")):
            if call != "socketpair":
                add("power", "%s(%s)" % (call, arguments[:120]))
        else:
            self._see_socket(add, at_s, by, call, arguments, where)

    def _path(self, arguments):
        folder = _FD_PATH.match(arguments)
        found = strings(arguments)
        path = found[0] if found else ""
        return os.path.normpath(os.path.join(folder.group(1), path)) if folder else path

    def _see_socket(self, add, at_s, by, call, arguments, where):
        inode = _INODE.search(arguments)
        inode = inode.group(1) if inode else ""
        if call == "socket":
            self._kinds[where] = "udp" if "SOCK_DGRAM" in arguments else "tcp"
        elif call in ("bind", "connect"):
            address = address_of(arguments)
            if address:
                (self._bound if call == "bind" else self._peers)[inode] = address
                add(call, address, None, self._kinds.get(inode, "tcp"))
        elif call == "getsockname":  # which free one it was given
            if self._bound.get(inode, "").endswith(":0"):
                self._bound[inode] = address_of(arguments)
                add("name", self._bound[inode])
        elif call == "listen":
            add("listen", self._bound.get(inode, "?"))
        elif call in ("write", "writev", "pwrite64", "sendto", "sendmsg"):
            target = _FD_PATH.match(arguments)
            to = target.group(1) if target else ""
            if inode:
                to = address_of(arguments) or self._peers.get(inode, "a client")
                if "sa_family" in arguments and address_of(arguments):
                    add("connect", to, None, "send")
            self.sent.append(Sent(at_s, self.life, by, to, "".join(strings(arguments))))
