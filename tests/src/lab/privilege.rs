//! The right to create network namespaces, and how to get it without sudo.
//!
//! Root creates them directly. Any other user first becomes root of a user namespace, if the
//! machine allows that. The lab can then do everything except what the kernel reserves for the real
//! root (forced socket buffers, conntrack sizes). If a right is missing, the lab reports it with
//! its remedy before it builds anything.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid};

use super::report::Forbidden;

/// The rights of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// The lab is root of the machine.
    Root,
    /// The lab is root of a user namespace only.
    Rootless,
}

const TUN: &str = "/dev/net/tun";

/// Ensures that this process can create network namespaces. Enters a user namespace if that is
/// necessary, or if `rootless` is set.
///
/// Call it before any thread is started: a process with several threads cannot enter a user
/// namespace.
///
/// # Errors
/// [`Forbidden`], with the remedy.
pub fn acquire(rootless: bool) -> Result<Rank, Forbidden> {
    let direct = geteuid().is_root() && !rootless && can_make_namespaces();
    if !direct {
        enter_user_namespace(geteuid(), getegid())
            .map_err(|error| refused(&format!("user namespaces are refused: {error}")))?;
    }
    usable()?;
    Ok(if direct && in_initial_user_namespace() { Rank::Root } else { Rank::Rootless })
}

/// Checks that this process is root of the machine and can build a lab.
///
/// # Errors
/// [`Forbidden`], with the remedy.
pub fn acquire_root() -> Result<(), Forbidden> {
    if !geteuid().is_root() || !in_initial_user_namespace() {
        return Err(refused("this process is not root of the machine"));
    }
    usable()
}

/// Checks that this process can build a lab without further rights.
///
/// # Errors
/// [`Forbidden`], with the remedy.
pub fn usable() -> Result<(), Forbidden> {
    if !can_make_namespaces() {
        return Err(refused("network namespaces are refused inside a user namespace"));
    }
    check_tun()
}

/// Makes the calling process root of a new user namespace, in which only this user and group are
/// mapped. The process must have a single thread.
pub(super) fn enter_user_namespace(uid: Uid, gid: Gid) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

/// Tests it on a thread, so that the calling thread keeps its namespace.
fn can_make_namespaces() -> bool {
    std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).is_ok()).join().unwrap_or(false)
}

fn in_initial_user_namespace() -> bool {
    // The initial namespace maps every id to itself.
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// Returns the error for `what`, with the setting that forbids namespaces as its remedy.
pub(super) fn refused(what: &str) -> Forbidden {
    let setting = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let blocked = [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "10000"),
        ("user/max_net_namespaces", "0", "10000"),
    ]
    .into_iter()
    .find(|(path, bad, _)| setting(&format!("/proc/sys/{path}")).as_deref() == Some(*bad));
    let remedy = match blocked {
        Some((path, _, good)) => {
            format!("allow them with `sysctl -w {}={good}`, or run as root", path.replace('/', "."))
        }
        None => "run as root; in a container, allow it to create namespaces".to_owned(),
    };
    Forbidden { what: what.to_owned(), remedy }
}

fn check_tun() -> Result<(), Forbidden> {
    let open = || -> io::Result<File> { OpenOptions::new().read(true).write(true).open(TUN) };
    let Err(error) = open() else { return Ok(()) };
    let remedy = if error.kind() == ErrorKind::PermissionDenied {
        format!("let every user open it with `chmod 0666 {TUN}` (this grants no other rights)")
    } else if Path::new("/sys/module/tun").exists() {
        format!("create it with `mkdir -p /dev/net && mknod -m 0666 {TUN} c 10 200`")
    } else {
        "load it with `modprobe tun`; in a container, pass the device in".to_owned()
    };
    Err(Forbidden { what: format!("cannot open {TUN}: {error}"), remedy })
}
