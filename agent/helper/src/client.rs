//! The agent's side: asks the helper, and gets open descriptors.

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

/// Names another socket than the usual one, for machines whose helper listens elsewhere.
pub const SOCKET_VARIABLE: &str = "TOWLINE_HELPER_SOCKET";
/// Seconds that an answer may take. The helper only opens files; its start takes the most.
const PATIENCE_SECONDS: i64 = 5;

/// Asks the helper of this machine. Blocks for at most some seconds.
///
/// # Errors
///
/// Of kind `NotConnected` if there is no helper; `PermissionDenied` if it denies this user; otherwise
/// what kept the helper from doing it.
pub fn ask(request: Request) -> io::Result<Vec<Option<OwnedFd>>> {
    let path = std::env::var_os(SOCKET_VARIABLE).map_or_else(|| SOCKET.into(), PathBuf::from);
    ask_at(&path, request)
}

/// Asks the helper that listens at `path`.
///
/// # Errors
///
/// See [`ask`].
pub fn ask_at(path: &Path, request: Request) -> io::Result<Vec<Option<OwnedFd>>> {
    let connection =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::new(PATIENCE_SECONDS, 0);
    setsockopt(&connection, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(&connection, sockopt::SendTimeout, &patience)?;
    // `NotFound` is left to files: the kind tells the two apart.
    connect(connection.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| {
        let words = format!("towline-helper does not listen at {}: {errno}", path.display());
        io::Error::new(io::ErrorKind::NotConnected, words)
    })?;
    let server = getsockopt(&connection, sockopt::PeerCredentials)?.uid();
    if server != 0 && server != geteuid().as_raw() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} is served by uid {server}, not by root", path.display()),
        ));
    }
    send(connection.as_raw_fd(), &request.encode(), MsgFlags::MSG_NOSIGNAL)?;
    let (response, descriptors) = receive(connection.as_fd())?;
    match response.status {
        Status::Done => Ok(in_place(response.present, descriptors)),
        Status::Failed => Err(io::Error::from_raw_os_error(response.errno)),
        Status::Denied => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "towline-helper serves root and the user `towline` alone",
        )),
        Status::Malformed => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "towline-helper does not know this request: it is of another version",
        )),
    }
}

/// Opens one of the kubelet's files as it is now.
///
/// # Errors
///
/// Of kind `NotFound` for a path that is not one of [`Installation::files`], and for a file that is
/// absent; else see [`ask`].
pub fn kubelet_file(path: &Path) -> io::Result<OwnedFd> {
    let installation = Installation::of(path).ok_or(io::ErrorKind::NotFound)?;
    let opened = ask(Request::Kubelet(installation))?;
    let files = installation.files().iter().zip(opened);
    let found = files
        .into_iter()
        .find_map(|(file, opened)| (path == Path::new(file)).then_some(opened).flatten());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Asks for the one descriptor of a request that has one.
///
/// # Errors
///
/// See [`ask`].
pub fn ask_for_one(request: Request) -> io::Result<OwnedFd> {
    ask(request)?.into_iter().flatten().next().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Receives a response. Descriptors that do not belong to it are closed.
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
            // SAFETY: the kernel has just made these for us; nobody else knows them.
            descriptors
                .extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let response = Response::parse(&message[..length.min(message.len())]).ok_or_else(invalid)?;
    if cut || response.present.count_ones() as usize != descriptors.len() {
        return Err(invalid());
    }
    Ok((response, descriptors))
}

/// Puts each descriptor in the place of its bit.
fn in_place(present: u8, descriptors: Vec<OwnedFd>) -> Vec<Option<OwnedFd>> {
    let mut descriptors = descriptors.into_iter();
    let bits = (0..DESCRIPTORS).map(|at| present & 1 << at != 0);
    bits.map(|present| if present { descriptors.next() } else { None }).collect()
}
