//! Attacks of a local user on what belongs to the agent: its TUN link, its state directory and its
//! sockets.

use std::fs::{File, OpenOptions, Permissions, set_permissions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};

use super::stage::{Condition, Place, Stage, WIREGUARD};
use super::{Attacker, Case, Outcome};
use crate::lab::actor::Actor;
use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::Node;
use crate::lab::namespace::Namespace;
use crate::lab::tamper::{LINK, Tampering};

/// Limit for `towline guard` to repair the link, and for an agent that refuses its state to exit, on a slow
/// machine.
const GUARD_LIMIT: Duration = Duration::from_secs(60);

/// Flags of `TUNSETIFF` that the agent sets.
const OURS: i32 = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Flags of `TUNSETIFF` that another program might set.
const PLAIN: i32 = libc::IFF_TUN | libc::IFF_NO_PI;
/// Additional flag of `TUNSETIFF` for a link with several queues.
const SEVERAL: i32 = libc::IFF_MULTI_QUEUE;

pub(super) fn cases() -> Vec<Case> {
    let user = |name: String, attempt: fn(&mut Stage<'_>) -> _| {
        Case::new(name, Attacker::LocalUser, Outcome::Refused, attempt)
    };
    let mut cases = Vec::new();
    for condition in [Condition::Running, Condition::Killed, Condition::Stopped] {
        for (form, flags) in [("as-ours", OURS), ("plain", PLAIN), ("several", OURS | SEVERAL)] {
            let is_short = flags == OURS;
            let name = format!("local/tun/one-queue/{}/{form}", condition.name());
            let case = Case::new(name, Attacker::LocalUser, Outcome::Refused, move |stage| {
                stage.require(Actor::User)?;
                stage.be(condition)?;
                attach(stage.namespace(Place::A), Actor::User, flags)
            });
            cases.push(if is_short { case } else { case.long() });
        }
    }
    cases.push(user("local/tun/one-queue/raw-user".to_owned(), |stage| {
        stage.require(Actor::RawUser)?;
        stage.be(Condition::Killed)?;
        attach(stage.namespace(Place::A), Actor::RawUser, OURS)
    }));
    cases.push(user("local/tun/link-from-before/guard".to_owned(), guarded_link));
    cases.push(user("local/tun/two-queues/running".to_owned(), |stage| {
        stage.require(Actor::User)?;
        attach(stage.namespace(Place::B), Actor::User, OURS | SEVERAL)
    }));
    cases.push(user("local/tun/two-queues/killed".to_owned(), |stage| two_queues(stage, false)));
    cases.push(user("local/tun/two-queues/link-from-before/agent".to_owned(), |stage| {
        two_queues(stage, true)
    }));
    cases.push(user("local/state/read".to_owned(), |stage| {
        stage.require(Actor::User)?;
        let state = stage.mesh()?.a.state();
        reads(stage.namespace(Place::A), &state)
    }));
    cases.push(user("local/controller-state/read".to_owned(), |stage| {
        stage.require(Actor::User)?;
        let state = stage.mesh()?.controller().operator().state().to_owned();
        reads(stage.namespace(Place::Cp), &state)
    }));
    cases.push(user("local/control-socket/connect".to_owned(), |stage| {
        stage.require(Actor::User)?;
        stage.be(Condition::Running)?;
        let socket = stage.mesh()?.a.socket();
        Actor::User
            .run(stage.namespace(Place::A), || Ok(given(UnixStream::connect(&socket).is_ok())))
    }));
    cases.push(user("local/udp-port/share".to_owned(), |stage| {
        stage.require(Actor::User)?;
        stage.be(Condition::Running)?;
        Actor::User.run(stage.namespace(Place::A), share_port)
    }));
    cases.push(user("local/loose/state-directory".to_owned(), |stage| {
        let state = stage.mesh()?.a.state();
        loose(stage, &state, 0o755, 0o700)
    }));
    cases.push(user("local/loose/identity-key".to_owned(), |stage| {
        let key = stage.mesh()?.a.state().join("identity.key");
        loose(stage, &key, 0o644, 0o600)
    }));
    cases
}

/// Returns the outcome of a request for access.
fn given(is_given: bool) -> Outcome {
    if is_given { Outcome::Granted } else { Outcome::Refused }
}

/// Tries to attach to the TUN link. Opens `/dev/net/tun` before it drops the rights of root, as on
/// most machines, where every user may open the device.
fn attach(namespace: &Namespace, actor: Actor, flags: i32) -> anyhow::Result<Outcome> {
    namespace.run(|| {
        let file = open_tun()?;
        actor.assume()?;
        Ok(given(set_link(&file, flags).is_ok()))
    })
}

