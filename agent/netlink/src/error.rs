//! Errors of netlink operations.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// Refusal of one request by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Error number.
    pub errno: Errno,
    /// Message of the kernel (extended acknowledgement), if it sent one.
    pub text: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{} ({})", text.trim_end_matches('.'), self.errno),
            None => f.write_str(self.errno.desc()),
        }
    }
}

/// Error of a netlink operation.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A system call on the socket failed.
    #[error("netlink socket: cannot {action}: {source}")]
    Socket {
        /// Action that failed, such as `open`; it completes "cannot ...".
        action: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("cannot {what}: {refusal}")]
    Refused {
        /// Request that was refused; it completes "cannot ...".
        what: String,
        /// Answer of the kernel.
        refusal: Refusal,
    },
    /// Answers were lost. The caller must read the state again to know what was changed. The text is
    /// the request, which completes "cannot ...".
    #[error("cannot {0}: the kernel's answers were lost: buffer overrun or timeout")]
    Overrun(String),
    /// No link has this name.
    #[error("there is no link {0}")]
    NoLink(String),
}

impl NetlinkError {
    /// Returns the error number of a refusal or of a failed system call.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { refusal, .. } => Some(refusal.errno),
            Self::Socket { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Overrun(_) | Self::NoLink(_) => None,
        }
    }
}
