//! The agent's side: sends requests to the helper and receives open descriptors.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    getsockopt, recvmsg, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use nix::unistd::geteuid;

use crate::protocol::{
    DESCRIPTORS, Installation, RESPONSE_BYTES, Request, Response, SOCKET, Status,
};

/// Environment variable with the path of the socket, for machines whose helper does not listen at
/// [`SOCKET`].
pub const SOCKET_VARIABLE: &str = "TOWLINE_HELPER_SOCKET";
/// Longest time to wait for a response, in seconds. The helper only opens files; starting it takes
/// most of the time.
const TIMEOUT_SECONDS: i64 = 5;

/// Sends a request to the helper of this machine. Returns the descriptors in the order of the
/// files of the request, with `None` for an absent file. Blocks for at most a few seconds.
///
/// # Errors
///
/// Returns an error of kind `NotConnected` if no helper listens, of kind `PermissionDenied` if it
/// denies this user, and otherwise the helper's error.
pub fn ask(request: Request) -> io::Result<Vec<Option<OwnedFd>>> {
    let path = std::env::var_os(SOCKET_VARIABLE).map_or_else(|| SOCKET.into(), PathBuf::from);
    ask_at(&path, request)
}

/// Sends a request to the helper that listens at `path`, like [`ask`].
///
/// # Errors
///
/// Returns the same errors as [`ask`].
pub fn ask_at(path: &Path, request: Request) -> io::Result<Vec<Option<OwnedFd>>> {
    let connection =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let timeout = TimeVal::new(TIMEOUT_SECONDS, 0);
    setsockopt(&connection, sockopt::ReceiveTimeout, &timeout)?;
    setsockopt(&connection, sockopt::SendTimeout, &timeout)?;
    // The kind `NotFound` is reserved for absent files, so that callers can distinguish the two.
    connect(connection.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| {
        let words = format!(
            "cannot connect to towline-helper at {}: {errno}: start towline-helper.socket",
            path.display()
        );
        io::Error::new(io::ErrorKind::NotConnected, words)
    })?;
    let server = getsockopt(&connection, sockopt::PeerCredentials)?.uid();
    if server != 0 && server != geteuid().as_raw() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "cannot trust {}: its server runs as uid {server}, not as root",
                path.display()
            ),
        ));
    }
    send(connection.as_raw_fd(), &request.encode(), MsgFlags::MSG_NOSIGNAL)?;
    let (response, descriptors) = receive(connection.as_fd())?;
    match response.status {
        Status::Done => Ok(in_place(response.present, descriptors)),
        Status::Failed => Err(io::Error::from_raw_os_error(response.errno)),
        Status::Denied => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "request denied by towline-helper: this user is neither root nor `towline`",
        )),
        Status::Malformed => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "request unknown to towline-helper: it has another version: install both from one release",
        )),
    }
}

/// Opens the current version of one of the kubelet's files.
///
/// # Errors
///
/// Returns an error of kind `NotFound` for a path that is not one of [`Installation::files`] and
/// for an absent file, and otherwise the same errors as [`ask`].
pub fn kubelet_file(path: &Path) -> io::Result<OwnedFd> {
    let installation = Installation::of(path).ok_or(io::ErrorKind::NotFound)?;
    let opened = ask(Request::Kubelet(installation))?;
    let files = installation.files().iter().zip(opened);
    let found = files
        .into_iter()
        .find_map(|(file, opened)| (path == Path::new(file)).then_some(opened).flatten());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Sends a request that has one descriptor, and returns that descriptor.
///
/// # Errors
///
/// Returns the same errors as [`ask`].
pub fn ask_for_one(request: Request) -> io::Result<OwnedFd> {
    ask(request)?.into_iter().flatten().next().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Receives a response and its descriptors. If they do not match, the descriptors are closed.
pub(crate) fn receive(connection: BorrowedFd<'_>) -> io::Result<(Response, Vec<OwnedFd>)> {
    let invalid =
        || io::Error::new(io::ErrorKind::InvalidData, "invalid response of towline-helper");
    let mut message = [0; RESPONSE_BYTES + 1];
    let mut control = nix::cmsg_space!([i32; DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(connection.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let length = received.bytes;
    let cut = received.flags.intersects(MsgFlags::MSG_CTRUNC | MsgFlags::MSG_TRUNC);
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just created these descriptors for this process, and nothing
            // else owns them.
            descriptors
                .extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let response = message.get(..length).and_then(Response::parse).ok_or_else(invalid)?;
    if cut || response.present.count_ones() as usize != descriptors.len() {
        return Err(invalid());
    }
    Ok((response, descriptors))
}

/// Places each descriptor at the index of its bit in `present`.
fn in_place(present: u8, descriptors: Vec<OwnedFd>) -> Vec<Option<OwnedFd>> {
    let mut descriptors = descriptors.into_iter();
    let bits = (0..DESCRIPTORS).map(|at| present & 1 << at != 0);
    bits.map(|present| if present { descriptors.next() } else { None }).collect()
}
