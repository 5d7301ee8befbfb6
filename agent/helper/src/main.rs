//! `towline-helper`: answers one request on the connection that systemd passes on, and ends.
//!
//! `towline-helper PATH` listens at PATH itself, for machines without socket activation.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use towline_helper::protocol::Status;
use towline_helper::server::{Machine, serve, serve_all};

/// sd_listen_fds(3): the first descriptor that is passed on.
const FIRST_DESCRIPTOR: i32 = 3;

fn main() -> ExitCode {
    let _ = nix::sys::prctl::set_dumpable(false);
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let ended = match &arguments[..] {
        [] => answer(),
        [path] if !path.as_encoded_bytes().starts_with(b"-") => listen_at(Path::new(path)),
        _ => {
            eprintln!(
                "usage: towline-helper [SOCKET]; without SOCKET, systemd passes a connection"
            );
            return ExitCode::from(2);
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("towline-helper: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers the request of the connection that was passed on.
fn answer() -> io::Result<()> {
    let of_us = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    if !of_us || std::env::var("LISTEN_FDS").as_deref() != Ok("1") {
        return Err(io::Error::other("no connection was passed on: start towline-helper.socket"));
    }
    // SAFETY: the variables say that this descriptor is ours; nothing else here has opened one.
    let connection = unsafe { OwnedFd::from_raw_fd(FIRST_DESCRIPTOR) };
    match serve(connection.as_fd(), &Machine::default())? {
        Status::Denied => Err(io::Error::other("denied: neither root nor the user `towline`")),
        Status::Malformed => Err(io::Error::other("the message was no request")),
        // What the system refused is for the agent to say.
        Status::Done | Status::Failed => Ok(()),
    }
}

fn listen_at(path: &Path) -> io::Result<()> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Everybody may connect; who may ask is decided by the peer's credentials.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    listen(&listener, Backlog::new(16)?)?;
    serve_all(&listener, &Machine::default())
}
