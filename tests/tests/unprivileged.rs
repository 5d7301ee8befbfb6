//! Runs the agent without root's rights, with only what its unit grants.
//!
//! `unshare`, `mount` and `setpriv` (util-linux) stand in for systemd: the user exists in a mount
//! namespace of the program, `/proc/sys` is read-only, and one capability is left.
#![allow(clippy::unwrap_used)] // a panic is the report
#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use towline_tests::lab::binaries::{Binaries, Profile};
use towline_tests::lab::interrupt::wait_for;
use towline_tests::lab::mesh::{Controller, Node, START_LIMIT, await_tunnel};
use towline_tests::lab::privilege::{self, Rank};
use towline_tests::lab::topology::{Host, Lab};

/// Ids that stand in for the user `towline`. No system assigns these numbers by default.
const USER: (u32, u32) = (64_123, 64_124);
const TIMEOUT: Duration = Duration::from_secs(60);
/// Script that runs its arguments as root, where the user exists: what an administrator does.
const AS_ROOT: &str = r#"mount --bind "$0" /etc/passwd && exec "$@""#;
/// Script that runs its arguments as the user, with the rights that `towline.service` leaves. Every
/// user may open the TUN device, as with udev's rules.
const AS_USER: &str = r#"mount --bind "$0" /etc/passwd && mount --bind /proc/sys /proc/sys &&
    tun="$0.$$" && mknod -m 666 "$tun" c 10 200 &&
    mount --bind "$tun" /dev/net/tun &&
    mount -o remount,bind,ro /proc/sys && ulimit -c 0 && exec setpriv --reuid 64123 --regid 64124 \
    --clear-groups --inh-caps=-all,+net_admin --ambient-caps=-all,+net_admin \
    --bounding-set=-all,+net_admin --no-new-privs "$@""#;

/// Returns the command that runs a program through one of the scripts above.
fn wrapped(script: &str, passwd: &Path) -> Vec<String> {
    let words = ["unshare", "--mount", "sh", "-c", script];
    words.into_iter().map(str::to_owned).chain([passwd.display().to_string()]).collect()
}

fn can_run() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if privilege::acquire_root().is_err() || !has("unshare") || !has("setpriv") {
        println!("skipped: it needs root of the machine, unshare and setpriv");
        return false;
    }
    true
}

fn owners(directory: &Path) -> Vec<(String, u32)> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let mut owners: Vec<(String, u32)> = files
        .map(|file| (file.file_name().into_string().unwrap(), file.metadata().unwrap().uid()))
        .collect();
    owners.push((".".to_owned(), fs::metadata(directory).unwrap().uid()));
    owners
}

fn give(directory: &Path, (uid, gid): (u32, u32)) {
    for (name, _) in owners(directory) {
        chown(directory.join(name), Some(uid), Some(gid)).unwrap();
    }
}

fn await_mesh(a: &Node, b: &Node) {
    let reason = await_tunnel(a, b, TIMEOUT).unwrap();
    assert_eq!(reason, None, "{}", fs::read_to_string(b.log()).unwrap_or_default());
}

/// Mesh of a control plane, with a second machine that has not joined.
struct Site {
    lab: Lab,
    binaries: Binaries,
    worker: Arc<Host>,
    /// File that stands in for `/etc/passwd` where the user exists.
    passwd: PathBuf,
    controller: Controller,
    /// Node on the control plane; its agent runs.
    first: Node,
}

impl Site {
    fn new() -> Self {
        let binaries = Binaries::build(Profile::Dev).unwrap();
        let mut lab = Lab::new(Rank::Root).unwrap();
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10").unwrap().build().unwrap();
        let worker = lab.host("worker").public("203.0.113.11", "2001:db8::11").unwrap();
        let worker = worker.build().unwrap();
        let passwd = lab.directory().join("passwd");
        let line = format!("root:x:0:0::/:/bin/sh\ntowline:x:{}:{}::/:/x\n", USER.0, USER.1);
        fs::write(&passwd, line).unwrap();
        fs::set_permissions(lab.directory(), fs::Permissions::from_mode(0o755)).unwrap();

        let controller = Controller::start(&lab, &cp, &binaries).unwrap();
        let mut first = Node::new(&lab, &cp, "first", &binaries, "").unwrap();
        first.join(&controller.operator().token("site").unwrap()).unwrap();
        first.launch().unwrap();
        Self { lab, binaries, worker, passwd, controller, first }
    }
}

