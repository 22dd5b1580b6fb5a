"""The cases that the SDK and wandb-restore are compared in, and the one table of deliberate differences.

In the environment and in files, @BASE@ is the stand-in's base URL, @NETLOC@ and @PORT@ its host and port, @KEY@ the key that it
takes, @PROXY@ its proxy, @CA@ its CA file, @HERE@ the working directory, @HOME@ the home directory.
"""
from __future__ import annotations

import dataclasses

# ---- what differs on purpose: the README's section "Differences from the Python SDK" repeats these rows ---------------------

DIFFERENCES = {  # what differs -> why
    "The address of a run in the browser is a run path": "people paste it; the SDK refuses addresses",
    "A query or fragment behind a run path is dropped": "no run id has a `?` or `#` in it",
    "The path of a sweep is refused": "the SDK takes the sweep's id for a run's",
    "Without a run path, `WANDB_RUN_ID`, `run_id` in a settings file or the resume file names the run": "a job that was started again finds its own checkpoint",
    "An entity of white space alone counts as empty": "the account's default entity is used",
    "An entity with a slash or a line break is refused": "no account has one; the service need not be asked",
    "`WANDB_MODE=offline`, `dryrun` and `disabled` are honoured": "no request is made; a local copy is opened",
    "Extra headers go to the service alone": "they may hold credentials; storage refuses a request with a signature and an `Authorization`",
    "No key goes to storage, even when a download is retried": "the SDK sends it to another port of the service's host, and storage refuses the request",
    "Without a key a private run is not found": "the service is asked, because the run may be public; the SDK ends before",
    "A public run needs no key": "the service does not ask for one",
    "White space around a key is no part of it": "mounted secrets end with a newline",
    "A local copy needs no key, no server and no run": "compute nodes without a network open what the login node fetched",
    "An unknown key or a bad value in a settings file leaves the other keys valid": "the SDK discards the local and the global file",
    "A bare `%` in a settings file is taken as it stands": "the SDK ends with an error of its parser",
    "`$WANDB_DIR/wandb/settings` counts, before `./wandb/settings`": "`wandb offline` writes it there",
    "A netrc file may end within a macro or a quoted word": "the entries in it are whole; the SDK ignores the file",
    "A name that no file can have is refused at once": "absolute, with `..`, or too long for the file system: nothing is asked, read or written",
    "A name with `.` as a part is also looked for without it": "`./model.h5` comes from completion in a shell",
    "A symbolic link in the target's place is replaced by the file": "the SDK writes through it",
    "A root may lead through a directory that is not there": "`new/../ckpt` works although `new` does not exist",
    "Size and md5 are checked": "the SDK keeps whatever arrived",
    "A field that the service leaves out is unknown": "the SDK ends with an `AttributeError` or `KeyError`",
    "A file's address may be relative, or `directUrl` alone": "a server behind a proxy may not know its own name",
    "A file without a node is not found": "the SDK ends with an `IndexError`",
    "`REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` name the authorities, too": "most Python programs take them",
    "A netrc entry for any name of the public service counts for each of them": "they are one service; the SDK accepts only `api.wandb.ai` for `api.forge.coreweave.com`",
    "The key goes to each name of the public service, in any case, with and without its port": "the SDK compares host and port as text, and then downloads without the key",
}

# ---- what the stand-ins serve -----------------------------------------------------------------------------------------------

KEY = "standin00123456789abcdef0123456789abcdef0123"
MD5_OF_OTHER = "mZFLkyvTelC5g8XnyQrpOw=="
# A JWT whose claims say nothing: the stand-in compares its text.
TOKEN = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZXN0In0.c2lnbmF0dXJl"

RUN_NAMES = """
    e/p/r dflt/p/r dflt/proj/r e/proj/r ent/p/r ent/proj/r dflt/e/p ent/e/p e/p/r:1 dflt/p/a:b ent/p/a:b dflt/e:x/r ent/e:x/r
    dflt/runs/r ent/runs/r e/runs/r e/p/R E/P/R dflt/proj/runs ent/proj/runs dflt/proj/sweeps dflt/p/runs e/p/é e/p/r-1_2.3
    fileent/fileproj/r fileent/proj/r ent/fileproj/r globalent/globalproj/r fileent/globalproj/r fileent/p/r dflt/fileproj/r
    dflt/globalproj/r globalent/fileproj/r globalent/p/r globalent/proj/r
""".split() + ["e/p/r s", "my team/my proj/r"]

FILES = {
    "d/b.txt": "b\n", "d/e/f/deep.bin": "deep", "empty": "", "my file.txt": "space", " lead": "lead", "trail ": "trail",
    "100%": "percent",
    "a%20b.txt": "percent-encoded", "a+b": "plus", "a&b=c": "ampersand", "a;b,c": "semicolon", "a#b": "hash",
    "naïve/ünïcode.txt": "unicode",
    "日本語.txt": "japanese", "😀": "astral", "e\u0301": "combining", "quo'te\"s": "quotes", "br[a]ck{e}ts": "brackets",
    "$HOME": "dollar",
    "~": "tilde", "~/x": "tilde directory", "-dash": "dash", ".hidden": "hidden", "..two": "two dots", "...": "three dots",
    "d/..two/x": "inner two dots",
    "a\\b": "backslash", "C:/x": "drive", "a:b": "colon", "con": "device", "tab\there": "tab", "d//g.txt": "two slashes",
    "./dot": "dot",
    "d/./dot": "inner dot", "/abs": "absolute", "../up": "parent", "d/../up": "inner parent", "d/": "trailing slash",
    ".": "only dot", "..": "only parent",
    "n" * 255: "longest", "media/images/x_1_abc.png": "\x89PNG", "model-best.h5": "weights", "output.log": "line\r\nline\n",
    "crlf.txt": "a\r\nb\r\n",
    "wandb-summary.json": "{}", "files": "files", "run": "run", "null": "null", "0": "zero", "a=b": "equals", "@x": "at",
    "a!b": "bang", "(x)": "round",
    "a|b": "pipe", "<a>": "angle", "`x`": "tick", "^": "caret", "file.tar.gz": "gz", "UPPER.TXT": "upper", "upper.txt": "lower",
}

