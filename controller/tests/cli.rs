//! Tests of the binary: exit status, error messages of one line, and no loss of acknowledged data.

#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use towline_proto::token::JoinToken;

const BINARY: &str = env!("CARGO_BIN_EXE_towline-controller");

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TOWLINE")) {
        command.env_remove(name);
    }
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// A running controller; killed when dropped.
struct Running {
    child: Child,
}

impl Running {
    fn start(dir: &Path) -> Self {
        let dir = dir.to_str().unwrap();
        let args = [
            "serve",
            "--state-dir",
            dir,
            "--listen",
            "127.0.0.1:0",
            "--advertise",
            "controller.example:7443",
        ];
        let mut child = command(&args).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        loop {
            let before = seen.len();
            log.read_line(&mut seen).unwrap();
            assert!(seen.len() > before, "the controller ended: {seen}");
            if seen[before..].contains("listening address=127.0.0.1:") {
                break;
            }
        }
        // The log is read to its end, so that the controller never blocks on the pipe.
        std::thread::spawn(move || log.read_to_end(&mut Vec::new()));
        Self { child }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Asserts that a command failed with one line on stderr, and returns the line.
fn failure(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty());
    let errors: Vec<&str> = stderr.lines().filter(|line| !line.contains(" INFO ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    errors[0].to_owned()
}

fn tokens(dir: &str) -> Vec<serde_json::Value> {
    let listed = run(&["token", "list", "-o", "json", "--state-dir", dir]);
    serde_json::from_str(&stdout(&listed)).unwrap()
}

#[test]
fn the_log_is_json_where_that_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("state");
    let dir = dir.to_str().unwrap();
    let file = root.path().join("controller.toml");
    std::fs::write(&file, "listen = \"127.0.0.1:0\"\n[log]\nformat = \"json\"\n").unwrap();
    let args = ["serve", "--state-dir", dir, "--config", file.to_str().unwrap()];
    let mut child = command(&args).stderr(Stdio::piped()).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let _running = Running { child };
    for line in log.lines() {
        let line = line.unwrap();
        let event: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(event["timestamp"].is_string() && event["level"].is_string(), "{line}");
        if event["fields"]["message"] == "listening" {
            assert!(event["fields"]["address"].is_string(), "{line}");
            return;
        }
    }
    panic!("the controller ended");
}

#[test]
fn a_backup_of_a_running_controller_can_take_the_place_of_its_store() {
    let root = tempfile::tempdir().unwrap();
    let (dir, file) = (root.path().join("state"), root.path().join("copy.redb"));
    let (state, copy) = (dir.to_str().unwrap(), file.to_str().unwrap());
    let tokens = || stdout(&run(&["--state-dir", state, "token", "list", "-o", "json"]));
    let running = Running::start(&dir);
    stdout(&run(&["--state-dir", state, "token", "create", "--name", "kept"]));
    let saved = stdout(&run(&["--state-dir", state, "backup", copy]));
    assert!(saved.contains("ca.key"), "{saved}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = run(&["--state-dir", state, "backup", copy]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("name a new file"), "{again:?}");
    stdout(&run(&["--state-dir", state, "token", "create", "--name", "later"]));
    running.kill();

    std::fs::copy(&file, dir.join("towline.redb")).unwrap();
    let running = Running::start(&dir);
    let listed = tokens();
    assert!(listed.contains("kept") && !listed.contains("later"), "{listed}");
    assert!(listed.contains("revoked"), "open tokens of a backup are void: {listed}");
    stdout(&run(&["--state-dir", state, "token", "create", "--name", "new"]));
    running.kill();
    let running = Running::start(&dir);
    assert!(tokens().contains("open"), "only the first start of a backup revokes: {}", tokens());
    running.kill();

    // On another machine only the keys and the backup are left.
    std::fs::copy(&file, dir.join("towline.redb")).unwrap();
    std::fs::remove_file(dir.join("starts")).unwrap();
    let _running = Running::start(&dir);
    assert!(tokens().contains("revoked"), "{}", tokens());
}

#[test]
fn a_drill_shows_what_a_backup_is_worth_and_leaves_the_mesh_alone() {
    let root = tempfile::tempdir().unwrap();
    let [dir, drill, file] = ["state", "drill", "copy.redb"].map(|name| root.path().join(name));
    let (state, practice) = (dir.to_str().unwrap(), drill.to_str().unwrap());
    let _running = Running::start(&dir);
    stdout(&run(&["--state-dir", state, "token", "create", "--name", "kept"]));
    stdout(&run(&["--state-dir", state, "backup", file.to_str().unwrap()]));
    let before = tokens(state);

    std::fs::DirBuilder::new().mode(0o700).create(&drill).unwrap();
    std::fs::copy(&file, drill.join("towline.redb")).unwrap();
    for name in ["ca.crt", "store.key"] {
        std::fs::copy(dir.join(name), drill.join(name)).unwrap();
    }
    let serve = ["serve", "--state-dir", practice, "--listen", "127.0.0.1:0"];
    let refused = failure(&run(&serve));
    assert!(refused.contains("ca.key is missing"), "{refused}");
    assert!(!drill.join("ca.key").exists(), "no other key is made");

    std::fs::copy(dir.join("ca.key"), drill.join("ca.key")).unwrap();
    let _practising = Running::start(&drill);
    let restored = tokens(practice);
    assert_eq!((restored.len(), &restored[0]["name"]), (1, &before[0]["name"]));
    assert_eq!(restored[0]["state"], "revoked");
    assert_eq!(tokens(state), before, "the mesh noticed nothing");
}

#[test]
fn a_backup_can_be_named_in_the_working_directory_and_replaces_nothing() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let _running = Running::start(&state);
    let backup = |name: &str| {
        let mut command = command(&["--state-dir", state.to_str().unwrap(), "backup", name]);
        command.current_dir(root.path()).output().unwrap()
    };
    stdout(&backup("copy.redb"));
    let again = backup("copy.redb");
    assert!(String::from_utf8_lossy(&again.stderr).contains("name a new file"), "{again:?}");
    stdout(&backup("copy.1"));
    stdout(&backup("copy.2"));
    let hidden = std::fs::read_dir(root.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(hidden.count(), 0, "nothing stays behind");
}

#[test]
fn tokens_are_created_listed_and_revoked() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let _controller = Running::start(root.path());

    let created = run(&["token", "create", "--site", "dc-a", "--state-dir", dir]);
    let token: JoinToken = stdout(&created).trim_end().parse().unwrap();
    assert_eq!(token.controllers[0].to_string(), "controller.example:7443");
    assert_eq!(stdout(&created).lines().count(), 1, "only the token");

    let args = ["token", "create", "--state-dir", dir, "-o", "json", "--label", "rack=7"];
    let created: serde_json::Value = serde_json::from_str(&stdout(&run(&args))).unwrap();
    created["token"].as_str().unwrap().parse::<JoinToken>().unwrap();
    let id = created["id"].as_str().unwrap();
    assert_eq!(created["labels"]["rack"], "7");
    assert_eq!(created["relay"], false);
    let args = ["token", "create", "--state-dir", dir, "-o", "json", "--relay", "--ttl", "1m"];
    let relay: serde_json::Value = serde_json::from_str(&stdout(&run(&args))).unwrap();
    assert_eq!(relay["relay"], true);

    run(&["token", "revoke", id, "--state-dir", dir]);
    let revoked = tokens(dir).into_iter().find(|token| token["id"] == id).unwrap();
    assert_eq!(revoked["state"], "revoked");
    assert_eq!(tokens(dir).len(), 3);
    for format in ["table", "wide", "yaml"] {
        let text = stdout(&run(&["token", "list", "--state-dir", dir, "-o", format]));
        assert!(text.contains(id), "{text}");
    }
    assert_eq!(stdout(&run(&["node", "list", "-o", "json", "--state-dir", dir])), "[]\n");
    let line = failure(&run(&["node", "show", "nobody", "--state-dir", dir]));
    assert!(line.contains("no node `nobody`"), "{line}");
    let line = failure(&run(&["node", "set", "nobody", "--relay", "--state-dir", dir]));
    assert!(line.contains("no node `nobody`"), "{line}");
    assert_eq!(run(&["node", "set", "nobody", "--state-dir", dir]).status.code(), Some(2));
    let line = failure(&run(&["node", "remove", "nobody", "--state-dir", dir]));
    assert!(line.contains("no node `nobody`"), "{line}");
    let line = failure(&run(&["token", "create", "--prefix", "10.0.0.1/8", "--state-dir", dir]));
    assert!(line.contains("10.0.0.0/8"), "{line}");
    let line =
        failure(&run(&["token", "create", "--replace", "a", "--uses", "2", "--state-dir", dir]));
    assert!(line.contains("one use"), "{line}");
}

#[test]
fn what_holds_for_the_mesh_is_changed_list_by_list_and_survives_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let show = || -> serde_json::Value {
        let shown = run(&["mesh", "show", "-o", "json", "--state-dir", dir]);
        serde_json::from_str(&stdout(&shown)).unwrap()
    };
    let set = |args: &[&str]| run(&[&["mesh", "set", "--state-dir", dir], args].concat());

    let controller = Running::start(root.path());
    let first = show();
    assert_eq!(first["protected"], serde_json::json!([]));
    stdout(&set(&["--protected", "10.244.0.0/16,fd00:10::/48", "--trusted-site", "dc-a"]));
    stdout(&set(&["--bypass-when-down", "10.20.0.0/16", "--protected", "10.244.0.0/16"]));
    controller.kill();
    let _controller = Running::start(root.path());
    let mesh = show();
    assert_eq!(mesh["protected"], serde_json::json!(["10.244.0.0/16"]));
    assert_eq!(mesh["trusted_sites"], serde_json::json!(["dc-a"]));
    assert_eq!(mesh["bypass_when_down"], serde_json::json!(["10.20.0.0/16"]));
    assert_eq!(mesh["generation"], first["generation"].as_u64().unwrap() + 2);
    stdout(&set(&["--trusted-site", "none"]));
    assert_eq!(show()["trusted_sites"], serde_json::json!([]));

    assert!(failure(&set(&["--protected", "10.0.0.1/8"])).contains("10.0.0.0/8"));
    assert!(failure(&set(&["--trusted-site", "two words"])).contains("two words"));
    assert_eq!(set(&[]).status.code(), Some(2));
}

#[test]
fn the_list_of_controllers_begins_with_what_is_advertised_and_is_changed_by_an_operator() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let listed = || {
        let shown = run(&["mesh", "show", "-o", "json", "--state-dir", dir]);
        let mesh: serde_json::Value = serde_json::from_str(&stdout(&shown)).unwrap();
        mesh["controllers"].clone()
    };
    let set = |list: &str| run(&["mesh", "set", "--state-dir", dir, "--controllers", list]);

