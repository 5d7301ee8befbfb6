//! Tests of the binary with its store in a real etcd. Where there is no etcd, they say so and pass.

#![allow(clippy::unwrap_used, reason = "a panic is the report")]
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const BINARY: &str = env!("CARGO_BIN_EXE_towline-controller");
/// Arguments that start a controller. Tokens need an address of it.
const SERVE: [&str; 5] =
    ["serve", "--listen", "127.0.0.1:0", "--advertise", "controller.example:7443"];

/// A process that is killed when dropped.
struct Process(Child);

impl Process {
    fn terminate(mut self) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), Signal::SIGTERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A controller with the rest of its log.
struct Controller {
    process: Process,
    log: BufReader<ChildStderr>,
}

impl Controller {
    /// Starts a controller, and reads its log up to a line with these words.
    fn start(dir: &Path, store: &str, words: &str) -> Self {
        Self::start_with(&[], dir, store, words)
    }

    /// Starts a controller with more arguments, and reads its log up to a line with these words.
    fn start_with(arguments: &[&str], dir: &Path, store: &str, words: &str) -> Self {
        let mut command = command(&SERVE, dir, store);
        command.args(arguments);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut controller = Self { process: Process(child), log };
        controller.read_to(words);
        controller
    }

    /// Reads the log up to a line with these words.
    fn read_to(&mut self, words: &str) {
        let mut seen = String::new();
        loop {
            let before = seen.len();
            self.log.read_line(&mut seen).unwrap();
            assert!(seen.len() > before, "the controller ended: {seen}");
            if seen[before..].contains(words) {
                return;
            }
        }
    }

    /// Reads the rest of the log, so that the controller never blocks on the pipe.
    fn detach(self) -> Process {
        let mut log = self.log;
        std::thread::spawn(move || log.read_to_end(&mut Vec::new()));
        self.process
    }
}

fn command(args: &[&str], dir: &Path, store: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.args(args).arg("--state-dir").arg(dir).stdin(Stdio::null());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TOWLINE")) {
        command.env_remove(name);
    }
    command.env("TOWLINE_CONTROLLER_STORE", store);
    command
}