NODES = {  # names of files in e/nodes/r -> what their nodes say
    "md5-base64": {}, "md5-hex": {"md5_as": "hex"}, "md5-hex-upper": {"md5": "900150983CD24FB0D6963F7D28E17F72"},
    "md5-null": {"md5": None},
    "md5-absent": {"absent": ["md5"]}, "md5-junk": {"md5": "XXX"}, "md5-empty": {"md5": ""}, "md5-short": {"md5": "AAAA"},
    "md5-wrong": {"md5": MD5_OF_OTHER},
    "md5-zero": {"md5": "0"}, "md5-zeros": {"md5": "00"}, "md5-unpadded": {"md5": "kAFQmDzST7DWlj99KOF/cg"},
    "md5-spaces": {"md5": " kAFQmDzST7DWlj99KOF/cg== "},
    "md5-urlsafe": {"md5": "kAFQmDzST7DWlj99KOF_cg=="}, "md5-long": {"md5": "A" * 400}, "md5-hex-wrong": {"md5": "0" * 32},
    "size-string": {"sizeBytes": "3"}, "size-null": {"sizeBytes": None}, "size-absent": {"absent": ["sizeBytes"]},
    "size-zero": {"sizeBytes": 0},
    "size-less": {"sizeBytes": 2}, "size-more": {"sizeBytes": 4}, "nothing-known": {"md5": None, "sizeBytes": None},
    "size-zero-no-md5": {"sizeBytes": 0, "md5": None}, "size-more-no-md5": {"sizeBytes": 4, "md5": None},
    "size-null-junk-md5": {"sizeBytes": None, "md5": "XXX"},
    "updated-null": {"updatedAt": None}, "updated-other": {"updatedAt": "2024-01-02T03:04:05"},
    "zero-updated-null": {"md5": "0", "updatedAt": None},
    "type-empty": {"mimetype": ""}, "type-html": {"mimetype": "text/html"}, "reference": {"url": "s3://bucket/key",
        "directUrl": "s3://bucket/key"},
    "reference-gs": {"url": "gs://bucket/key", "directUrl": "gs://bucket/key"}, "url-empty": {"url": ""},
    "url-relative": {"url": "/files/e/nodes/r/md5-base64"},
    "url-file": {"url": "file:///etc/hostname"}, "url-words": {"url": "not an address"}, "direct-empty": {"directUrl": ""},
}


def runs():
    """The content of the file for wandb-stand-in --runs."""
    served = {name: {"files": {"a.txt": {"text": name}}} for name in RUN_NAMES}
    served["e/p/r"]["files"].update({name: {"text": text} for name, text in FILES.items()})
    served["e/p/r"]["files"]["big.bin"] = {"generate": 9_000_001}
    served["e/empty/r"] = {"files": {}}
    served["e/public/r"] = {"public": True, "files": {"a.txt": {"text": "public"}}}
    served["e/nodes/r"] = {"files": {name: {"text": "abc", **node} for name, node in NODES.items()}}
    return served


SERVERS = {  # name -> arguments of wandb-stand-in
    "plain": ["--plain"],
    "tls": [],
    "prefix": ["--plain", "--prefix", "/wandb"],
    "no default entity": ["--plain", "--default-entity", ""],
    "no node": ["--plain", "--no-node-for-missing"],
    "relative": ["--plain", "--redirect", "relative"],
    "chain": ["--plain", "--redirect", "chain"],
    "direct": ["--plain", "--redirect", "none"],
    "loop": ["--plain", "--redirect", "loop"],
    "chunked": ["--plain", "--fault", "storage:chunked"],
    "until close": ["--plain", "--fault", "storage:until-close"],
    "status 403": ["--plain", "--fault", "storage:status=403"],
    "status 404": ["--plain", "--fault", "storage:status=404"],
    "graphql 401": ["--plain", "--fault", "graphql:status=401"],
    "graphql 403": ["--plain", "--fault", "graphql:status=403"],
    "graphql errors": ["--plain", "--fault", "graphql:errors=permission denied"],
    # wandb-restore comes first: it makes one request of each kind, and after the failure another one. The third is the SDK's.
    "storage 503 once": ["--plain", "--fault", "storage#1:status=503", "--fault", "storage#3:status=503"],
    "graphql 503 once": ["--plain", "--fault", "graphql#1:status=503", "--fault", "graphql#3:status=503"],
}
PUBLIC_NAMES = ["api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com", "wandb.ai", "api.qa.wandb.ai",
    "api.qa.forge.coreweave.com",
                "wandb.example.test"]
for _name in ("api.wandb.ai", "api.forge.coreweave.com", "api.qa.forge.coreweave.com", "wandb.example.test"):
    SERVERS[_name] = ["--proxy", "--service-url", f"https://{_name}"] + [word for host in PUBLIC_NAMES for word in ("--host",
        host)]


@dataclasses.dataclass
class Case:
    group: str
    title: str
    name: str | None = "a.txt"
    run_path: str | None = "e/p/r"
    replace: bool | None = None
    root: str | None = None
    server: str = "plain"
    environment: dict = dataclasses.field(default_factory=dict)  # None removes a variable
    here: dict = dataclasses.field(default_factory=dict)  # files below the working directory; None: a directory
    home: dict = dataclasses.field(default_factory=dict)  # files below the home directory
    call: str = "restore"  # of the SDK: wandb.restore, File.download, or list for Run.files()
    differs: tuple | None = None  # (row of DIFFERENCES, outcome of the SDK, outcome of wandb-restore); see `differ`


CASES: list[Case] = []


def add(group, title, **given):
    CASES.append(Case(group, title, **given))


# ---- run paths ----------------------------------------------------------------------------------------------------------------

PATHS = [
    "e/p/r", "/e/p/r", "e/p/r/", "/e/p/r/", "//e/p/r//", "e/p/runs/r", "/e/p/runs/r", "e/p/sweeps/r", " e / p / r ",
    "\te/p/r\n", "e/p/r ", "e /p/r", "e/p: r",
    "e/p:r", "e/p:r:1", "e/p/r:1", "p/r", "p:r", "/p/r", "p:a:b", "p / r", "p : r", "r", "/r", "r/", " r ", "/runs/r", "runs/r",
    "/sweeps/r", "e:x/r",
    "e/p/", "e/p", "e/runs/r", "e/sweeps/r", "e/p/runs/", "runs/runs/r", "e/p/R", "E/P/R", "e/p/é", "e/p/r s",
    "my team/my proj/r", "e/p/r-1_2.3",
    "", " ", "/", ":", "/ / /", "e/p:", ":r", "e//r", "//r", "e/p//r", "e/:r", "e/p/q/r", "e/p/runs/r/x", "a/b/c/d/e", "e/ /r",
    "e/p/r/files", "e/p/missing", "e/missing/r",
    "missing/p/r", "e/p/runs/r/files/a.txt", "e/p/r/overview", "e/p/runs/r/overview", "https://wandb.ai/e/p/runs/r",
    "wandb.ai/e/p/runs/r", "https://forge.coreweave.com/wandb/e/p/runs/r",
    "e/p/r?nw=x", "e/p/runs/r?nw=nwuser", "e/p/r#x", "e\\p\\r", "e/p/%72", "e/p/..", "../p/r", "e/p/r\u00a0",
    "e\u3000/ \u2003p\u2028/\x85r", "\u1680e/p/r", "e/p/r\u200b", "e|p|r",
]
for _path in PATHS:
    add("run path", f"{_path!r}", run_path=_path)
    add("run path", f"{_path!r}, entity and project in the environment", run_path=_path, environment={"WANDB_ENTITY": "ent",
        "WANDB_PROJECT": "proj"})
