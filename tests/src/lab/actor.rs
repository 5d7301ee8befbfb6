//! Threads with fewer rights than the lab: what a local user of a host can do.
//!
//! In Linux, credentials belong to a thread; only the C library applies them to the whole process.
//! So a thread drops its own credentials by system call, does its job and ends.

use std::io;

use serde::Serialize;

use super::namespace::Namespace;

/// The rights of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Actor {
    /// Root of the host.
    Root,
    /// User `nobody` without capabilities.
    User,
    /// User `nobody` with `CAP_NET_RAW` only, like a container in the host's network namespace.
    RawUser,
}

/// Id of the user and of the group `nobody`.
const NOBODY: libc::c_long = 65_534;
/// Version `_LINUX_CAPABILITY_VERSION_3` of `linux/capability.h`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// Capability `CAP_NET_RAW`, as a bit of the first word.
const NET_RAW: u32 = 1 << 13;

/// `struct __user_cap_header_struct` of `linux/capability.h`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    thread: i32,
}

/// `struct __user_cap_data_struct` of `linux/capability.h`, which holds 32 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWords {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

impl Actor {
    /// Runs `job` with these rights inside `namespace`, on a thread of its own.
    pub fn run<T: Send>(
        self,
        namespace: &Namespace,
        job: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        namespace.run(|| {
            self.assume()?;
            job()
        })
    }

    /// Gives the calling thread these rights until it ends. Needs root.
    ///
    /// # Errors
    /// If this process cannot become another user: in a user namespace only one user is mapped.
    pub fn assume(self) -> io::Result<()> {
        let capabilities = match self {
            Self::Root => return Ok(()),
            Self::User => 0,
            Self::RawUser => NET_RAW,
        };
        // SAFETY: these calls take numbers, and no memory.
        unsafe {
            check(libc::syscall(libc::SYS_setgroups, 0, 0))?;
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
            check(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY))?;
            check(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY))?;
        }
        let header = CapabilityHeader { version: CAPABILITY_VERSION, thread: 0 };
        let first =
            CapabilityWords { effective: capabilities, permitted: capabilities, inheritable: 0 };
        let words = [first, CapabilityWords::default()];
        // SAFETY: the header and two words are what this version of the call reads.
        check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) })
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
