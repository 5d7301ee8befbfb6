//! Errors of the store in etcd, each in one line that says what to do, and what the status of a call means.

use std::error::Error as _;
use std::path::PathBuf;

use tonic::{Code, Status};
use towline_service::{grpc, output};

use crate::entropy::NoEntropy;

/// Error of the store in etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// A member cannot be reached, or ended the connection.
    #[error("cannot reach etcd at {endpoint}: {why}: start it, or correct `store`")]
    Unreachable {
        /// Address of the member.
        endpoint: String,
        /// Description of the error.
        why: String,
    },
    /// A member did not answer in time.
    #[error(
        "etcd at {endpoint} is slow: no answer within {seconds} s: check its disk and the network"
    )]
    Slow {
        /// Address of the member.
        endpoint: String,
        /// Time that was waited, in seconds.
        seconds: u64,
    },
    /// The cluster has no quorum.
    #[error("etcd at {endpoint} cannot decide: {why}: start the members that are missing")]
    NoQuorum {
        /// Address of the member.
        endpoint: String,
        /// Message of etcd.
        why: String,
    },
    /// The quota of the database is used up. etcd refuses writes until an operator acts.
    #[error(
        "etcd is full: {0}: compact and defragment it, then run `etcdctl alarm disarm`; a larger \
         --quota-backend-bytes helps too"
    )]
    Full(String),
    /// The members of the cluster disagree about their data.
    #[error("etcd is corrupt: {0}: replace the damaged member, then run `etcdctl alarm disarm`")]
    Corrupt(String),
    /// The user may not read or write the keys.
    #[error(
        "etcd refuses the user {user}: {why}: grant it read and write of the keys that begin with \
         `{prefix}`"
    )]
    Denied {
        /// Name of the user, quoted, or `without a name`.
        user: String,
        /// Message of etcd.
        why: String,
        /// Prefix of the keys.
        prefix: String,
    },
    /// etcd refuses the name or the password.
    #[error("cannot log in to etcd: {0}: correct `user` and `password_file` in [etcd]")]
    Login(String),
    /// The TLS handshake failed.
    #[error(
        "cannot connect to etcd at {endpoint}: {why}: correct `ca`, `certificate` and `key` in [etcd]"
    )]
    Certificate {
        /// Address of the member.
        endpoint: String,
        /// Description of the error.
        why: String,
    },
    /// A file that the configuration names cannot be used.
    #[error("cannot use {path}: {why}: correct it in [etcd]")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Description of the error.
        why: String,
    },
    /// A revision that was being read was compacted.
    #[error("etcd was compacted while it was read: try again, or keep more of its history")]
    Compacted,
    /// etcd has an older state than this process has seen in it.
    #[error(
        "etcd went back from sequence {had} to {found}: it was restored from a snapshot: restart the \
         controller"
    )]
    WentBack {
        /// Sequence number that this process has seen.
        had: u64,
        /// Sequence number of the store now.
        found: u64,
    },
    /// The store has another mesh.
    #[error(
        "{store} has the mesh {found}, but ca.crt is of the mesh {ours}: give every controller of a mesh \
         the same ca.key and ca.crt, or name another prefix in `store`"
    )]
    OtherMesh {
        /// URL of the store.
        store: String,
        /// Id of its mesh.
        found: String,
        /// Id of the mesh of this controller's CA.
        ours: String,
    },
    /// The store has the mesh of another CA with the same mesh id.
    #[error(
        "{store} was written with the CA {found}, but ca.crt is {ours}: give every controller of a mesh \
         the same ca.key and ca.crt"
    )]
    OtherAuthority {
        /// URL of the store.
        store: String,
        /// Fingerprint of the CA that the store was written with.
        found: String,
        /// Fingerprint of this controller's CA.
        ours: String,
    },
    /// Another controller uses the store.
    #[error("{store} is in use by the controller {holder}: stop it, or wait until its lease ends")]
    InUse {
        /// URL of the store.
        store: String,
        /// Name of the other controller.
        holder: String,
    },
    /// The lease of this controller ended, because it did not reach etcd in time.
    #[error("this controller's lease of the store ended: try again")]
    LeaseEnded,
    /// The store has no mesh.
    #[error(
        "{0} has no mesh: a mesh was set up before: restore etcd from a snapshot, or import a backup with \
         `towline-controller store import`"
    )]
    Empty(String),
    /// The store has a mesh already.
    #[error("{0} has a mesh: name another prefix in `store`, or remove its keys")]
    NotEmpty(String),
    /// A key has an invalid value.
    #[error("{store} is damaged: its key `{key}` {why}: restore etcd from a snapshot")]
    Damaged {
        /// URL of the store.
        store: String,
        /// Key with the invalid value.
        key: String,
        /// Description of the damage.
        why: String,
    },
    /// The store was written by a newer controller.
    #[error(
        "cannot read {store}: unsupported format {found}, not {known}: run the version of the controller \
         that wrote it"
    )]
    Format {
        /// URL of the store.
        store: String,
        /// Format of the store.
        found: u64,
        /// Newest format that this version knows.
        known: u64,
    },
    /// A change is larger than etcd accepts.
    #[error("cannot write {what}: {bytes} bytes are more than the {most} that fit into etcd")]
    TooLarge {
        /// Name of the record or of the change.
        what: String,
        /// Size in bytes.
        bytes: usize,
        /// Largest size in bytes.
        most: usize,
    },
    /// The store was changed by another process while it was used.
    #[error("another process changed {0} at the same time: try again")]
    Changed(String),
    /// etcd refused a request for a reason that has no variant here.
    #[error("etcd refused a request: {0}")]
    Refused(String),
    /// The thread that talks to etcd ended, or cannot be started.
    #[error("the thread for etcd ended: {0}")]
    Ended(String),
    /// The operating system provides no random bytes.
    #[error(transparent)]
    Entropy(#[from] NoEntropy),
}