for _path in ("r", "p/r", "p:r", "e/p/r", "runs/r"):
    add("run path", f"{_path!r}, the account has no default entity", run_path=_path, server="no default entity",
        environment={"WANDB_PROJECT": "proj"})
    add("run path", f"{_path!r}, the account has no default entity, the environment has", run_path=_path,
        server="no default entity",
        environment={"WANDB_ENTITY": "ent", "WANDB_PROJECT": "proj"})

# ---- environment --------------------------------------------------------------------------------------------------------------

for _path in ("r", "p/r"):
    for _value in ("ent", " ent", "ent ", "\tent\n", "", " ", "missing", "e/n", "Ent"):
        add("environment", f"WANDB_ENTITY={_value!r}, run path {_path!r}", run_path=_path, environment={"WANDB_ENTITY": _value,
            "WANDB_PROJECT": "proj"})
for _value in ("proj", " proj", "proj ", "\tproj\n", "", " ", "missing", "p/q", "Proj"):
    add("environment", f"WANDB_PROJECT={_value!r}", run_path="r", environment={"WANDB_PROJECT": _value})
add("environment", "WANDB_RUN_ID, no run path", run_path=None, environment={"WANDB_ENTITY": "e", "WANDB_PROJECT": "p",
    "WANDB_RUN_ID": "r"})
add("environment", "WANDB_RUN_ID, a run path of another run", run_path="e/proj/r", environment={"WANDB_ENTITY": "e",
    "WANDB_PROJECT": "p", "WANDB_RUN_ID": "R"})
add("environment", "WANDB_RUN_ID, an empty run path", run_path="", environment={"WANDB_ENTITY": "e", "WANDB_PROJECT": "p",
    "WANDB_RUN_ID": "r"})
add("environment", "nothing set, no run path", run_path=None)
add("environment", "resume file, WANDB_RESUME=auto, no run path", run_path=None, environment={"WANDB_ENTITY": "e",
    "WANDB_PROJECT": "p", "WANDB_RESUME": "auto"},
    here={"wandb/wandb-resume.json": '{"run_id": "r"}'})
for _mode in ("online", "offline", "dryrun", "disabled", "run", "shared"):
    add("environment", f"WANDB_MODE={_mode}", environment={"WANDB_MODE": _mode})
for _mode in ("offline", "disabled"):
    add("environment", f"WANDB_MODE={_mode}, a local copy", environment={"WANDB_MODE": _mode}, here={"a.txt": "local"})
add("environment", "extra headers", environment={"WANDB_X_EXTRA_HTTP_HEADERS": '{"X-Team": "a"}'})
add("environment", "extra headers, the older name", environment={"WANDB__EXTRA_HTTP_HEADERS": '{"X-Team": "a"}'})
add("environment", "extra headers with Authorization",
    environment={"WANDB_X_EXTRA_HTTP_HEADERS": '{"Authorization": "Basic eDp5"}'})
add("environment", "HTTP_PROXY that is not there, server on this machine", environment={"HTTP_PROXY": "http://127.0.0.1:1"})
add("environment", "WANDB_USERNAME and WANDB_USER_EMAIL", environment={"WANDB_USERNAME": "somebody",
    "WANDB_USER_EMAIL": "somebody@example.test"})
add("environment", "WANDB_HTTP_TIMEOUT=60", environment={"WANDB_HTTP_TIMEOUT": "60"})
add("environment", "WANDB_SILENT=true", environment={"WANDB_SILENT": "true"})
add("environment", "WANDB_CACHE_DIR", environment={"WANDB_CACHE_DIR": "@HOME@/cache"})
add("environment", "HOME unset", environment={"HOME": None})
add("environment", "WANDB_DIR that is not there", environment={"WANDB_DIR": "@HERE@/none"})

# ---- keys ---------------------------------------------------------------------------------------------------------------------

for _title, _key in {
        "right": KEY, "none": None, "empty": "", "wrong": "x" * 40, "39 characters": "x" * 39, "prefixed": "local-" + "x" * 40,
        "prefix and short": "local-" + "x" * 39,
        "with a star": "*" + "x" * 39, "with a space inside": "x" * 20 + " " + "x" * 20, "space in front": " " + KEY,
        "space behind": KEY + " ", "newline behind": KEY + "\n",
        "CRLF behind": KEY + "\r\n", "a JWT": "aaaa.bbbb.cccc", "only spaces": "   ", "non-ASCII": "é" * 40,
        "quoted": f'"{KEY}"', "dashes": "a-b-c-" + "x" * 40}.items():
    add("key", f"WANDB_API_KEY {_title}", environment={"WANDB_API_KEY": _key})
    if _title in ("none", "empty", "wrong", "39 characters"):
        add("key", f"WANDB_API_KEY {_title}, right one in netrc", environment={"WANDB_API_KEY": _key},
            home={".netrc": "machine @NETLOC@ login user password @KEY@\n"})
add("key", "none, a public run", run_path="e/public/r", environment={"WANDB_API_KEY": None})
add("key", "wrong, a public run", run_path="e/public/r", environment={"WANDB_API_KEY": "x" * 40})
add("key", "none, a local copy", environment={"WANDB_API_KEY": None}, here={"a.txt": "local"})
add("key", "wrong, a local copy", environment={"WANDB_API_KEY": "x" * 40}, here={"a.txt": "local"})
add("key", "too short, a local copy", environment={"WANDB_API_KEY": "x"}, here={"a.txt": "local"})
add("key", "identity token", environment={"WANDB_API_KEY": None, "WANDB_IDENTITY_TOKEN_FILE": "@HOME@/token"},
    home={"token": TOKEN})
add("key", "identity token with a newline", environment={"WANDB_API_KEY": None, "WANDB_IDENTITY_TOKEN_FILE": "@HOME@/token"},
    home={"token": TOKEN + "\n"})
add("key", "identity token, wrong", environment={"WANDB_API_KEY": None, "WANDB_IDENTITY_TOKEN_FILE": "@HOME@/token"},
    home={"token": "a.b.c"})
add("key", "identity token, file missing", environment={"WANDB_API_KEY": None, "WANDB_IDENTITY_TOKEN_FILE": "@HOME@/token"})
add("key", "identity token and key", environment={"WANDB_IDENTITY_TOKEN_FILE": "@HOME@/token"}, home={"token": TOKEN})
add("key", "identity token file name empty", environment={"WANDB_IDENTITY_TOKEN_FILE": ""})

# ---- settings files -----------------------------------------------------------------------------------------------------------