    let controller = Running::start(root.path());
    assert_eq!(listed(), serde_json::json!(["controller.example:7443"]));
    stdout(&set("203.0.113.7:7443,[2001:db8::7]:7443"));
    controller.kill();
    let _controller = Running::start(root.path());
    assert_eq!(listed(), serde_json::json!(["203.0.113.7:7443", "[2001:db8::7]:7443"]));

    // A token has the mesh's controllers, and this one as long as it is not among them.
    let created = run(&["token", "create", "--state-dir", dir]);
    let token: JoinToken = stdout(&created).trim_end().parse().unwrap();
    let addresses: Vec<String> = token.controllers.iter().map(ToString::to_string).collect();
    let expected = ["203.0.113.7:7443", "[2001:db8::7]:7443", "controller.example:7443"];
    assert_eq!(addresses, expected);

    assert_eq!(set("nowhere").status.code(), Some(2));
    assert_eq!(set("").status.code(), Some(2));
    assert!(failure(&set(&["a:1"; 9].join(","))).contains("too long"));
}

#[test]
fn what_cannot_be_is_one_line_and_a_status() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let line = failure(&run(&["node", "list", "--state-dir", dir]));
    assert!(line.contains("no controller was set up"), "{line}");
    Running::start(root.path()).kill();
    let line = failure(&run(&["node", "list", "--state-dir", dir]));
    assert!(line.contains("is not running"), "{line}");

    assert_eq!(run(&["serve", "--nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["token", "create", "--uses", "0"]).status.code(), Some(2));
    assert_eq!(stdout(&run(&["version"])), format!("{}\n", towline_proto::VERSION));

    let config = root.path().join("controller.toml");
    std::fs::write(&config, "lisssten = \"127.0.0.1:1\"\n").unwrap();
    let config = config.to_str().unwrap();
    for args in [vec!["config", "check"], vec!["serve", "--state-dir", dir]] {
        let line = failure(&run(&[&args[..], &["--config", config]].concat()));
        assert!(line.contains("line 1: unknown field `lisssten`"), "{line}");
    }
    std::fs::write(config, "listen = \"127.0.0.1:1\"\n").unwrap();
    assert!(run(&["config", "check", "--config", config]).status.success());
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let _controller = Running::start(root.path());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command(&["token", "list", "--state-dir", dir])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_second_controller_and_a_busy_port_are_told_and_change_nothing() {
    let root = tempfile::tempdir().unwrap();
    let first = Running::start(root.path());
    let dir = root.path().to_str().unwrap();
    let line = failure(&run(&["serve", "--state-dir", dir, "--listen", "127.0.0.1:0"]));
    assert!(line.contains("another controller uses"), "{line}");

    let address = std::fs::read_to_string(root.path().join("address")).unwrap();
    let other = tempfile::tempdir().unwrap();
    let other_dir = other.path().to_str().unwrap();
    let line = failure(&run(&["serve", "--state-dir", other_dir, "--listen", address.trim()]));
    assert!(line.contains("--listen"), "{line}");
    assert!(!other.path().join("ca.key").exists());
    drop(first);
}

#[test]
fn a_damaged_state_is_told_and_nothing_is_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    Running::start(root.path()).kill();
    let serve = || failure(&run(&["serve", "--state-dir", dir, "--listen", "127.0.0.1:0"]));
    let store = root.path().join("towline.redb");
    let good = std::fs::read(&store).unwrap();

    std::fs::write(&store, &good[..good.len() / 3]).unwrap();
    let line = serve();
    assert!(line.contains("towline.redb") && line.contains("backup"), "{line}");
    assert!(std::fs::read(&store).unwrap() == good[..good.len() / 3]);
    std::fs::write(&store, b"").unwrap();
    assert!(serve().contains("backup"));
    assert!(std::fs::read(&store).unwrap().is_empty());
    std::fs::remove_file(&store).unwrap();
    assert!(serve().contains("missing"));
    assert!(!store.exists());
    std::fs::write(&store, &good).unwrap();

    let key = root.path().join("ca.key");
    let kept = std::fs::read(&key).unwrap();
    std::fs::write(&key, "junk").unwrap();
    let line = serve();
    assert!(line.contains("ca.key"), "{line}");
    assert_eq!(std::fs::read(&key).unwrap(), b"junk");
    std::fs::remove_file(&key).unwrap();
    assert!(serve().contains("ca.key is missing"));
    assert!(!key.exists());
    std::fs::write(&key, kept).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    Running::start(root.path()).kill();
}

#[test]
fn a_first_start_that_was_cut_short_goes_on() {
    let whole = tempfile::tempdir().unwrap();
    Running::start(whole.path()).kill();
    // The files that an interrupted first start leaves, in the order of their creation.
    let files = ["ca.key", "ca.crt", "store.key", "towline.redb"];
    for count in 1..=files.len() {
        let root = tempfile::tempdir().unwrap();
        // The mode that a first start sets; a directory that others can enter is refused.
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(root.path(), private).unwrap();
        for file in &files[..count] {
            std::fs::copy(whole.path().join(file), root.path().join(file)).unwrap();
        }
        std::fs::write(root.path().join("towline.redb.new"), b"half").unwrap();
        Running::start(root.path()).kill();
        let key = |dir: &Path| std::fs::read(dir.join("ca.key")).unwrap();
        assert_eq!(key(root.path()), key(whole.path()));
        Running::start(root.path()).kill();
    }
}

#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().to_str().unwrap();
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..4u64 {
        let controller = Running::start(root.path());
        let pid = Pid::from_raw(i32::try_from(controller.child.id()).unwrap());
        // Kills the controller in the middle of a stream of writes.
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30 + 37 * round));
            kill(pid, Signal::SIGKILL).unwrap();
        });
        loop {
            let created = run(&["token", "create", "-o", "json", "--state-dir", dir]);
            if !created.status.success() {
                break;
            }
            let created: serde_json::Value = serde_json::from_slice(&created.stdout).unwrap();
            acknowledged.push(created["id"].as_str().unwrap().to_owned());
        }
        killer.join().unwrap();
    }
    let _controller = Running::start(root.path());
    let there: Vec<String> =
        tokens(dir).iter().map(|token| token["id"].as_str().unwrap().to_owned()).collect();
    for id in &acknowledged {
        assert!(there.contains(id), "token {id} of {} was lost", acknowledged.len());
    }
    // A kill must not look like a restored backup, which would revoke the tokens.
    assert!(tokens(dir).iter().all(|token| token["state"] == "open"));
}

