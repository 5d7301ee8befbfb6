//! Runs the command-line programs as processes: what they print on which stream, and their exit
//! status.

use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};
use std::sync::OnceLock;

use towline_proto::stun;
use towline_tests::lab::binaries::{Binaries, Profile};

fn binaries() -> &'static Binaries {
    static BUILT: OnceLock<Binaries> = OnceLock::new();
    BUILT.get_or_init(|| Binaries::build(Profile::Dev).expect("the daemons build"))
}

fn towline(arguments: &[&str]) -> Output {
    let mut command = Command::new(&binaries().towline);
    run(command.args(arguments))
}

fn controller(arguments: &[&str]) -> Output {
    let mut command = Command::new(&binaries().controller);
    run(command.args(arguments))
}

fn run(command: &mut Command) -> Output {
    command.env_remove("TOWLINE_CONFIG").env_remove("TOWLINE_SOCKET").env_remove("TOWLINE_TOKEN");
    command.stdin(std::process::Stdio::null());
    command.output().expect("the program starts")
}

/// Asserts exit status 1, nothing on stdout, and one line on stderr that contains every part.
fn assert_refused(output: &Output, says: &[&str]) {
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    for part in says {
        assert!(line.contains(part), "`{part}` is missing in: {line}");
    }
}

#[test]
fn without_an_agent_every_question_gets_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let socket = socket.to_str().unwrap();
    for question in [
        &["status"][..],
        &["peers"],
        &["ping", "cp"],
        &["status", "-o", "json"],
        &["explain", "cp"],
        &["trace", "cp:443"],
    ] {
        let output = towline(&[&["--socket", socket], question].concat());
        assert_refused(&output, &["no agent is running", "towline agent"]);
    }
}

#[test]
fn without_an_agent_doctor_checks_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (directory.path().join("state"), directory.path().join("agent.sock"));
    let (state, socket) = (state.to_str().unwrap(), socket.to_str().unwrap());
    let arguments = ["--state-dir", state, "--socket", socket, "doctor", "-o", "json"];
    let output = towline(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["healthy"], false);
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(checks[0]["code"], "agent");
    assert_eq!(checks[0]["state"], "failed");
    assert_eq!(checks[0]["causes"][0], "agent-not-running");
    assert!(checks[0]["remedy"].as_str().unwrap().contains("systemctl"));
    let conntrack = checks.iter().find(|check| check["code"] == "conntrack");
    assert!(conntrack.is_some(), "{report}");
    let table = towline(&arguments[..5]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.starts_with("failed   agent "), "{table}");
}

#[test]
fn without_an_agent_netcheck_asks_the_servers_that_are_given() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (directory.path().join("state"), directory.path().join("agent.sock"));
    let (state, socket) = (state.to_str().unwrap(), socket.to_str().unwrap());
    let netcheck = ["--state-dir", state, "--socket", socket, "netcheck"];
    assert_refused(&towline(&netcheck), &["no STUN server is known", "--reflector"]);
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((len, from)) = server.recv_from(&mut datagram) {
            if let Some((answer, len)) = stun::answer(&datagram[..len], from) {
                server.send_to(&answer[..len], from).unwrap();
            }
        }
    });
    let output = towline(&[&netcheck[..], &["--reflector", &address, "-o", "json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["udp"], true);
    assert_eq!(report["ipv4"]["state"], "works");
    assert_eq!(report["ipv4"]["nat"]["filtering"], "unknown");
    let reflector = &report["ipv4"]["reflectors"][0];
    assert_eq!(reflector["address"], address.as_str());
    assert!(reflector["rtt_us"].is_u64(), "{report}");
    assert_eq!(reflector["mtu_at_least"], 1500);
    assert!(report["agent"].is_null(), "{report}");
}

#[test]
fn without_an_agent_the_bundle_has_the_host_and_says_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (state, socket, file) = (at("state"), at("agent.sock"), at("bundle.tar.gz"));
    let bundle = ["--state-dir", &state, "--socket", &socket, "bundle", &file];
    let output = towline(&bundle);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), file);
    let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode, 0o600);
    assert!(std::fs::read(&file).unwrap().starts_with(&[0x1f, 0x8b]), "gzip");
    assert_refused(&towline(&bundle), &["cannot create", "bundle.tar.gz"]);
}

#[test]
fn a_live_screen_needs_a_terminal() {
    assert_refused(&towline(&["top"]), &["not a terminal", "towline peers --watch"]);
}

#[test]
fn an_agent_that_has_not_joined_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let socket = directory.path().join("agent.sock");
    let (state, socket) = (state.to_str().unwrap(), socket.to_str().unwrap());
    let output = towline(&["--state-dir", state, "--socket", socket, "agent"]);
    assert_refused(&output, &["towline join"]);
}