/// Opens the TUN device without a link.
fn open_tun() -> anyhow::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    file.context("cannot open /dev/net/tun")
}

/// Attaches the TUN device to the agent's link.
fn set_link(file: &File, flags: i32) -> std::io::Result<()> {
    // SAFETY: an `ifreq` is plain data; all zero is one of its values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(LINK.bytes()) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Creates the link again without an owner, as earlier versions left it. No agent has it open.
fn leave_from_before(namespace: &Namespace, flags: i32) -> anyhow::Result<()> {
    namespace.run(|| {
        Tampering::DeleteLink.apply()?;
        let file = open_tun()?;
        set_link(&file, flags).context("cannot create the TUN link")?;
        // SAFETY: TUNSETPERSIST takes its argument by value.
        let kept = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 1) };
        if kept == -1 {
            return Err(std::io::Error::last_os_error())
                .context("cannot make the TUN link persistent");
        }
        Ok(())
    })
}

/// Checks that `towline guard` sets an owner on a link that has none.
fn guarded_link(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    stage.require(Actor::User)?;
    stage.be(Condition::Killed)?;
    leave_from_before(stage.namespace(Place::A), OURS)?;
    // The guard process may keep running until an agent starts.
    let guard = stage.mesh()?.a.start(&["guard"])?;
    let refused = wait_up_to(GUARD_LIMIT, || {
        let outcome = attach(stage.namespace(Place::A), Actor::User, OURS)?;
        Ok((outcome == Outcome::Refused).then_some(()))
    })?;
    drop(guard);
    stage.be(Condition::Running)?;
    Ok(given(refused.is_none()))
}

/// Tries to attach another queue to a link with several queues: without an agent, or while an agent
/// runs that found the link without an owner (`from_before`).
fn two_queues(stage: &mut Stage<'_>, from_before: bool) -> anyhow::Result<Outcome> {
    stage.require(Actor::User)?;
    let flags = OURS | SEVERAL;
    stage.mesh()?.b.agent()?.kill()?;
    let attempt = |stage: &Stage<'_>| attach(stage.namespace(Place::B), Actor::User, flags);
    if from_before {
        let left = leave_from_before(stage.namespace(Place::B), flags);
        stage.restart_b()?;
        left?;
        attempt(stage)
    } else {
        let outcome = attempt(stage);
        stage.restart_b()?;
        outcome
    }
}

/// Returns whether a user may list this directory or read a file in it.
fn reads(namespace: &Namespace, directory: &Path) -> anyhow::Result<Outcome> {
    let mut inside = vec![directory.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(directory) = inside.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() { &mut inside } else { &mut files }.push(entry.path());
        }
    }
    anyhow::ensure!(!files.is_empty(), "{} is empty", directory.display());
    Actor::User.run(namespace, || {
        let lists = std::fs::read_dir(directory).is_ok();
        Ok(given(lists || files.iter().any(|file| File::open(file).is_ok())))
    })
}

/// Tries to bind the agent's UDP port, with every socket option that shares a port.
fn share_port() -> anyhow::Result<Outcome> {
    for address in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST, Ipv4Addr::new(203, 0, 113, 11)] {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        if socket.bind(&SocketAddr::from((address, WIREGUARD)).into()).is_ok() {
            return Ok(Outcome::Granted);
        }
    }
    Ok(Outcome::Refused)
}

/// Checks that an agent does not start while other users may read its secrets.
fn loose(stage: &mut Stage<'_>, path: &Path, loose: u32, tight: u32) -> anyhow::Result<Outcome> {
    stage.be(Condition::Killed)?;
    set_permissions(path, Permissions::from_mode(loose))?;
    let ended = ends(&mut stage.mesh()?.a);
    set_permissions(path, Permissions::from_mode(tight))?;
    if let Some(mut agent) = stage.mesh()?.a.take_agent() {
        agent.kill()?;
    }
    Ok(given(!ended?))
}

/// Returns whether an agent exits by itself after it is started. An agent that answers has started.
fn ends(node: &mut Node) -> anyhow::Result<bool> {
    node.launch()?;
    let ended = wait_up_to(GUARD_LIMIT, || {
        if node.agent()?.check().is_err() {
            return Ok(Some(true));
        }
        Ok(node.status().is_ok().then_some(false))
    })?;
    Ok(ended.unwrap_or(false))
}
