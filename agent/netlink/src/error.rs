//! What goes wrong between us and the kernel.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// The kernel's refusal of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub errno: Errno,
    /// The kernel's own words (extended acknowledgement), where it has any.
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

/// Why a netlink operation failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket itself.
    #[error("netlink socket: cannot {action}: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {what}: {refusal}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why not.
        refusal: Refusal,
    },
    /// Answers were lost: what was done is known only after reading it again.
    #[error("the kernel dropped answers for want of buffer space while asked to {0}")]
    Overrun(String),
    /// A link that was named does not exist.
    #[error("there is no link {0}")]
    NoLink(String),
}

impl NetlinkError {
    /// The kernel's error number, if it refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { refusal, .. } => Some(refusal.errno),
            Self::Socket { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Overrun(_) | Self::NoLink(_) => None,
        }
    }
}
