//! What a process that holds keys gives up at its start.

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Makes sure that no copy of this process's memory reaches a disk or another process of the same
/// user: no core dump, no `ptrace`, no reading of `/proc/PID/mem`.
///
/// The files of `/proc/PID` then belong to root. A process can still use those of `/proc/self`
/// that it needs, such as `exe` and `fd`. Children that execute another program are not affected
/// by the first of both measures.
pub fn forbid_dumps() {
    // Neither can fail for a process that only takes from itself. A sandbox that answers EPERM to
    // `setrlimit` has set the limit already (`LimitCORE=0`).
    let _ = prctl::set_dumpable(false);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::getrlimit;

    #[test]
    fn a_process_that_forbids_dumps_has_none() {
        forbid_dumps();
        assert_eq!(prctl::get_dumpable(), Ok(false));
        assert_eq!(getrlimit(Resource::RLIMIT_CORE), Ok((0, 0)));
        std::env::current_exe().expect("a process still finds its own program");
    }
}