fn run(args: &[&str], dir: &Path, store: &str) -> Output {
    command(args, dir, store).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn tokens(dir: &Path, store: &str) -> Vec<String> {
    let listed = stdout(&run(&["token", "list", "-o", "json"], dir, store));
    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
    let text = |token: &serde_json::Value| format!("{} {}", token["id"], token["state"]);
    listed.iter().map(text).collect()
}

/// Starts etcd. `None` if this machine has none, after it said so.
fn etcd(data: &Path) -> Option<(Process, String)> {
    const ATTEMPTS: usize = 5;
    // Another program may take a port that was free a moment ago. Then etcd ends.
    for attempt in 0..ATTEMPTS {
        let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (client, peer) = (free(), free());
        let [client, peer] = [client, peer].map(|listener| listener.local_addr().unwrap().port());
        let mut process = spawn_etcd(&data.join(attempt.to_string()), client, peer)?;
        while process.0.try_wait().unwrap().is_none() {
            if TcpStream::connect((Ipv4Addr::LOCALHOST, client)).is_ok() {
                return Some((process, format!("etcd://127.0.0.1:{client}/mesh")));
            }
            std::thread::yield_now();
        }
    }
    panic!("etcd ends whenever it is started");
}

/// Starts etcd on these ports. `None` if this machine has none, after it said so.
fn spawn_etcd(data: &Path, client: u16, peer: u16) -> Option<Process> {
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let program = std::env::var_os("TOWLINE_TEST_ETCD").unwrap_or_else(|| "etcd".into());
    let started = Command::new(program)
        .args(["--name", "m0", "--log-level", "error"])
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
        .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
        .args(["--initial-cluster", &format!("m0={}", url(peer))])
        .env("ETCD_UNSUPPORTED_ARCH", "arm64")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match started {
        Ok(process) => Some(Process(process)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: etcd is missing: apt-get install etcd-server");
            None
        }
        Err(error) => panic!("cannot start etcd: {error}"),
    }
}

/// Copies the CA of one controller to the state directory of another one.
fn copy_ca(from: &Path, to: &Path) {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(to).unwrap();
    for file in ["ca.key", "ca.crt", "store.key"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

#[test]
fn controllers_take_over_from_one_another_and_lose_nothing() {
    let root = tempfile::tempdir().unwrap();
    let Some((_etcd, store)) = etcd(&root.path().join("etcd")) else { return };
    let (first, second) = (root.path().join("first"), root.path().join("second"));
    let serves = "listening address=127.0.0.1:";
    let waits = "waiting: another controller serves the mesh";
    let serving = Controller::start(&first, &store, serves).detach();
    stdout(&run(&["token", "create", "--name", "a"], &first, &store));
    let before = tokens(&first, &store);
    assert!(before.len() == 1 && before[0].contains("open"), "{before:?}");

    copy_ca(&first, &second);
    let mut waiting = Controller::start(&second, &store, waits);
    serving.terminate();
    waiting.read_to(serves);
    let serving = waiting.detach();
    assert_eq!(tokens(&second, &store), before, "a stop loses nothing, and no token is revoked");
    stdout(&run(&["token", "create", "--name", "b"], &second, &store));
    let before = tokens(&second, &store);

    let mut waiting = Controller::start(&first, &store, waits);
    drop(serving);
    waiting.read_to(serves);
    let serving = waiting.detach();
    assert_eq!(tokens(&first, &store), before, "neither does a kill");
    serving.terminate();

    // A controller with a CA of its own is told so.
    let stranger = root.path().join("stranger");
    Controller::start(&stranger, "file", serves).detach().terminate();
    let refused = run(&SERVE, &stranger, &store);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("the same ca.key and ca.crt"), "{error}");
}

/// Asks until the tokens at a controller are these. A command takes longer than a controller needs to follow.
fn wait_for_tokens(dir: &Path, store: &str, expected: &[String]) {
    let is_there = |_| tokens(dir, store) == expected;
    assert!((0..500).any(is_there), "{:?} instead of {expected:?}", tokens(dir, store));
}

#[test]
fn controllers_that_share_a_store_serve_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let Some((_etcd, store)) = etcd(&root.path().join("etcd")) else { return };
    let config = root.path().join("controller.toml");
    std::fs::write(&config, "[etcd]\nshared = true\n").unwrap();
    let arguments = ["--config", config.to_str().unwrap()];
    let dirs: Vec<_> = ["a", "b", "c"].map(|name| root.path().join(name)).into();
    let serves = "listening address=127.0.0.1:";
    let start = |dir: &Path| Controller::start_with(&arguments, dir, &store, serves).detach();
    let mut running = vec![start(&dirs[0])];
    for dir in &dirs[1..] {
        copy_ca(&dirs[0], dir);
        running.push(start(dir));
    }

    // Commands at all three at once: none is refused, none is lost.
    let create = |dir: &Path| stdout(&run(&["token", "create"], dir, &store));
    std::thread::scope(|scope| {
        let create = &create;
        for dir in &dirs {
            scope.spawn(move || (0..5).for_each(|_| drop(create(dir))));
        }
    });
    let all = tokens(&dirs[0], &store);
    assert!(all.len() >= 5, "its own ones are there at once: {all:?}");
    let count = |dir: &Path| tokens(dir, &store).len();
    assert!((0..500).any(|_| count(&dirs[0]) == 15), "{}", count(&dirs[0]));
    let all = tokens(&dirs[0], &store);
    dirs.iter().for_each(|dir| wait_for_tokens(dir, &store, &all));

    // One is killed, one stops; the third goes on, and the others find what it wrote.
    drop(running.remove(0));
    running.remove(0).terminate();
    create(&dirs[2]);
    let all = tokens(&dirs[2], &store);
    assert_eq!(all.len(), 16);
    running.push(start(&dirs[0]));
    running.push(start(&dirs[1]));
    dirs.iter().for_each(|dir| wait_for_tokens(dir, &store, &all));
}

#[test]
fn a_controller_with_another_ca_cannot_share_a_store_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let Some((_etcd, store)) = etcd(&root.path().join("etcd")) else { return };
    let config = root.path().join("controller.toml");
    std::fs::write(&config, "[etcd]\nshared = true\n").unwrap();
    let arguments = ["--config", config.to_str().unwrap()];
    let serves = "listening address=127.0.0.1:";
    let (first, stranger) = (root.path().join("first"), root.path().join("stranger"));
    let _serving = Controller::start_with(&arguments, &first, &store, serves).detach();
    stdout(&run(&["token", "create", "--name", "a"], &first, &store));
    let before = tokens(&first, &store);

    // It made a CA of its own at a first start without etcd.
    Controller::start(&stranger, "file", serves).detach().terminate();
    let mut command = command(&SERVE, &stranger, &store);
    let refused = command.args(arguments).output().unwrap();
    let log = String::from_utf8_lossy(&refused.stderr).into_owned();
    let last = log.trim_end().lines().last().unwrap_or_default();
    assert!(!refused.status.success(), "{log}");
    assert!(last.contains("give every controller of a mesh the same ca.key and ca.crt"), "{log}");

    // The first one serves, and writes as before.
    assert_eq!(tokens(&first, &store), before);
    stdout(&run(&["token", "create", "--name", "b"], &first, &store));
    assert_eq!(tokens(&first, &store).len(), 2);
}

#[test]
fn a_mesh_moves_from_a_file_to_etcd_and_back() {
    let root = tempfile::tempdir().unwrap();
    let Some((_etcd, store)) = etcd(&root.path().join("etcd")) else { return };
    let dir = root.path().join("state");
    let serves = "listening address=127.0.0.1:";
    let serving = Controller::start(&dir, "file", serves).detach();
    stdout(&run(&["token", "create", "--name", "a"], &dir, "file"));
    let backup = root.path().join("backup");
    let backup = backup.to_str().unwrap();
    stdout(&run(&["backup", backup], &dir, "file"));
    let busy = run(&["store", "import", backup], &dir, &store);
    assert!(String::from_utf8_lossy(&busy.stderr).contains("stop it"), "{busy:?}");
    serving.terminate();

    let moved = stdout(&run(&["store", "import", backup], &dir, &store));
    assert!(moved.contains("imported into etcd://127.0.0.1:"), "{moved}");
    let again = run(&["store", "import", backup], &dir, &store);
    assert!(String::from_utf8_lossy(&again.stderr).contains("has a mesh"), "{again:?}");
    let serving = Controller::start(&dir, &store, serves).detach();
    let there = tokens(&dir, &store);
    assert!(there.len() == 1 && there[0].contains("revoked"), "{there:?}");
    stdout(&run(&["token", "create", "--name", "b"], &dir, &store));
    serving.terminate();

    let export = root.path().join("export");
    let export = export.to_str().unwrap();
    stdout(&run(&["store", "export", export], &dir, &store));
    std::fs::remove_file(dir.join("towline.redb")).unwrap();
    stdout(&run(&["store", "import", export], &dir, "file"));
    let _serving = Controller::start(&dir, "file", serves).detach();
    assert_eq!(tokens(&dir, "file").len(), 2);
}
