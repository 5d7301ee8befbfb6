//! Runs a test of `cargo test` inside namespaces: the test program is started again, for that one
//! test, as root of a user namespace.
//!
//! A test program has several threads from the start, so it cannot enter a user namespace itself.

#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::unistd::{getegid, geteuid};

use super::privilege::{Rank, enter_user_namespace, usable};
use super::report::Forbidden;

const INSIDE: &str = "TOWLINE_LAB_INSIDE";

/// Runs `body` as root of a user namespace. If this machine forbids namespaces, prints the reason
/// and runs nothing. `test` is the path of the calling test, without the crate's name.
///
/// # Panics
/// If the test fails inside the namespace.
pub fn netns_exec(test: &str, body: impl FnOnce(Rank)) {
    if std::env::var_os(INSIDE).is_some() {
        match usable() {
            Ok(()) => body(Rank::Rootless),
            Err(forbidden) => skip(&forbidden),
        }
        return;
    }
    let started = std::env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.args([test, "--exact", "--nocapture", "--include-ignored"]).env(INSIDE, "1");
        command.stdin(Stdio::null());
        let (uid, gid) = (geteuid(), getegid());
        // SAFETY: between fork and exec the child makes system calls, and allocations that glibc
        // and musl allow there.
        unsafe { command.pre_exec(move || enter_user_namespace(uid, gid)) };
        command.output()
    });
    match started {
        Err(error) => skip(&super::privilege::refused(&format!("no user namespace: {error}"))),
        Ok(output) => {
            let stdout = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            print!("{stdout}");
            assert!(
                output.status.success(),
                "the test failed in the namespace:\n{stdout}\n{errors}"
            );
            assert!(stdout.contains("1 passed"), "no test is named `{test}`");
        }
    }
}

fn skip(forbidden: &Forbidden) {
    println!("skipped: {forbidden}");
}
