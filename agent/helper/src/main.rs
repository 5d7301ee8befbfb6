//! `towline-helper`: answers one request on the connection that systemd passes to it, and exits.
//!
//! `towline-helper PATH` listens at PATH itself, for machines without socket activation.

#![expect(clippy::print_stderr, reason = "diagnostics of the command line")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use towline_helper::protocol::Status;
use towline_helper::server::{Machine, serve, serve_all};

/// First descriptor that systemd passes to a service (sd_listen_fds(3)).
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

/// Answers the request on the connection that systemd passed.
fn answer() -> io::Result<()> {
    let of_us = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    if !of_us || std::env::var("LISTEN_FDS").as_deref() != Ok("1") {
        return Err(io::Error::other(
            "cannot answer a request: systemd passed no connection: start towline-helper.socket",
        ));
    }
    // SAFETY: the variables say that this descriptor belongs to this process, and nothing else here
    // has opened one.
    let connection = unsafe { OwnedFd::from_raw_fd(FIRST_DESCRIPTOR) };
    match serve(connection.as_fd(), &Machine::default())? {
        Status::Denied => Err(io::Error::other(
            "request denied: the client is neither root nor the user `towline`",
        )),
        Status::Malformed => Err(io::Error::other("request refused: the message is not a request")),
        // The agent reports an error of the system.
        Status::Done | Status::Failed => Ok(()),
    }
}

fn listen_at(path: &Path) -> io::Result<()> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Any user may connect. The peer's credentials decide whether it is served.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    listen(&listener, Backlog::new(16)?)?;
    serve_all(&listener, &Machine::default())
}
