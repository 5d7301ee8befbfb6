//! Helpers for tests that need their own network. Each test runs in its own process, in a new user
//! and network namespace, so it needs no root and does not touch the machine's network.

#![expect(clippy::print_stdout, reason = "says why a test is skipped")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};

use towline_netlink::{Rtnetlink, VethPeer};

/// Defines a test whose body runs as root in a new network namespace. If the machine does not
/// permit that, the test prints the reason and is skipped.
#[macro_export]
macro_rules! namespace_test {
    ($(#[$meta:meta])* fn $name:ident() $body:block) => {
        $(#[$meta])*
        #[test]
        fn $name() {
            $crate::in_namespace(
                concat!(module_path!(), "::", stringify!($name)),
                || $body,
            );
        }
    };
}

/// Defines a test like [`namespace_test`] that needs other users than root: only the network
/// namespace is new. If the tests do not run as root, the test prints the reason and is skipped.
#[macro_export]
macro_rules! root_namespace_test {
    (fn $name:ident() $body:block) => {
        #[test]
        fn $name() {
            $crate::in_namespace_of_root(concat!(module_path!(), "::", stringify!($name)), || {
                $body
            });
        }
    };
}

/// Environment variable that marks the process inside the namespace.
const INSIDE: &str = "TOWLINE_TEST_NAMESPACE";

/// Runs `body` inside new user and network namespaces, by starting the test's own program there for
/// this one test. `path` is the path of the test including the crate's name.
pub fn in_namespace(path: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    run_again(path, enter_new_namespace);
}

/// Runs `body` inside a new network namespace, in the current user namespace.
pub fn in_namespace_of_root(path: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: not root");
    }
    run_again(path, |_, _| Ok(unshare(CloneFlags::CLONE_NEWNET)?));
}

fn run_again(path: &str, enter: impl Fn(&str, &str) -> io::Result<()> + Send + Sync + 'static) {
    let (_, test) = path.split_once("::").expect("a path inside the crate");
    let mut command = Command::new(std::env::current_exe().expect("the test's own program"));
    command.args([test, "--exact", "--nocapture", "--include-ignored"]).env(INSIDE, "1");
    let uid_map = format!("0 {} 1", nix::unistd::geteuid());
    let gid_map = format!("0 {} 1", nix::unistd::getegid());
    // SAFETY: between fork and exec the closure only makes system calls. Its strings are allocated
    // before, and paths this short stay on the stack, so no lock of the allocator is needed.
    unsafe {
        command.pre_exec(move || enter(&uid_map, &gid_map));
    }
    match command.output() {
        Err(error) => println!("skipped: cannot create user and network namespaces: {error}"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            print!("{text}");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "in the namespace: {errors}");
            assert!(text.contains("1 passed"), "{test} is not the name of the test");
        }
    }
}

fn enter_new_namespace(uid_map: &str, gid_map: &str) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", uid_map)?;
    std::fs::write("/proc/self/gid_map", gid_map)
}

/// Additional network namespace of the running test.
#[derive(Debug)]
pub struct NetworkNamespace {
    handle: File,
}

impl Default for NetworkNamespace {
    fn default() -> Self {
        Self::new()
    }
}

impl NetworkNamespace {
    /// Creates a network namespace whose loopback is down.
    pub fn new() -> Self {
        let handle = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            File::open("/proc/thread-self/ns/net").expect("the namespace's file")
        });
        Self { handle: handle.join().expect("the thread ends") }
    }

    /// Runs `body` on a thread inside the namespace.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.handle, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                body()
            });
            thread.join().expect("the thread ends")
        })
    }

    /// Returns the descriptor of the namespace, for netlink requests.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// Adds a veth link with this name, with its peer in the same namespace, and sets both up. Returns
/// the index of the link.
pub fn add_link(name: &str) -> u32 {
    let mut rtnetlink = Rtnetlink::open().expect("a netlink socket");
    let peer = format!("{name}p");
    rtnetlink.add_veth(name, VethPeer { name: &peer, namespace: None }).expect("a veth pair");
    for end in [name, &peer] {
        let index = rtnetlink.link_index(end).expect("the link");
        rtnetlink.set_up(index, true).expect("the link comes up");
    }
    rtnetlink.link_index(name).expect("the link")
}

/// Adds a persistent TUN link with this name and without an owner, as earlier versions did. If TUN
/// devices cannot be opened, prints the reason and returns `false`.
pub fn add_unowned_tun(name: &str) -> bool {
    let device = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: /dev/net/tun: {error}");
            return false;
        }
    };
    // SAFETY: `ifreq` is plain data, and all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as _;
    let fd = device.as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is; TUNSETPERSIST takes its
    // argument by value.
    let made = unsafe {
        libc::ioctl(fd, libc::TUNSETIFF as _, &raw mut request) == 0
            && libc::ioctl(fd, libc::TUNSETPERSIST as _, 1) == 0
    };
    assert!(made, "cannot create a TUN link: {}", io::Error::last_os_error());
    true
}