_E, _P = "entity = fileent\n", "project = fileproj\n"
SETTINGS = {
    "plain": "[default]\n" + _E + _P,
    "colons": "[default]\nentity: fileent\nproject: fileproj\n",
    "no spaces": "[default]\nentity=fileent\nproject=fileproj\n",
    "upper case keys": "[default]\nENTITY = fileent\nProject = fileproj\n",
    "CRLF": "[default]\r\nentity = fileent\r\nproject = fileproj\r\n",
    "comments": "# one\n[default]\n; two\n" + _E + "# three\n" + _P,
    "inline comment": "[default]\n" + _E + "project = fileproj ; no\n",
    "blank lines": "\n\n[default]\n\n" + _E + "\n\n" + _P + "\n",
    "no final newline": "[default]\nentity = fileent\nproject = fileproj",
    "indented value": "[default]\n" + _E + "project =\n  fileproj\n",
    "indented key": "[default]\n  entity = fileent\n  project = fileproj\n",
    "space around values": "[default]\nentity =   fileent  \nproject = \tfileproj\t\n",
    "quoted": "[default]\nentity = \"fileent\"\n" + _P,
    "DEFAULT and default": "[DEFAULT]\n" + _E + "[default]\n" + _P,
    "DEFAULT alone": "[DEFAULT]\n" + _E + _P,
    "another section": "[other]\n" + _E + _P,
    "two sections": "[other]\nentity = e\n[default]\n" + _E + _P,
    "no header": _E + _P,
    "duplicate key": "[default]\nentity = ent\n" + _E + _P,
    "duplicate section": "[default]\n" + _E + "[default]\n" + _P,
    "percent": "[default]\n" + _E + "project = file%proj\n",
    "two percents": "[default]\n" + _E + "project = file%%proj\n",
    "interpolation": "[default]\n" + _E + "stem = file\nproject = %(entity)s\n",
    "empty value": "[default]\nentity =\n" + _P,
    "no value": "[default]\nentity\n" + _P,
    "empty file": "",
    "only header": "[default]\n",
    "garbage": "\x01\x02 {json: true}",
    "byte order mark": "\ufeff[default]\n" + _E + _P,
    "unknown key": "[default]\n" + _E + _P + "no_such_setting = 1\n",
    "bad value": "[default]\n" + _E + _P + "x_graphql_timeout_seconds = soon\n",
    "known other key": "[default]\n" + _E + _P + "mode = online\n",
    "header in upper case": "[Default]\n" + _E + _P,
    "space in header": "[ default ]\n" + _E + _P,
    "text behind header": "[default] x\n" + _E + _P,
    "unicode comment": "# ü\n[default]\n" + _E + _P,
    "continued value": "[default]\nentity = fileent\n  more\n" + _P,
}
for _title, _text in SETTINGS.items():
    add("settings file", f"local: {_title}", run_path="r", here={"wandb/settings": _text})
    if _title not in ("colons", "no spaces", "blank lines", "no final newline", "unicode comment", "indented key"):
        add("settings file", f"global: {_title}", run_path="r", home={".config/wandb/settings": _text},
            environment={"WANDB_PROJECT": "proj"})

_LOCAL, _GLOBAL = "[default]\n" + _E + _P, "[default]\nentity = globalent\nproject = globalproj\n"
for _title, _given in {
        "global": dict(home={".config/wandb/settings": _GLOBAL}),
        "local over global": dict(here={"wandb/settings": _LOCAL}, home={".config/wandb/settings": _GLOBAL}),
        "local entity, global project": dict(here={"wandb/settings": "[default]\n" + _E},
            home={".config/wandb/settings": _GLOBAL}),
        "environment over local": dict(here={"wandb/settings": _LOCAL}, environment={"WANDB_ENTITY": "ent",
            "WANDB_PROJECT": "proj"}),
        "empty environment over local": dict(here={"wandb/settings": _LOCAL}, environment={"WANDB_ENTITY": "",
            "WANDB_PROJECT": "proj"}),
        "empty project in the environment over local": dict(here={"wandb/settings": _LOCAL}, environment={"WANDB_PROJECT": ""}),
        ".wandb": dict(here={".wandb/settings": _LOCAL}),
        ".wandb and wandb": dict(here={".wandb/settings": _LOCAL, "wandb/settings": _GLOBAL}),
        ".wandb without settings, and wandb": dict(here={".wandb": None, "wandb/settings": _LOCAL}),
        "WANDB_CONFIG_DIR": dict(here={"conf/settings": _GLOBAL}, environment={"WANDB_CONFIG_DIR": "@HERE@/conf"}),
        "WANDB_CONFIG_DIR, relative": dict(here={"conf/settings": _GLOBAL}, environment={"WANDB_CONFIG_DIR": "conf"}),
        "WANDB_CONFIG_DIR with a tilde": dict(home={"conf/settings": _GLOBAL}, environment={"WANDB_CONFIG_DIR": "~/conf"}),
        "WANDB_CONFIG_DIR empty": dict(home={".config/wandb/settings": _GLOBAL}, environment={"WANDB_CONFIG_DIR": ""}),
        "WANDB_CONFIG_DIR without settings": dict(home={".config/wandb/settings": _GLOBAL},
            environment={"WANDB_CONFIG_DIR": "@HERE@/none", "WANDB_PROJECT": "proj"}),
        "XDG_CONFIG_HOME is not used": dict(home={"xdg/wandb/settings": _GLOBAL}, environment={"XDG_CONFIG_HOME": "@HOME@/xdg",
            "WANDB_PROJECT": "proj"}),
        "WANDB_DIR, settings there and here": dict(here={"other/wandb/settings": _GLOBAL, "wandb/settings": _LOCAL},
            environment={"WANDB_DIR": "@HERE@/other"}),
        "WANDB_DIR, settings there alone": dict(here={"other/wandb/settings": _GLOBAL},
            environment={"WANDB_DIR": "@HERE@/other", "WANDB_PROJECT": "proj"}),
        "WANDB_DIR, settings here alone": dict(here={"other": None, "wandb/settings": _LOCAL},
            environment={"WANDB_DIR": "@HERE@/other"}),
        "a directory in the local file's place": dict(here={"wandb/settings": None}, environment={"WANDB_PROJECT": "proj"}),
        "a directory in the global file's place": dict(home={".config/wandb/settings": None},
            environment={"WANDB_PROJECT": "proj"}),
        "local malformed, global good": dict(here={"wandb/settings": "garbage"}, home={".config/wandb/settings": _GLOBAL}),
        "local good, global malformed": dict(here={"wandb/settings": _LOCAL}, home={".config/wandb/settings": "garbage"}),
        "parent directory is not looked at": dict(home={"wandb/settings": _LOCAL}, environment={"WANDB_PROJECT": "proj"}),
}.items():
    add("settings file", _title, run_path="r", **_given)
for _title, _text, _environment in (
        ("base_url in the local file", "base_url = @BASE@", {"WANDB_BASE_URL": None}),
        ("base_url in the local file with a slash", "base_url = @BASE@/", {"WANDB_BASE_URL": None}),
        ("base_url in the environment over the local file", "base_url = http://127.0.0.1:1", {}),
        ("base_url in the local file, malformed", "base_url = nowhere", {}),
        ("api_key in the local file", "api_key = @KEY@", {"WANDB_API_KEY": None}),
        ("api_key in the local file, wrong", "api_key = " + "x" * 40, {"WANDB_API_KEY": None}),
        ("api_key in the local file, short", "api_key = x", {"WANDB_API_KEY": None}),
        ("api_key in the local file, the environment has another", "api_key = " + "x" * 40, {}),
        ("mode = offline in the local file", "mode = offline", {}),
        ("extra headers in the local file", 'x_extra_http_headers = {"X-Team": "a"}', {}),
        ("run_id in the local file, no run path", "run_id = r\nentity = e\nproject = p", {}),
):
    add("settings file", _title, here={"wandb/settings": f"[default]\n{_text}\n"}, environment=_environment,
        run_path=None if "no run path" in _title else "e/p/r")