/// Returns a node that has not joined, in a directory of the user.
fn node_of_user(lab: &Lab, host: &Arc<Host>, binaries: &Binaries) -> Node {
    let node = Node::new(lab, host, "second", binaries, "").unwrap();
    let directory = node.state().parent().unwrap().to_owned();
    chown(&directory, Some(USER.0), Some(USER.1)).unwrap();
    node
}

#[test]
fn root_joins_and_a_user_with_one_capability_runs_the_agent() {
    if !can_run() {
        return;
    }
    let Site { lab, binaries, worker, passwd, controller, first } = Site::new();
    // Root joins for the user: everything in the state directory belongs to the user.
    let mut second = node_of_user(&lab, &worker, &binaries);
    second.wrap(wrapped(AS_ROOT, &passwd));
    second.join(&controller.operator().token("site").unwrap()).unwrap();
    let state = second.state();
    assert!(owners(&state).len() > 4);
    for (name, uid) in owners(&state) {
        assert_eq!(uid, USER.0, "{name}");
    }
    second.wrap(wrapped(AS_USER, &passwd));
    second.launch().unwrap();
    second.await_status(START_LIMIT).unwrap();
    await_mesh(&first, &second);

    // The process has only that capability and cannot be dumped, and the link is as planned.
    let pid = second.agent().unwrap().pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(value("Uid:"), USER.0.to_string());
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(&value(set), 16).unwrap(), 1 << 12, "{set}");
    }
    assert_eq!(value("NoNewPrivs:"), "1");
    let memory = fs::metadata(format!("/proc/{pid}/mem")).unwrap();
    assert_eq!(memory.uid(), 0, "the process can be dumped");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    worker
        .namespace()
        .run(|| {
            let link = towline_netlink::Rtnetlink::open()?.link("towline0")?;
            assert_eq!(link.unwrap().reverse_path_filter, Some(2));
            Ok(())
        })
        .unwrap();
    let output = second.command_ok(&["status"]).unwrap();
    assert!(!output.contains("rp_filter"), "{output}");

    // Root's commands reach the agent; those of another user do not.
    second.wrap(wrapped(AS_ROOT, &passwd));
    second.status().unwrap();
    let third: Vec<String> = ["setpriv", "--reuid", "64999", "--regid", "64999", "--clear-groups"]
        .map(str::to_owned)
        .to_vec();
    second.wrap(third);
    second.command_ok(&["status"]).unwrap_err();
}

#[test]
fn a_state_directory_of_root_is_taken_over_by_the_user_and_given_back() {
    if !can_run() {
        return;
    }
    let Site { lab, binaries, worker, passwd, controller, first } = Site::new();
    // A version that has no such user leaves the directory like this.
    let mut second = node_of_user(&lab, &worker, &binaries);
    second.join(&controller.operator().token("site").unwrap()).unwrap();
    let state = second.state();
    for round in ["root", "user", "root again"] {
        let user = round == "user";
        // systemd does this with `StateDirectory=` if `User=` differs from the owner.
        give(&state, if user { USER } else { (0, 0) });
        second.wrap(if user { wrapped(AS_USER, &passwd) } else { Vec::new() });
        second.launch().unwrap();
        second.await_status(START_LIMIT).unwrap();
        wait_for("a connection to the controller", TIMEOUT, || {
            Ok(second.status()?.controller.connected.then_some(()))
        })
        .unwrap();
        await_mesh(&first, &second);
        second.take_agent().unwrap().stop().unwrap();
        let owner = if user { USER.0 } else { 0 };
        for (name, uid) in owners(&state) {
            assert_eq!(uid, owner, "{name} of {round}");
        }
    }
    assert_eq!(controller.operator().nodes().unwrap().len(), 2, "the node is still the same");
}
