//! Why a handshake message is not used.

use crate::Refusal;

/// Reason why a handshake message is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invalid {
    /// Wrong length, type or reserved bytes.
    Malformed,
    /// The first MAC is wrong.
    WrongMac,
    /// What is encrypted is not authentic, or is of another peer.
    NotAuthentic,
    /// A public key gives a shared secret of zeros.
    WeakKey,
    /// The message does not answer the last one of this node.
    Unexpected,
}

impl From<Invalid> for Refusal {
    fn from(invalid: Invalid) -> Self {
        match invalid {
            Invalid::Malformed => Self::Malformed,
            Invalid::WrongMac => Self::WrongMac,
            Invalid::NotAuthentic | Invalid::WeakKey | Invalid::Unexpected => {
                Self::InvalidHandshake
            }
        }
    }
}