add("settings file", "base_url in the global file", home={".config/wandb/settings": "[default]\nbase_url = @BASE@\n"},
    environment={"WANDB_BASE_URL": None})
add("settings file", "api_key in the global file", home={".config/wandb/settings": "[default]\napi_key = @KEY@\n"},
    environment={"WANDB_API_KEY": None})

# ---- netrc --------------------------------------------------------------------------------------------------------------------

NETRC = {
    "three lines": "machine @NETLOC@\n  login user\n  password @KEY@\n",
    "one line": "machine @NETLOC@ login user password @KEY@", "no login": "machine @NETLOC@ password @KEY@\n",
    "password before login": "machine @NETLOC@ password @KEY@ login user\n",
    "another login": "machine @NETLOC@ login me@example.test password @KEY@\n",
    "account": "machine @NETLOC@ login user account a password @KEY@\n",
    "host without port": "machine 127.0.0.1 login user password @KEY@\n",
    "another port": "machine 127.0.0.1:1 login user password @KEY@\n",
    "another host": "machine example.test login user password @KEY@\n", "default": "default login user password @KEY@\n",
    "default in front": "default login user password " + "x" * 40 + "\nmachine @NETLOC@ login user password @KEY@\n",
    "host and default": "machine @NETLOC@ login user password @KEY@\ndefault login user password " + "x" * 40 + "\n",
    "two entries, last right": "machine @NETLOC@ login user password " + "x" * 40 + "\nmachine @NETLOC@ login user password @KEY@\n",
    "two entries, first right": "machine @NETLOC@ login user password @KEY@\nmachine @NETLOC@ login user password " + "x" * 40 + "\n",
    "prefix of the host": "machine 127.0.0 login user password @KEY@\n",
    "comment in front": "# a\nmachine @NETLOC@ login user password @KEY@\n",
    "comment behind": "machine @NETLOC@ login user password @KEY@ # b\n",
    "comment without space": "machine @NETLOC@ login user password @KEY@#b\n",
    "comment between": "machine @NETLOC@\n# b\nlogin user\npassword @KEY@\n",
    "quoted password": 'machine @NETLOC@ login user password "@KEY@"\n',
    "quoted host": 'machine "@NETLOC@" login user password @KEY@\n',
    "single quotes": "machine @NETLOC@ login user password '@KEY@'\n",
    "escaped": "machine @NETLOC@ login user password \\s@KEY@\n",
    "macdef": "macdef m\n  echo\n\nmachine @NETLOC@ login user password @KEY@\n",
    "macdef within": "machine @NETLOC@ login user password @KEY@\nmacdef m\n  echo\n\n",
    "macdef without end": "machine @NETLOC@ login user password @KEY@\nmacdef m\n  echo",
    "tabs": "machine\t@NETLOC@\tlogin\tuser\tpassword\t@KEY@\n", "CRLF": "machine @NETLOC@\r\nlogin user\r\npassword @KEY@\r\n",
    "blank lines": "\n\nmachine @NETLOC@\n\nlogin user\n\npassword @KEY@\n\n",
    "empty": "", "only comment": "# nothing\n", "unknown word": "machine @NETLOC@ login user password @KEY@ port 1\n",
    "unknown word in front": "hello\nmachine @NETLOC@ login user password @KEY@\n",
    "broken entry behind": "machine @NETLOC@ login user password @KEY@\nmachine\n",
    "no password": "machine @NETLOC@ login user\n", "empty password": 'machine @NETLOC@ login user password ""\n',
    "short key": "machine @NETLOC@ login user password short\n",
    "wrong key": "machine @NETLOC@ login user password " + "x" * 40 + "\n",
    "upper case words": "MACHINE @NETLOC@ LOGIN user PASSWORD @KEY@\n",
    "byte order mark": "\ufeffmachine @NETLOC@ login user password @KEY@\n",
    "URL for the host": "machine @BASE@ login user password @KEY@\n",
    "unfinished quote": 'machine @NETLOC@ login user password "@KEY@\n',
    "other hosts around": "machine a.test login x password y\nmachine @NETLOC@ login user password @KEY@\nmachine b.test login x password y\n",
}
for _title, _text in NETRC.items():
    add("netrc", _title, home={".netrc": _text}, environment={"WANDB_API_KEY": None})
for _title, _home, _netrc in (
        ("~/_netrc", {"_netrc": NETRC["one line"]}, None), ("~/.netrc and ~/_netrc", {".netrc": NETRC["one line"],
            "_netrc": NETRC["wrong key"]}, None),
        ("~/.netrc of no use and ~/_netrc", {".netrc": "", "_netrc": NETRC["one line"]}, None), ("NETRC",
            {"n": NETRC["one line"]}, "@HOME@/n"), ("NETRC with a tilde", {"n": NETRC["one line"]}, "~/n"),
        ("NETRC missing, ~/.netrc there", {".netrc": NETRC["one line"]}, "@HOME@/none"), ("NETRC empty, ~/.netrc there",
            {".netrc": NETRC["one line"]}, ""),
        ("a directory in its place", {".netrc": None}, None), ("NETRC over ~/.netrc", {"n": NETRC["one line"],
            ".netrc": NETRC["wrong key"]}, "@HOME@/n")):
    add("netrc", _title, home=_home, environment={"WANDB_API_KEY": None, "NETRC": _netrc})

# ---- names --------------------------------------------------------------------------------------------------------------------

# wandb-restore reads an argument that ends in "/" as a pattern: every file below the directory. So the file "d/" is not compared.
for _name in FILES:
    if _name.endswith("/"):
        continue
    add("name", f"{_name!r}" if len(_name) < 60 else f"{len(_name)} characters", name=_name)
for _name in ("", " ", "a.txt ", "/a.txt", "A.TXT", "d", "d/b.txt/x", "./a.txt", "d/../a.txt", "a//b",
    "n" * 256, "missing.txt", "a.txt\n", "%61.txt", "big.bin", "d\\b.txt"):
    if _name not in FILES:
        add("name", f"{_name!r}" if len(_name) < 60 else f"{len(_name)} characters", name=_name)

# ---- roots and local copies ---------------------------------------------------------------------------------------------------

for _title, _root in {"relative": "out", "nested": "out/a/b", "with a slash": "out/", "dot": ".", "empty": "",
    "absolute": "@HERE@/out", "parent": "../elsewhere", "with a space": "my out", "tilde": "~/out", "unicode": "öut",
                      "with dots": "out/../out2", "dot in front": "./out"}.items():
    for _name in ("a.txt", "d/b.txt"):
        add("root", f"{_title}, {_name}", root=_root, name=_name)