#[test]
fn unknown_keys_in_the_configuration_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("agent.toml");
    std::fs::write(&file, "[wireguard]\nport = 1\nprot = 2\n").unwrap();
    let file = file.to_str().unwrap();
    for command in [&["config", "check"][..], &["agent"], &["status"], &["join"]] {
        let output = towline(&[&["--config", file], command].concat());
        assert_refused(&output, &["line 3", "prot"]);
    }
    std::fs::write(directory.path().join("controller.toml"), "listne = \"[::]:7443\"\n").unwrap();
    let file = directory.path().join("controller.toml");
    for command in [&["config", "check"][..], &["serve"], &["node", "list"]] {
        let output = controller(&[&["--config", file.to_str().unwrap()], command].concat());
        assert_refused(&output, &["line 1", "listne"]);
    }
}

#[test]
fn wrong_usage_is_status_2_and_says_nothing_on_stdout() {
    for output in [
        towline(&["no-such-command"]),
        towline(&["peers", "-o", "xml"]),
        towline(&["trace", "cp:http"]),
        controller(&["token", "create", "--ttl", "soon"]),
    ] {
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

#[test]
fn no_token_and_no_token_at_all_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let state = ["--state-dir", state.to_str().unwrap(), "join", "--name", "a"];
    let missing = towline(&[&state[..], &["--token-file", "/nonexistent/token"]].concat());
    assert_refused(&missing, &["/nonexistent/token"]);
    let file = directory.path().join("token");
    std::fs::write(&file, "what is this").unwrap();
    let other = towline(&[&state[..], &["--token-file", file.to_str().unwrap()]].concat());
    assert_refused(&other, &["not a join token", "token create"]);
}

#[test]
fn operators_without_a_controller_get_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    for command in [&["token", "create"][..], &["token", "list"], &["node", "list"]] {
        let output = controller(&[&["--state-dir", state.to_str().unwrap()], command].concat());
        assert_refused(&output, &["serve"]);
    }
    assert!(!state.exists(), "asking makes nothing");
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(&binaries().towline)
        .args(["config", "show"])
        .current_dir(directory.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn completions_are_scripts_and_man_pages_are_files() {
    type Program = fn(&[&str]) -> Output;
    let programs: [(Program, &str); 2] =
        [(towline, "towline-status.1"), (controller, "towline-controller-token-create.1")];
    for (program, page) in programs {
        for shell in ["bash", "zsh", "fish"] {
            let output = program(&["completions", shell]);
            assert!(output.status.success() && output.stderr.is_empty(), "{shell}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("completions"), "{shell}");
        }
        assert_eq!(program(&["completions", "tcsh"]).status.code(), Some(2));
        let directory = tempfile::tempdir().unwrap();
        let written = program(&["man", directory.path().to_str().unwrap()]);
        assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
        let text = std::fs::read_to_string(directory.path().join(page)).unwrap();
        assert!(text.contains(".SH EXAMPLES"), "{text}");
        let absent = directory.path().join("absent");
        assert_refused(&program(&["man", absent.to_str().unwrap()]), &["cannot write", "absent"]);
    }
}

#[test]
fn the_version_of_the_json_documents_is_shown_by_both_programs() {
    for output in [towline(&["version", "-o", "json"]), controller(&["version", "-o", "json"])] {
        let version: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(version["schema_version"], towline_proto::status::SCHEMA_VERSION);
    }
}

#[test]
fn a_format_or_a_filter_of_the_log_that_does_not_exist_is_wrong_usage() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    for (name, value) in [("TOWLINE_LOG_FORMAT", "xml"), ("TOWLINE_LOG", "towline_core=loud")] {
        for (program, arguments) in
            [(&binaries().towline, ["agent"]), (&binaries().controller, ["serve"])]
        {
            let mut command = Command::new(program);
            command.arg("--state-dir").arg(&state).args(arguments).env(name, value);
            let output = run(&mut command);
            let words = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{name}: {words}");
            assert!(words.contains(value), "{name}: {words}");
        }
    }
    assert!(!state.exists(), "wrong usage makes nothing");
}

#[test]
fn the_lab_lists_its_scenarios_and_knows_wrong_usage() {
    let lab = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_lab")).args(arguments).output().expect("the lab starts")
    };
    let list = lab(&["list"]);
    assert!(list.status.success());
    let list = String::from_utf8(list.stdout).unwrap();
    for scenario in ["demo", "idle", "crash"] {
        assert!(list.lines().any(|line| line.starts_with(scenario)), "{list}");
    }
    let json = lab(&["--json", "list"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["scenarios"].as_array().unwrap().len(), list.lines().count());
    for wrong in [
        &["no-such-scenario"][..],
        &[],
        &["demo", "--megabytes", "0"],
        &["interop", "no-such-case"],
        &["attack", "--case", "no-such-case"],
        &["explain", "--keep", "--json"],
        &["explain", "--keep", "--update-docs"],
        &["explain", "--keep", "--case", "paths"],
        &["explain", "--keep", "--case", "healthy/ipv4-only"],
        &["vm", "--case", "no-such-case"],
        &["vm", "--kernel", "no-such-kernel"],
    ] {
        let output = lab(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{wrong:?}");
    }
}
