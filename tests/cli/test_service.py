"""`turbodiff service` with a systemctl that writes down what it is asked; its files are read as their users do."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from configparser import RawConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbodiff.cli import service
from turbodiff.spec.page_flags import page_parser

ROOT = Path(__file__).parents[2]
ODD = [
    "plain",
    "two words",
    "100%h $HOME ${HOME}",
    "a \"quote\" and 'one'",
    "back\\slash \\x41\\",
    "`id`;&|<>*?~#",
    "雪 ünï",
]
SYSTEMCTL = """#!/bin/sh
printf '%s\\n' "$*" >> "$ASKED"
case "$2" in show) echo active;; "$REFUSES") exit 1;; esac
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, and a systemctl that answers; `asked` holds what it was asked."""
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "SUDO_USER", *service.CARRIED):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("TURBODIFF_")]:
        monkeypatch.delenv(name)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("REFUSES", "none")
    return tmp_path / "home"


def asked(home):
    """What systemctl was asked, less whether it answers."""
    path = home.parent / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix("--user ") for line in lines if line != "--user show-environment"]


def unit_of(home):
    return home / ".config/systemd/user/turbodiff.service"


def entry_of(home):
    return home / ".local/share/applications/turbodiff.desktop"


def words_of_systemd(line, command=True):
    """A command line as systemd.service(5) reads it: quotes, C escapes, no specifier, no variable."""
    words, place = [], 0
    while place < len(line):
        assert line[place] == '"', "every word of ours is quoted"
        word, place = b"", place + 1
        while line[place] != '"':
            if line[place] == "\\":
                kind = line[place + 1]
                if kind == "x":
                    word += bytes.fromhex(line[place + 2 : place + 4])
                    place += 4
                    continue
                word += {"\\": b"\\", '"': b'"'}[kind]
                place += 2
                continue
            word += os.fsencode(line[place])
            place += 1
        place += 1
        assert line[place : place + 1] in ("", " ")
        place += 1
        text = os.fsdecode(word)
        assert not re.search(r"(?<!%)(%%)*%(?!%)", text), "a specifier"
        text = text.replace("%%", "%")
        assert not command or not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", text), "a variable"
        words.append(text.replace("$$", "$") if command else text)
    return words


def words_of_desktop(value):
    """An Exec key by the Desktop Entry Specification: the escapes of a value, then quotes, then field codes."""
    value = re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[found[1]], value)
    words = re.findall(r'"((?:[^"\\`$]|\\["\\`$])*)"(?: |$)', value)
    assert " ".join(f'"{word}"' for word in words) == value
    plain = [re.sub(r'\\(["\\`$])', r"\1", word) for word in words]
    assert not any(re.search(r"(?<!%)(%%)*%(?!%)", word) for word in plain), "a field code"
    return [word.replace("%%", "%") for word in plain]


def exec_of(home):
    parser = RawConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
    parser.read_string(entry_of(home).read_text("utf-8"))
    return words_of_desktop(parser["Desktop Entry"]["Exec"])


def exec_start(home):
    (line,) = re.findall(r"^ExecStart=(.*)$", unit_of(home).read_text("utf-8"), re.M)
    return words_of_systemd(line)


def test_install_writes_a_unit_and_an_entry_says_so_and_starts_it(home, turbodiff):
    code, told = turbodiff("service", "install", "--port", "7999")
    assert code == 0
    assert [line for line in told.out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {unit_of(home)}", f"wrote {entry_of(home)}",
    ]  # fmt: skip
    assert asked(home) == ["daemon-reload", "enable --now turbodiff.service"]
    assert "ran: systemctl --user enable --now turbodiff.service" in told.out and "http://127.0.0.1:7999/" in told.out
    assert "WantedBy=default.target" in unit_of(home).read_text() and "Terminal=false" in entry_of(home).read_text()


def test_a_second_install_changes_nothing_and_other_flags_change_the_files(home, turbodiff):
    turbodiff("service", "install")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (unit_of(home), entry_of(home))]
    _, told = turbodiff("service", "install")
    assert told.out.count("unchanged ") == 2 and "wrote" not in told.out
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (unit_of(home), entry_of(home))] == before
    _, told = turbodiff("service", "install", "--port", "8001")
    assert told.out.count("wrote ") == 2 and "8001" in exec_start(home) and "7860" not in exec_start(home)


@pytest.mark.parametrize("name", ODD)
def test_paths_of_any_name_reach_the_app_as_they_are(home, turbodiff, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    python = folder / "py thon"
    python.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(folder)
    code, _ = turbodiff("service", "install", "--outputs", str(folder / "o"), "--state-dir", str(folder / "s"))
    assert code == 0
    flags = ["--port", "7860", "--outputs", f"{folder}/o", "--state-dir", f"{folder}/s"]
    app = ROOT / "webui" / "app.py"
    for argv, wanted in (
        (exec_start(home), ["-P", str(app), *flags, "--no-browser"]),
        (exec_of(home), ["-P", "-m", "turbodiff.cli", "service", "open", *flags]),
    ):
        said = subprocess.run(argv, cwd="/", capture_output=True, text=True, check=True).stdout
        assert said.splitlines() == [str(folder), *wanted]


@given(st.text(st.characters(exclude_characters="\0"), max_size=30))
def test_every_text_comes_back_from_a_unit_and_stays_on_its_line(text):
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    for dollar, command in (("$$", True), ("$", False)):
        quoted = service.for_systemd(text, dollar)
        assert words_of_systemd(quoted, command) == [text]
        assert quoted.isprintable()


def test_a_path_that_no_entry_can_hold_costs_the_entry_only(home, turbodiff, tmp_path):
    code, told = turbodiff("service", "install", "--outputs", os.fsdecode(b"caf\xe9"))
    assert code == 0 and "no turbodiff.desktop: " in told.out and not entry_of(home).exists()
    assert str(tmp_path / os.fsdecode(b"caf\xe9")) in exec_start(home)


def test_systemd_itself_finds_nothing_wrong_with_the_unit(home, turbodiff, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    turbodiff("service", "install", "--outputs", "a b%h $x", "--state-dir", 'q"q')
    told = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit_of(home))],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (told.returncode, told.stderr) == (0, "")


def test_xdg_folders_are_honoured_where_they_are_absolute(home, turbodiff, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "con fig"))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    turbodiff("service", "install")
    assert (tmp_path / "con fig/systemd/user/turbodiff.service").exists()
    assert entry_of(home).exists() and not unit_of(home).exists() and not Path("relative").exists()


def test_a_dry_run_shows_all_and_changes_nothing(home, turbodiff):
    code, told = turbodiff("service", "install", "--dry-run")
    assert code == 0 and not home.exists() and asked(home) == []
    assert "ExecStart=" in told.out and "[Desktop Entry]" in told.out
    assert "would run: systemctl --user enable --now turbodiff.service" in told.out
    turbodiff("service", "install")
    before = asked(home)
    _, told = turbodiff("service", "uninstall", "--dry-run")
    assert told.out.count("would remove ") == 2 and "would run: systemctl --user disable" in told.out
    assert unit_of(home).exists() and entry_of(home).exists() and asked(home) == before


def test_uninstall_stops_it_and_takes_away_what_was_written_and_may_be_said_twice(home, turbodiff):
    turbodiff("service", "install")
    code, told = turbodiff("service", "uninstall")
    assert code == 0 and told.out.count("removed ") == 2
    assert asked(home)[2:] == ["disable --now turbodiff.service", "daemon-reload"]
    assert not unit_of(home).exists() and not entry_of(home).exists()
    code, told = turbodiff("service", "uninstall")
    assert code == 0 and told.out.count("not there: ") == 2


def test_without_systemd_the_files_are_written_and_the_commands_are_named(home, turbodiff, monkeypatch):
    monkeypatch.setenv("REFUSES", "show-environment")
    code, told = turbodiff("service", "install")
    assert code == 0 and asked(home) == [] and unit_of(home).exists()
    assert "to run where systemd answers: systemctl --user enable --now turbodiff.service" in told.out
    assert "Terminal=true" in entry_of(home).read_text()
    wanted = unit_of(home).parent / "default.target.wants" / "turbodiff.service"
    wanted.parent.mkdir()
    wanted.symlink_to(unit_of(home))  # as `enable` left it
    monkeypatch.setenv("PATH", "/nowhere")
    code, told = turbodiff("service", "uninstall")
    assert code == 0 and told.out.count("removed ") == 3 and not wanted.is_symlink()


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("[Service]\nExecStart=/bin/true\n"), lambda path: path.symlink_to("/dev/null"),
    lambda path: path.mkdir(),
])  # fmt: skip
def test_a_file_of_somebody_else_is_refused_and_left_alone(home, turbodiff, make):
    unit_of(home).parent.mkdir(parents=True)
    make(unit_of(home))
    code, told = turbodiff("service", "install")
    assert code == 2 and str(unit_of(home)) in told.err and "left alone" in told.err and "try: move" in told.err
    assert not entry_of(home).exists() and asked(home) == []
    code, told = turbodiff("service", "uninstall")
    assert code == 0 and f"left alone, not of `service install`: {unit_of(home)}" in told.out
    assert os.path.lexists(unit_of(home)) and asked(home) == ["daemon-reload"]


def test_what_systemd_refuses_is_one_line_with_where_to_look(home, turbodiff, monkeypatch):
    monkeypatch.setenv("REFUSES", "enable")
    code, told = turbodiff("service", "install")
    assert code == 1 and "systemctl --user enable --now" in told.err and "journalctl --user -u turbodiff" in told.err


def test_a_folder_that_takes_no_file_is_one_line(home, turbodiff):
    home.mkdir()
    (home / ".config").write_text("a file in the way")
    code, told = turbodiff("service", "install")
    assert code == 2 and "cannot be written" in told.err and "XDG_CONFIG_HOME" in told.err


def test_settings_of_this_shell_go_along_but_no_password(home, turbodiff, monkeypatch):
    monkeypatch.setenv("TURBODIFF_MODELS", "/data/100% $weights")
    monkeypatch.setenv("TURBODIFF_PASSWORD", "open sesame")
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    _, told = turbodiff("service", "install", "--dry-run")
    assert "secret" not in told.out and "sesame" not in told.out
    turbodiff("service", "install")
    text = unit_of(home).read_text()
    lines = re.findall(r"^Environment=(.*)$", text, re.M)
    given = dict(words_of_systemd(line, command=False)[0].split("=", 1) for line in lines)
    assert given == {"TURBODIFF_MODELS": "/data/100% $weights", "https_proxy": "http://me:secret@proxy:3128"}
    assert "sesame" not in text and unit_of(home).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another's sudo")
def test_under_sudo_it_is_refused(home, turbodiff, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "somebody")
    code, told = turbodiff("service", "install")
    assert code == 1 and "without sudo" in told.err and not home.exists()


@pytest.fixture
def page():
    """A page that says it is well: its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"ok": self.path == "/healthz"}, separators=(",", ":")).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_status_says_what_is_installed_and_whether_the_page_answers(home, turbodiff, page):
    code, told = turbodiff("service", "status")
    assert code == 3 and told.out.count("not there") == 2 and "does not answer" in told.out
    turbodiff("service", "install", "--port", str(page))
    code, told = turbodiff("service", "status")  # at the port that it was installed with
    assert code == 0 and told.out.count("installed") == 2
    assert re.search(r"^systemd +active$", told.out, re.M) and f"http://127.0.0.1:{page}/ answers" in told.out