add("root", "is a file", root="out", here={"out": "a file"})
add("root", "is there", root="out", here={"out": None})
add("root", "has another file", root="out", here={"out/other": "x"})
add("root", "parent of the name is a file", name="d/b.txt", here={"d": "a file"})
add("root", "WANDB_DIR is none", environment={"WANDB_DIR": "@HERE@/w"}, here={"w": None})
for _call in ("restore", "download"):
    for _replace in (None, False, True):
        for _title, _here in {"none": {}, "same": {"a.txt": "e/p/r"}, "other": {"a.txt": "mine"}, "empty": {"a.txt": ""},
            "longer": {"a.txt": "e/p/r and more"}, "a directory": {"a.txt": None},
                              "a link": {"a.txt": ("link", "target"), "target": "mine"}, "a link to nothing": {"a.txt": ("link",
                                  "target")}, "a link to a directory": {"a.txt": ("link", "t"), "t": None}}.items():
            if _replace is None and _call == "download":
                continue
            add("local copy", f"{_call}, {_title}, replace {_replace}", call=_call, replace=_replace, here=_here)
add("local copy", "of a missing run", run_path="e/p/missing", here={"a.txt": "mine"})
add("local copy", "of a missing file", name="missing.txt", here={"missing.txt": "mine"})
add("local copy", "of a missing file, replace", name="missing.txt", here={"missing.txt": "mine"}, replace=True)
add("local copy", "of a malformed run path", run_path="a/b/c/d", here={"a.txt": "mine"})
add("local copy", "below a root", root="out", here={"out/a.txt": "mine"})
add("local copy", "elsewhere than the root", root="out", here={"a.txt": "mine"})
add("local copy", "no server", environment={"WANDB_BASE_URL": "http://127.0.0.1:1"}, here={"a.txt": "mine"})
add("local copy", "outside of the root", root="out", name="../a.txt", here={"a.txt": "mine", "out": None})
add("local copy", "absolute name", name="@HERE@/a.txt", here={"a.txt": "mine"})

# ---- nodes --------------------------------------------------------------------------------------------------------------------

for _name in NODES:
    add("node", _name, run_path="e/nodes/r", name=_name)
for _name in ("md5-base64", "md5-hex", "md5-null", "md5-zero", "size-null", "size-string", "updated-null", "md5-junk"):
    add("node", f"{_name}, File.download", run_path="e/nodes/r", name=_name, call="download")

# ---- missing things, listing, storage -----------------------------------------------------------------------------------------

for _server in ("plain", "no node"):
    for _title, _given in {"file": dict(name="missing.txt"), "file of an empty run": dict(run_path="e/empty/r"),
        "run": dict(run_path="e/p/missing"), "project": dict(run_path="e/missing/r"),
                           "entity": dict(run_path="missing/p/r"), "directory": dict(name="d"),
                           "case of the name": dict(name="A.TXT")}.items():
        add("missing", f"{_title}, {_server} server", server=_server, **_given)
for _title, _path in {"many": "e/p/r", "one": "dflt/p/r", "none": "e/empty/r", "missing run": "e/p/missing",
    "of odd nodes": "e/nodes/r", "malformed path": "a/b/c/d"}.items():
    add("list", _title, call="list", name=None, run_path=_path)
for _server in ("tls", "prefix", "relative", "chain", "direct", "loop", "chunked", "until close", "status 403", "status 404",
    "graphql 401", "graphql 403", "graphql errors", "storage 503 once",
                "graphql 503 once"):
    add("server", _server, server=_server, environment={"SSL_CERT_FILE": "@CA@"} if _server == "tls" else {})
for _server in ("plain", "tls", "relative", "direct", "chunked"):
    add("server", f"{_server}, 9 MB", server=_server, name="big.bin",
        environment={"SSL_CERT_FILE": "@CA@"} if _server == "tls" else {})

# ---- base URLs and hosts ------------------------------------------------------------------------------------------------------

for _title, _url in {
        "one slash": "@BASE@/", "three slashes": "@BASE@///", "upper case scheme": "HTTP://@NETLOC@",
        "localhost": "http://localhost:@PORT@", "LOCALHOST": "http://LOCALHOST:@PORT@", "no scheme": "@NETLOC@",
        "ftp": "ftp://@NETLOC@", "space in front": " @BASE@", "space behind": "@BASE@ ", "newline behind": "@BASE@\n",
        "empty": "", "only scheme": "http://", "no host": "http://:@PORT@", "tab inside": "http://127.0.0.1\t:@PORT@",
        "port 0": "http://127.0.0.1:0", "port too large": "http://127.0.0.1:65536", "port not a number": "http://127.0.0.1:x",
        "path": "@BASE@/wandb", "graphql in it": "@BASE@/graphql", "word": "nowhere",
        "one slash in scheme": "http:/@NETLOC@", "space inside": "http://127.0.0.1 :@PORT@", "backslashes": "http:\\\\@NETLOC@",
        "wandb.ai": "https://wandb.ai", "http://api.wandb.ai": "http://api.wandb.ai",
        "app.wandb.ai": "https://app.wandb.ai"}.items():
    add("base URL", _title, environment={"WANDB_BASE_URL": _url} | ({"WANDB_API_KEY": KEY}))
for _title, _url in {"slash": "@BASE@/", "without": "http://@NETLOC@", "other prefix": "http://@NETLOC@/other",
    "two slashes": "http://@NETLOC@//wandb"}.items():
    add("base URL", f"prefix server, {_title}", server="prefix", environment={"WANDB_BASE_URL": _url})
add("base URL", "TLS without its CA", server="tls")
add("base URL", "TLS, SSL_CERT_FILE missing", server="tls", environment={"SSL_CERT_FILE": "@HERE@/none"})
add("base URL", "TLS, REQUESTS_CA_BUNDLE", server="tls", environment={"REQUESTS_CA_BUNDLE": "@CA@"})
add("base URL", "TLS, CURL_CA_BUNDLE", server="tls", environment={"CURL_CA_BUNDLE": "@CA@"})
add("base URL", "TLS, not verified", server="tls", environment={"WANDB_INSECURE_DISABLE_SSL": "true"})
add("base URL", "TLS, WANDB_INSECURE_DISABLE_SSL=false", server="tls", environment={"WANDB_INSECURE_DISABLE_SSL": "false"})
add("base URL", "http to a TLS port", server="tls", environment={"WANDB_BASE_URL": "http://@NETLOC@", "SSL_CERT_FILE": "@CA@"})

_WANDB, _FORGE, _PROXIED = "api.wandb.ai", "api.forge.coreweave.com", "https://forge.coreweave.com/api/wandb"