#[test]
fn it_ends_in_time_when_it_is_told_to() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let root = tempfile::tempdir().unwrap();
        let mut controller = Running::start(root.path());
        let pid = Pid::from_raw(i32::try_from(controller.child.id()).unwrap());
        kill(pid, signal).unwrap();
        // It takes less than 2 s on an idle machine; the bound of about 20 s only ends a failing test.
        let ended = (0..4000).find_map(|_| {
            let status = controller.child.try_wait().unwrap();
            if status.is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            status
        });
        let status = ended.expect("the controller has ended");
        assert!(status.success());
        assert!(!root.path().join("address").exists());
    }
}

#[test]
fn once_it_says_that_it_is_ready_it_serves() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (directory.path().join("state"), directory.path().join("notify"));
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let notified = || {
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let state = state.to_str().unwrap();
    let serve = ["serve", "--state-dir", state, "--listen", "127.0.0.1:0"];
    let advertise = ["--advertise", "controller.example:7443"];
    let child = command(&[&serve[..], &advertise].concat())
        .env("NOTIFY_SOCKET", &socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut running = Running { child };
    assert_eq!(notified(), "READY=1");
    // Runs at once, like a command after `systemctl enable --now`.
    let token = stdout(&run(&["--state-dir", state, "token", "create"]));
    token.trim().parse::<JoinToken>().unwrap();
    kill(Pid::from_raw(running.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(notified(), "STOPPING=1");
    assert!(running.child.wait().unwrap().success());
}