/// What the status of a failed call means.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Another member may answer.
    Elsewhere(EtcdError),
    /// The token of the login is not valid any more: log in again.
    LogIn(EtcdError),
    /// No member will answer.
    Refused(EtcdError),
}

/// Caller of etcd, for messages.
pub(super) struct Caller<'a> {
    /// Address of the member.
    pub(super) endpoint: &'a str,
    /// Name of the user, if the controller logs in.
    pub(super) user: Option<&'a str>,
    /// Prefix of the keys.
    pub(super) prefix: &'a str,
}

/// Returns what the status of a failed call means. The words are those of etcd 3.4 and later.
pub(super) fn verdict(status: &Status, caller: &Caller<'_>) -> Verdict {
    let why = grpc::message(status);
    let why = why.strip_prefix("etcdserver: ").unwrap_or(&why).to_owned();
    let says = |words: &str| status.message().contains(words);
    let endpoint = || caller.endpoint.to_owned();
    match status.code() {
        Code::ResourceExhausted if says("database space exceeded") => {
            Verdict::Refused(EtcdError::Full(why))
        }
        Code::DataLoss => Verdict::Refused(EtcdError::Corrupt(why)),
        Code::OutOfRange if says("has been compacted") => Verdict::Refused(EtcdError::Compacted),
        Code::PermissionDenied => {
            let user = caller.user.map_or("without a name".to_owned(), |user| format!("`{user}`"));
            let prefix = caller.prefix.to_owned();
            Verdict::Refused(EtcdError::Denied { user, why, prefix })
        }
        Code::Unauthenticated => Verdict::LogIn(EtcdError::Login(why)),
        Code::InvalidArgument if says("revision of auth store is old") => {
            Verdict::LogIn(EtcdError::Login(why))
        }
        Code::InvalidArgument if says("user name is empty") || says("authentication failed") => {
            Verdict::Refused(EtcdError::Login(why))
        }
        Code::FailedPrecondition if says("authentication is not enabled") => {
            Verdict::Refused(EtcdError::Login(why))
        }
        Code::Unavailable if says("etcdserver: ") => {
            Verdict::Elsewhere(EtcdError::NoQuorum { endpoint: endpoint(), why })
        }
        Code::DeadlineExceeded | Code::ResourceExhausted if says("etcdserver: ") => {
            Verdict::Elsewhere(EtcdError::Refused(why))
        }
        // The connection ended. A server that refuses our certificate in TLS 1.3 says so only then.
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => {
            let why = match status.source() {
                Some(source) => output::error_line(source),
                None => why,
            };
            Verdict::Elsewhere(if why.contains("alert") {
                EtcdError::Certificate { endpoint: endpoint(), why }
            } else {
                EtcdError::Unreachable { endpoint: endpoint(), why }
            })
        }
        _ => Verdict::Refused(EtcdError::Refused(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(status: &Status) -> (&'static str, String) {
        let caller = Caller { endpoint: "a:2379", user: Some("towline"), prefix: "/towline/" };
        let (kind, error) = match verdict(status, &caller) {
            Verdict::Elsewhere(error) => ("elsewhere", error),
            Verdict::LogIn(error) => ("log in", error),
            Verdict::Refused(error) => ("refused", error),
        };
        (kind, error.to_string())
    }

    #[test]
    fn what_etcd_says_becomes_one_line_that_says_what_to_do() {
        let cases = [
            (
                Status::resource_exhausted("etcdserver: mvcc: database space exceeded"),
                "refused",
                "etcd is full: mvcc: database space exceeded: compact",
            ),
            (
                Status::out_of_range("etcdserver: mvcc: required revision has been compacted"),
                "refused",
                "compacted while it was read",
            ),
            (
                Status::permission_denied("etcdserver: permission denied"),
                "refused",
                "the user `towline`: permission denied: grant it read and write of the keys that begin \
                 with `/towline/`",
            ),
            (Status::unauthenticated("etcdserver: invalid auth token"), "log in", "cannot log in"),
            (
                Status::invalid_argument("etcdserver: user name is empty"),
                "refused",
                "cannot log in to etcd: user name is empty: correct `user`",
            ),
            (
                Status::unavailable("etcdserver: request timed out"),
                "elsewhere",
                "etcd at a:2379 cannot decide: request timed out: start the members",
            ),
            (Status::unavailable("tcp closed"), "elsewhere", "cannot reach etcd at a:2379"),
            (
                Status::unavailable("received fatal alert: CertificateRequired"),
                "elsewhere",
                "CertificateRequired: correct `ca`, `certificate` and `key`",
            ),
            (
                Status::invalid_argument("etcdserver: request is too large"),
                "refused",
                "etcd refused a request: request is too large",
            ),
        ];
        for (status, kind, words) in cases {
            let (found, line) = line(&status);
            assert_eq!(found, kind, "{line}");
            assert!(line.contains(words), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