def test_open_shows_the_page_and_starts_the_service_first_where_it_does_not_run(
    home, turbodiff, page, tmp_path, monkeypatch
):
    seen = tmp_path / "seen"
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > "{seen}"\n')
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{tmp_path}/browser %s")
    opening = [sys.executable, "-m", "turbodiff.cli", "service", "open", "--port", str(page)]
    subprocess.run(opening, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert seen.read_text().strip() == f"http://127.0.0.1:{page}/" and asked(home) == []
    turbodiff("service", "install", "--port", "1")
    monkeypatch.setattr(service, "START_WAIT_S", 0.0)
    code, told = turbodiff("service", "open", "--port", "1")  # systemd says that it started, the page never comes
    assert asked(home)[-1] == "start turbodiff.service"
    assert code == 1 and "the page does not answer" in told.err and "systemctl --user status" in told.err


SERVED = ["--listen", "::", "--password-file", "secret", "--root-path", "/video", "--proxy", "10.0.0.0/8"]
SERVED += ["--host-name", "video.example", "--lang", "zh", "--mcp", "--port", "7999", "--state-dir", "state"]
SERVED += ["--webhook", "https://me.example/hook", "--enhancer", "http://127.0.0.1:1/v1", "--enhancer-model", "small"]
SERVED += ["--cluster", "10.0.0.1:6379", "--cluster-gpus", "4", "--cluster-downloads", "--no-local-gpus", "--metrics"]


def test_every_flag_of_the_page_goes_into_the_unit_and_the_entry_and_means_the_same_there(
    home, turbodiff, monkeypatch, tmp_path
):
    monkeypatch.setattr("turbodiff.spec.page_flags.find_spec", lambda name: name)
    code, told = turbodiff("service", "install", *SERVED)
    assert code == 0, told.err
    wish = vars(page_parser().parse_args([*SERVED, "--outputs", "outputs"]))
    folders = {name: tmp_path / wish[name] for name in ("outputs", "state_dir", "password_file")}
    unit, entry = exec_start(home), exec_of(home)
    in_unit = vars(page_parser().parse_args(unit[unit.index(str(ROOT / "webui" / "app.py")) + 1 :]))
    assert in_unit == wish | folders | {"no_browser": True}
    assert vars(page_parser().parse_args(entry[entry.index("open") + 1 :])) == wish | folders
    given = {action.dest for action in page_parser()._actions} - {"help", "password", "no_browser", "outputs"}
    assert not [name for name in given if wish[name] == page_parser().get_default(name)], "one was forgotten here"


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--listen"], "listen_needs_password", "--password-file"), (["--port", "0"], "bad_port", "65535"),
        (["--root-path", "video"], "bad_root_path", "/video"), (["--proxy", "x"], "bad_proxy", "127.0.0.1"),
    ],
)  # fmt: skip
def test_what_the_page_would_refuse_is_refused_before_a_file_is_written(home, turbodiff, flags, code, told):
    status, said = turbodiff("service", "install", *flags)
    assert status == 2 and told in said.err and not home.exists(), code


def test_a_password_on_the_command_line_gets_into_no_file(home, turbodiff):
    status, said = turbodiff("service", "install", "--password", "sesame")
    assert status == 2 and "--password" in said.err and not home.exists()


@pytest.mark.parametrize("command", [("serve",), ("service", "install"), ("service", "open")])
def test_the_help_of_each_way_to_start_the_page_names_all_its_flags(home, turbodiff, command):
    status, said = turbodiff(*command, "--help")
    assert status == 0
    for action in page_parser()._actions:
        if action.dest not in ("help", "password"):
            assert action.option_strings[0] in said.out, action.dest


@pytest.mark.parametrize(
    ("listen", "url"),
    [("::", "http://127.0.0.1:7999/"), ("fd00::20", "http://[fd00::20]:7999/"), ("10.0.0.4", "http://10.0.0.4:7999/")],
)
def test_status_asks_where_the_page_listens(home, turbodiff, listen, url):
    turbodiff("service", "install", "--listen", listen, "--password-file", "secret", "--port", "7999")
    assert f"page       {url} does not answer" in turbodiff("service", "status")[1].out