def add_host(title, server, base_url, netrc=None, key=None, settings=None, **more):
    environment = {"WANDB_BASE_URL": base_url, "WANDB_API_KEY": key, "HTTPS_PROXY": "@PROXY@", "SSL_CERT_FILE": "@CA@"} | more
    home = {}
    if netrc:
        home[".netrc"] = "".join(f"machine {host} login user password {password}\n" for host, password in netrc.items())
    if settings:
        home[".config/wandb/settings"] = f"[default]\nbase_url = {settings}\n"
    add("host", title, server=server, environment=environment, home=home)


_BAD = "x" * 40
for _host in (_WANDB, _FORGE):
    add_host(f"nothing set but netrc for {_host}", _FORGE, None, {_host: "@KEY@"})
    add_host(f"base URL Forge, netrc for {_host}", _FORGE, f"https://{_FORGE}", {_host: "@KEY@"})
    add_host(f"base URL Forge in the settings file, netrc for {_host}", _FORGE, None, {_host: "@KEY@"},
        settings=f"https://{_FORGE}")
    add_host(f"base URL Forge's proxy, netrc for {_host}", _FORGE, _PROXIED, {_host: "@KEY@"})
    add_host(f"base URL Forge's proxy with a slash, netrc for {_host}", _FORGE, _PROXIED + "/", {_host: "@KEY@"})
    add_host(f"base URL Forge's proxy in the settings file, netrc for {_host}", _FORGE, None, {_host: "@KEY@"},
        settings=_PROXIED)
    add_host(f"base URL wandb.ai, netrc for {_host}", _WANDB, f"https://{_WANDB}", {_host: "@KEY@"})
    add_host(f"base URL wandb.ai in the settings file, netrc for {_host}", _WANDB, None, {_host: "@KEY@"},
        settings=f"https://{_WANDB}")
    add_host(f"base URL wandb.ai with a slash, netrc for {_host}", _WANDB, f"https://{_WANDB}/", {_host: "@KEY@"})
add_host("nothing set but a key", _FORGE, None, key=KEY)
add_host("nothing set, no key", _FORGE, None)
add_host("nothing set, netrc for both, Forge's right", _FORGE, None, {_FORGE: "@KEY@", _WANDB: _BAD})
add_host("nothing set, netrc for both, wandb.ai's right", _FORGE, None, {_FORGE: _BAD, _WANDB: "@KEY@"})
add_host("base URL wandb.ai, netrc for both, wandb.ai's right", _WANDB, f"https://{_WANDB}", {_FORGE: _BAD, _WANDB: "@KEY@"})
add_host("base URL wandb.ai, netrc for both, Forge's right", _WANDB, f"https://{_WANDB}", {_FORGE: "@KEY@", _WANDB: _BAD})
add_host("base URL wandb.ai, key", _WANDB, f"https://{_WANDB}", key=KEY)
add_host("base URL Forge's proxy, key", _FORGE, _PROXIED, key=KEY)
add_host("base URL Forge, netrc for forge.coreweave.com", _FORGE, f"https://{_FORGE}", {"forge.coreweave.com": "@KEY@"})
add_host("base URL Forge's proxy, netrc for forge.coreweave.com", _FORGE, _PROXIED, {"forge.coreweave.com": "@KEY@"})
add_host("base URL Forge's web address", _FORGE, "https://forge.coreweave.com", key=KEY)
add_host("base URL Forge's web address with a path", _FORGE, "https://forge.coreweave.com/wandb", key=KEY)
add_host("base URL Forge's proxy with a port", _FORGE, "https://forge.coreweave.com:443/api/wandb", key=KEY)
add_host("base URL Forge's proxy over http", _FORGE, "http://forge.coreweave.com/api/wandb", key=KEY)
add_host("base URL Forge in upper case", _FORGE, "https://API.FORGE.COREWEAVE.COM", key=KEY)
add_host("base URL wandb.ai with port 443, netrc without", _WANDB, f"https://{_WANDB}:443", {_WANDB: "@KEY@"})
add_host("base URL wandb.ai with port 443, netrc with", _WANDB, f"https://{_WANDB}:443", {_WANDB + ":443": "@KEY@"})
add_host("base URL wandb.ai, netrc with port 443", _WANDB, f"https://{_WANDB}", {_WANDB + ":443": "@KEY@"})
add_host("base URL Forge with port 443, netrc for wandb.ai", _FORGE, f"https://{_FORGE}:443", {_WANDB: "@KEY@"})
add_host("base URL wandb.ai in upper case, netrc in lower", _WANDB, "https://API.WANDB.AI", {_WANDB: "@KEY@"})
add_host("base URL QA's Forge, netrc for QA's wandb.ai", "api.qa.forge.coreweave.com", "https://api.qa.forge.coreweave.com",
    {"api.qa.wandb.ai": "@KEY@"})
add_host("base URL QA's Forge, netrc for wandb.ai", "api.qa.forge.coreweave.com", "https://api.qa.forge.coreweave.com",
    {_WANDB: "@KEY@"})
add_host("base URL QA's proxy, key", "api.qa.forge.coreweave.com", "https://qa.forge.coreweave.com/api/wandb", key=KEY)
add_host("a server of one's own, netrc for it", "wandb.example.test", "https://wandb.example.test",
    {"wandb.example.test": "@KEY@"})
add_host("a server of one's own, netrc for wandb.ai", "wandb.example.test", "https://wandb.example.test", {_WANDB: "@KEY@"})
add_host("a server of one's own, netrc for Forge", "wandb.example.test", "https://wandb.example.test", {_FORGE: "@KEY@"})
add_host("a server of one's own, netrc in upper case", "wandb.example.test", "https://wandb.example.test",
    {"WANDB.EXAMPLE.TEST": "@KEY@"})
add_host("base URL Forge, service calls itself wandb.ai", _WANDB, f"https://{_FORGE}", key=KEY)
add_host("base URL wandb.ai, service calls itself Forge", _FORGE, f"https://{_WANDB}", key=KEY)
add_host("WANDB_HTTPS_PROXY in place of HTTPS_PROXY", _FORGE, None, key=KEY, HTTPS_PROXY=None, WANDB_HTTPS_PROXY="@PROXY@")
add_host("https_proxy in lower case", _FORGE, None, key=KEY, HTTPS_PROXY=None, https_proxy="@PROXY@")
add_host("NO_PROXY for the host of the proxy alone", _FORGE, None, key=KEY, NO_PROXY="127.0.0.1")


# ---- which cases differ on purpose ----------------------------------------------------------------------------------------------


def differ(row, sdk, ours, group, *titles):
    """Cases that differ as a row of the table says, with the outcome that each program must have: restored, not found, refused, or
    "no key": refused by the SDK or not found by wandb-restore because no key was found."""
    found = [case for case in CASES if case.group == group and case.title in titles]
    if len(found) != len(titles):
        raise ValueError(f"{group}: no case {set(titles) - {case.title for case in found}}")
    for case in found:
        case.differs = (row, sdk, ours)


def with_defaults(*paths):
    return [title for path in paths for title in (f"{path!r}", f"{path!r}, entity and project in the environment")]


differ("The address of a run in the browser is a run path", "refused", "restored", "run path", *with_defaults(
    "e/p/runs/r/x", "e/p/runs/r/files/a.txt", "e/p/runs/r/overview", "https://wandb.ai/e/p/runs/r", "wandb.ai/e/p/runs/r",
    "https://forge.coreweave.com/wandb/e/p/runs/r"))
differ("A query or fragment behind a run path is dropped", "not found", "restored", "run path", *with_defaults("e/p/r?nw=x",
    "e/p/runs/r?nw=nwuser", "e/p/r#x"))
differ("The path of a sweep is refused", "restored", "refused", "run path", *with_defaults("e/p/sweeps/r"))
_row = "Without a run path, `WANDB_RUN_ID`, `run_id` in a settings file or the resume file names the run"
differ(_row, "refused", "restored", "environment", "WANDB_RUN_ID, no run path", "WANDB_RUN_ID, an empty run path",
    "resume file, WANDB_RESUME=auto, no run path")
differ(_row, "refused", "restored", "settings file", "run_id in the local file, no run path")
differ("An entity of white space alone counts as empty", "refused", "restored", "environment", "WANDB_ENTITY=' ', run path 'r'",
    "WANDB_ENTITY=' ', run path 'p/r'")
_row = "An entity with a slash or a line break is refused"
differ(_row, "not found", "refused", "environment", "WANDB_ENTITY='e/n', run path 'r'", "WANDB_ENTITY='e/n', run path 'p/r'")
differ(_row, "not found", "refused", "settings file", "local: continued value", "global: continued value")
_row = "`WANDB_MODE=offline`, `dryrun` and `disabled` are honoured"
differ(_row, "restored", "refused", "environment", "WANDB_MODE=offline", "WANDB_MODE=dryrun", "WANDB_MODE=disabled")
differ(_row, "restored", "refused", "settings file", "mode = offline in the local file")
differ("Extra headers go to the service alone", "refused", "restored", "environment", "extra headers with Authorization")
differ("No key goes to storage, even when a download is retried", "refused", "restored", "server", "storage 503 once")
_row = "Without a key a private run is not found"
differ(_row, "no key", "no key", "key", "WANDB_API_KEY none", "WANDB_API_KEY empty")
differ(_row, "no key", "no key", "netrc", "host without port", "another port", "another host", "prefix of the host", "empty",
    "only comment", "unknown word", "unknown word in front",
       "broken entry behind", "no password", "empty password", "upper case words", "byte order mark", "URL for the host",
       "~/.netrc of no use and ~/_netrc", "NETRC missing, ~/.netrc there",
       "a directory in its place")
differ(_row, "no key", "no key", "host", "nothing set, no key", "base URL wandb.ai, netrc with port 443",
    "base URL QA's Forge, netrc for wandb.ai", "a server of one's own, netrc for wandb.ai",
       "a server of one's own, netrc for Forge", "a server of one's own, netrc in upper case")
differ("A public run needs no key", "no key", "restored", "key", "none, a public run")
_row = "White space around a key is no part of it"
differ(_row, "refused", "restored", "key", "WANDB_API_KEY space in front", "WANDB_API_KEY space behind",
    "WANDB_API_KEY newline behind", "WANDB_API_KEY CRLF behind")
differ(_row, "refused", "no key", "key", "WANDB_API_KEY only spaces")
_row = "A local copy needs no key, no server and no run"
differ(_row, "no key", "restored", "key", "none, a local copy")
differ(_row, "refused", "restored", "key", "too short, a local copy", "wrong, a local copy")
differ(_row, "not found", "restored", "local copy", "of a missing run")
differ(_row, "refused", "restored", "local copy", "no server")
_row = "An unknown key or a bad value in a settings file leaves the other keys valid"
differ(_row, "refused", "restored", "settings file", "local: unknown key", "local: bad value")
differ(_row, "restored", "restored", "settings file", "global: unknown key", "global: bad value", "global: two percents")
differ(_row, "refused", "not found", "settings file", "local: two percents")
differ("A bare `%` in a settings file is taken as it stands", "refused", "restored", "settings file", "global: percent")
differ("`$WANDB_DIR/wandb/settings` counts, before `./wandb/settings`", "restored", "restored", "settings file",
    "WANDB_DIR, settings there and here", "WANDB_DIR, settings there alone")
_row = "A netrc file may end within a macro or a quoted word"
differ(_row, "no key", "restored", "netrc", "macdef without end")
differ(_row, "refused", "restored", "netrc", "unfinished quote")
_row = "A name that no file can have is refused at once"
differ(_row, "not found", "refused", "name", "'/a.txt'", "'d/../a.txt'", "256 characters")
differ(_row, "restored", "refused", "local copy", "outside of the root", "absolute name")
_row = "A name with `.` as a part is also looked for without it"
differ(_row, "not found", "restored", "name", "'./a.txt'")
differ(_row, "refused", "restored", "name", "'./dot'", "'d/./dot'")
_row = "A symbolic link in the target's place is replaced by the file"
differ(_row, "restored", "restored", "local copy", "restore, a link to nothing, replace None",
    "restore, a link to nothing, replace False", "restore, a link to nothing, replace True",
       "restore, a link, replace True", "download, a link to nothing, replace False",
       "download, a link to nothing, replace True", "download, a link, replace True")
differ("A root may lead through a directory that is not there", "refused", "restored", "root", "with dots, a.txt",
    "with dots, d/b.txt")
differ("Size and md5 are checked", "restored", "refused", "node", "md5-wrong", "md5-hex-wrong", "size-less", "size-more",
    "size-more-no-md5")
_row = "A field that the service leaves out is unknown"
differ(_row, "refused", "restored", "node", "md5-absent", "size-absent")
differ(_row, "refused", "restored", "list", "of odd nodes")
differ("A file's address may be relative, or `directUrl` alone", "refused", "restored", "node", "url-empty", "url-relative")
differ("A file without a node is not found", "refused", "not found", "missing", "file, no node server",
    "directory, no node server", "case of the name, no node server")
differ("`REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` name the authorities, too", "refused", "restored", "base URL",
    "TLS, REQUESTS_CA_BUNDLE",
       "TLS, CURL_CA_BUNDLE")
differ("A netrc entry for any name of the public service counts for each of them", "no key", "restored", "host",
    "base URL wandb.ai, netrc for api.forge.coreweave.com",
       "base URL wandb.ai in the settings file, netrc for api.forge.coreweave.com",
       "base URL wandb.ai with a slash, netrc for api.forge.coreweave.com",
       "base URL Forge, netrc for forge.coreweave.com", "base URL Forge's proxy, netrc for forge.coreweave.com")
differ("The key goes to each name of the public service, in any case, with and without its port", "refused", "restored", "host",
    "base URL wandb.ai with port 443, netrc without",
       "base URL Forge in upper case", "base URL wandb.ai in upper case, netrc in lower",
       "base URL wandb.ai with port 443, netrc with", "base URL Forge with port 443, netrc for wandb.ai",
       "base URL Forge, service calls itself wandb.ai", "base URL wandb.ai, service calls itself Forge")
